"""One layer's call around a backend: its checks, and its dtype. What autograd wraps (rnnkern/autograd.py).

T steps, B sequences, I inputs, H units, P outputs a direction, D directions, N = T*B rows or as many as are packed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern import checks
from rnnkern.backends import Layer, Needs, Saved, States, compute_dtype, select
from rnnkern.cells import CELLS, split_directions
from rnnkern.packing import sort_lengths


class Settings(NamedTuple):
    """What a layer call is, apart from its tensors."""

    cell: str
    backend: str
    batch_major: bool  # x (T, B, I) is a transposed (B, T, I), and so shall be the results


class Operands(NamedTuple):
    """The tensors of a layer call, those that may carry a gradient first."""

    x: Tensor  # (T, B, I), or (N, I) with batch_sizes
    h0: Tensor  # (D, B, P)
    c0: Tensor | None  # (D, B, H)
    weights: tuple[Tensor, ...]  # the fields of `Weights` that are there, one direction after the other
    lengths: Tensor | None  # (B,) int64: x is padded
    batch_sizes: Tensor | None  # (T,) int64: x is packed


class Results(NamedTuple):
    """What a layer call gives. The last two are what backward needs: in the dtype computed in, one row for each real
    step and sequence, empty when nothing is saved. More rows behind those do no harm.
    """

    y: Tensor  # (T, B, D*P) or (N, D*P)
    h_n: Tensor  # (D, B, P)
    c_n: Tensor  # (D, B, H), or empty for a cell without c
    gates: Tensor
    cells: Tensor


def prepare(settings: Settings, operands: Operands, as_given: bool = False) -> Layer:
    """A backend's view of the call (see `Backend.as_given`). Differentiable."""
    directions = operands.h0.shape[0]
    checks.operands(
        CELLS[settings.cell], operands.x, operands.h0, operands.c0, split_directions(operands.weights, directions)
    )
    order, batch_sizes = None, operands.batch_sizes
    if operands.lengths is not None and not as_given:
        order, batch_sizes = sort_lengths(operands.lengths.cpu(), operands.x.shape[0])
    elif batch_sizes is not None:
        checks.batch_sizes(batch_sizes, rows=operands.x.shape[0], batch=operands.h0.shape[1])
    dtype = operands.x.dtype if as_given else compute_dtype(operands.x.dtype)
    return Layer(
        cell=CELLS[settings.cell],
        x=operands.x.to(dtype),
        h0=operands.h0.to(dtype),
        c0=None if operands.c0 is None else operands.c0.to(dtype),
        weights=split_directions([w.to(dtype) for w in operands.weights], directions),
        batch_sizes=batch_sizes,
        order=order,
        lengths=operands.lengths if as_given else None,
        batch_major=settings.batch_major,
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
    settings: Settings, operands: Operands, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of x, h0, c0 and all weights where `needs` is true, in this order.

    `grads` are those of y, h_n and c_n, None for zero; at least one is given.
    """
    backend = select(settings.backend, operands.x.device)
    layer = prepare(settings, operands, backend.as_given)
    dtype = layer.x.dtype
    kept = Saved(
        saved.y.to(dtype), saved.gates if layer.cell.saved else None, saved.cells if layer.cell.has_c else None
    )
    dy, dh_n, dc_n = (None if g is None else g.to(dtype) for g in grads)
    of_weights = split_directions(needs[3:], len(layer.weights))  # type: ignore[arg-type]
    wanted = Needs(needs[0], needs[1], needs[2], of_weights)
    found = backend.backward(layer, kept, dy, dh_n, dc_n, wanted)
    return [g.to(operands.x.dtype) for g in found if g is not None]
