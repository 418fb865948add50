"""The forward sweep of one direction over a share of the sequences; the cell is compiled in.

    for each chunk of steps:    gx = x W_ih^T + b                    one product for all its rows
        for each step:          gh = h W_hh^T (+ gx, or + b_hh)      (c, h) = cell(gx, gh, c, h)

For each panel of units, gh of all sequences goes into rows that stay in L1, and from there through the cell.
h is double-buffered, since the other panels of a step still read the old one. Sequences leave (their state goes to h_n)
or join (their state is still h0) as the direction meets their ends.

A weight is read in panels (tile.py), or in place (blocks.py) where packing it would cost more than the products.
"""

from rnnkern.backends.numba_cpu.blocks import dot_units, pack_units
from rnnkern.backends.numba_cpu.jit import constants, inlined, shared, woven
from rnnkern.backends.numba_cpu.operands import Forward, read_operands
from rnnkern.backends.numba_cpu.sweep import (
    ahead,
    behind,
    clear_ended,
    common,
    copy_in_own,
    copy_out,
    copy_out_own,
    count_panels,
    gather,
    outer_row,
    outer_step,
    own_units,
    own_vectors,
    padded_bytes,
    panel_of,
    rows_in,
    saved_step,
    state_row,
    step_order,
    tile_height,
    wait_for_members,
)
from rnnkern.backends.numba_cpu.tile import CACHE_LINE, MAX_ROWS, MAX_VECTORS, tile
from rnnkern.backends.numba_cpu.vector import (
    VECTOR_BYTES,
    broadcast,
    flush_denormals,
    item_bytes,
    load_int,
    load_part,
    prefetch,
    restore_mode,
    store,
    store_part,
    vector_lanes,
)


@inlined
def units_per_panel(gates):
    """Vectors of units in a panel: the gates of one vector, or as many of a lone gate as a tile takes."""
    return 1 if gates > 1 else MAX_VECTORS


@woven
def pack_forward(a, gates, part, parts, zero):
    """Packs the weights that have panels."""
    if a.w_ih.panels != 0:
        pack_units(a.w_ih, 1, gates * a.sizes.hidden, a.sizes.inputs, MAX_VECTORS, part, parts, zero)
    if a.w_hh.panels != 0:
        pack_units(a.w_hh, gates, a.sizes.hidden, a.sizes.outputs, units_per_panel(gates), part, parts, zero)
    if a.w_hr.panels != 0:
        pack_units(a.w_hr, 1, a.sizes.outputs, a.sizes.hidden, MAX_VECTORS, part, parts, zero)


@woven
def panel_product(
    weight, gates, units, depth, v, width, after, rows, x, x_row, c0, c0_row, c0_column, c, c_row, c_column, zero
):  # fmt: skip
    """C (rows, gates*width vectors) = C0 + x (rows, depth) @ weight^T of the units from vector v on; those from vector
    `after` on come next."""
    lanes, columns = vector_lanes(zero), gates * width
    if weight.panels != 0:
        panel, panel_row = weight.panels + v * gates * depth * VECTOR_BYTES, columns * VECTOR_BYTES
        following, lines = weight.panels + after * gates * depth * VECTOR_BYTES, depth * panel_row // CACHE_LINE
        b = 0
        while b < rows:
            height = tile_height(rows - b, MAX_ROWS[columns])
            tile(
                height, columns, x + b * x_row, x_row, panel, panel_row, depth, ahead(following, lines, b, rows),
                c0 + b * c0_row, c0_row, c0_column, c + b * c_row, c_row, c_column, zero,
            )  # fmt: skip
            b += height
    else:
        for column in range(columns):
            unit = (v + column % width) * lanes
            dot_units(
                rows, weight.base + (column // width * units + unit) * weight.row, weight.row, units - unit,
                x, x_row, depth, c0 + column * c0_column, c0_row, c + column * c_column, c_row, zero,
            )  # fmt: skip


@inlined
def load_bias(target, source, gates, hidden, more, zero):
    """(gates, W): the bias of each gate, and another on top where there is one."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for gate in range(gates):
        for u in range(0, hidden, lanes):
            at = (gate * hidden + u) * item
            bias = broadcast(zero) if source == 0 else load_part(source + at, zero, hidden - u)
            if more != 0:
                bias = bias + load_part(more + at, zero, hidden - u)
            store(target + gate * padded_bytes(hidden, zero) + u * item, bias)


@inlined
def gx_bytes(gates, hidden, zero):
    """Bytes of a row of gx. A vector of the last gate's units may end as much as a vector behind the row."""
    return padded_bytes(gates * hidden, zero) + VECTOR_BYTES


@woven
def input_product(a, rows, own, space, gates, zero):
    """gx of the rows of a chunk, `own` vectors of all gates in a row."""
    inputs, units = a.sizes.inputs, gates * a.sizes.hidden
    x_row, gx_row, into = padded_bytes(inputs, zero), gx_bytes(gates, a.sizes.hidden, zero), common(a, space) + a.gx
    for v in range(own[0], own[1], MAX_VECTORS):
        width = min(MAX_VECTORS, own[1] - v)
        panel_product(
            a.w_ih, 1, units, inputs, v, width, v + width, rows, space + a.xs, x_row,
            space + a.b_x + v * VECTOR_BYTES, 0, VECTOR_BYTES, into + v * VECTOR_BYTES, gx_row, VECTOR_BYTES, zero,
        )  # fmt: skip


@shared
def cell_rows(
    rows, width, units, gh, gh_row, gx, gx_row, order, b, y, y_row, gates, gates_row, cells, cells_row, slot, c, c_row,
    h_old, h_new, h_row, new_row, projected, later, activations, cell, zero
):  # fmt: skip
    """The cell on `rows` sequences from b on and `width` vectors of units, of which `units` are real: each address is
    of the first of them, and strides lead to the next sequence. `later` are y, gates and cells of what is next written,
    fetched here: nobody has used them for long, and a store waits for its line. A function of its own, so that the
    constants of the gates stay in registers from row to row."""
    lanes, (y_later, gates_later, cells_later) = vector_lanes(zero), later
    for r in range(rows):
        along = (load_int(order + 8 * (b + r)) if order != 0 else b + r) * y_row
        place = y + along
        for w in range(width):
            at, count = w * VECTOR_BYTES, units - w * lanes
            kept = gates + r * gates_row + at if gates != 0 else 0
            if not projected:
                prefetch(y_later + along + at)
            if kept != 0:
                for block in range(activations):
                    prefetch(gates_later + r * gates_row + block * slot + at)
                if cells_later != 0:
                    prefetch(cells_later + r * cells_row + at)
            out = cell(
                gx + r * gx_row + at, slot, gh + r * gh_row + at, width * VECTOR_BYTES, kept, slot,
                cells + r * cells_row + at, c + r * c_row + at, h_old + r * h_row + at, count, zero,
            )  # fmt: skip
            store(h_new + r * new_row + at, out)
            if not projected:
                store_part(place + at, out, zero, count)


@inlined
def written_at(a, t, v, first):
    """Where step t of y, and of gates and cells if backward wants them, begins at vector v of the units."""
    at = v * VECTOR_BYTES
    return (
        outer_step(a.sizes, a.y, t) + at,
        behind(saved_step(a.sizes, a.gates, t), first * a.gates.row + at),
        behind(saved_step(a.sizes, a.cells, t), first * a.cells.row + at),
    )


@woven
def forward_step(a, s, t, rows, first, own, gx, h_old, h_new, space, gates, separate, activations, cell, zero):
    """Step t, the s-th of the sweep, of sequences first to first + rows, `own` units: from h_old to h_new (both
    (rows, W)), or to m with a projection."""
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    lanes, item, per_panel = vector_lanes(zero), item_bytes(zero), units_per_panel(gates)
    gate_row, h_row = padded_bytes(hidden, zero), padded_bytes(outputs, zero)
    gx_row, slot = gx_bytes(gates, hidden, zero), hidden * item
    column = slot if gates > 1 else VECTOR_BYTES
    out_row = gate_row if a.w_hr.base != 0 else h_row
    panels, t_next = count_panels(own.hidden, per_panel), step_order(a.sizes, min(s + 1, a.sizes.steps - 1))
    for p in range(panels):
        v, after = panel_of(own.hidden, per_panel, panels, p, s), panel_of(own.hidden, per_panel, panels, p + 1, s)
        width = min(per_panel, own.hidden[1] - v)
        gh, gh_row = space + a.tile, gates * width * VECTOR_BYTES
        panel_product(
            a.w_hh, gates, hidden, outputs, v, width, after, rows, h_old, h_row,
            (space + a.b_h if separate else gx) + v * VECTOR_BYTES, 0 if separate else gx_row, column,
            gh, gh_row, VECTOR_BYTES, zero,
        )  # fmt: skip
        y, kept, cells = written_at(a, t, v, first)
        later = written_at(a, t, after, first) if p + 1 < panels else written_at(a, t_next, v, first)
        cell_rows(
            rows, width, hidden - v * lanes, gh, gh_row, gx + v * VECTOR_BYTES, gx_row,
            a.sizes.order, first, y, a.y.row, kept, a.gates.row, cells, a.cells.row, slot,
            space + a.c + v * VECTOR_BYTES, gate_row,
            h_old + v * VECTOR_BYTES,
            (space + a.m if a.w_hr.base != 0 else h_new) + v * VECTOR_BYTES, h_row, out_row,
            a.w_hr.base != 0, later, activations, cell, zero,
        )  # fmt: skip


@woven
def project(a, t, rows, first, h_new, space, zero):
    """h = m W_hr^T of step t, into the state and the output."""
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    h_row, m_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
    vectors = h_row // VECTOR_BYTES
    for v in range(0, vectors, MAX_VECTORS):
        width = min(MAX_VECTORS, vectors - v)
        h = h_new + v * VECTOR_BYTES
        for b in range(rows):
            for j in range(width):
                store(h + b * h_row + j * VECTOR_BYTES, broadcast(zero))
        panel_product(
            a.w_hr, 1, outputs, hidden, v, width, v + width, rows, space + a.m, m_row,
            h, h_row, VECTOR_BYTES, h, h_row, VECTOR_BYTES, zero,
        )  # fmt: skip
    y_step = outer_step(a.sizes, a.y, t)
    for b in range(rows):
        copy_out(outer_row(a.sizes, a.y, y_step, first + b), h_new + b * h_row, outputs, zero)


@woven
def start_states(a, first, last, own, h, space, zero):
    """h0, in both buffers since sequences may join later, and c0; of `own` vectors."""
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    h_row, c_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
    for b in range(last - first):
        h0 = state_row(a.sizes, a.h0, first + b)
        copy_in_own(h + b * h_row, h0, own.outputs, outputs, zero)
        copy_in_own(h + (a.sizes.block + b) * h_row, h0, own.outputs, outputs, zero)
        if a.c_n.base != 0:
            copy_in_own(space + a.c + b * c_row, state_row(a.sizes, a.c0, first + b), own.hidden, hidden, zero)


@woven
def end_states(a, first, staying, rows, own, h, space, zero):
    """h_n and c_n of the sequences that have met their last step: of `rows`, those that do not stay."""
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    h_row, c_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
    for b in range(staying, rows):
        copy_out_own(state_row(a.sizes, a.h_n, first + b), h + b * h_row, own.outputs, outputs, zero)
        if a.c_n.base != 0:
            copy_out_own(state_row(a.sizes, a.c_n, first + b), space + a.c + b * c_row, own.hidden, hidden, zero)


CELL = constants()  # what a kernel has of its own: kernels.py compiles this sweep for every cell


def forward_sweep(address, first, last, share, zero):
    """Sequences [first, last) through all steps, with denormals flushed."""
    mode, a = flush_denormals(), read_operands(address, Forward)
    gates, separate = CELL.gates, CELL.separate
    sizes, space = a.sizes, a.workspace + share * a.workspace_bytes
    own, states = own_units(sizes, units_per_panel(gates), zero), common(a, space) + a.h
    gx_row, h_row = gx_bytes(gates, sizes.hidden, zero), padded_bytes(sizes.outputs, zero)
    own_gates = own_vectors(sizes, gates * sizes.hidden, MAX_VECTORS, zero)
    load_bias(space + a.b_x, a.b_ih, 1, gates * sizes.hidden, 0 if separate else a.b_hh, zero)
    if separate:
        load_bias(space + a.b_h, a.b_hh, 1, gates * sizes.hidden, 0, zero)
    for block in range(first, last, sizes.block):
        end = min(block + sizes.block, last)
        start_states(a, block, end, own, states, space, zero)
        wait_for_members(sizes)
        for chunk in range(0, sizes.steps, sizes.chunk):
            chunk_end = min(chunk + sizes.chunk, sizes.steps)
            n = 0
            for s in range(chunk, chunk_end):
                t = step_order(sizes, s)
                rows = rows_in(sizes, t, block, end)
                into = space + a.xs + n * padded_bytes(sizes.inputs, zero)
                gather(sizes, a.x, t, block, rows, sizes.inputs, into, zero)
                n += rows
            input_product(a, n, own_gates, space, gates, zero)
            wait_for_members(sizes)
            n = 0
            for s in range(chunk, chunk_end):
                t = step_order(sizes, s)
                rows = rows_in(sizes, t, block, end)
                h_old = states + (s % 2) * sizes.block * h_row
                h_new = states + ((s + 1) % 2) * sizes.block * h_row
                gx = common(a, space) + a.gx + n * gx_row
                forward_step(
                    a, s, t, rows, block, own, gx, h_old, h_new, space, gates, separate, CELL.activations, CELL.forward,
                    zero,
                )  # fmt: skip
                if a.w_hr.base != 0:
                    project(a, t, rows, block, h_new, space, zero)
                wait_for_members(sizes)
                clear_ended(sizes, a.y, t, block, end, sizes.outputs, zero)
                staying = rows_in(sizes, step_order(sizes, s + 1), block, end) if s + 1 < sizes.steps else 0
                end_states(a, block, staying, rows, own, h_new, space, zero)
                n += rows
    restore_mode(mode)
