"""The forward sweep of a call that asks for more than the plain cell: masks, zoneout, resets, peepholes, LayerNorm, c
of every step, and a GRU that resets before its last product. Its products and cells are in recurrence.py, all else is
as in forward.py.

A step begins by putting the reset states in the place of the old ones, and with u = h times the recurrent mask; it ends
with zoneout of h, after any projection.

Its parts are compiled apart from the sweep, once for all cells, and are given the address of the operands.
"""

from rnnkern.backends.numba_cpu.blocks import pack_units
from rnnkern.backends.numba_cpu.forward import end_states, project, start_states
from rnnkern.backends.numba_cpu.jit import constants, inlined, shared, woven
from rnnkern.backends.numba_cpu.lanes import load_byte, mix
from rnnkern.backends.numba_cpu.operands import OptionalForward, read_operands
from rnnkern.backends.numba_cpu.recurrence import (
    Row,
    input_products,
    pack_recurrence,
    recurrent_products,
    row_forward,
    start_recurrence,
)
from rnnkern.backends.numba_cpu.sweep import (
    behind,
    clear_ended,
    copy_in,
    gather,
    given_row,
    outer_row,
    outer_step,
    own_units,
    padded_bytes,
    rows_in,
    saved_step,
    sequence,
    state_row,
    step_order,
)
from rnnkern.backends.numba_cpu.tile import MAX_VECTORS
from rnnkern.backends.numba_cpu.vector import (
    flush_denormals,
    item_bytes,
    load,
    load_part,
    restore_mode,
    store,
    store_part,
    vector_lanes,
)


@woven
def pack_optional_forward(a, gates, part, parts, zero):
    """Packs the weights that have panels."""
    pack_recurrence(a.step, a.sizes, gates, part, parts, zero)
    if a.w_hr.panels != 0:
        pack_units(a.w_hr, 1, a.sizes.outputs, a.sizes.hidden, MAX_VECTORS, part, parts, zero)


@inlined
def is_reset(sizes, reset, t, b):
    """Whether the b-th sequence starts anew at step t."""
    return reset.base != 0 and load_byte(reset.base + t * reset.step + sequence(sizes, b) * reset.row) != 0


@inlined
def reset_row(sizes, rows, t, b):
    """The state that a reset of the b-th sequence at step t gives; 0 for zeros."""
    return rows.base + t * rows.step + sequence(sizes, b) * rows.row if rows.base != 0 else 0


@inlined
def times_mask(target, source, mask, units, zero):
    """A workspace row times the row of a mask."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for u in range(0, units, lanes):
        store(target + u * item, load(source + u * item, zero) * load_part(mask + u * item, zero, units - u))


@shared
def gather_inputs(sizes, rows, mask, t, first, count, target, zero):
    """The inputs of `count` sequences at step t into a workspace, times their mask."""
    gather(sizes, rows, t, first, count, sizes.inputs, target, zero)
    if mask.base != 0:
        for b in range(count):
            into = target + b * padded_bytes(sizes.inputs, zero)
            times_mask(into, into, state_row(sizes, mask, first + b), sizes.inputs, zero)


@shared
def enter_step(address, t, rows, first, h, space, zero):
    """Resets the states of step t, and forms u where there is a mask."""
    a = read_operands(address, OptionalForward)
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    h_row, c_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
    for b in range(rows):
        if is_reset(a.sizes, a.beside.reset, t, first + b):
            copy_in(h + b * h_row, reset_row(a.sizes, a.beside.reset_h, t, first + b), outputs, zero)
            if a.c_n.base != 0:
                copy_in(space + a.c + b * c_row, reset_row(a.sizes, a.beside.reset_c, t, first + b), hidden, zero)
        if a.beside.recurrent_mask.base != 0:
            mask = state_row(a.sizes, a.beside.recurrent_mask, first + b)
            times_mask(space + a.u + b * h_row, h + b * h_row, mask, outputs, zero)


@shared
def leave_step(address, t, rows, first, h_old, h_new, zero):
    """Zoneout of h, and y."""
    a = read_operands(address, OptionalForward)
    outputs, lanes, item = a.sizes.outputs, vector_lanes(zero), item_bytes(zero)
    h_row, y_step, zone = padded_bytes(outputs, zero), outer_step(a.sizes, a.y, t), a.beside.zone_h
    zone_step = outer_step(a.sizes, zone, t)
    for b in range(rows):
        y = outer_row(a.sizes, a.y, y_step, first + b)
        mask = given_row(a.sizes, zone, zone_step, first + b)
        for u in range(0, outputs, lanes):
            at = b * h_row + u * item
            old, new = load(h_old + at, zero), load(h_new + at, zero)
            new = mix(behind(mask, u), a.beside.share_h, old, new, outputs - u, zero)
            store(h_new + at, new)
            store_part(y + u * item, new, zero, outputs - u)


@inlined
def cells_row(sizes, beside, cells, t, b):
    """Where c of the b-th sequence at step t lies, 0 where it is not kept."""
    if cells.base == 0:
        return 0
    if beside.outer_cells != 0:
        return outer_row(sizes, cells, outer_step(sizes, cells, t), b)
    return saved_step(sizes, cells, t) + b * cells.row


@shared
def forward_rows(address, t, n, rows, first, h_old, h_new, space, activations, gates, separate, cell, zero):
    """The cell on the rows of step t, whose products gx are rows n and following of the chunk."""
    a = read_operands(address, OptionalForward)
    sizes, beside, hidden = a.sizes, a.beside, a.sizes.hidden
    gate_row, h_row = padded_bytes(hidden, zero), padded_bytes(sizes.outputs, zero)
    g_row = gates * gate_row
    gates_step, zone_step = saved_step(sizes, a.gates, t), outer_step(sizes, beside.zone_c, t)
    projected = a.w_hr.base != 0
    out, out_row = space + a.m if projected else h_new, gate_row if projected else h_row
    for r in range(rows):
        b = first + r
        row = Row(
            space + a.step.gx + (n + r) * g_row,
            space + a.step.gh + r * g_row,
            h_old + r * h_row,
            space + a.c + r * gate_row,
            given_row(sizes, beside.zone_c, zone_step, b),
            gates_step + b * a.gates.row if a.gates.base != 0 else 0,
            cells_row(sizes, beside, a.cells, t, b),
            out + r * out_row,
        )
        row_forward(a.step, beside, row, activations, space, gates, separate, cell, hidden, zero)


CELL = constants()  # what a kernel has of its own: optional_kernels.py compiles this sweep for every cell


def optional_forward_sweep(address, first, last, share, zero):
    """Sequences [first, last) through all steps, with denormals flushed."""
    mode, a = flush_denormals(), read_operands(address, OptionalForward)
    activations, gates, separate, resets_before = CELL.activations, CELL.gates, CELL.separate, CELL.resets_before
    sizes, space = a.sizes, a.workspace + share * a.workspace_bytes
    own = own_units(sizes, MAX_VECTORS, zero)
    x_row, h_row = padded_bytes(sizes.inputs, zero), padded_bytes(sizes.outputs, zero)
    g_row = gates * padded_bytes(sizes.hidden, zero)
    start_recurrence(a.step, a.beside, space, gates, separate, sizes.hidden, zero)
    for block in range(first, last, sizes.block):
        end = min(block + sizes.block, last)
        start_states(a, block, end, own, space + a.h, space, zero)
        for chunk in range(0, sizes.steps, sizes.chunk):
            chunk_end = min(chunk + sizes.chunk, sizes.steps)
            n = 0
            for s in range(chunk, chunk_end):
                t = step_order(sizes, s)
                rows = rows_in(sizes, t, block, end)
                gather_inputs(sizes, a.x, a.beside.input_mask, t, block, rows, space + a.xs + n * x_row, zero)
                n += rows
            input_products(a.step, a.beside, n, space + a.xs, space, gates, sizes, zero)
            n = 0
            for s in range(chunk, chunk_end):
                t = step_order(sizes, s)
                rows = rows_in(sizes, t, block, end)
                h_old = space + a.h + (s % 2) * sizes.block * h_row
                h_new = space + a.h + ((s + 1) % 2) * sizes.block * h_row
                enter_step(address, t, rows, block, h_old, space, zero)
                gx, gh = space + a.step.gx + n * g_row, space + a.step.gh
                u = space + a.u if a.beside.recurrent_mask.base != 0 else h_old
                recurrent_products(
                    a.step, a.beside, rows, u, gx, gh, space, gates, separate, resets_before, sizes, zero
                )
                forward_rows(
                    address, t, n, rows, block, h_old, h_new, space, activations, gates, separate, CELL.forward, zero
                )
                if a.w_hr.base != 0:
                    project(a, t, rows, block, h_new, space, zero)
                leave_step(address, t, rows, block, h_old, h_new, zero)
                clear_ended(sizes, a.y, t, block, end, sizes.outputs, zero)
                if a.beside.outer_cells != 0:
                    clear_ended(sizes, a.cells, t, block, end, sizes.hidden, zero)
                staying = rows_in(sizes, step_order(sizes, s + 1), block, end) if s + 1 < sizes.steps else 0
                end_states(a, block, staying, rows, own, h_new, space, zero)
                n += rows
    restore_mode(mode)
