"""One layer's call around a backend: its form of the rows, and gradients of weights by matrix products.

What autograd wraps (rnnkern/autograd.py) and what every backend shares. T steps, B sequences, I inputs, H units,
P outputs a direction, D directions, N = T*B rows or as many as are packed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern import checks
from rnnkern.backends import Gradients, Layer, Saved, States, compute_dtype, select
from rnnkern.cells import CELLS, Weights, split_directions
from rnnkern.packing import Packing, pack, previous_rows


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


def prepare(settings: Settings, operands: Operands) -> tuple[Layer, Packing | None]:
    """The backend's view of the call, in the dtype to compute in; with lengths the rows are packed. Differentiable."""
    directions = operands.h0.shape[0]
    checks.operands(
        CELLS[settings.cell], operands.x, operands.h0, operands.c0, split_directions(operands.weights, directions)
    )
    x, h0, c0, batch_sizes, packing = operands.x, operands.h0, operands.c0, operands.batch_sizes, None
    if operands.lengths is not None:
        packing = pack(operands.lengths.cpu(), x.shape[0])
        x, h0, c0 = packing.gather(x), packing.sort(h0), packing.sort(c0)  # type: ignore[assignment]
        batch_sizes = packing.batch_sizes
    elif batch_sizes is not None:
        checks.batch_sizes(batch_sizes, rows=x.shape[0], batch=h0.shape[1])
    dtype = compute_dtype(x.dtype)
    layer = Layer(
        cell=CELLS[settings.cell],
        x=x.to(dtype),
        h0=h0.to(dtype),
        c0=None if c0 is None else c0.to(dtype),
        weights=split_directions([w.to(dtype) for w in operands.weights], directions),
        batch_sizes=batch_sizes,
        batch_major=settings.batch_major,
    )
    return layer, packing


def finish(operands: Operands, packing: Packing | None, states: States) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n) in the rows, order and dtype of the call. Differentiable."""
    y, h_n, c_n = states.y, states.h_n, states.c_n
    if packing is not None:
        y, h_n, c_n = packing.scatter(y, *operands.x.shape[:2]), packing.unsort(h_n), packing.unsort(c_n)  # type: ignore[assignment]
    dtype = operands.x.dtype
    return y.to(dtype), h_n.to(dtype), None if c_n is None else c_n.to(dtype)


def forward(settings: Settings, operands: Operands, save: bool) -> Results:
    """Runs one layer; `save` keeps what `backward` needs."""
    backend = select(settings.backend, operands.x.device)
    layer, packing = prepare(settings, operands)
    states = backend.forward(layer, save)
    y, h_n, c_n = finish(operands, packing, states)
    return Results(
        y,
        h_n,
        y.new_empty(0) if c_n is None else c_n,
        layer.x.new_empty(0) if states.gates is None else states.gates,
        layer.x.new_empty(0) if states.cells is None else states.cells,
    )


def _flat(layer: Layer, rows: Tensor) -> Tensor:
    """(T, B, ...) or (N, ...) as a matrix (N, all the rest), rows in the order they have in memory."""
    if layer.batch_sizes is not None:
        return rows.flatten(1)
    return (rows.transpose(0, 1) if layer.batch_major else rows).flatten(0, 1).flatten(1)


def _previous(layer: Layer, y: Tensor, d: int) -> Tensor:
    """The state that met W_hh of direction d in each row, (N, P): the output one step before in its direction, h0 at
    its start."""
    h, h0 = y.narrow(-1, d * layer.outputs, layer.outputs), layer.h0[d]
    if layer.batch_sizes is not None:
        return torch.cat([h, h0]).index_select(0, previous_rows(layer.batch_sizes, reverse=d == 1).to(h.device))
    previous = layer.rows(layer.outputs)
    if d == 0:
        previous[1:], previous[0] = h[:-1], h0
    else:
        previous[:-1], previous[-1] = h[1:], h0
    return _flat(layer, previous)


def _weight_gradients(
    layer: Layer, saved: Saved, gradients: Gradients, needed: tuple[Weights, ...]
) -> list[Tensor | None]:
    """The gradients of all weights that `needed` (true where wanted) asks for, direction after direction."""
    results: list[Tensor | None] = []
    inputs = _flat(layer, layer.x)
    for d, wanted in enumerate(needed):
        dgx = _flat(layer, gradients.dgx.select(-2, d))
        dgh = _flat(layer, gradients.dgh.select(-2, d)) if layer.cell.separate else dgx
        results.append(dgx.t() @ inputs if wanted.weight_ih else None)
        results.append(dgh.t() @ _previous(layer, saved.y, d) if wanted.weight_hh else None)
        results.append(dgx.sum(0) if wanted.bias_ih else None)
        results.append(_recurrent_bias_gradient(layer, dgh, results[-1]) if wanted.bias_hh else None)
        results.append(_projection_gradient(layer, saved, gradients, d) if wanted.weight_hr else None)
    return results


def _recurrent_bias_gradient(layer: Layer, dgh: Tensor, of_bias_ih: Tensor | None) -> Tensor:
    """db_hh (G*H,): the sum over rows of dgh, or a copy of db_ih where that is the same sum."""
    return dgh.sum(0) if layer.cell.separate or of_bias_ih is None else of_bias_ih.clone()


def _projection_gradient(layer: Layer, saved: Saved, gradients: Gradients, d: int) -> Tensor:
    """dW_hr (P, H) = dp^T m, with the unprojected m = o tanh(c) formed again from what was saved."""
    assert saved.gates is not None
    assert saved.cells is not None
    assert gradients.dp is not None
    o = saved.gates.select(-2, d).narrow(-1, layer.cell.saved.index("o") * layer.hidden, layer.hidden)
    m = o * saved.cells.select(-2, d).tanh()
    return _flat(layer, gradients.dp.select(-2, d)).t() @ _flat(layer, m)


def _input_gradient(layer: Layer, dgx: Tensor) -> Tensor:
    """dx = dgx W_ih, summed over directions: (T, B, I) or (N, I)."""
    weight = torch.cat([w.weight_ih for w in layer.weights])  # (D*G*H, I)
    dx = layer.rows(layer.x.shape[-1])
    torch.mm(_flat(layer, dgx), weight, out=_flat(layer, dx))
    return dx


def backward(
    settings: Settings, operands: Operands, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of x, h0, c0 and all weights where `needs` is true, in this order.

    `grads` are those of y, h_n and c_n, None for zero; at least one is given.
    """
    backend = select(settings.backend, operands.x.device)
    layer, packing = prepare(settings, operands)
    dy, dh_n, dc_n = grads
    if packing is not None:
        rows = len(packing.step)
        saved = Saved(packing.gather(saved.y), *(None if part is None else part[:rows] for part in saved[1:]))
        dy = None if dy is None else packing.gather(dy)
        dh_n, dc_n = packing.sort(dh_n), packing.sort(dc_n)
    dtype = layer.x.dtype
    saved = Saved(
        saved.y.to(dtype), saved.gates if layer.cell.saved else None, saved.cells if layer.cell.has_c else None
    )
    dy, dh_n, dc_n = (None if g is None else g.to(dtype) for g in (dy, dh_n, dc_n))
    gradients = backend.backward(layer, saved, dy, dh_n, dc_n)
    found: list[Tensor | None] = [
        _input_gradient(layer, gradients.dgx) if needs[0] else None,
        gradients.dh0 if needs[1] else None,
        gradients.dc0 if needs[2] else None,
        *_weight_gradients(layer, saved, gradients, split_directions(needs[3:], len(layer.weights))),  # type: ignore[arg-type]
    ]
    if packing is not None:
        if found[0] is not None:
            found[0] = packing.scatter(found[0], *operands.x.shape[:2])
        found[1], found[2] = packing.unsort(found[1]), packing.unsort(found[2])
    return [g.to(operands.x.dtype) for g in found if g is not None]
