"""The backward sweep of one direction over a share of the sequences; the cell is compiled in.

Steps go in the opposite order of the forward sweep:

    dh += dy_t;  (dgx_t, dgh_t, dc, direct) = cell'(dh, dc, saved_t);  dh = direct + dgh_t W_hh

with dh starting as dh_n and ending as dh0, for sequences that join and leave as well. With a projection h = m W_hr^T
the product in between is dm = dh W_hr. The gradients of a chunk's pre-activations, and next to them what met the
weights there, wait in the workspace; what is left of them is products, once for all rows of the chunk:

    dx = dgx W_ih    dW_ih += dgx^T x    dW_hh += dgh^T h'    db_ih += sum dgx    db_hh += sum dgh    dW_hr += dp^T m

so that no gradient of a pre-activation ever exists for the whole sequence. Each share has sums of its own for the
weights; Python adds those of the shares in their order, so that results do not depend on which thread was first.
"""

from rnnkern.backends.numba_cpu.blocks import pack_depth
from rnnkern.backends.numba_cpu.jit import constants, inlined, woven
from rnnkern.backends.numba_cpu.operands import Backward, read_operands
from rnnkern.backends.numba_cpu.sweep import (
    apart_bytes,
    clear_ended,
    common,
    copy_in,
    copy_out_own,
    outer_row,
    outer_step,
    own_units,
    padded_bytes,
    product,
    rows_in,
    saved_step,
    state_row,
    step_order,
    wait_for_members,
)
from rnnkern.backends.numba_cpu.tile import CACHE_LINE, MAX_ROWS, MAX_VECTORS, outer_tile
from rnnkern.backends.numba_cpu.vector import (
    VECTOR_BYTES,
    broadcast,
    flush_denormals,
    item_bytes,
    load,
    load_part,
    prefetch,
    restore_mode,
    store,
    store_part,
    vector_lanes,
)

# Of an outer product, so many units: a multiple of the rows of every tile.
UNITS_PART = 480


@woven
def pack_backward(a, gates, part, parts, zero):
    """Packs the weights that have panels."""
    recurrent = gates * a.sizes.hidden
    if a.w_ih.panels != 0:
        pack_depth(a.w_ih, recurrent, a.sizes.inputs, MAX_VECTORS, part, parts, zero)
    if a.w_hh.panels != 0:
        pack_depth(a.w_hh, recurrent, a.sizes.outputs, MAX_VECTORS, part, parts, zero)
    if a.w_hr.panels != 0:
        pack_depth(a.w_hr, a.sizes.outputs, a.sizes.hidden, MAX_VECTORS, part, parts, zero)


@woven
def outer_product(rows, a, a_row, a_units, b, b_row, b_units, into, fresh, tile, zero):
    """into (a_units, b_units) = the sum over rows of a^T b, or on top of what is there unless `fresh`. Zeros lie one
    vector row before `tile`, by way of which the edges go. The units of a are taken in parts that stay in the second
    cache while they meet all of b."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    vectors, into_row = (b_units + lanes - 1) // lanes, b_units * item
    zeros = tile - MAX_VECTORS * VECTOR_BYTES
    for begin in range(0, a_units, UNITS_PART):
        end = min(begin + UNITS_PART, a_units)
        for v in range(0, vectors, MAX_VECTORS):
            width = min(MAX_VECTORS, vectors - v)
            panel, tile_row, most = b + v * VECTOR_BYTES, width * VECTOR_BYTES, MAX_ROWS[width]
            for unit in range(begin, end, most):
                at, tall = into + unit * into_row + v * VECTOR_BYTES, min(most, end - unit)
                for r in range(most, min(2 * most, end - unit)):  # what the next tile adds to
                    for line in range(width + 1):
                        prefetch(at + r * into_row + line * CACHE_LINE)
                whole = tall == most and (v + width) * lanes <= b_units
                before, before_row = (at, into_row) if whole and not fresh else (zeros, 0)
                to, to_row = (at, into_row) if whole else (tile, tile_row)
                outer_tile(width, a + unit * item, a_row, panel, b_row, rows, before, before_row, to, to_row, zero)
                for r in range(0 if whole else tall):
                    for j in range(width):
                        value, count = load(tile + r * tile_row + j * VECTOR_BYTES, zero), b_units - (v + j) * lanes
                        add_part(at + r * into_row + j * VECTOR_BYTES, value, count, fresh, zero)


@inlined
def add_part(into, value, count, fresh, zero):
    """The first `count` numbers of a vector into memory, or on top of what is there unless `fresh`."""
    if not fresh:
        value = value + load_part(into, zero, count)
    store_part(into, value, zero, count)


@inlined
def sum_rows(rows, a, a_row, units, into, fresh, zero):
    """into (units) = the sum of the rows, or on top of what is there unless `fresh`. As far as they go, four vectors at
    a time: each addition waits for the one before."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    together = units // (4 * lanes) * 4 * lanes
    for u in range(0, together, 4 * lanes):
        first, second, third, fourth = broadcast(zero), broadcast(zero), broadcast(zero), broadcast(zero)
        for n in range(rows):
            row = a + n * a_row + u * item
            first, second = first + load(row, zero), second + load(row + VECTOR_BYTES, zero)
            third = third + load(row + 2 * VECTOR_BYTES, zero)
            fourth = fourth + load(row + 3 * VECTOR_BYTES, zero)
        at = into + u * item
        add_part(at, first, lanes, fresh, zero)
        add_part(at + VECTOR_BYTES, second, lanes, fresh, zero)
        add_part(at + 2 * VECTOR_BYTES, third, lanes, fresh, zero)
        add_part(at + 3 * VECTOR_BYTES, fourth, lanes, fresh, zero)
    for u in range(together, units, lanes):
        total = broadcast(zero)
        for n in range(rows):
            total = total + load_part(a + n * a_row + u * item, zero, units - u)
        add_part(into + u * item, total, units - u, fresh, zero)


@woven
def weight_gradients(a, rows, share, own, fresh, space, gates, zero):
    """Adds what the rows of a chunk give to the gradients of weights and biases: of all units, for the sums of this
    share, or of a member's units, for the only sum there is."""
    item, hidden = item_bytes(zero), a.sizes.hidden
    recurrent, sum_of = gates * hidden, 0 if a.sizes.members > 1 else share  # a member's share is its number
    for gate in range(gates if a.sizes.members > 1 else 1):
        first = gate * hidden + own.hidden[0] * vector_lanes(zero)
        last = min(gate * hidden + own.hidden[1] * vector_lanes(zero), (gate + 1) * hidden)
        if a.sizes.members == 1:
            last = recurrent  # in one go
        if first < last:
            gate_gradients(a, rows, first, last - first, sum_of * recurrent, fresh, space, zero)
    if a.dw_hr != 0:
        outputs = a.sizes.outputs
        dp_row, m_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
        into = a.dw_hr + share * outputs * hidden * item
        outer_product(
            rows, space + a.dp, dp_row, outputs, space + a.ms, m_row, hidden, into, fresh, space + a.tile, zero
        )


@woven
def gate_gradients(a, rows, first, count, sums, fresh, space, zero):
    """Adds what belongs to `count` pre-activations from `first` on to the gradients that start at row `sums`."""
    item, inputs, outputs, at = item_bytes(zero), a.sizes.inputs, a.sizes.outputs, sums + first
    x_row, h_row, tile = apart_bytes(inputs, zero), apart_bytes(outputs, zero), space + a.tile
    dgx, dgh = common(a, space) + a.dgx + first * item, common(a, space) + a.dgh + first * item
    if a.dw_ih != 0:
        into = a.dw_ih + at * inputs * item
        outer_product(rows, dgx, a.dg_row, count, space + a.xs, x_row, inputs, into, fresh, tile, zero)
    if a.dw_hh != 0:
        into = a.dw_hh + at * outputs * item
        outer_product(rows, dgh, a.dg_row, count, space + a.hs, h_row, outputs, into, fresh, tile, zero)
    if a.db_ih != 0:
        sum_rows(rows, dgx, a.dg_row, count, a.db_ih + at * item, fresh, zero)
    if a.db_hh != 0:
        sum_rows(rows, dgh, a.dg_row, count, a.db_hh + at * item, fresh, zero)


@woven
def input_gradients(a, chunk, chunk_end, first, last, rows, own, space, gates, zero):
    """dx of the rows of a chunk, by way of the rows of x, which nobody reads any more."""
    sizes, x_row = a.sizes, apart_bytes(a.sizes.inputs, zero)
    for n in range(rows):
        copy_in(space + a.xs + n * x_row, 0, sizes.inputs, zero)
    product(
        rows, common(a, space) + a.dgx, a.dg_row, a.w_ih, gates * sizes.hidden, own.inputs, 0, space + a.xs, x_row, zero
    )
    n = 0
    for s in range(chunk_end - 1, chunk - 1, -1):
        t = step_order(sizes, s)
        dx_step = outer_step(sizes, a.dx, t)
        for b in range(rows_in(sizes, t, first, last)):
            dx = outer_row(sizes, a.dx, dx_step, first + b)
            copy_out_own(dx, space + a.xs + n * x_row, own.inputs, sizes.inputs, zero)
            n += 1
        clear_ended(sizes, a.dx, t, first, last, sizes.inputs, zero)


@woven
def add_output_gradient(a, t, n, rows, first, own, space, zero):
    """dh += dy_t, and with a projection dp_t = dh and dm = dh W_hr."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    dh_row, dm_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
    dh, dm = space + a.dh, space + a.dm
    if a.dy.base != 0:
        dy_step = outer_step(a.sizes, a.dy, t)
        for b in range(rows):
            dy = outer_row(a.sizes, a.dy, dy_step, first + b)
            for u in range(own.outputs[0] * lanes, min(own.outputs[1] * lanes, outputs), lanes):
                at = dh + b * dh_row + u * item
                store(at, load(at, zero) + load_part(dy + u * item, zero, outputs - u))
    if a.w_hr.base != 0:
        for b in range(rows):
            copy_in(space + a.dp + (n + b) * dh_row, dh + b * dh_row, outputs, zero)
            copy_in(dm + b * dm_row, 0, hidden, zero)
        product(rows, dh, dh_row, a.w_hr, outputs, (0, dm_row // VECTOR_BYTES), 0, dm, dm_row, zero)
        for b in range(rows):
            copy_in(dh + b * dh_row, 0, outputs, zero)


@woven
def backward_step(a, s, t, n, first, rows, own, space, activations, cell, zero):
    """The cell's gradients at step t, the s-th of the forward sweep, into rows n and following of the chunk; leaves in
    dh what reaches h_{t-1} past W_hh. What the step that comes next will read, and nobody has since the forward sweep,
    is fetched."""
    sizes, lanes, item = a.sizes, vector_lanes(zero), item_bytes(zero)
    hidden, inputs, outputs = a.sizes.hidden, a.sizes.inputs, a.sizes.outputs
    hidden_row, dh_row = padded_bytes(hidden, zero), padded_bytes(outputs, zero)
    x_row, h_row = apart_bytes(inputs, zero), apart_bytes(outputs, zero)
    slot = hidden * item
    t_prev = step_order(sizes, s - 1) if s > 0 else t
    # the rows whose previous state is a step's, not an initial one
    continuing = rows_in(sizes, t_prev, first, first + rows) if s > 0 else 0
    x_step, y_step, before_step = outer_step(sizes, a.x, t), outer_step(sizes, a.y, t), outer_step(sizes, a.y, t_prev)
    gates_step, cells_step = saved_step(sizes, a.gates, t), saved_step(sizes, a.cells, t)
    cells_before = saved_step(sizes, a.cells, t_prev)
    t_before = step_order(sizes, max(s - 2, 0))
    next_gates, next_cells = saved_step(sizes, a.gates, t_prev), saved_step(sizes, a.cells, t_before)
    next_dy, next_y = outer_step(sizes, a.dy, t_prev), outer_step(sizes, a.y, t_before)
    for r in range(rows):
        b = first + r
        x, h_prev = space + a.xs + (n + r) * x_row, space + a.hs + (n + r) * h_row
        if a.dw_ih != 0:
            copy_in(x, outer_row(sizes, a.x, x_step, b), inputs, zero)
        before = outer_row(sizes, a.y, before_step, b) if r < continuing else state_row(sizes, a.h0, b)
        copy_in(h_prev, before, outputs, zero)
        c_prev = cells_before + b * a.cells.row if r < continuing else state_row(sizes, a.c0, b)
        gates, cells = gates_step + b * a.gates.row, cells_step + b * a.cells.row
        y = outer_row(sizes, a.y, y_step, b)
        dg = common(a, space) + (n + r) * a.dg_row
        projected = a.w_hr.base != 0
        dh = space + a.dm + r * hidden_row if projected else space + a.dh + r * dh_row
        dc = space + a.dc + r * hidden_row
        soon_gates, soon_cells = next_gates + b * a.gates.row, next_cells + b * a.cells.row
        soon_dy, soon_y = outer_row(sizes, a.dy, next_dy, b), outer_row(sizes, a.y, next_y, b)
        for u in range(own.hidden[0] * lanes, min(own.hidden[1] * lanes, hidden), lanes):
            at = u * item
            for block in range(activations):
                prefetch(soon_gates + block * slot + at)
            if a.cells.base != 0:
                prefetch(soon_cells + at)
            if a.dy.base != 0:
                prefetch(soon_dy + at)
            prefetch(soon_y + at)
            m = space + a.ms + (n + r) * hidden_row + at if projected else 0
            direct = cell(
                load(dh + at, zero), gates + at, slot, cells + at, c_prev + at, y + at, h_prev + at, dc + at,
                dg + a.dgx + at, dg + a.dgh + at, m, hidden - u, zero,
            )  # fmt: skip
            store(dh + at, direct)


@woven
def start_gradients(a, first, last, space, zero):
    """dh_n and dc_n, and the zeros that sums start from."""
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    for j in range(MAX_VECTORS):
        store(space + a.tile + (j - MAX_VECTORS) * VECTOR_BYTES, broadcast(zero))
    for b in range(last - first):
        dh, dc = space + a.dh + b * padded_bytes(outputs, zero), space + a.dc + b * padded_bytes(hidden, zero)
        copy_in(dh, state_row(a.sizes, a.dh_n, first + b), outputs, zero)
        if a.dc0.base != 0:
            copy_in(dc, state_row(a.sizes, a.dc_n, first + b), hidden, zero)


@woven
def end_gradients(a, first, last, own, space, zero):
    """dh0 and dc0."""
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    for b in range(last - first):
        dh, dc = space + a.dh + b * padded_bytes(outputs, zero), space + a.dc + b * padded_bytes(hidden, zero)
        copy_out_own(state_row(a.sizes, a.dh0, first + b), dh, own.outputs, outputs, zero)
        if a.dc0.base != 0:
            copy_out_own(state_row(a.sizes, a.dc0, first + b), dc, own.hidden, hidden, zero)


CELL = constants()  # what a kernel has of its own: kernels.py compiles this sweep for every cell


def backward_sweep(address, first, last, share, zero):
    """Sequences [first, last) back through all steps, with denormals flushed."""
    mode, a = flush_denormals(), read_operands(address, Backward)
    gates = CELL.gates
    sizes, space = a.sizes, a.workspace + share * a.workspace_bytes
    dh_row, fresh, own = padded_bytes(sizes.outputs, zero), True, own_units(sizes, MAX_VECTORS, zero)
    for block in range(first, last, sizes.block):
        end = min(block + sizes.block, last)
        start_gradients(a, block, end, space, zero)
        chunk_end = sizes.steps
        while chunk_end > 0:
            chunk = max(chunk_end - sizes.chunk, 0)
            n = 0
            for s in range(chunk_end - 1, chunk - 1, -1):
                t = step_order(sizes, s)
                rows = rows_in(sizes, t, block, end)
                add_output_gradient(a, t, n, rows, block, own, space, zero)
                backward_step(a, s, t, n, block, rows, own, space, CELL.activations, CELL.backward, zero)
                wait_for_members(sizes)
                dgh, dh = common(a, space) + a.dgh + n * a.dg_row, space + a.dh
                product(rows, dgh, a.dg_row, a.w_hh, gates * sizes.hidden, own.outputs, s, dh, dh_row, zero)
                n += rows
            if n > 0:
                weight_gradients(a, n, share, own, fresh, space, gates, zero)
                fresh = False
            if a.dx.base != 0:
                input_gradients(a, chunk, chunk_end, block, end, n, own, space, gates, zero)
            wait_for_members(sizes)
            chunk_end = chunk
        end_gradients(a, block, end, own, space, zero)
    restore_mode(mode)
