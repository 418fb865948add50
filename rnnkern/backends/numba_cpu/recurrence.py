"""A step that has everything that a layer may be asked for, forward: what the optional forward sweep does at each step,
and the optional backward sweep where it computes activations anew.

Other than in the plain sweep (forward.py), a step's recurrent product is formed for all units before any goes through
the cell, since LayerNorm needs whole rows, and a GRU that resets before its last product needs all of r for it:

    gh (rows, G, W) = u W_hh^T (+ gx, or + b_hh)            u is h, or h times the recurrent mask
    r = s(gh_r), gh_n = gx_n + b_hn + (r*u) W_hn^T          where the last gate has a product of its own
    gx = LN(gx)*w + b, gh = LN(gh)*w + b                    with LayerNorm, row by row
    out, c = cell(gx, gh, c, h)                             row by row
"""

from typing import NamedTuple

from rnnkern.backends.numba_cpu.blocks import pack_units
from rnnkern.backends.numba_cpu.forward import load_bias, panel_product, units_per_panel
from rnnkern.backends.numba_cpu.jit import shared, woven
from rnnkern.backends.numba_cpu.norms import normalise, normalised_outputs
from rnnkern.backends.numba_cpu.optional_cells import reset_gate
from rnnkern.backends.numba_cpu.sweep import behind, padded_bytes
from rnnkern.backends.numba_cpu.vector import (
    VECTOR_BYTES,
    item_bytes,
    store,
    store_part,
    vector_lanes,
)


class Row(NamedTuple):
    """Where a step of one sequence reads and writes."""

    gx: int  # (G, W)
    gh: int  # (G, W)
    h: int  # (W): h before, for zoneout and the cell's direct way
    c: int  # (W): carried
    zone_c: int  # (H) bytes, or 0
    kept: int  # (kept, H), or 0
    cells: int  # (H), or 0
    out: int  # (W)


@woven
def pack_recurrence(step, sizes, gates, part, parts, zero):
    """Packs the weights of the forward products that have panels."""
    first = gates - 1 if step.last.base != 0 else gates
    if step.w_ih.panels != 0:
        pack_units(step.w_ih, gates, sizes.hidden, sizes.inputs, units_per_panel(gates), part, parts, zero)
    if step.w_hh.panels != 0:
        pack_units(step.w_hh, first, sizes.hidden, sizes.outputs, units_per_panel(first), part, parts, zero)
    if step.last.panels != 0:
        pack_units(step.last, 1, sizes.hidden, sizes.outputs, units_per_panel(1), part, parts, zero)


@shared
def start_recurrence(step, beside, space, gates, separate, hidden, zero):
    """The rows that products and norms start from."""
    normed = beside.ln_ih_weight != 0
    load_bias(space + step.b_x, step.b_ih, gates, hidden, beside.ln_ih_bias, zero)
    load_bias(space + step.b_h, step.b_hh, gates, hidden, beside.ln_hh_bias, zero)
    load_bias(space + step.nothing, 0, gates, hidden, 0, zero)
    if normed:
        load_bias(space + step.n_x, beside.ln_ih_weight, gates, hidden, 0, zero)
        load_bias(space + step.n_h, beside.ln_hh_weight, gates, hidden, 0, zero)
    elif not separate:  # then gh starts from gx, which has both biases
        load_bias(space + step.b_x, step.b_ih, gates, hidden, step.b_hh, zero)


@woven
def gate_product(weight, gates, units, depth, rows, x, x_row, c0, c0_row, c, c_row, tile_gates, zero):
    """C (rows, gates, W) = C0 + x (rows, depth) @ weight^T. `tile_gates` are the gates that the weight's panels
    interleave."""
    gate_row, per_panel = padded_bytes(units, zero), units_per_panel(tile_gates)
    column = gate_row if tile_gates > 1 else VECTOR_BYTES
    vectors = gate_row // VECTOR_BYTES
    for v in range(0, vectors, per_panel):
        width = min(per_panel, vectors - v)
        panel_product(
            weight, tile_gates, units, depth, v, width, v + width, rows, x, x_row,
            c0 + v * VECTOR_BYTES, c0_row, column, c + v * VECTOR_BYTES, c_row, column, zero,
        )  # fmt: skip


@shared
def input_products(step, beside, rows, x, space, gates, sizes, zero):
    """gx of rows of x, without its bias if it is still to be normalised."""
    gx_row = gates * padded_bytes(sizes.hidden, zero)
    start = space + (step.nothing if beside.ln_ih_weight != 0 else step.b_x)
    x_row = padded_bytes(sizes.inputs, zero)
    gate_product(
        step.w_ih, gates, sizes.hidden, sizes.inputs, rows, x, x_row, start, 0, space + step.gx, gx_row, gates, zero
    )


@shared
def reset_gates(rows, gh, gh_row, u, ru, row, zero):
    """The first part of a cell that resets before its last product."""
    for r in range(rows):
        for at in range(0, row, VECTOR_BYTES):
            reset_gate(gh + r * gh_row + at, u + r * row + at, ru + r * row + at, zero)


@shared
def recurrent_products(step, beside, rows, u, gx, gh, space, gates, separate, resets_before, sizes, zero):
    """gh of rows of u, on top of gx where the cell adds the two."""
    hidden, outputs = sizes.hidden, sizes.outputs
    gate_row, u_row = padded_bytes(hidden, zero), padded_bytes(outputs, zero)
    g_row = gates * gate_row
    if beside.ln_hh_weight != 0:
        start, start_row = space + step.nothing, 0
    elif separate:
        start, start_row = space + step.b_h, 0
    else:
        start, start_row = gx, g_row
    first = gates - 1 if resets_before else gates
    gate_product(step.w_hh, gates, hidden, outputs, rows, u, u_row, start, start_row, gh, g_row, first, zero)
    if resets_before:
        reset_gates(rows, gh, g_row, u, space + step.ru, gate_row, zero)
        last = first * gate_row
        gate_product(
            step.last, 1, hidden, outputs, rows, space + step.ru, gate_row, gx + last, g_row, gh + last, g_row, 1, zero
        )


@woven
def row_forward(step, beside, row, activations, space, gates, separate, cell, hidden, zero):
    """The cell on a row whose products are there."""
    lanes, item, gate_row = vector_lanes(zero), item_bytes(zero), padded_bytes(hidden, zero)
    slot = hidden * item
    if beside.ln_ih_weight != 0:
        of_x = behind(row.kept, (activations + beside.keeps_h) * slot)
        normalise(
            row.gx, row.gh, space + step.n_x, space + step.n_h, space + step.b_x, space + step.b_h,
            of_x, behind(of_x, gates * slot), gates, separate, hidden, zero,
        )  # fmt: skip
    v = space + step.v if beside.ln_c_weight != 0 else 0
    for u in range(0, hidden, lanes):
        at, count = u * item, hidden - u
        kept = behind(row.kept, at)
        out = cell(
            row.gx + at, gate_row, row.gh + at, gate_row, kept, slot, behind(row.cells, at), row.c + at, row.h + at,
            behind(beside.w_ch, at), behind(row.zone_c, u), beside.share_c, behind(v, at), count, zero,
        )  # fmt: skip
        if beside.keeps_h != 0 and kept != 0:
            store_part(kept, out, zero, count)
        store(row.out + at, out)
    if v != 0:
        o = row.gh + 3 * gate_row
        normalised_outputs(v, beside.ln_c_weight, beside.ln_c_bias, o, row.out, hidden, zero)
