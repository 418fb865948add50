"""The two recurrent sweeps of one direction of a layer, over a range of batch rows; the cell is compiled in.

Memory. T steps, B rows, I inputs, H units, P outputs (H, or proj_size), lanes units a vector; everything in the dtype
of `zero`.

    x, y, gates, cells, d*   `Rows`: row b of step t lies at base + t*step + (starts[t] + b)*row. A padded layout has
                             starts = 0; packed rows have step = 0 and starts = the row where step t begins. counts[t]
                             rows take part in step t: the sequences are sorted by length, longest first, so that they
                             are always the first rows.
    w_*                      packed panels (tile.py)
    h (2,B,W) c (B,W) ...    carried in the caller's workspace, W = units rounded up to whole vectors, so that no load
                             there needs a mask

A thread runs a whole sweep over rows [first, last) and shares nothing it writes: no barrier. Forward takes the steps in
the order of its direction, and so do the counts fall (rows leave, their state goes to h_n) or rise (rows join, their
state is still h0). For each panel and tile of rows, both products go into `scratch` (in L1) and through the cell. h is
double-buffered, since the other panels of a step still read the old one. Backward takes the steps in the opposite
order:

    dh += dy_t;  (dgx_t, dgh_t, dc, direct) = cell'(dh, dc, saved_t);  dh = direct + dgh_t W_hh

with dh starting as dh_n and ending as dh0, for rows that join and leave as well. With a projection h = m W_hr^T the
products in between are dm = dh W_hr, and `dp` keeps dh for the gradient of W_hr.
"""

from typing import NamedTuple

from rnnkern.backends.numba_cpu.jit import inlined, woven
from rnnkern.backends.numba_cpu.tile import MAX_ROWS, MAX_VECTORS, tile
from rnnkern.backends.numba_cpu.vector import (
    VECTOR_BYTES,
    broadcast,
    item_bytes,
    load,
    load_int,
    load_part,
    store,
    store_part,
    vector_lanes,
)


class Rows(NamedTuple):
    """Where the rows of a buffer lie, in bytes; base 0 where there is no such buffer."""

    base: int
    step: int
    row: int


class Forward(NamedTuple):
    """The operands of a forward sweep: sizes, addresses, and rows of buffers."""

    steps: int
    reverse: int
    inputs: int  # I
    hidden: int  # H
    outputs: int  # P
    starts: int  # (T) int64
    counts: int  # (T) int64
    x: Rows  # (T, B, I)
    y: Rows  # (T, B, P) written
    gates: Rows  # (T, B, saved gates * H) written, or none in inference
    cells: Rows  # (T, B, H) written, or none
    h0: Rows  # (B, P)
    c0: Rows  # (B, H), or none
    h_n: Rows  # (B, P) written
    c_n: Rows  # (B, H) written, or none
    w_ih: int  # panels (I, G, vectors, lanes)
    w_hh: int  # panels (P, G, vectors, lanes)
    w_hr: int  # panels (H, vectors, lanes), or 0
    b_x: int  # panels (1, G, vectors, lanes): the bias that the input product starts from
    b_h: int  # panels likewise: the bias that the recurrent product starts from, where the cell keeps the two apart
    h: Rows  # (2, B, W) workspace
    c: Rows  # (B, W) workspace
    m: Rows  # (B, W) workspace: the cell's output before the projection


class Backward(NamedTuple):
    """The operands of a backward sweep."""

    steps: int
    reverse: int
    hidden: int
    outputs: int
    recurrent: int  # G*H, the depth of the product with W_hh
    starts: int
    counts: int
    gates: Rows  # (T, B, saved gates * H), or none
    cells: Rows  # (T, B, H), or none
    y: Rows  # (T, B, P)
    h0: Rows  # (B, P)
    c0: Rows  # (B, H), or none
    dy: Rows  # (T, B, P), or none
    dh_n: Rows  # (B, P), or none
    dc_n: Rows  # (B, H), or none
    dgx: Rows  # (T, B, G*H) written
    dgh: Rows  # (T, B, G*H) written where the cell keeps the two apart, else dgx
    dp: Rows  # (T, B, P) written with a projection, else none
    dh0: Rows  # (B, P) written
    dc0: Rows  # (B, H) written, or none
    w_hh: int  # panels (G*H, vectors, lanes)
    w_hr: int  # panels (P, vectors, lanes), or 0
    dh: Rows  # (B, W) workspace
    dc: Rows  # (B, W) workspace
    dm: Rows  # (B, W) workspace with a projection


@inlined
def row_at(rows, t, start, b):
    return rows.base + t * rows.step + (start + b) * rows.row


@inlined
def tile_height(rows, most):
    """Rows of the next tile: as many tiles as needed, of nearly equal height."""
    tiles = (rows + most - 1) // most
    return (rows + tiles - 1) // tiles


@inlined
def copy_in(target, source, units, zero):
    """`units` numbers into a workspace row, zeros behind them to the end of the vector; all zeros where there is no
    source."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for u in range(0, units, lanes):
        store(target + u * item, broadcast(zero) if source == 0 else load_part(source + u * item, zero, units - u))


@inlined
def copy_out(target, source, units, zero):
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for u in range(0, units, lanes):
        store_part(target + u * item, load(source + u * item, zero), zero, units - u)


@woven
def product(rows, a, a_row, panels, depth, units, c, c_row, zero):
    """c (rows, units) += a (rows, depth) @ the packed weight, panel by panel."""
    lanes = vector_lanes(zero)
    vectors = (units + lanes - 1) // lanes
    for v in range(0, vectors, MAX_VECTORS):
        width = min(MAX_VECTORS, vectors - v)
        panel = panels + v * depth * VECTOR_BYTES
        b = 0
        while b < rows:
            height = tile_height(rows - b, MAX_ROWS[width])
            at = c + b * c_row + v * VECTOR_BYTES
            tile(height, width, a + b * a_row, a_row, panel, depth, at, c_row, at, c_row, zero)
            b += height


@inlined
def step_order(steps, reverse, s):
    """The step that a sweep in this direction takes as its s-th."""
    return steps - 1 - s if reverse else s


@inlined
def rows_in(a, t, first, last):
    """How many rows of [first, last) take part in step t."""
    return max(0, min(load_int(a.counts + 8 * t), last) - first)


@woven
def forward_step(a, t, start, rows, first, h_old, h_new, scratch, gates, separate, cell, zero):
    """Step t of rows first to first + rows: from h_old to h_new (both (rows, W)), or to m with a projection."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    vectors = (a.hidden + lanes - 1) // lanes
    per_panel = MAX_VECTORS // gates
    slot = a.hidden * item
    for v in range(0, vectors, per_panel):
        width = min(per_panel, vectors - v)
        columns = gates * width
        spacing, scratch_row = width * VECTOR_BYTES, columns * VECTOR_BYTES
        before = v * gates * VECTOR_BYTES  # bytes of the panels before this one, for each unit of depth
        b = 0
        while b < rows:
            height = tile_height(rows - b, MAX_ROWS[columns])
            gx = scratch
            gh = scratch + MAX_ROWS[columns] * scratch_row if separate else scratch
            x = row_at(a.x, t, start, first + b)
            tile(
                height,
                columns,
                x,
                a.x.row,
                a.w_ih + before * a.inputs,
                a.inputs,
                a.b_x + before,
                0,
                gx,
                scratch_row,
                zero,
            )
            sum_from, sum_row = (a.b_h + before, 0) if separate else (gx, scratch_row)
            h = h_old + b * a.h.row
            tile(
                height,
                columns,
                h,
                a.h.row,
                a.w_hh + before * a.outputs,
                a.outputs,
                sum_from,
                sum_row,
                gh,
                scratch_row,
                zero,
            )
            for j in range(height * width):
                r, unit = b + j // width, (v + j % width) * lanes
                at, count = unit * item, a.hidden - unit
                in_tile = (j // width) * scratch_row + (j % width) * VECTOR_BYTES
                saved = row_at(a.gates, t, start, first + r) + at if a.gates.base != 0 else 0
                cells = row_at(a.cells, t, start, first + r) + at
                c = a.c.base + (first + r) * a.c.row + at
                out = cell(
                    gx + in_tile, gh + in_tile, spacing, saved, slot, cells, c, h_old + r * a.h.row + at, count, zero
                )
                if a.w_hr != 0:
                    store(a.m.base + (first + r) * a.m.row + at, out)
                else:
                    store(h_new + r * a.h.row + at, out)
                    store_part(row_at(a.y, t, start, first + r) + at, out, zero, count)
            b += height


@woven
def project(a, t, start, rows, first, h_new, zero):
    """h = m W_hr^T of step t, into the state and the output."""
    for b in range(rows):
        copy_in(h_new + b * a.h.row, 0, a.outputs, zero)
    m = a.m.base + first * a.m.row
    product(rows, m, a.m.row, a.w_hr, a.hidden, a.outputs, h_new, a.h.row, zero)
    for b in range(rows):
        copy_out(row_at(a.y, t, start, first + b), h_new + b * a.h.row, a.outputs, zero)


@woven
def forward_sweep(a, first, last, scratch, gates, separate, cell, zero):
    """Rows [first, last) through all steps. `gates`, `separate` and `cell` are constants of the kernel."""
    h = a.h.base + first * a.h.row
    for b in range(first, last):
        for buffer in range(2):
            copy_in(a.h.base + buffer * a.h.step + b * a.h.row, a.h0.base + b * a.h0.row, a.outputs, zero)
        if a.c0.base != 0:
            copy_in(a.c.base + b * a.c.row, a.c0.base + b * a.c0.row, a.hidden, zero)
    for s in range(a.steps):
        t = step_order(a.steps, a.reverse, s)
        rows, start = rows_in(a, t, first, last), load_int(a.starts + 8 * t)
        h_old, h_new = h + (s % 2) * a.h.step, h + ((s + 1) % 2) * a.h.step
        forward_step(a, t, start, rows, first, h_old, h_new, scratch, gates, separate, cell, zero)
        if a.w_hr != 0:
            project(a, t, start, rows, first, h_new, zero)
        staying = rows_in(a, step_order(a.steps, a.reverse, s + 1), first, last) if s + 1 < a.steps else 0
        for b in range(staying, rows):
            copy_out(a.h_n.base + (first + b) * a.h_n.row, h_new + b * a.h.row, a.outputs, zero)
            if a.c0.base != 0:
                copy_out(a.c_n.base + (first + b) * a.c_n.row, a.c.base + (first + b) * a.c.row, a.hidden, zero)


@woven
def add_output_gradient(a, t, start, rows, first, zero):
    """dh += dy_t, and with a projection dp_t = dh and dm = dh W_hr."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for b in range(first, first + rows):
        dh, dy = a.dh.base + b * a.dh.row, row_at(a.dy, t, start, b)
        if a.dy.base != 0:
            for u in range(0, a.outputs, lanes):
                at = u * item
                store(dh + at, load(dh + at, zero) + load_part(dy + at, zero, a.outputs - u))
        if a.w_hr != 0:
            copy_out(row_at(a.dp, t, start, b), dh, a.outputs, zero)
            copy_in(a.dm.base + b * a.dm.row, 0, a.hidden, zero)
    if a.w_hr != 0:
        dh, dm = a.dh.base + first * a.dh.row, a.dm.base + first * a.dm.row
        product(rows, dh, a.dh.row, a.w_hr, a.outputs, a.hidden, dm, a.dm.row, zero)
        for b in range(first, first + rows):
            copy_in(a.dh.base + b * a.dh.row, 0, a.outputs, zero)


@woven
def backward_step(a, s, t, start, first, rows, cell, zero):
    """The cell's gradients at step t, the s-th of the forward sweep; leaves in dh what reaches h_{t-1} past W_hh."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    slot = a.hidden * item
    t_prev = step_order(a.steps, a.reverse, s - 1) if s > 0 else t
    start_prev = load_int(a.starts + 8 * t_prev)
    continuing = (
        rows_in(a, t_prev, first, first + rows) if s > 0 else 0
    )  # the rows whose previous state is a step's, not h0
    incoming = a.dm if a.w_hr != 0 else a.dh
    for r in range(rows):
        b = first + r
        h_prev = row_at(a.y, t_prev, start_prev, b) if r < continuing else a.h0.base + b * a.h0.row
        c_prev = row_at(a.cells, t_prev, start_prev, b) if r < continuing else a.c0.base + b * a.c0.row
        gates, cells, y = row_at(a.gates, t, start, b), row_at(a.cells, t, start, b), row_at(a.y, t, start, b)
        dgx, dgh = row_at(a.dgx, t, start, b), row_at(a.dgh, t, start, b)
        dh, dc = incoming.base + b * incoming.row, a.dc.base + b * a.dc.row
        for u in range(0, a.hidden, lanes):
            at, count = u * item, a.hidden - u
            direct = cell(
                load(dh + at, zero),
                gates + at,
                slot,
                cells + at,
                c_prev + at,
                y + at,
                h_prev + at,
                dc + at,
                dgx + at,
                dgh + at,
                count,
                zero,
            )
            store(dh + at, direct)


@woven
def backward_sweep(a, first, last, cell, zero):
    """Rows [first, last) back through all steps."""
    for b in range(first, last):
        copy_in(a.dh.base + b * a.dh.row, a.dh_n.base + b * a.dh_n.row, a.outputs, zero)
        if a.c0.base != 0:
            copy_in(a.dc.base + b * a.dc.row, a.dc_n.base + b * a.dc_n.row, a.hidden, zero)
    for s in range(a.steps - 1, -1, -1):
        t = step_order(a.steps, a.reverse, s)
        rows, start = rows_in(a, t, first, last), load_int(a.starts + 8 * t)
        add_output_gradient(a, t, start, rows, first, zero)
        backward_step(a, s, t, start, first, rows, cell, zero)
        dgh, dh = row_at(a.dgh, t, start, first), a.dh.base + first * a.dh.row
        product(rows, dgh, a.dgh.row, a.w_hh, a.recurrent, a.outputs, dh, a.dh.row, zero)
    for b in range(first, last):
        copy_out(a.dh0.base + b * a.dh0.row, a.dh.base + b * a.dh.row, a.outputs, zero)
        if a.c0.base != 0:
            copy_out(a.dc0.base + b * a.dc0.row, a.dc.base + b * a.dc.row, a.hidden, zero)
