"""The long part of the table of mutations: every edge and every buffer of the sweeps."""

from tests.mutations import BACKWARD, BLOCKS, FORWARD, SWEEP, TILE, VECTOR, mutations

OF_SWEEPS = [
    *mutations(
        SWEEP,
        "members",
        "gru",
        {
            "members: each reads its own h": ("a.workspace if a.sizes.members > 1 else space", "space"),
            "members: the last one's units": (
                "panels * (sizes.member + 1) // sizes.members",
                "panels * (sizes.member + 1) // (sizes.members + 1)",
            ),
        },
    ),
    *mutations(
        BACKWARD,
        "members",
        "gru",
        {"members: every gate's gradient is the first one's": ("first = gate * hidden + own", "first = own")},
    ),
    *mutations(
        BACKWARD,
        "backward",
        "lstm",
        {
            "lstm: dropped dc_n": (
                "copy_in(dc, state_row(a.sizes, a.dc_n, first + b), hidden, zero)",
                "copy_in(dc, 0, hidden, zero)",
            ),
            "lstm: a joining row's c taken for a continuing one's": (
                "if r < continuing else state_row(sizes, a.c0, b)",
                "if r + 1 < continuing else state_row(sizes, a.c0, b)",
            ),
            "lstm: dh counted twice with a projection": ("copy_in(dh + b * dh_row, 0, outputs, zero)", "pass"),
            "lstm: dm on top of an old one": ("copy_in(dm + b * dm_row, 0, hidden, zero)", "pass"),
            "lstm: rows of dp over those of the step before": (
                "copy_in(space + a.dp + (n + b) * dh_row",
                "copy_in(space + a.dp + b * dh_row",
            ),
            "lstm: previous c from this step's rows": (
                "cells_before = saved_step(sizes, a.cells, t_prev)",
                "cells_before = saved_step(sizes, a.cells, t)",
            ),
        },
    ),
    *mutations(
        BACKWARD,
        "backward",
        "rnn_tanh",
        {
            "dropped dh_n": (
                "copy_in(dh, state_row(a.sizes, a.dh_n, first + b), outputs, zero)",
                "copy_in(dh, 0, outputs, zero)",
            ),
            "dropped dy": ("load(at, zero) + load_part(dy + u * item, zero, outputs - u)", "load(at, zero)"),
            "dh0 without the first step's product": (
                "product(rows, dgh, a.dg_row, a.w_hh, gates * sizes.hidden,",
                "product(rows, dgh, a.dg_row, a.w_hh, gates * sizes.hidden - 1,",
            ),
            "gradients on top of what was in memory": (
                "own = padded_bytes(sizes.outputs, zero), True",
                "own = padded_bytes(sizes.outputs, zero), False",
            ),
            "dx of a chunk in the wrong order": (
                "outer_step(sizes, a.dx, t)",
                "outer_step(sizes, a.dx, step_order(sizes, chunk + chunk_end - 1 - s))",
            ),
            "inputs of a chunk over those of the step before": (
                "space + a.xs + (n + r) * x_row, space",
                "space + a.xs + r * x_row, space",
            ),
            "dx on top of x": ("copy_in(space + a.xs + n * x_row, 0, sizes.inputs, zero)", "pass"),
            "a sum of rows without the last": (
                "        for n in range(rows):\n            total",
                "        for n in range(rows - 1):\n            total",
            ),
            "every block starts from the first one's gradients": (
                "start_gradients(a, block, end, space, zero)",
                "start_gradients(a, first, first + end - block, space, zero)",
            ),
            "every block writes the first one's dx": (
                "input_gradients(a, chunk, chunk_end, block, end, n,",
                "input_gradients(a, chunk, chunk_end, first, first + end - block, n,",
            ),
            "every block ends in the first one's dh0": (
                "end_gradients(a, block, end, own, space, zero)",
                "end_gradients(a, first, first + end - block, own, space, zero)",
            ),
            "order ignored on x in backward": (
                "copy_in(x, outer_row(sizes, a.x, x_step, b), inputs, zero)",
                "copy_in(x, x_step + b * a.x.row, inputs, zero)",
            ),
            "order ignored on the previous y": (
                "before = outer_row(sizes, a.y, before_step, b) if",
                "before = before_step + b * a.y.row if",
            ),
            "order ignored on y in backward": ("y = outer_row(sizes, a.y, y_step, b)", "y = y_step + b * a.y.row"),
            "order ignored on dy": (
                "dy = outer_row(a.sizes, a.dy, dy_step, first + b)",
                "dy = dy_step + (first + b) * a.dy.row",
            ),
            "order ignored on dx": (
                "dx = outer_row(sizes, a.dx, dx_step, first + b)",
                "dx = dx_step + (first + b) * a.dx.row",
            ),
            "weight gradients: lanes past the last unit written": (
                "store_part(into, value, zero, count)",
                "store(into, value)",
            ),
            "weight gradients: a panel with an edge taken for whole": (
                "whole = tall == most and (v + width) * lanes <= b_units",
                "whole = tall == most",
            ),
            "weight gradients: too few gates taken for a whole tile": (
                "whole = tall == most and (v + width) * lanes <= b_units",
                "whole = (v + width) * lanes <= b_units",
            ),
            "weight gradients: whole tiles of a chunk in place of those before": (
                "if whole and not fresh else (zeros, 0)",
                "if whole and fresh else (zeros, 0)",
            ),
            "bias gradients: the third vector twice": (
                "load(row + 3 * VECTOR_BYTES, zero)",
                "load(row + 2 * VECTOR_BYTES, zero)",
            ),
        },
    ),
    *mutations(
        FORWARD,
        "forward",
        "rnn_tanh",
        {
            "length edge: a leaving row forgotten": (
                "for b in range(staying, rows):",
                "for b in range(staying + 1, rows):",
            ),
            "missing recurrent bias": ("0 if separate else a.b_hh", "0"),
            "a panel sees the new state": (
                "h_new = states + ((s + 1) % 2) * sizes.block * h_row",
                "h_new = h_old",
            ),
            "a joining sequence finds no h0": (
                "copy_in_own(h + (a.sizes.block + b) * h_row, h0, own.outputs, outputs, zero)",
                "pass",
            ),
            "last step's final states lost": ("if s + 1 < sizes.steps else 0", "if s + 1 < sizes.steps else rows"),
            "inputs of a chunk in the wrong order": (
                "gather(sizes, a.x, t, block,",
                "gather(sizes, a.x, step_order(sizes, chunk + chunk_end - 1 - s), block,",
            ),
            "a chunk takes up the products of the one before": (
                "gx = common(a, space) + a.gx + n * gx_row",
                "gx = common(a, space) + a.gx",
            ),
            "every block starts from the first one's states": (
                "start_states(a, block, end, own, states, space, zero)",
                "start_states(a, first, first + end - block, own, states, space, zero)",
            ),
            "every block reads the first one's inputs": (
                "gather(sizes, a.x, t, block, rows,",
                "gather(sizes, a.x, t, first, rows,",
            ),
            "order ignored on y": (
                "along = (load_int(order + 8 * (b + r)) if order != 0 else b + r) * y_row",
                "along = (b + r) * y_row",
            ),
            "y: lanes past the last unit written": (
                "store_part(place + at, out, zero, count)",
                "store(place + at, out)",
            ),
            "a row's dot products start from the first one's sums": (
                "c0 + column * c0_column, c0_row, c + column",
                "c0 + column * c0_column, 0, c + column",
            ),
        },
    ),
    *mutations(
        SWEEP,
        "forward",
        "rnn_tanh",
        {
            "reverse direction in the order of the other": (
                "return sizes.steps - 1 - s if sizes.reverse else s",
                "return s",
            ),
            "order ignored on states": (
                "return rows.base + sequence(sizes, b) * rows.row if rows.base != 0 else 0",
                "return rows.base + b * rows.row if rows.base != 0 else 0",
            ),
        },
    ),
    *mutations(
        FORWARD,
        "forward",
        "gru",
        {
            "gru: recurrent bias added to both products": ("0 if separate else a.b_hh", "a.b_hh"),
            "gru: both biases the same": (
                "load_bias(space + a.b_h, a.b_hh, 1,",
                "load_bias(space + a.b_h, a.b_ih, 1,",
            ),
            "gru: recurrent bias dropped": (
                "load_bias(space + a.b_h, a.b_hh, 1,",
                "load_bias(space + a.b_h, 0, 1,",
            ),
            "gru: the recurrent product starts from the other": (
                "(space + a.b_h if separate else gx) + v",
                "(space + a.b_h if not separate else gx) + v",
            ),
            "no input product for the last row": (
                "a.w_ih, 1, units, inputs, v, width, v + width, rows,",
                "a.w_ih, 1, units, inputs, v, width, v + width, rows - 1,",
            ),
            "saved rows are those of the first block": (
                "behind(saved_step(a.sizes, a.gates, t), first * a.gates.row + at)",
                "behind(saved_step(a.sizes, a.gates, t), at)",
            ),
            "gates in place all read the first": (
                "rows, weight.base + (column // width * units + unit) * weight.row",
                "rows, weight.base + unit * weight.row",
            ),
        },
    ),
    *mutations(
        FORWARD,
        "forward",
        "lstm",
        {
            "lstm: a leaving row's c forgotten": (
                "copy_out_own(state_row(a.sizes, a.c_n, first + b), space + a.c",
                "copy_out_own(state_row(a.sizes, a.c_n, first + b), space + a.h",
            ),
            "lstm: projection added to the old state": (
                "store(h + b * h_row + j * VECTOR_BYTES, broadcast(zero))",
                "pass",
            ),
            "order ignored on a projected y": (
                "copy_out(outer_row(a.sizes, a.y, y_step, first + b), h_new",
                "copy_out(y_step + (first + b) * a.y.row, h_new",
            ),
        },
    ),
    *mutations(
        SWEEP,
        "backward",
        "rnn_tanh",
        {
            "every panel of a product is the first": (
                "weight.panels + v * depth * VECTOR_BYTES if packed",
                "weight.panels if packed",
            ),
            "rows of a weight in place as far apart as those of a panel": (
                "panel_row = width * VECTOR_BYTES if packed else weight.row",
                "panel_row = width * VECTOR_BYTES",
            ),
            "a weight in place is read from its first unit": (
                "else weight.base + v * VECTOR_BYTES",
                "else weight.base",
            ),
            "a row between the tiles of a product left out": ("            b += height", "            b += height + 1"),
            "order ignored on states in backward": (
                "return rows.base + sequence(sizes, b) * rows.row if rows.base != 0 else 0",
                "return rows.base + b * rows.row if rows.base != 0 else 0",
            ),
            "states and dx: lanes past the last unit written": (
                "store_part(target + u * item, load(source + u * item, zero), zero, units - u)",
                "store(target + u * item, load(source + u * item, zero))",
            ),
        },
    ),
    *mutations(
        BACKWARD,
        "backward",
        "gru",
        {
            "previous state from this step's rows": (
                "outer_step(sizes, a.y, t), outer_step(sizes, a.y, t_prev)",
                "outer_step(sizes, a.y, t), outer_step(sizes, a.y, t)",
            ),
            "recurrent weights meet the inputs' gradients": (
                "outer_product(rows, dgh, a.dg_row, count, space + a.hs",
                "outer_product(rows, dgx, a.dg_row, count, space + a.hs",
            ),
            "recurrent bias takes the inputs' gradients": (
                "sum_rows(rows, dgh, a.dg_row",
                "sum_rows(rows, dgx, a.dg_row",
            ),
        },
    ),
    *mutations(
        TILE,
        "forward",
        "rnn_tanh",
        {
            "a tile's rows all see the first row's input": (
                "element(a_rows[row], a_offset)",
                "element(a_rows[0], a_offset)",
            ),
            "a tile starts from the first row's C0": (
                "(sums[rc], start[rc], new[rc])",
                "(sums[rc], start[0, rc[1]], new[rc])",
            ),
        },
    ),
    *mutations(
        TILE,
        "backward",
        "rnn_tanh",
        {
            "an outer product's rows step by a gate": ("at.a_stride\n    else:", "_number(item)\n    else:"),
        },
    ),
    *mutations(
        SWEEP,
        "forward",
        "gru",
        {
            "what is saved of lengths taken for padded": (
                "first = load_int(sizes.starts + 8 * t) if sizes.starts != 0 else 0",
                "first = load_int(sizes.starts + 8 * t) if sizes.starts != 0 and sizes.order == 0 else 0",
            ),
        },
    ),
    *mutations(
        BLOCKS,
        "forward",
        "rnn_tanh",
        {
            "a dot product without a tail of one": (
                'builder.icmp_signed(">", tail, _number(0))',
                'builder.icmp_signed(">", tail, _number(1))',
            ),
            "squares not transposed": (
                "low = [lane if lane // half % 2 == 0 else lanes + lane - half for lane in range(lanes)]",
                "low = list(range(lanes))",
            ),
        },
    ),
    *mutations(
        BLOCKS,
        "backward",
        "rnn_tanh",
        {
            "every row of a panel is the weight's first": (
                "load_part(weight.base + k * weight.row + unit * item, zero",
                "load_part(weight.base + unit * item, zero",
            ),
        },
    ),
    *mutations(
        BLOCKS,
        "forward",
        "gru",
        {
            "panels of every gate hold the first": (
                "source = weight.base + (column // width * units + unit) * weight.row + k * item",
                "source = weight.base + unit * weight.row + k * item",
            ),
        },
    ),
    *mutations(
        FORWARD,
        "forward",
        "rnn_tanh",
        {"the mode of the processor not restored": ("    restore_mode(mode)\n", "")},
    ),
    *mutations(
        BACKWARD,
        "backward",
        "rnn_tanh",
        {"the mode of the processor not restored after backward": ("    restore_mode(mode)\n", "")},
    ),
    *mutations(
        VECTOR,
        "flushed",
        "rnn_relu",
        {
            "denormals not flushed": ("FLUSH_BITS = 0x8040", "FLUSH_BITS = 0x0000"),
            "denormals flushed where they are written alone": ("FLUSH_BITS = 0x8040", "FLUSH_BITS = 0x8000"),
        },
    ),
]
