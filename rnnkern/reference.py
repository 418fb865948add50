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

from rnnkern.backends import Gradients, Layer, Saved, States
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
    """Rows of a layer call as padded (T, B, ...), and back. In a packed call `active` (T, B, 1) tells which elements
    exist."""

    def __init__(self, layer: Layer) -> None:
        self.at: tuple[Tensor, Tensor] | None = None
        self.steps, self.batch = layer.x.shape[0], layer.h0.shape[1]
        self.active: Tensor | None = None
        if layer.batch_sizes is not None:
            self.steps = len(layer.batch_sizes)
            step_index, sequence = positions(layer.batch_sizes)
            self.at = (step_index.to(layer.x.device), sequence.to(layer.x.device))
            exists = torch.arange(self.batch, device="cpu").unsqueeze(0) < layer.batch_sizes.unsqueeze(1)
            self.active = exists.unsqueeze(-1).to(layer.x.device)

    def spread(self, rows: Tensor) -> Tensor:
        """(N, ...) -> (T, B, ...), zero where no row exists."""
        if self.at is None:
            return rows
        return rows.new_zeros(self.steps, self.batch, *rows.shape[1:]).index_put(self.at, rows)

    def collect(self, grid: Tensor) -> Tensor:
        """(T, B, ...) -> (N, ...)."""
        return grid if self.at is None else grid[self.at]

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


def _join(grid: _Grid, parts: Sequence[Tensor | None], dim: int, stack: bool) -> Tensor | None:
    """The directions' (T, B, n) side by side (stack: along a new dimension), as rows."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return grid.collect(torch.stack(present, dim) if stack else torch.cat(present, dim))


def forward(layer: Layer, save: bool = True) -> States:
    """A layer's sweeps: the backend function, and what second derivatives are taken of."""
    grid = _Grid(layer)
    x = grid.spread(layer.x)
    sweeps = [
        sweep(layer.cell, grid, x, w, layer.h0[d], None if layer.c0 is None else layer.c0[d], reverse=d == 1)
        for d, w in enumerate(layer.weights)
    ]
    y = _join(grid, [s.y for s in sweeps], -1, stack=False)
    assert y is not None
    return States(
        y,
        torch.stack([s.h_n for s in sweeps]),
        None if layer.c0 is None else torch.stack([s.c_n for s in sweeps if s.c_n is not None]),
        _join(grid, [s.gates for s in sweeps], 2, stack=True) if save else None,
        _join(grid, [s.cells for s in sweeps], 2, stack=True) if save else None,
    )


class SweepGradients(NamedTuple):
    """The gradients of one direction, padded."""

    dgx: Tensor
    dgh: Tensor
    dp: Tensor
    dh0: Tensor
    dc0: Tensor | None


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
    dgx, dgh, dp = {}, {}, {}
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
        dgx[t], dgh[t], dp[t] = (grid.keep(t, part, torch.zeros_like(part)) for part in (g.dgx, g.dgh, dh_t))
        dh = grid.keep(t, g.direct + g.dgh @ w.weight_hh, dh)
        if dc is not None and g.dc is not None:
            dc = grid.keep(t, g.dc, dc)
    all_dgx, all_dgh, all_dp = (torch.stack([part[t] for t in range(grid.steps)]) for part in (dgx, dgh, dp))
    return SweepGradients(all_dgx, all_dgh, all_dp, dh, dc)


def backward(layer: Layer, saved: Saved, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None) -> Gradients:
    """A layer's sweeps backward: the backend function."""
    grid = _Grid(layer)
    y = grid.spread(saved.y)
    gates, cells = (None if part is None else grid.spread(part) for part in (saved.gates, saved.cells))
    dy = torch.zeros_like(y) if dy is None else grid.spread(dy)
    dh_n = torch.zeros_like(layer.h0) if dh_n is None else dh_n
    dc_n = torch.zeros_like(layer.c0) if dc_n is None and layer.c0 is not None else dc_n
    parts = []
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
        parts.append(
            sweep_backward(layer.cell, grid, direction, w, start, dy[..., columns], dh_n[d], dc, reverse=d == 1)
        )
    dgx, dgh, dp = (_join(grid, [getattr(p, name) for p in parts], 2, stack=True) for name in ("dgx", "dgh", "dp"))
    assert dgx is not None
    assert dgh is not None
    return Gradients(
        dgx,
        dgh if layer.cell.separate else dgx,
        None if layer.weights[0].weight_hr is None else dp,
        torch.stack([p.dh0 for p in parts]),
        None if layer.c0 is None else torch.stack([p.dc0 for p in parts if p.dc0 is not None]),
    )
