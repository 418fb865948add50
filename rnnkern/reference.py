"""The oracle: a layer's sweeps over a sequence, forward and backward, in plain torch, around the equations of
reference_cells.py.

Slow, and meant to be read: any device, any dtype, differentiable any number of times. Every kernel is tested against
it, and second derivatives go through it (rnnkern/autograd.py).

A step t of the backward sweep, where dh and dc are what has reached its h and c:

    dh += dy_t                    dc += dcells_t
    (straight to h', dp) = zone'(dh)                       zoneout acts on the projected h
    dm = dp W_hr, or dp           (dgx, dgh, dc, ...) = the cell's backward of dm
    dgx, dgh = LN'(dgx), LN'(dgh)                          where products are normalised
    dh = (what goes straight) + mask * (dgh W_hh + du)     u = mask * h' is what met W_hh
    where t is reset: both go to the reset states, and dh = dc = 0
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern.backends import Cotangents, Layer, Needs, Saved, States
from rnnkern.cells import Weights
from rnnkern.packing import positions
from rnnkern.reference_cells import (
    Around,
    Before,
    Step,
    Zone,
    input_products,
    normalised,
    normalised_backward,
    recurrent_products,
    step,
    step_backward,
)


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

    def spread_any(self, rows: Tensor) -> Tensor:
        """Rows like those of y, of any dtype -> (T, B, ...)."""
        return self.spread(rows) if self.packed else rows

    def outer_cells(self, rows: Tensor) -> Tensor:
        """(T, B, D, H) or (N, D, H) in the rows of y -> (T, B, D, H)."""
        return self.outer(rows.flatten(-2)).view(self.steps, self.batch, *rows.shape[-2:])

    def inner_cells(self, grid: Tensor) -> Tensor:
        """`outer_cells` undone."""
        rows = self.inner(grid.flatten(-2))
        return rows.view(*rows.shape[:-1], *grid.shape[-2:])

    def mask(self, grid: Tensor) -> Tensor:
        return grid if self.active is None else torch.where(self.active, grid, torch.zeros_like(grid))

    def keep(self, t: int, new: Tensor, old: Tensor) -> Tensor:
        """`new` for the sequences that have a step t, `old` for the others."""
        return new if self.active is None else torch.where(self.active[t], new, old)

    def order(self, reverse: bool) -> list[int]:
        steps = list(range(self.steps))
        return steps[::-1] if reverse else steps


class _Direction:
    """What the two sweeps of one direction share: its weights, and what happens to a state between two steps."""

    def __init__(self, layer: Layer, grid: _Grid, d: int) -> None:
        self.cell, self.grid, self.weights, self.extras = layer.cell, grid, layer.weights[d], layer.extras
        self.order = grid.order(reverse=d == 1)
        self.start = (layer.h0[d], None if layer.c0 is None else layer.c0[d])
        extras, units, hidden = layer.extras, layer.outputs, layer.hidden
        self.x_factors = None if extras.input_mask is None else extras.input_mask[d]
        self.u_factors = None if extras.recurrent_mask is None else extras.recurrent_mask[d]
        self.mask_h, self.mask_c = (
            None if mask is None else grid.spread_any(mask)[..., d * n : (d + 1) * n]
            for mask, n in ((extras.zoneout_mask_h, units), (extras.zoneout_mask_c, hidden))
        )

    def zone_h(self, t: int) -> Zone:
        return Zone(None if self.mask_h is None else self.mask_h[t], self.extras.zoneout_h)

    def zone_c(self, t: int) -> Zone:
        return Zone(None if self.mask_c is None else self.mask_c[t], self.extras.zoneout_c)

    def masked(self, x: Tensor) -> Tensor:
        """x (T, B, I), or its gradient, times the input mask."""
        return x if self.x_factors is None else x * self.x_factors

    def to_recurrent(self, h: Tensor) -> Tensor:
        """h (B, P), or its gradient, times the recurrent mask."""
        return h if self.u_factors is None else h * self.u_factors

    def reset(self, t: int, h: Tensor, c: Tensor | None) -> Before:
        """The states of step t after its reset."""
        extras = self.extras
        if extras.reset is not None:
            h = torch.where(extras.reset[t].unsqueeze(1), _at(extras.reset_h, t, h), h)
            c = None if c is None else torch.where(extras.reset[t].unsqueeze(1), _at(extras.reset_c, t, c), c)
        return Before(h, c, self.to_recurrent(h))


def _at(given: Tensor | None, t: int, like: Tensor) -> Tensor:
    """The state that a reset at step t gives."""
    if given is None:
        return torch.zeros_like(like)
    return given if given.dim() == 2 else given[t]


class Sweep(NamedTuple):
    """One direction of a layer, padded."""

    y: Tensor  # (T, B, P)
    h_n: Tensor  # (B, P)
    c_n: Tensor | None  # (B, H)
    gates: Tensor | None  # (T, B, kept*H)
    cells: Tensor | None  # (T, B, H)


def sweep(at: _Direction, x: Tensor, kept: int) -> Sweep:
    """All steps of one direction; x (T, B, I). Keeps `kept` blocks of H a step."""
    gx = input_products(at.masked(x), at.weights)
    h, c = at.start
    ys: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}
    cells: dict[int, Tensor] = {}
    for t in at.order:
        before = at.reset(t, h, c)
        gh = recurrent_products(before.u, at.weights)
        new = step(at.cell, gx.full[t], gh.full, before, at.weights, at.zone_c(t))
        h_new = new.h if at.weights.weight_hr is None else new.h @ at.weights.weight_hr.t()
        h = ys[t] = at.grid.keep(t, at.zone_h(t).mix(before.h, h_new), h)
        if c is not None and new.c is not None:
            c = cells[t] = at.grid.keep(t, new.c, c)
        if kept:
            gates[t] = _kept(at, new, gx.product[t], gh.product)
    y, saved, all_c = ([values[t] for t in sorted(values)] for values in (ys, gates, cells))
    return Sweep(torch.stack(y), h, c, torch.stack(saved) if saved else None, torch.stack(all_c) if all_c else None)


def _kept(at: _Direction, new: Step, of_x: Tensor, of_h: Tensor) -> Tensor:
    """What a step keeps for backward (`CellSpec.kept`)."""
    parts = list(new.saved) if at.cell.saved or at.extras.zones else []
    if at.weights.ln_ih_weight is not None:
        parts += [of_x, of_h]
    return torch.cat(parts, -1)


def _side_by_side(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The directions' (T, B, n) as (T, B, D, n)."""
    present = [part for part in parts if part is not None]
    return torch.stack(present, 2) if present else None


def forward(layer: Layer, save: bool = True) -> States:
    """A layer's sweeps: the backend function, and what second derivatives are taken of."""
    grid = _Grid(layer)
    x = grid.outer(layer.x)
    kept = layer.kept if save else 0
    sweeps = [sweep(_Direction(layer, grid, d), x, kept) for d in range(len(layer.weights))]
    gates, cells = (_side_by_side([getattr(s, name) for s in sweeps]) for name in ("gates", "cells"))
    if cells is not None:
        cells = grid.inner_cells(cells) if layer.extras.states else grid.collect(cells) if save else None
    return States(
        grid.inner(torch.cat([s.y for s in sweeps], -1)),
        torch.stack([s.h_n for s in sweeps]),
        None if layer.c0 is None else torch.stack([s.c_n for s in sweeps if s.c_n is not None]),
        None if gates is None else grid.collect(gates),
        cells,
    )


class SweepGradients(NamedTuple):
    """The gradients of one direction, padded, and what met the weights."""

    dgx: Tensor  # (T, B, G*H): of x W_ih^T
    dgh: Tensor  # (T, B, G*H): of u W_hh^T
    dp: Tensor  # (T, B, P): of the projected h
    m: Tensor  # (T, B, H): h before the projection
    u: Tensor  # (T, B, P): what met W_hh
    last: Tensor  # (T, B, P): what met the last gate's part of it
    of_sums: dict[str, Tensor]  # by weight: gradients (T, B, n) that are only to be summed
    dreset_h: Tensor | None  # (T, B, P)
    dreset_c: Tensor | None  # (T, B, H)
    dh0: Tensor  # (B, P)
    dc0: Tensor | None  # (B, H)


def sweep_backward(
    at: _Direction, saved: Sweep, dy: Tensor, dcells: Tensor | None, dh: Tensor, dc: Tensor | None
) -> SweepGradients:
    """All steps of one direction, last to first, from the gradients of y, of all c and of the final states."""
    rows: dict[int, dict[str, Tensor]] = {}
    for index in reversed(range(len(at.order))):
        t = at.order[index]
        h, c = at.start
        if index > 0:
            previous = at.order[index - 1]
            h = at.grid.keep(previous, saved.y[previous], h)
            c = None if c is None or saved.cells is None else at.grid.keep(previous, saved.cells[previous], c)
        before = at.reset(t, h, c)
        dc_t = dc if dc is None or dcells is None else dc + dcells[t]
        found, dh_prev, dc_prev = _step_backward(at, t, saved, before, dh + dy[t], dc_t)
        rows[t] = {name: at.grid.keep(t, part, torch.zeros_like(part)) for name, part in found.items()}
        if at.extras.reset is not None:
            drops = at.extras.reset[t].unsqueeze(1)
            nothing = torch.zeros_like(dh_prev)
            rows[t]["reset_h"] = at.grid.keep(t, torch.where(drops, dh_prev, nothing), nothing)
            dh_prev = torch.where(drops, nothing, dh_prev)
            if dc_prev is not None:
                nothing = torch.zeros_like(dc_prev)
                rows[t]["reset_c"] = at.grid.keep(t, torch.where(drops, dc_prev, nothing), nothing)
                dc_prev = torch.where(drops, nothing, dc_prev)
        dh = at.grid.keep(t, dh_prev, dh)
        dc = None if dc is None or dc_prev is None else at.grid.keep(t, dc_prev, dc)
    all_rows = {name: torch.stack([rows[t][name] for t in range(at.grid.steps)]) for name in rows[0]}
    dgx, dgh, dp, m, u, last = (all_rows.pop(name) for name in ("dgx", "dgh", "dp", "m", "u", "last"))
    dreset_h, dreset_c = (all_rows.pop(name, None) for name in ("reset_h", "reset_c"))
    return SweepGradients(dgx, dgh, dp, m, u, last, all_rows, dreset_h, dreset_c, dh, dc)


def _step_backward(
    at: _Direction, t: int, saved: Sweep, before: Before, dh: Tensor, dc: Tensor | None
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Step t: its rows by name, and the gradients of the states before it, past the reset."""
    w, cell, hidden = at.weights, at.cell, at.weights.weight_hh.shape[0] // len(at.cell.gates)
    gates, c_t = None if saved.gates is None else saved.gates[t], None if saved.cells is None else saved.cells[t]
    zone_h, zone_c = at.zone_h(t), at.zone_c(t)
    count = len(cell.saved) or 1
    activations = (saved.y[t],) if gates is None else gates[..., : count * hidden].chunk(count, -1)
    if not cell.saved and not at.extras.zones:
        activations = (saved.y[t],)
    dh_old, dp = zone_h.split(dh)
    g = step_backward(
        cell,
        Around(activations, before, c_t, zone_c),
        w,
        dp if w.weight_hr is None else dp @ w.weight_hr,
        dc,
    )
    rows = {"dp": dp, "u": before.u, "bias_ih": g.dgx, "bias_hh": g.dgh, "m": dp, "last": before.u}
    if w.weight_hr is not None:
        assert before.c is not None
        i, f, gate, o = activations
        rows["m"] = o * normalised(f * before.c + i * gate, w.ln_c_weight, w.ln_c_bias).tanh()
    if cell.resets_before:
        rows["last"] = activations[0] * before.u
    dgx, dgh = g.dgx, g.dgh
    if w.ln_ih_weight is not None:
        assert gates is not None
        of_x, of_h = gates[..., -2 * dgx.shape[-1] :].chunk(2, -1)
        norm_x, norm_h = (
            normalised_backward(of_x, w.ln_ih_weight, dgx),
            normalised_backward(of_h, w.ln_hh_weight, dgh),
        )
        assert norm_x.dweight is not None
        assert norm_h.dweight is not None
        rows |= {"ln_ih_weight": norm_x.dweight, "ln_ih_bias": dgx}
        rows |= {"ln_hh_weight": norm_h.dweight, "ln_hh_bias": dgh}
        dgx, dgh = norm_x.dx, norm_h.dx
    if g.dnorm is not None:
        rows |= {"ln_c_weight": g.dnorm[0], "ln_c_bias": g.dnorm[1]}
    if g.dpeepholes is not None:
        rows["weight_ch"] = g.dpeepholes
    rows |= {"dgx": dgx, "dgh": dgh}
    through = dgh @ w.weight_hh
    if cell.resets_before:
        first = 2 * hidden
        through = dgh[..., :first] @ w.weight_hh[:first]
    return rows, dh_old + g.direct + at.to_recurrent(through + g.du), g.dc


def _weight_gradients(at: _Direction, x: Tensor, g: SweepGradients, wanted: Weights) -> list[Tensor | None]:
    """The gradients of one direction's weights where wanted: sums over all steps and sequences."""

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return left.flatten(0, 1).t() @ right.flatten(0, 1)

    found: dict[str, Tensor] = {name: rows.sum((0, 1)) for name, rows in g.of_sums.items()}
    found["weight_ih"] = outer(g.dgx, at.masked(x))
    found["weight_hh"] = outer(g.dgh, g.u)
    if at.cell.resets_before:
        first = found["weight_hh"].shape[0] // 3 * 2
        found["weight_hh"] = torch.cat([outer(g.dgh[..., :first], g.u), outer(g.dgh[..., first:], g.last)])
    if at.weights.weight_hr is not None:
        found["weight_hr"] = outer(g.dp, g.m)
    return [found[name] if want else None for name, want in wanted._asdict().items()]


def _with_gates(layer: Layer, saved: Saved) -> tuple[Layer, Saved]:
    """The call and what it has saved, computed anew where gates are not kept."""
    if not layer.extras.recompute:
        return layer, saved
    layer = layer._replace(extras=layer.extras._replace(recompute=False))
    return layer, saved._replace(gates=forward(layer).gates)


def backward(layer: Layer, saved: Saved, grads: Cotangents, needs: Needs) -> list[Tensor | None]:
    """A layer's sweeps backward: the backend function."""
    layer, saved = _with_gates(layer, saved)
    grid, extras = _Grid(layer), layer.extras
    x, y = grid.outer(layer.x), grid.outer(saved.y)
    gates = None if saved.gates is None else grid.spread(saved.gates)
    cells, dcells = (
        None if part is None else grid.outer_cells(part) if extras.states else grid.spread(part)
        for part in (saved.cells, grads.cells)
    )
    dy = torch.zeros_like(y) if grads.y is None else grid.outer(grads.y)
    dh_n = torch.zeros_like(layer.h0) if grads.h_n is None else grads.h_n
    dc_n = torch.zeros_like(layer.c0) if grads.c_n is None and layer.c0 is not None else grads.c_n
    parts: list[SweepGradients] = []
    of_weights: list[Tensor | None] = []
    directions = [_Direction(layer, grid, d) for d in range(len(layer.weights))]
    for d, at in enumerate(directions):
        columns = slice(d * layer.outputs, (d + 1) * layer.outputs)
        of_gates, of_cells, of_dcells = (None if part is None else part[:, :, d] for part in (gates, cells, dcells))
        kept = Sweep(y[..., columns], dh_n[d], None, of_gates, of_cells)
        g = sweep_backward(at, kept, dy[..., columns], of_dcells, dh_n[d], None if dc_n is None else dc_n[d])
        parts.append(g)
        of_weights += _weight_gradients(at, x, g, needs.weights[d])
    dx = sum(at.masked(g.dgx @ at.weights.weight_ih) for g, at in zip(parts, directions, strict=True))
    assert isinstance(dx, Tensor)
    return [
        grid.inner(dx) if needs.x else None,
        torch.stack([g.dh0 for g in parts]) if needs.h0 else None,
        torch.stack([g.dc0 for g in parts if g.dc0 is not None]) if needs.c0 else None,
        _of_reset(extras.reset_h, parts[0].dreset_h) if needs.reset_h else None,
        _of_reset(extras.reset_c, parts[0].dreset_c) if needs.reset_c else None,
        *of_weights,
    ]


def _of_reset(state: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """The gradient of a state that resets give, from those of all steps."""
    assert state is not None
    if rows is None:
        return torch.zeros_like(state)
    return rows if state.dim() == 3 else rows.sum(0)
