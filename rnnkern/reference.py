"""The oracle: every cell's step, the sweep over a sequence, and its backward written out by hand, in plain torch.

Slow, and meant to be read: any device, any dtype, differentiable any number of times. Every kernel is tested against
it, and second derivatives go through it (rnnkern/autograd.py).

A step takes the pre-activations gx = W_ih x_t + b_ih and gh = W_hh h_{t-1} + b_hh, (B, G*H) each. With * elementwise,
s the sigmoid:

    LSTM   i, f, o = s(gx + gh),  g = tanh(gx + gh)     c = f*c' + i*g      h = o*tanh(c)
    GRU    r, z = s(gx + gh),  n = tanh(gx_n + r*gh_n)  h = (1-z)*n + z*h'
    RNN    h = tanh(gx + gh)  or  relu(gx + gh)

(LSTM: Hochreiter 1997, Gers 2000. GRU: Cho 2014, reset after the product as in cuDNN. RNN: Elman 1990.)
(' marks the value of the step before.) Backward, with s' = s(1-s) and tanh' = 1 - tanh^2 in terms of the outputs:

    LSTM   dc += dh*o*(1-tanh(c)^2);  di = dc*g*i(1-i);  df = dc*c'*f(1-f);  dg = dc*i*(1-g^2)
           do = dh*tanh(c)*o(1-o);  dc' = dc*f
    GRU    dn = dh*(1-z)*(1-n^2);  dr = dn*gh_n*r(1-r);  dz = dh*(h'-n)*z(1-z);  of gh_n: dn*r;  straight to h': dh*z
    RNN    dh*(1-h^2)  or  0 where h <= 0, else dh

and dh' = (what goes straight) + dgh W_hh.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern.backends import Layer, Needs, Saved, States
from rnnkern.cells import CellSpec, Weights
from rnnkern.packing import positions


class Step(NamedTuple):
    """One step of the cell, before any projection."""

    h: Tensor  # (B, H)
    c: Tensor | None  # (B, H)
    saved: tuple[Tensor, ...]  # (B, H) each, as the cell's spec names them


def step(cell: CellSpec, gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> Step:
    """The cell's equations."""
    if cell.name == "lstm":
        assert c is not None
        i, f, g, o = (gx + gh).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return Step(o * c.tanh(), c, (i, f, g, o))
    if cell.name == "gru":
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        return Step((1 - z) * n + z * h, None, (r, z, n, hn))
    if cell.name == "rnn_tanh":
        return Step((gx + gh).tanh(), None, ())
    if cell.name == "rnn_relu":
        return Step((gx + gh).relu(), None, ())
    raise ValueError(f"cell: no equations for {cell.name!r}")


class StepGradients(NamedTuple):
    dgx: Tensor  # (B, G*H)
    dgh: Tensor  # (B, G*H)
    dc: Tensor | None  # (B, H): of the previous c
    direct: Tensor | int  # (B, H): what of dh reaches the previous h past W_hh


class Around(NamedTuple):
    """The values around a step that its backward reads."""

    saved: tuple[Tensor, ...]
    h: Tensor
    h_prev: Tensor
    c: Tensor | None
    c_prev: Tensor | None


def step_backward(cell: CellSpec, at: Around, dh: Tensor, dc: Tensor | None) -> StepGradients:
    """The gradients of a step from those of its h and c."""
    if cell.name == "lstm":
        assert at.c is not None
        assert at.c_prev is not None
        assert dc is not None
        i, f, g, o = at.saved
        tanh_c = at.c.tanh()
        dc = dc + dh * o * (1 - tanh_c**2)
        di, df = dc * g * i * (1 - i), dc * at.c_prev * f * (1 - f)
        dg, do = dc * i * (1 - g**2), dh * tanh_c * o * (1 - o)
        dgx = torch.cat([di, df, dg, do], -1)
        return StepGradients(dgx, dgx, dc * f, 0)
    if cell.name == "gru":
        r, z, n, hn = at.saved
        dn = dh * (1 - z) * (1 - n**2)
        dr, dz = dn * hn * r * (1 - r), dh * (at.h_prev - n) * z * (1 - z)
        return StepGradients(torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1), None, dh * z)
    if cell.name == "rnn_tanh":
        dgx = dh * (1 - at.h**2)
        return StepGradients(dgx, dgx, None, 0)
    if cell.name == "rnn_relu":
        dgx = torch.where(at.h <= 0, torch.zeros_like(dh), dh)
        return StepGradients(dgx, dgx, None, 0)
    raise ValueError(f"cell: no equations for {cell.name!r}")


class _Grid:
    """Rows of a layer call as padded (T, B, ...), and back. Where sequences differ in length, `active` (T, B, 1) tells
    which elements exist."""

    def __init__(self, layer: Layer) -> None:
        self.at: tuple[Tensor, Tensor] | None = None  # (step, sequence) of each packed row
        self.packed = layer.batch_sizes is not None and layer.order is None  # so are rows of x and y
        self.steps, self.batch = layer.x.shape[0], layer.h0.shape[1]
        self.active: Tensor | None = None
        if layer.batch_sizes is not None:
            self.steps = len(layer.batch_sizes)
            step_index, sequence = positions(layer.batch_sizes)
            sequence = sequence if layer.order is None else layer.order[sequence]
            self.at = (step_index.to(layer.x.device), sequence.to(layer.x.device))
            exists = torch.zeros(self.steps, self.batch, 1, dtype=torch.bool, device=layer.x.device)
            self.active = exists.index_put(self.at, exists.new_ones(()))

    def spread(self, rows: Tensor) -> Tensor:
        """(N, ...) -> (T, B, ...), zero where no row exists; rows behind the last real one are filling."""
        if self.at is None:
            return rows
        grid = rows.new_zeros(self.steps, self.batch, *rows.shape[1:])
        return grid.index_put(self.at, rows[: len(self.at[0])])

    def collect(self, grid: Tensor) -> Tensor:
        """(T, B, ...) -> (N, ...)."""
        return grid if self.at is None else grid[self.at]

    def outer(self, rows: Tensor) -> Tensor:
        """Rows of x, y or their gradients -> (T, B, ...), zero where a sequence has ended."""
        return self.spread(rows) if self.packed else self.mask(rows)

    def inner(self, grid: Tensor) -> Tensor:
        """(T, B, ...) -> rows of x, y or their gradients, zero where a sequence has ended."""
        return self.collect(grid) if self.packed else self.mask(grid)

    def mask(self, grid: Tensor) -> Tensor:
        return grid if self.active is None else torch.where(self.active, grid, torch.zeros_like(grid))

    def keep(self, t: int, new: Tensor, old: Tensor) -> Tensor:
        """`new` for the sequences that have a step t, `old` for the others."""
        return new if self.active is None else torch.where(self.active[t], new, old)

    def order(self, reverse: bool) -> list[int]:
        steps = list(range(self.steps))
        return steps[::-1] if reverse else steps


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x @ weight.t()
    return product if bias is None else product + bias


class Sweep(NamedTuple):
    """One direction of a layer, padded."""

    y: Tensor  # (T, B, P)
    h_n: Tensor  # (B, P)
    c_n: Tensor | None  # (B, H)
    gates: Tensor | None  # (T, B, saved*H)
    cells: Tensor | None  # (T, B, H)


def sweep(cell: CellSpec, grid: _Grid, x: Tensor, w: Weights, h: Tensor, c: Tensor | None, reverse: bool) -> Sweep:
    """All steps of one direction; x (T, B, I)."""
    gx = _linear(x, w.weight_ih, w.bias_ih)
    ys: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}
    cells: dict[int, Tensor] = {}
    for t in grid.order(reverse):
        new = step(cell, gx[t], _linear(h, w.weight_hh, w.bias_hh), h, c)
        h_new = new.h if w.weight_hr is None else new.h @ w.weight_hr.t()
        h = ys[t] = grid.keep(t, h_new, h)
        if c is not None and new.c is not None:
            c = cells[t] = grid.keep(t, new.c, c)
        if new.saved:
            gates[t] = torch.cat(new.saved, -1)
    y, saved, kept = ([values[t] for t in sorted(values)] for values in (ys, gates, cells))
    return Sweep(torch.stack(y), h, c, torch.stack(saved) if saved else None, torch.stack(kept) if kept else None)


def _side_by_side(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The directions' (T, B, n) as (T, B, D, n)."""
    present = [part for part in parts if part is not None]
    return torch.stack(present, 2) if present else None


def forward(layer: Layer, save: bool = True) -> States:
    """A layer's sweeps: the backend function, and what second derivatives are taken of."""
    grid = _Grid(layer)
    x = grid.outer(layer.x)
    sweeps = [
        sweep(layer.cell, grid, x, w, layer.h0[d], None if layer.c0 is None else layer.c0[d], reverse=d == 1)
        for d, w in enumerate(layer.weights)
    ]
    gates, cells = (_side_by_side([getattr(s, name) for s in sweeps]) for name in ("gates", "cells"))
    return States(
        grid.inner(torch.cat([s.y for s in sweeps], -1)),
        torch.stack([s.h_n for s in sweeps]),
        None if layer.c0 is None else torch.stack([s.c_n for s in sweeps if s.c_n is not None]),
        grid.collect(gates) if save and gates is not None else None,
        grid.collect(cells) if save and cells is not None else None,
    )


class SweepGradients(NamedTuple):
    """The gradients of one direction, padded, and what met W_hh."""

    dgx: Tensor  # (T, B, G*H): of the input pre-activation W_ih x + b_ih
    dgh: Tensor  # (T, B, G*H): of the recurrent pre-activation W_hh h + b_hh
    dp: Tensor  # (T, B, P): of the projected state
    h_prev: Tensor  # (T, B, P)
    dh0: Tensor  # (B, P)
    dc0: Tensor | None  # (B, H)


def sweep_backward(
    cell: CellSpec,
    grid: _Grid,
    saved: Sweep,
    w: Weights,
    start: tuple[Tensor, Tensor | None],
    dy: Tensor,
    dh: Tensor,
    dc: Tensor | None,
    reverse: bool,
) -> SweepGradients:
    """All steps of one direction, last to first; `start` is (h0, c0), dh and dc those of the final states."""
    rows: dict[int, tuple[Tensor, ...]] = {}
    order = grid.order(reverse)
    for index in reversed(range(len(order))):
        t = order[index]
        h_prev, c_prev = start
        if index > 0:
            before = order[index - 1]
            h_prev = grid.keep(before, saved.y[before], start[0])
            if saved.cells is not None and start[1] is not None:
                c_prev = grid.keep(before, saved.cells[before], start[1])
        gates = () if saved.gates is None else saved.gates[t].chunk(len(cell.saved), -1)
        around = Around(gates, saved.y[t], h_prev, None if saved.cells is None else saved.cells[t], c_prev)
        dh_t = dh + dy[t]
        g = step_backward(cell, around, dh_t if w.weight_hr is None else dh_t @ w.weight_hr, dc)
        rows[t] = tuple(grid.keep(t, part, torch.zeros_like(part)) for part in (g.dgx, g.dgh, dh_t, h_prev))
        dh = grid.keep(t, g.direct + g.dgh @ w.weight_hh, dh)
        if dc is not None and g.dc is not None:
            dc = grid.keep(t, g.dc, dc)
    dgx, dgh, dp, h_before = (torch.stack(part) for part in zip(*(rows[t] for t in range(grid.steps)), strict=True))
    return SweepGradients(dgx, dgh, dp, h_before, dh, dc)


def _weight_gradients(
    cell: CellSpec, x: Tensor, saved: Sweep, g: SweepGradients, wanted: Weights
) -> list[Tensor | None]:
    """dW_ih, dW_hh, db_ih, db_hh, dW_hr of one direction where wanted: sums of outer products over all steps and
    sequences."""

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return left.flatten(0, 1).t() @ right.flatten(0, 1)

    of_projection = None
    if wanted.weight_hr:
        assert saved.gates is not None
        assert saved.cells is not None
        o = saved.gates.chunk(len(cell.saved), -1)[cell.saved.index("o")]
        of_projection = outer(g.dp, o * saved.cells.tanh())
    return [
        outer(g.dgx, x) if wanted.weight_ih else None,
        outer(g.dgh, g.h_prev) if wanted.weight_hh else None,
        g.dgx.sum((0, 1)) if wanted.bias_ih else None,
        g.dgh.sum((0, 1)) if wanted.bias_hh else None,
        of_projection,
    ]


def backward(
    layer: Layer, saved: Saved, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, needs: Needs
) -> list[Tensor | None]:
    """A layer's sweeps backward: the backend function."""
    grid = _Grid(layer)
    x, y = grid.outer(layer.x), grid.outer(saved.y)
    gates, cells = (None if part is None else grid.spread(part) for part in (saved.gates, saved.cells))
    dy = torch.zeros_like(y) if dy is None else grid.outer(dy)
    dh_n = torch.zeros_like(layer.h0) if dh_n is None else dh_n
    dc_n = torch.zeros_like(layer.c0) if dc_n is None and layer.c0 is not None else dc_n
    parts: list[SweepGradients] = []
    of_weights: list[Tensor | None] = []
    for d, w in enumerate(layer.weights):
        columns = slice(d * layer.outputs, (d + 1) * layer.outputs)
        direction = Sweep(
            y[..., columns],
            dh_n[d],
            None,
            None if gates is None else gates[:, :, d],
            None if cells is None else cells[:, :, d],
        )
        start = (layer.h0[d], None if layer.c0 is None else layer.c0[d])
        dc = None if dc_n is None else dc_n[d]
        g = sweep_backward(layer.cell, grid, direction, w, start, dy[..., columns], dh_n[d], dc, reverse=d == 1)
        parts.append(g)
        of_weights += _weight_gradients(layer.cell, x, direction, g, needs.weights[d])
    dx = sum(g.dgx @ w.weight_ih for g, w in zip(parts, layer.weights, strict=True))
    assert isinstance(dx, Tensor)
    return [
        grid.inner(dx) if needs.x else None,
        torch.stack([g.dh0 for g in parts]) if needs.h0 else None,
        torch.stack([g.dc0 for g in parts if g.dc0 is not None]) if needs.c0 else None,
        *of_weights,
    ]
