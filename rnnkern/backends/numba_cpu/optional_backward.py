"""The backward sweep of a call that asks for more than the plain cell; backward.py has the plain one.

Steps of a chunk, last to first, after what met its weights has been gathered (and, where activations were not saved,
after they have been computed anew by recurrence.py, for all rows of the chunk at once, since every h is known):

    dh += dy_t;  dc += dcells_t;  old, dh = the parts of dh that zoneout gives to the old h and to the new
    (dgx_t, dgh_t, dc, direct) = cell'(dm, dc, saved_t)            dm = dh, or dh W_hr
    dgx_t, dgh_t = LN'(dgx_t), LN'(dgh_t)                          row by row, with LayerNorm
    dh = old + direct + mask * (dgh_t W_hh)                        reset before: d(r*u) = dgh_n W_hn comes first, and
                                                                   d(r*u) * r is on top
    where t is reset: dh and dc go to the states of the reset, and are 0 before it

Gradients that are sums over rows alone (peepholes, LayerNorm, and with LayerNorm the biases, whose gradients are those
before the norm) are added row by row to where they belong; biases that have the same gradient share a sum (norms.py).
"""

from rnnkern.backends.numba_cpu.backward import end_gradients, outer_product, start_gradients, sum_rows
from rnnkern.backends.numba_cpu.blocks import pack_depth
from rnnkern.backends.numba_cpu.jit import constants, inlined, shared, woven
from rnnkern.backends.numba_cpu.lanes import of_new, of_old
from rnnkern.backends.numba_cpu.norms import end_norm_sums, norm_sums, norms_backward, of_share, through_norm_of_c
from rnnkern.backends.numba_cpu.operands import OptionalBackward, read_operands
from rnnkern.backends.numba_cpu.optional_cells import add_part, reset_gate_backward
from rnnkern.backends.numba_cpu.optional_forward import cells_row, gather_inputs, is_reset, reset_row, times_mask
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
    copy_out,
    given_row,
    outer_row,
    outer_step,
    own_units,
    padded_bytes,
    product,
    rows_in,
    saved_step,
    state_row,
    step_order,
)
from rnnkern.backends.numba_cpu.tile import MAX_VECTORS
from rnnkern.backends.numba_cpu.vector import (
    VECTOR_BYTES,
    broadcast,
    flush_denormals,
    item_bytes,
    load,
    load_part,
    restore_mode,
    store,
    vector_lanes,
)


@shared
def shared_product(rows, a, a_row, weight, depth, units, c, c_row, zero):
    """`product`, compiled once for all that call it here."""
    product(rows, a, a_row, weight, depth, (0, padded_bytes(units, zero) // VECTOR_BYTES), 0, c, c_row, zero)


@woven
def pack_optional_backward(a, gates, part, parts, zero):
    """Packs the weights that have panels."""
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    first = (gates - 1 if a.last.base != 0 else gates) * hidden
    if a.w_ih.panels != 0:
        pack_depth(a.w_ih, gates * hidden, a.sizes.inputs, MAX_VECTORS, part, parts, zero)
    if a.w_hh.panels != 0:
        pack_depth(a.w_hh, first, outputs, MAX_VECTORS, part, parts, zero)
    if a.last.panels != 0:
        pack_depth(a.last, hidden, outputs, MAX_VECTORS, part, parts, zero)
    if a.w_hr.panels != 0:
        pack_depth(a.w_hr, outputs, hidden, MAX_VECTORS, part, parts, zero)
    if a.recompute != 0:
        pack_recurrence(a.step, a.sizes, gates, part, parts, zero)


@shared
def meet(address, s, t, n, first, rows, space, zero):
    """What step t, the s-th of the forward sweep, met: x, h, u and c, into rows n and following of the chunk."""
    a = read_operands(address, OptionalBackward)
    sizes, hidden, outputs = a.sizes, a.sizes.hidden, a.sizes.outputs
    h_row, c_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
    t_prev = step_order(sizes, s - 1) if s > 0 else t
    # the rows whose previous state is a step's, not an initial one
    continuing = rows_in(sizes, t_prev, first, first + rows) if s > 0 else 0
    before_step = outer_step(sizes, a.y, t_prev)
    gather_inputs(
        sizes, a.x, a.beside.input_mask, t, first, rows, space + a.xs + n * padded_bytes(sizes.inputs, zero), zero
    )
    for r in range(rows):
        b, h = first + r, space + a.hs + (n + r) * h_row
        starts = is_reset(sizes, a.beside.reset, t, b)
        if starts:
            before = reset_row(sizes, a.beside.reset_h, t, b)
        elif r < continuing:
            before = outer_row(sizes, a.y, before_step, b)
        else:
            before = state_row(sizes, a.h0, b)
        copy_in(h, before, outputs, zero)
        if a.beside.recurrent_mask.base != 0:
            times_mask(space + a.us + (n + r) * h_row, h, state_row(sizes, a.beside.recurrent_mask, b), outputs, zero)
        if a.dc0.base != 0:
            if starts:
                before = reset_row(sizes, a.beside.reset_c, t, b)
            elif r < continuing:
                before = cells_row(sizes, a.beside, a.cells, t_prev, b)
            else:
                before = state_row(sizes, a.c0, b)
            copy_in(space + a.cs + (n + r) * c_row, before, hidden, zero)


@shared
def recompute_rows(address, chunk, chunk_end, first, last, space, activations, gates, separate, cell, zero):
    """The activations of a chunk's rows, whose products are there."""
    a = read_operands(address, OptionalBackward)
    sizes, hidden = a.sizes, a.sizes.hidden
    gate_row, h_row = padded_bytes(hidden, zero), padded_bytes(sizes.outputs, zero)
    g_row = gates * gate_row
    n = 0
    for s in range(chunk_end - 1, chunk - 1, -1):
        t = step_order(sizes, s)
        zone_step = outer_step(sizes, a.beside.zone_c, t)
        for b in range(first, first + rows_in(sizes, t, first, last)):
            if a.dc0.base != 0:  # the cell changes c
                copy_in(space + a.dv, space + a.cs + n * gate_row, hidden, zero)
            row = Row(
                space + a.step.gx + n * g_row,
                space + a.step.gh + n * g_row,
                space + a.hs + n * h_row,
                space + a.dv,
                given_row(sizes, a.beside.zone_c, zone_step, b),
                space + a.kept + n * a.kept_row,
                0,
                space + a.tanh_v,
            )
            row_forward(a.step, a.beside, row, activations, space, gates, separate, cell, hidden, zero)
            n += 1


@shared
def enter_gradients(address, t, n, rows, first, space, zero):
    """dh += dy_t and dc += dcells_t, zoneout, and with a projection dp_t = dh, and zeros for dm."""
    a = read_operands(address, OptionalBackward)
    lanes, item, sizes, beside = vector_lanes(zero), item_bytes(zero), a.sizes, a.beside
    hidden, outputs = sizes.hidden, sizes.outputs
    h_row, c_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
    dy_step, zone_step = outer_step(sizes, a.dy, t), outer_step(sizes, beside.zone_h, t)
    dcells_step = outer_step(sizes, a.dcells, t)
    for r in range(rows):
        b, dh, old = first + r, space + a.dh + r * h_row, space + a.old + r * h_row
        dy, mask = given_row(sizes, a.dy, dy_step, b), given_row(sizes, beside.zone_h, zone_step, b)
        for u in range(0, outputs, lanes):
            at, count = u * item, outputs - u
            gradient, here = load(dh + at, zero), behind(mask, u)
            if dy != 0:
                gradient = gradient + load_part(dy + at, zero, count)
            store(old + at, of_old(here, beside.share_h, gradient, count, zero))
            store(dh + at, of_new(here, beside.share_h, gradient, count, zero))
        if a.dcells.base != 0:
            dc, of_cells = space + a.dc + r * c_row, outer_row(sizes, a.dcells, dcells_step, b)
            for u in range(0, hidden, lanes):
                at = u * item
                store(dc + at, load(dc + at, zero) + load_part(of_cells + at, zero, hidden - u))
        if a.w_hr.base != 0:
            copy_in(space + a.dp + (n + r) * h_row, dh, outputs, zero)
            copy_in(space + a.dm + r * c_row, 0, hidden, zero)
        copy_in(space + a.du + r * h_row, 0, outputs, zero)


@shared
def backward_rows(address, t, n, first, rows, share, space, activations, gates, separate, cell, zero):
    """The cell's gradients at step t, into rows n and following of the chunk; adds to `old` what reaches h past
    W_hh."""
    a = read_operands(address, OptionalBackward)
    sizes, beside, lanes, item = a.sizes, a.beside, vector_lanes(zero), item_bytes(zero)
    hidden, outputs = sizes.hidden, sizes.outputs
    hidden_row, h_row, slot = padded_bytes(hidden, zero), padded_bytes(outputs, zero), hidden * item
    y_step, gates_step = outer_step(sizes, a.y, t), saved_step(sizes, a.gates, t)
    zone_step = outer_step(sizes, beside.zone_c, t)
    dw_ch = of_share(a.dw_ch, share, 3 * hidden, zero)
    sums = norm_sums(a, share, gates, separate, zero)
    for r in range(rows):
        b = first + r
        kept = space + a.kept + (n + r) * a.kept_row if a.recompute != 0 else gates_step + b * a.gates.row
        h_prev, c_prev = space + a.hs + (n + r) * h_row, space + a.cs + (n + r) * hidden_row
        h = kept if beside.keeps_h != 0 else outer_row(sizes, a.y, y_step, b)
        dgx, dgh = space + a.dgx + (n + r) * a.dg_row, space + a.dgh + (n + r) * a.dg_row
        projected = a.w_hr.base != 0
        dm = space + a.dm + r * hidden_row if projected else space + a.dh + r * h_row
        dc, old = space + a.dc + r * hidden_row, space + a.old + r * h_row
        normed = beside.ln_c_weight != 0
        if normed:
            through_norm_of_c(
                kept, c_prev, dm, space + a.step.v, space + a.tanh_v, space + a.dv, beside.ln_c_weight,
                beside.ln_c_bias, sums.c_weight, sums.c_bias, hidden, zero,
            )  # fmt: skip
        zone = given_row(sizes, beside.zone_c, zone_step, b)
        cells = cells_row(sizes, beside, a.cells, t, b)
        for u in range(0, hidden, lanes):
            at, count = u * item, hidden - u
            direct = cell(
                load(dm + at, zero), kept + at, slot, cells + at, c_prev + at, h + at, h_prev + at, dc + at,
                behind(beside.w_ch, at), behind(dw_ch, at), behind(zone, u), beside.share_c,
                space + a.tanh_v + at if normed else 0, space + a.dv + at, dgx + at, dgh + at,
                space + a.ms + (n + r) * hidden_row + at if projected else 0, count, zero,
            )  # fmt: skip
            store(old + at, load(old + at, zero) + direct)
        if beside.ln_ih_weight != 0:
            of_x = kept + (activations + beside.keeps_h) * slot
            norms_backward(
                of_x, of_x + gates * slot, dgx, dgh, beside.ln_ih_weight, beside.ln_hh_weight, sums, separate,
                gates * hidden, zero,
            )  # fmt: skip


@shared
def reset_rows(address, t, n, first, rows, space, zero):
    """What goes by way of r * u, whose gradient du holds: the gradient of r, and in du what reaches u."""
    a = read_operands(address, OptionalBackward)
    lanes, item, hidden, outputs = vector_lanes(zero), item_bytes(zero), a.sizes.hidden, a.sizes.outputs
    h_row, gates_step = padded_bytes(outputs, zero), saved_step(a.sizes, a.gates, t)
    for r in range(rows):
        kept = space + a.kept + (n + r) * a.kept_row if a.recompute != 0 else gates_step + (first + r) * a.gates.row
        dgx = space + a.dgx + (n + r) * a.dg_row
        for u in range(0, hidden, lanes):
            at, count = u * item, hidden - u
            du, met = space + a.du + r * h_row + at, space + a.us + (n + r) * h_row + at
            store(du, reset_gate_backward(load(du, zero), kept + at, met, dgx + at, count, zero))
            store(space + a.rus + (n + r) * h_row + at, load_part(kept + at, zero, count) * load(met, zero))


@shared
def leave_gradients(address, t, first, rows, space, zero):
    """dh of the step before, and resets."""
    a = read_operands(address, OptionalBackward)
    sizes, lanes, item = a.sizes, vector_lanes(zero), item_bytes(zero)
    hidden, outputs, mask = sizes.hidden, sizes.outputs, a.beside.recurrent_mask
    h_row, c_row = padded_bytes(outputs, zero), padded_bytes(hidden, zero)
    for r in range(rows):
        b, dh, dc = first + r, space + a.dh + r * h_row, space + a.dc + r * c_row
        du, old = space + a.du + r * h_row, space + a.old + r * h_row
        if mask.base != 0:
            times_mask(du, du, state_row(sizes, mask, b), outputs, zero)
        for u in range(0, outputs, lanes):
            at = u * item
            store(dh + at, load(old + at, zero) + load(du + at, zero))
        if is_reset(sizes, a.beside.reset, t, b):
            give_away(dh, reset_row(sizes, a.dreset_h, t, b), outputs, zero)
            if a.dc0.base != 0:
                give_away(dc, reset_row(sizes, a.dreset_c, t, b), hidden, zero)


@woven
def backward_step(address, a, t, n, first, rows, share, space, activations, gates, separate, resets_before, cell, zero):
    """Step t: from dh and dc to those of the step before."""
    hidden, outputs = a.sizes.hidden, a.sizes.outputs
    h_row, c_row, last = padded_bytes(outputs, zero), padded_bytes(hidden, zero), (gates - 1) * hidden
    dgx, dgh, du = space + a.dgx + n * a.dg_row, space + a.dgh + n * a.dg_row, space + a.du
    enter_gradients(address, t, n, rows, first, space, zero)
    if a.w_hr.base != 0:
        shared_product(rows, space + a.dh, h_row, a.w_hr, outputs, hidden, space + a.dm, c_row, zero)
    backward_rows(address, t, n, first, rows, share, space, activations, gates, separate, cell, zero)
    if resets_before:
        shared_product(rows, dgx + last * item_bytes(zero), a.dg_row, a.last, hidden, outputs, du, h_row, zero)
        reset_rows(address, t, n, first, rows, space, zero)
    depth = last if resets_before else gates * hidden
    shared_product(rows, dgh, a.dg_row, a.w_hh, depth, outputs, du, h_row, zero)
    leave_gradients(address, t, first, rows, space, zero)


@inlined
def give_away(row, to, units, zero):
    """Adds a row to another, if there is one, and leaves zeros."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for u in range(0, units, lanes):
        at = u * item
        if to != 0:
            add_part(to + at, load(row + at, zero), zero, units - u)
        store(row + at, broadcast(zero))


@shared
def optional_weight_gradients(address, rows, share, fresh, space, gates, resets_before, zero):
    """Adds what the rows of a chunk give to the gradients of weights and biases."""
    a = read_operands(address, OptionalBackward)
    item, hidden, inputs, outputs = item_bytes(zero), a.sizes.hidden, a.sizes.inputs, a.sizes.outputs
    recurrent, x_row, h_row = gates * hidden, padded_bytes(inputs, zero), padded_bytes(outputs, zero)
    dgx, dgh, tile, row = space + a.dgx, space + a.dgh, space + a.tile, a.dg_row
    if a.dw_ih != 0:
        into = a.dw_ih + share * recurrent * inputs * item
        outer_product(rows, dgx, row, recurrent, space + a.xs, x_row, inputs, into, fresh, tile, zero)
    if a.dw_hh != 0:
        into, first = a.dw_hh + share * recurrent * outputs * item, recurrent - hidden if resets_before else recurrent
        outer_product(rows, dgh, row, first, space + a.us, h_row, outputs, into, fresh, tile, zero)
        if resets_before:
            last = first * item
            into += last * outputs
            outer_product(rows, dgh + last, row, hidden, space + a.rus, h_row, outputs, into, fresh, tile, zero)
    if a.dw_hr != 0:
        m_row, into = padded_bytes(hidden, zero), a.dw_hr + share * outputs * hidden * item
        outer_product(rows, space + a.dp, h_row, outputs, space + a.ms, m_row, hidden, into, fresh, tile, zero)
    if a.beside.ln_ih_weight == 0:
        if a.db_ih != 0:
            sum_rows(rows, dgx, row, recurrent, a.db_ih + share * recurrent * item, fresh, zero)
        if a.db_hh != 0:
            sum_rows(rows, dgh, row, recurrent, a.db_hh + share * recurrent * item, fresh, zero)


@shared
def give_inputs(address, chunk, chunk_end, first, last, space, zero):
    """dx of the rows of a chunk from the workspace, times the mask."""
    a = read_operands(address, OptionalBackward)
    sizes, x_row, mask = a.sizes, padded_bytes(a.sizes.inputs, zero), a.beside.input_mask
    n = 0
    for s in range(chunk_end - 1, chunk - 1, -1):
        t = step_order(sizes, s)
        dx_step = outer_step(sizes, a.dx, t)
        for b in range(first, first + rows_in(sizes, t, first, last)):
            dx = space + a.xs + n * x_row
            if mask.base != 0:
                times_mask(dx, dx, state_row(sizes, mask, b), sizes.inputs, zero)
            copy_out(outer_row(sizes, a.dx, dx_step, b), dx, sizes.inputs, zero)
            n += 1
        clear_ended(sizes, a.dx, t, first, last, sizes.inputs, zero)


@shared
def optional_input_gradients(address, chunk, chunk_end, first, last, rows, space, gates, zero):
    """dx of the rows of a chunk, by way of the rows of x, which nobody reads any more."""
    a = read_operands(address, OptionalBackward)
    sizes, x_row = a.sizes, padded_bytes(a.sizes.inputs, zero)
    for n in range(rows):
        copy_in(space + a.xs + n * x_row, 0, sizes.inputs, zero)
    shared_product(rows, space + a.dgx, a.dg_row, a.w_ih, gates * sizes.hidden, sizes.inputs, space + a.xs, x_row, zero)
    give_inputs(address, chunk, chunk_end, first, last, space, zero)


CELL = constants()  # what a kernel has of its own: optional_kernels.py compiles this sweep for every cell


def optional_backward_sweep(address, first, last, share, zero):
    """Sequences [first, last) back through all steps, with denormals flushed."""
    mode, a = flush_denormals(), read_operands(address, OptionalBackward)
    activations, gates, separate, resets_before = CELL.activations, CELL.gates, CELL.separate, CELL.resets_before
    sizes, space, fresh = a.sizes, a.workspace + share * a.workspace_bytes, True
    if a.recompute != 0:
        start_recurrence(a.step, a.beside, space, gates, separate, sizes.hidden, zero)
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
                meet(address, s, t, n, block, rows, space, zero)
                n += rows
            if a.recompute != 0:
                input_products(a.step, a.beside, n, space + a.xs, space, gates, sizes, zero)
                recurrent_products(
                    a.step, a.beside, n, space + a.us, space + a.step.gx, space + a.step.gh, space, gates, separate,
                    resets_before, sizes, zero,
                )  # fmt: skip
                recompute_rows(
                    address, chunk, chunk_end, block, end, space, activations, gates, separate, CELL.forward, zero
                )
            n = 0
            for s in range(chunk_end - 1, chunk - 1, -1):
                t = step_order(sizes, s)
                rows = rows_in(sizes, t, block, end)
                backward_step(
                    address, a, t, n, block, rows, share, space, activations, gates, separate, resets_before,
                    CELL.backward, zero,
                )  # fmt: skip
                n += rows
            if n > 0:
                optional_weight_gradients(address, n, share, fresh, space, gates, resets_before, zero)
                fresh = False
            if a.dx.base != 0:
                optional_input_gradients(address, chunk, chunk_end, block, end, n, space, gates, zero)
            chunk_end = chunk
        end_gradients(a, block, end, own_units(sizes, MAX_VECTORS, zero), space, zero)
    if a.beside.ln_ih_weight != 0:
        end_norm_sums(a, share, gates, separate, zero)
    restore_mode(mode)
