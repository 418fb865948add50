"""Layer calls with everything that torch.nn lacks, for the backends: one table of options, and random operands."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from rnnkern.backends import Extras, Layer
from rnnkern.cells import CELLS, Weights, weight_names
from rnnkern.packing import positions, sort_lengths
from tests import host

host.register()


@dataclass(frozen=True)
class Optional:
    """A layer's call by what it asks for. Sizes are odd, so that no vector or tile is full."""

    cell: str = "lstm"
    T: int = 5
    B: int = 5
    I: int = 3  # noqa: E741
    H: int = 7
    dtype: torch.dtype = torch.float64
    directions: int = 1
    rows: str = "padded"  # or packed, lengths
    bias: bool = True
    proj_size: int = 0
    peephole: bool = False
    layer_norm: bool = False
    input_mask: bool = False
    recurrent_mask: bool = False
    zoneout: str = ""  # or masks, shares
    reset: str = ""  # or zeros, states (one for all steps), steps (one for each)
    states: bool = False
    recompute: bool = False
    seed: int = 0

    def why_not(self) -> str | None:
        """What has no meaning here."""
        spec = CELLS[self.cell]
        if (self.proj_size or self.peephole) and self.cell != "lstm":
            return "only an LSTM has a projection or peepholes"
        if self.layer_norm and spec.resets_before:
            return "LayerNorm of a product in two parts is not defined"
        if self.recompute and not spec.saved:
            return "a plain RNN keeps only h anyway"
        if self.reset and (self.directions == 2 or self.rows == "packed"):
            return "a reset has one direction and padded rows"
        if self.states and not spec.has_c:
            return "every h is in the output"
        return None

    def layer(self) -> Layer:
        """The call."""
        generator = torch.Generator().manual_seed(self.seed)
        spec, outputs, directions = CELLS[self.cell], self.proj_size or self.H, self.directions

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(self.dtype)

        def chance(share: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) < share

        recurrent = len(spec.gates) * self.H
        shapes = {
            "weight_ih": (recurrent, self.I), "weight_hh": (recurrent, outputs), "bias_ih": (recurrent,),
            "bias_hh": (recurrent,), "weight_hr": (outputs, self.H), "weight_ch": (3 * self.H,),
            "ln_ih_weight": (recurrent,), "ln_ih_bias": (recurrent,), "ln_hh_weight": (recurrent,),
            "ln_hh_bias": (recurrent,), "ln_c_weight": (self.H,), "ln_c_bias": (self.H,),
        }  # fmt: skip
        names = weight_names(spec, self.bias, bool(self.proj_size), self.peephole, self.layer_norm)
        weights = tuple(
            Weights(**{name: draw(*shapes[name]) / sqrt(self.H) + name.startswith("ln") * 0.5 for name in names})
            for _ in range(directions)
        )
        order, batch_sizes, x = None, None, draw(self.T, self.B, self.I)
        lengths = torch.tensor([1 + (b * 5 + self.T - 1) % self.T for b in range(self.B)])
        if self.rows != "padded":
            order, batch_sizes = sort_lengths(lengths, self.T)
        if self.rows == "packed":
            assert order is not None
            assert batch_sizes is not None
            step, b = positions(batch_sizes)
            x, order = x[step, order[b]], None
        lead = x.shape[:-1]
        masks = self.zoneout == "masks"
        state_rows = (self.T, self.B) if self.reset == "steps" else (self.B,)
        given = self.reset in ("states", "steps")
        extras = Extras(
            chance(0.7, directions, self.B, self.I).to(self.dtype) / 0.7 if self.input_mask else None,
            chance(0.7, directions, self.B, outputs).to(self.dtype) / 0.7 if self.recurrent_mask else None,
            chance(0.3, *lead, directions * outputs) if masks else None,
            chance(0.4, *lead, directions * self.H) if masks and spec.has_c else None,
            chance(0.3, self.T, self.B) if self.reset else None,
            draw(*state_rows, outputs) if given else None,
            draw(*state_rows, self.H) if given and spec.has_c else None,
            zoneout_h=0.3 if self.zoneout == "shares" else 0.0,
            zoneout_c=0.2 if self.zoneout == "shares" and spec.has_c else 0.0,
            recompute=self.recompute,
            states=self.states,
        )
        h0, c0 = draw(directions, self.B, outputs), draw(directions, self.B, self.H) if spec.has_c else None
        return Layer(spec, x, h0, c0, weights, batch_sizes, order, False, extras=extras)


def mapped(layer: Layer, change: Callable[[Tensor], Tensor]) -> Layer:
    """The layer with each tensor put through `change`, but for what is on the CPU always."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    return layer._replace(
        **{name: changed(getattr(layer, name)) for name in ("x", "h0", "c0", "lengths")},
        weights=tuple(w.map(change) for w in layer.weights),
        extras=layer.extras._replace(**{name: changed(value) for name, value in layer.extras._asdict().items()}),
    )


def in_double(layer: Layer) -> Layer:
    """The same values in float64."""
    return mapped(layer, lambda t: t.double() if t.is_floating_point() else t)


# Each is a departure from the defaults of `Optional`.
OPTIONS: dict[str, dict[str, Any]] = {
    "bidirectional": {"directions": 2},
    "packed": {"rows": "packed"},
    "lengths": {"rows": "lengths"},
    "no_bias": {"bias": False},
    "projection": {"proj_size": 3},
    "peephole": {"peephole": True},
    "layer_norm": {"layer_norm": True},
    "input_dropout": {"input_mask": True},
    "recurrent_dropout": {"recurrent_mask": True},
    "zoneout": {"zoneout": "masks"},
    "zoneout_eval": {"zoneout": "shares"},
    "reset": {"reset": "zeros"},
    "reset_to": {"reset": "states"},
    "reset_to_steps": {"reset": "steps"},
    "states": {"states": True},
    "recompute": {"recompute": True},
}


def optional_cases(most: int = 2) -> Iterator[tuple[str, Optional]]:
    """Every cell with each set of up to `most` options that can go together, by name."""
    for cell in CELLS:
        for size in range(most + 1):
            for names in combinations(OPTIONS, size):
                changes = [OPTIONS[name] for name in names]
                keys = [key for change in changes for key in change]
                if len(keys) > len(set(keys)):
                    continue
                case = replace(Optional(cell), **{k: v for change in changes for k, v in change.items()})
                if case.why_not() is None:
                    yield "-".join((cell, *names)), case


# Everything at once, as far as it goes together.
FULL: dict[str, Optional] = {
    f"{cell}-{rows}-{zoneout}": Optional(
        cell, rows=rows, zoneout=zoneout, input_mask=True, recurrent_mask=True,
        layer_norm=not CELLS[cell].resets_before, peephole=cell == "lstm", proj_size=3 if cell == "lstm" else 0,
        reset="steps" if rows == "lengths" else "", directions=1 if rows == "lengths" else 2,
        states=CELLS[cell].has_c, recompute=bool(CELLS[cell].saved) and zoneout == "masks",
    )
    for cell in CELLS
    for rows in ("padded", "packed", "lengths")
    for zoneout in ("masks", "shares")
}  # fmt: skip

# The backends whose modules are tested with every option.
OPTION_BACKENDS = ("numba", "reference", "host")
