"""The table of cells: what distinguishes one from another, for every layer of the library. A new cell starts here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    @property
    def states(self) -> int:
        """How many states a step carries."""
        return 2 if self.has_c else 1


CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("lstm", "LSTM", ("i", "f", "g", "o"), ("i", "f", "g", "o"), has_c=True, separate=False),
        CellSpec("gru", "GRU", ("r", "z", "n"), ("r", "z", "n", "hn"), has_c=False, separate=True),
        CellSpec("rnn_tanh", "RNN_TANH", ("h",), (), has_c=False, separate=False),
        CellSpec("rnn_relu", "RNN_RELU", ("h",), (), has_c=False, separate=False),
    )
}

CELL_OF_MODE: dict[str, CellSpec] = {spec.mode: spec for spec in CELLS.values()}


class Weights(NamedTuple):
    """The parameters of one direction of a layer; P is the output size, H or proj_size."""

    weight_ih: Tensor  # (G*H, I)
    weight_hh: Tensor  # (G*H, P)
    bias_ih: Tensor | None = None  # (G*H,)
    bias_hh: Tensor | None = None  # (G*H,)
    weight_hr: Tensor | None = None  # (P, H)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Weights":
        """The same weights, each that is there put through `change`."""
        w_ih, w_hh, *optional = self
        return Weights(change(w_ih), change(w_hh), *(None if w is None else change(w) for w in optional))


def named_weights(flat: Sequence[Tensor]) -> Weights:
    """The weights of one direction from torch.nn's order, w_ih, w_hh, [b_ih, b_hh,] [w_hr]."""
    w_ih, w_hh, *rest = flat
    w_hr = rest.pop() if len(rest) % 2 else None
    b_ih, b_hh = rest or (None, None)
    return Weights(w_ih, w_hh, b_ih, b_hh, w_hr)


def split_directions(flat: Sequence[Tensor], directions: int) -> tuple[Weights, ...]:
    """The weights of each direction, from those of all directions one after the other."""
    width = len(flat) // directions
    return tuple(named_weights(flat[i : i + width]) for i in range(0, len(flat), width))
