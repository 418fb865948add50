"""Modules with everything that torch.nn lacks: the table of options as a user writes them, what is drawn for a call,
and the equations once more, step by step, in plain torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

import rnnkern
from rnnkern import masks
from rnnkern.masks import Masks
from rnnkern.options import MEANT_FOR

I, H = 3, 5  # noqa: E741

# Each as an argument of a module.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "input_dropout": {"input_dropout": 0.4},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "weight_dropout": {"weight_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "zoneout_pair": {"zoneout": (0.0, 0.4)},
    "layer_norm": {"layer_norm": True},
    "peephole": {"peephole": True},
    "reset_before": {"reset_after": False},
    "recompute": {"recompute": True},
    "projection": {"proj_size": 2},
}
LSTM_ONLY = ("zoneout_pair", "projection")


def goes_with(kind: str, arguments: dict[str, Any]) -> bool:
    """Whether the arguments mean something for a kind of module."""
    if arguments.get("layer_norm") and "reset_after" in arguments:
        return False
    if kind != "LSTM" and ("proj_size" in arguments or isinstance(arguments.get("zoneout"), tuple)):
        return False
    return all(kind in MEANT_FOR[name][0] for name in arguments if name in MEANT_FOR)


def option_cases(most: int = 1) -> dict[str, tuple[str, dict[str, Any]]]:
    """Each kind of module with each set of up to `most` options that can go together, by name."""
    found = {}
    for kind in ("LSTM", "GRU", "RNN"):
        for size in range(1, most + 1):
            for names in combinations(ARGUMENTS, size):
                keys = [key for name in names for key in ARGUMENTS[name]]
                arguments = {key: value for name in names for key, value in ARGUMENTS[name].items()}
                if len(keys) == len(arguments) and goes_with(kind, arguments):
                    found["-".join((kind, *names))] = (kind, arguments)
    return found


def make(kind: str, backend: Any = "reference", dtype: Any = torch.float64, **arguments: Any) -> Any:
    """A module with weights that are all away from where they start."""
    module = getattr(rnnkern, kind)(I, H, dtype=dtype, backend=backend, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def start(kind: str, *shape: int, units: tuple[int, int] = (H, H)) -> Any:
    """Random states (*shape, units) in the form that the kind of module takes."""
    return (random(*shape, units[0]), random(*shape, units[1])) if kind == "LSTM" else random(*shape, units[0])


def flat(results: Any) -> list[Tensor]:
    """All tensors of nested tuples."""
    return [results] if isinstance(results, Tensor) else [t for part in results for t in flat(part)]


def gradients(results: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Those of the leaves, from different ones of everything in the results."""
    total = torch.stack([(r * torch.linspace(-1, 2, r.numel()).view(r.shape)).sum() for r in flat(results)]).sum()
    found: Any = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def assert_same(found: Any, expected: Any) -> None:
    """Two results in float64, to its precision."""
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-10, atol=1e-12)


@contextmanager
def what_is_drawn() -> Iterator[list[Masks]]:
    """The masks of every layer called, in order."""
    drawn: list[Masks] = []
    draw = masks.draw

    def spy(*args: Any) -> Masks:
        drawn.append(draw(*args))
        return drawn[-1]

    with mock.patch.object(masks, "draw", spy):
        yield drawn


def _step(module: nn.Module, x: Tensor, h: Tensor, c: Any, u: Tensor, zone_c: Any) -> tuple[Tensor, Any]:
    """h before any zoneout, and c after it; zone_c is 1 where c keeps its old value."""
    w = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}

    def norm(value: Tensor, of: str) -> Tensor:
        if f"ln_{of}_weight" not in w:
            return value
        return layer_norm(value, value.shape[-1:], w[f"ln_{of}_weight"], w[f"ln_{of}_bias"])

    gx = norm(linear(x, w["weight_ih"]), "ih") + w["bias_ih"]
    gh = norm(linear(u, w["weight_hh"]), "hh") + w["bias_hh"]
    if isinstance(module, rnnkern.LSTM):
        i, f, g, o = (gx + gh).chunk(4, -1)
        p_i, p_f, p_o = w.get("weight_ch", gx.new_zeros(3 * module.hidden_size)).chunk(3)
        v = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
        c = zone_c * c + (1 - zone_c) * v
        m = (o + p_o * c).sigmoid() * norm(v, "c").tanh()
        return linear(m, w["weight_hr"]) if "weight_hr" in w else m, c
    if isinstance(module, rnnkern.GRU):
        (r_x, z_x, n_x), (r_h, z_h, n_h) = gx.chunk(3, -1), gh.chunk(3, -1)
        r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        if not module.reset_after:
            n_h = linear(r * u, w["weight_hh"].chunk(3)[2], w["bias_hh"].chunk(3)[2])
            return (1 - z) * (n_x + n_h).tanh() + z * h, None
        return (1 - z) * (n_x + r * n_h).tanh() + z * h, None
    return (gx + gh).tanh(), None


def loop(module: Any, x: Tensor, hx: Any, drawn: Masks) -> tuple[Tensor, Any]:
    """One layer of one direction, as rnnkern's module gives it; zoneout by `drawn`, or by shares without masks."""
    options = module.options
    share_h, share_c = options.zones(rnnkern.cells.CELL_OF_MODE[module.mode])
    if module.training:
        share_h = share_c = 0.0
    h, c = (s[0] for s in hx) if isinstance(hx, tuple) else (hx[0], None)
    found = []
    for t in range(len(x)):
        x_t = x[t] if drawn.input is None else x[t] * drawn.input[0]
        u = h if drawn.recurrent is None else h * drawn.recurrent[0]
        zone_h = share_h if drawn.zoneout_h is None else drawn.zoneout_h[t].double()
        zone_c = share_c if drawn.zoneout_c is None else drawn.zoneout_c[t].double()
        new, c = _step(module, x_t, h, c, u, zone_c)
        h = zone_h * h + (1 - zone_h) * new
        found.append(h)
    return torch.stack(found), (h[None], c[None]) if c is not None else h[None]
