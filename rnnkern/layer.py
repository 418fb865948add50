"""One layer's call around a backend: its checks, and its dtype. What autograd wraps (rnnkern/autograd.py).

T steps, B sequences, I inputs, H units, P outputs a direction, D directions, N = T*B rows or as many as are packed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import checks
from rnnkern.backends import Cotangents, Extras, Layer, Needs, Saved, States, compute_dtype, select
from rnnkern.cells import CELLS, CellSpec, Weights, split_directions
from rnnkern.packing import sort_lengths


class Settings(NamedTuple):
    """What a layer call is, apart from its tensors. The last are fields of `Extras`."""

    cell: str
    backend: str
    batch_major: bool  # x (T, B, I) is a transposed (B, T, I), and so shall be the results
    peephole: bool = False  # the weights have weight_ch
    layer_norm: bool = False  # the weights have those of LayerNorm
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recompute: bool = False
    states: bool = False

    @property
    def spec(self) -> CellSpec:
        """The cell's entry in the table."""
        return CELLS[self.cell]

    def directions(self, flat: Sequence[Any], directions: int) -> tuple[Weights, ...]:
        """`Operands.weights`, or something for each of them, by direction and name."""
        return split_directions(self.spec, flat, directions, self.peephole, self.layer_norm)


class Operands(NamedTuple):
    """The tensors of a layer call. Those of the first line never carry a gradient, the others may; masks and resets are
    fields of `Extras`."""

    lengths: Tensor | None  # (B,) int64: x is padded
    batch_sizes: Tensor | None  # (T,) int64: x is packed
    input_mask: Tensor | None
    recurrent_mask: Tensor | None
    zoneout_mask_h: Tensor | None
    zoneout_mask_c: Tensor | None
    reset: Tensor | None
    x: Tensor  # (T, B, I), or (N, I) with batch_sizes
    h0: Tensor  # (D, B, P)
    c0: Tensor | None  # (D, B, H)
    reset_h: Tensor | None
    reset_c: Tensor | None
    weights: tuple[Tensor, ...]  # the fields of `Weights` that are there, one direction after the other

    def flat(self) -> tuple[Tensor | None, ...]:
        """As a flat list, weights at its end."""
        return (*self[:-1], *self.weights)


FIXED = Operands._fields.index("x")  # so many first ones never carry a gradient


def from_flat(tensors: Sequence[Any]) -> Operands:
    """`Operands.flat` undone."""
    count = len(Operands._fields) - 1
    return Operands(*tensors[:count], tuple(tensors[count:]))  # type: ignore[call-arg]


def plain_operands(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: tuple[Tensor, ...],
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> Operands:
    """Operands of a call without masks and resets."""
    return Operands(lengths, batch_sizes, None, None, None, None, None, x, h0, c0, None, None, weights)


class Results(NamedTuple):
    """What a layer call gives. The last two are what backward needs: in the dtype computed in, one row for each real
    step and sequence, empty when nothing is saved. More rows behind those do no harm. With `Settings.states` cells are
    a result as well, in the rows of y, zero past a length.
    """

    y: Tensor  # (T, B, D*P) or (N, D*P)
    h_n: Tensor  # (D, B, P)
    c_n: Tensor  # (D, B, H), or empty for a cell without c
    gates: Tensor
    cells: Tensor


def prepare(settings: Settings, operands: Operands, as_given: bool = False) -> Layer:
    """A backend's view of the call (see `Backend.as_given`). Differentiable."""
    weights = settings.directions(operands.weights, operands.h0.shape[0])
    checks.operands(settings.spec, operands, weights)
    order, batch_sizes = None, operands.batch_sizes
    if operands.lengths is not None and not as_given:
        order, batch_sizes = sort_lengths(operands.lengths.cpu(), operands.x.shape[0])
    elif batch_sizes is not None:
        checks.batch_sizes(batch_sizes, rows=operands.x.shape[0], batch=operands.h0.shape[1])
    dtype = operands.x.dtype if as_given else compute_dtype(operands.x.dtype)

    def given(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)

    return Layer(
        cell=settings.spec,
        x=given(operands.x),
        h0=given(operands.h0),
        c0=given(operands.c0),
        weights=tuple(w.map(given) for w in weights),
        batch_sizes=batch_sizes,
        order=order,
        lengths=operands.lengths if as_given else None,
        batch_major=settings.batch_major,
        extras=Extras(
            given(operands.input_mask),
            given(operands.recurrent_mask),
            operands.zoneout_mask_h,
            operands.zoneout_mask_c,
            operands.reset,
            given(operands.reset_h),
            given(operands.reset_c),
            settings.zoneout_h,
            settings.zoneout_c,
            settings.recompute,
            settings.states,
        ),
    )


def finish(states: States, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n) in the dtype of the call. Differentiable."""
    y, h_n, c_n, _, _ = states
    return y.to(dtype), h_n.to(dtype), None if c_n is None else c_n.to(dtype)


def forward(settings: Settings, operands: Operands, save: bool) -> Results:
    """Runs one layer; `save` keeps what `backward` needs."""
    backend = select(settings.backend, operands.x.device)
    layer = prepare(settings, operands, backend.as_given)
    states = backend.forward(layer, save)
    y, h_n, c_n = finish(states, operands.x.dtype)
    c_n = y.new_empty(0) if c_n is None else c_n
    # each empty one its own: outputs of an operator may not share memory
    gates, cells = (
        y.new_empty(0, dtype=compute_dtype(y.dtype)) if kept is None else kept for kept in (states.gates, states.cells)
    )
    return Results(y, h_n, c_n, gates, cells)


def backward(
    settings: Settings, operands: Operands, saved: Saved, grads: Cotangents, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of x, h0, c0, reset_h, reset_c and all weights where `needs` is true, in this order; at least one
    of `grads` is given."""
    backend = select(settings.backend, operands.x.device)
    layer = prepare(settings, operands, backend.as_given)
    dtype = layer.x.dtype
    kept = Saved(saved.y.to(dtype), saved.gates if layer.kept else None, saved.cells if layer.cell.has_c else None)
    x, h0, c0, reset_h, reset_c, *of_weights = needs
    wanted = Needs(x, h0, c0, reset_h, reset_c, settings.directions(of_weights, len(layer.weights)))
    found = backend.backward(layer, kept, grads.map(lambda g: g.to(dtype)), wanted)
    return [g.to(operands.x.dtype) for g in found if g is not None]
