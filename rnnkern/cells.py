"""The table of cells: what distinguishes one from another, for every layer of the library. A new cell starts here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class CellSpec:
    """One kind of recurrent cell. Sizes are counted in units of H, the hidden size."""

    name: str
    mode: str  # torch.nn.RNNBase's name for it
    gates: tuple[str, ...]  # blocks of W_ih, W_hh and the biases, in torch's order
    saved: tuple[str, ...]  # blocks of H that a forward step keeps for backward
    has_c: bool  # a second state beside h
    separate: bool  # the gradients of the input and recurrent pre-activations differ
    in_torch: bool = True  # torch.nn has it
    # the last gate's recurrent product is with the first gate times h, so a step has two products, one after the other
    resets_before: bool = False

    @property
    def states(self) -> int:
        """How many states a step carries."""
        return 2 if self.has_c else 1

    def kept(self, zoneout: bool, layer_norm: bool) -> int:
        """How many blocks of H a forward step keeps. With zoneout what a plain RNN gives is not its activation, which
        then comes first; with LayerNorm both products before they are normalised come last."""
        activations = len(self.saved) or int(zoneout)
        return activations + (2 * len(self.gates) if layer_norm else 0)


CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("lstm", "LSTM", ("i", "f", "g", "o"), ("i", "f", "g", "o"), has_c=True, separate=False),
        CellSpec("gru", "GRU", ("r", "z", "n"), ("r", "z", "n", "hn"), has_c=False, separate=True),
        CellSpec(
            "gru_reset_before",
            "GRU",
            ("r", "z", "n"),
            ("r", "z", "n"),
            has_c=False,
            separate=False,
            in_torch=False,
            resets_before=True,
        ),
        CellSpec("rnn_tanh", "RNN_TANH", ("h",), (), has_c=False, separate=False),
        CellSpec("rnn_relu", "RNN_RELU", ("h",), (), has_c=False, separate=False),
    )
}

TORCH_CELLS: dict[str, CellSpec] = {name: spec for name, spec in CELLS.items() if spec.in_torch}

CELL_OF_MODE: dict[str, CellSpec] = {spec.mode: spec for spec in TORCH_CELLS.values()}


class Weights(NamedTuple):
    """The parameters of one direction of a layer, by the names of a module's; P is the output size, H or proj_size."""

    weight_ih: Tensor  # (G*H, I)
    weight_hh: Tensor  # (G*H, P)
    bias_ih: Tensor | None = None  # (G*H,)
    bias_hh: Tensor | None = None  # (G*H,)
    weight_hr: Tensor | None = None  # (P, H)
    weight_ch: Tensor | None = None  # (3*H,): the peepholes of i, f and o
    ln_ih_weight: Tensor | None = None  # (G*H,): LayerNorm of x W_ih^T
    ln_ih_bias: Tensor | None = None  # (G*H,)
    ln_hh_weight: Tensor | None = None  # (G*H,): of h W_hh^T
    ln_hh_bias: Tensor | None = None  # (G*H,)
    ln_c_weight: Tensor | None = None  # (H,): of c, where the cell has it
    ln_c_bias: Tensor | None = None  # (H,)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Weights":
        """The same weights, each that is there put through `change`."""
        w_ih, w_hh, *optional = self
        return Weights(change(w_ih), change(w_hh), *(None if w is None else change(w) for w in optional))

    def present(self) -> Iterator[Tensor]:
        """Those that are there, in order."""
        return (w for w in self if w is not None)


def weight_names(cell: CellSpec, bias: bool, projects: bool, peephole: bool, layer_norm: bool) -> list[str]:
    """The fields of `Weights` that a direction has, in order."""
    names = list(Weights._fields)
    return (
        names[:2]
        + names[2:4] * bias
        + names[4:5] * projects
        + names[5:6] * peephole
        + names[6 : 12 if cell.has_c else 10] * layer_norm
    )


def weight_shapes(cell: CellSpec, inputs: int, hidden: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """The shape of every field of `Weights`."""
    rows = len(cell.gates) * hidden
    return {
        "weight_ih": (rows, inputs),
        "weight_hh": (rows, outputs),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
        "weight_hr": (outputs, hidden),
        "weight_ch": (3 * hidden,),
        "ln_ih_weight": (rows,),
        "ln_ih_bias": (rows,),
        "ln_hh_weight": (rows,),
        "ln_hh_bias": (rows,),
        "ln_c_weight": (hidden,),
        "ln_c_bias": (hidden,),
    }


def own_weight_names(cell: CellSpec, peephole: bool, layer_norm: bool) -> list[str]:
    """Those fields of `Weights` that torch.nn lacks."""
    return weight_names(cell, False, False, peephole, layer_norm)[2:]


def _place_of_fields() -> dict[tuple[bool, bool, bool, int], tuple[int | None, ...]]:
    """For (has_c, peephole, layer_norm, number of weights): where in a list of weights each field of `Weights` is."""
    found: dict[tuple[bool, bool, bool, int], tuple[int | None, ...]] = {}
    for cell in CELLS.values():
        for bias, projects, peephole, layer_norm in product((False, True), repeat=4):
            names = weight_names(cell, bias, projects, peephole, layer_norm)
            place = tuple(names.index(name) if name in names else None for name in Weights._fields)
            found[cell.has_c, peephole, layer_norm, len(names)] = place
    return found


_PLACES = _place_of_fields()  # worked out once: every call asks several times


def named_weights(cell: CellSpec, flat: Sequence[Tensor], peephole: bool = False, layer_norm: bool = False) -> Weights:
    """The weights of one direction from a list in the order of `Weights`, those that are missing left out."""
    place = _PLACES[cell.has_c, peephole, layer_norm, len(flat)]
    return Weights(*[None if i is None else flat[i] for i in place])  # type: ignore[arg-type]


def split_directions(
    cell: CellSpec, flat: Sequence[Tensor], directions: int, peephole: bool = False, layer_norm: bool = False
) -> tuple[Weights, ...]:
    """The weights of each direction, from those of all directions one after the other."""
    width = len(flat) // directions
    return tuple(named_weights(cell, flat[i : i + width], peephole, layer_norm) for i in range(0, len(flat), width))
