"""The table of mutations: defects that test_mutations.py puts into a copy of the source, each to be seen by a check."""

from typing import NamedTuple

BACKEND = "backends/numba_cpu/__init__.py"
CELLS = "backends/numba_cpu/cells.py"
SWEEP = "backends/numba_cpu/sweep.py"
KERNELS = "backends/numba_cpu/kernels.py"


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    check: str  # of numba_mutant.CHECKS
    cell: str


# One of each kind: these run always.
COMMON = [
    Mutation(
        "lstm: i and f swapped",
        CELLS,
        "    i = sigmoid(load(gh, zero))\n    f = sigmoid(load(gh + spacing, zero))",
        "    f = sigmoid(load(gh, zero))\n    i = sigmoid(load(gh + spacing, zero))",
        "forward",
        "lstm",
    ),
    Mutation("lstm: derivative of i", CELLS, "dc_new * g * i * (1.0 - i)", "dc_new * g * i", "backward", "lstm"),
    Mutation("lstm: dropped dc_n", SWEEP, "a.dc_n.base + b * a.dc_n.row", "0", "backward", "lstm"),
    Mutation(
        "gru: r and z swapped",
        CELLS,
        "r = sigmoid(load(gx, zero) + load(gh, zero))\n    z = sigmoid(",
        "z = sigmoid(load(gx, zero) + load(gh, zero))\n    r = sigmoid(",
        "forward",
        "gru",
    ),
    Mutation(
        "gru: dgh equal to dgx",
        CELLS,
        "store_part(dgh + 2 * slot, dn * r, zero, count)",
        "store_part(dgh + 2 * slot, dn, zero, count)",
        "backward",
        "gru",
    ),
    Mutation("gru: missing dh * z", CELLS, "return dh * z\n", "return dh * 0.0\n", "backward", "gru"),
    Mutation("rnn: derivative of tanh", CELLS, "dh * (1.0 - h_new * h_new)", "dh", "backward", "rnn_tanh"),
    Mutation("dropped dh_n", SWEEP, "a.dh_n.base + b * a.dh_n.row", "0", "backward", "rnn_tanh"),
    Mutation(
        "length edge: a row too few",
        SWEEP,
        "min(load_int(a.counts + 8 * t), last)",
        "min(load_int(a.counts + 8 * t) - 1, last)",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "length edge: a leaving row forgotten",
        SWEEP,
        "for b in range(staying, rows):",
        "for b in range(staying + 1, rows):",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "length edge: a continuing row taken for a joining one",
        SWEEP,
        "if r < continuing else a.h0",
        "if r + 1 < continuing else a.h0",
        "backward",
        "gru",
    ),
    Mutation(
        "reverse direction in the order of the other",
        SWEEP,
        "return steps - 1 - s if reverse else s",
        "return s",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "missing recurrent bias",
        BACKEND,
        "return weights.bias_ih + weights.bias_hh, None",
        "return weights.bias_ih, None",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "stale packed weights",
        BACKEND,
        "        return target.data_ptr()\n",
        "        return vars(_Call.packed).setdefault((matrix.data_ptr(), matrix.shape), target).data_ptr()\n",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "pack writes no weights",
        KERNELS,
        "load_scalar(source + k * weight.k_stride, zero) if unit < weight.units else zero",
        "zero",
        "backward",
        "rnn_tanh",
    ),
    # These change no kernel, and so cost little.
    Mutation(
        "previous rows not shifted",
        "layer.py",
        "previous[1:], previous[0] = h[:-1], h0",
        "previous[:], previous[0] = h, h0",
        "layers",
        "RNN",
    ),
    Mutation(
        "previous rows of reverse not shifted",
        "layer.py",
        "previous[:-1], previous[-1] = h[1:], h0",
        "previous[:], previous[-1] = h, h0",
        "layers",
        "RNN",
    ),
    Mutation("gru: dW_hh from dgx", "layer.py", "dgh.t() @ _previous", "dgx.t() @ _previous", "layers", "GRU"),
    Mutation(
        "gru: db_hh a copy of db_ih",
        "layer.py",
        "if layer.cell.separate or of_bias_ih is None",
        "if of_bias_ih is None",
        "layers",
        "GRU",
    ),
    Mutation(
        "gradients of final states not sorted",
        "layer.py",
        "dh_n, dc_n = packing.sort(dh_n), packing.sort(dc_n)",
        "pass",
        "layers",
        "LSTM",
    ),
    Mutation(
        "final states not unsorted",
        "packing.py",
        "torch.empty_like(states).index_copy(1, self.order, states)",
        "states",
        "layers",
        "LSTM",
    ),
    Mutation(
        "initial states not sorted", "packing.py", "states.index_select(1, self.order)", "states", "layers", "LSTM"
    ),
    Mutation(
        "previous row on the wrong side",
        "packing.py",
        "before = step + 1 if reverse else step - 1",
        "before = step - 1",
        "layers",
        "RNN",
    ),
    Mutation(
        "previous row of a sequence that has none",
        "packing.py",
        "exists &= sequence < batch_sizes[before]",
        "exists &= sequence <= batch_sizes[before]",
        "layers",
        "RNN",
    ),
]

# Every gate, every gradient, every buffer.
FULL = [
    Mutation(
        "lstm: g through a sigmoid",
        CELLS,
        "g = tanh(load(gh + 2 * spacing, zero))",
        "g = sigmoid(load(gh + 2 * spacing, zero))",
        "forward",
        "lstm",
    ),
    Mutation(
        "lstm: o reads g",
        CELLS,
        "o = sigmoid(load(gh + 3 * spacing, zero))",
        "o = sigmoid(load(gh + 2 * spacing, zero))",
        "forward",
        "lstm",
    ),
    Mutation("lstm: c forgets all", CELLS, "c_new = f * load(c, zero) + i * g", "c_new = i * g", "forward", "lstm"),
    Mutation("lstm: h without tanh", CELLS, "return o * tanh(c_new)", "return o * c_new", "forward", "lstm"),
    Mutation(
        "lstm: saves i for f",
        CELLS,
        "store_part(gates + slot, f, zero, count)",
        "store_part(gates + slot, i, zero, count)",
        "forward",
        "lstm",
    ),
    Mutation(
        "lstm: derivative of f",
        CELLS,
        "load_part(c_prev, zero, count) * f * (1.0 - f)",
        "load_part(c_prev, zero, count) * f",
        "backward",
        "lstm",
    ),
    Mutation(
        "lstm: f meets the new c",
        CELLS,
        "dc_new * load_part(c_prev, zero, count)",
        "dc_new * load_part(cells, zero, count)",
        "backward",
        "lstm",
    ),
    Mutation(
        "lstm: derivative of g", CELLS, "dc_new * i * (1.0 - g * g)", "dc_new * i * (1.0 - g)", "backward", "lstm"
    ),
    Mutation("lstm: derivative of o", CELLS, "dh * tanh_c * o * (1.0 - o)", "dh * tanh_c * o", "backward", "lstm"),
    Mutation("lstm: derivative of tanh(c)", CELLS, "dh * o * (1.0 - tanh_c * tanh_c)", "dh * o", "backward", "lstm"),
    Mutation("lstm: dc not carried", CELLS, "dc_new = load(dc, zero) + dh * o", "dc_new = dh * o", "backward", "lstm"),
    Mutation("lstm: dc past f", CELLS, "store(dc, dc_new * f)", "store(dc, dc_new)", "backward", "lstm"),
    Mutation(
        "lstm: a leaving row's c forgotten",
        SWEEP,
        "copy_out(a.c_n.base + (first + b) * a.c_n.row, a.c.base",
        "copy_out(a.c_n.base + (first + b) * a.c_n.row, a.h.base",
        "forward",
        "lstm",
    ),
    Mutation(
        "lstm: a joining row's c taken for a continuing one's",
        SWEEP,
        "if r < continuing else a.c0",
        "if r + 1 < continuing else a.c0",
        "backward",
        "lstm",
    ),
    Mutation(
        "lstm: dh counted twice with a projection",
        SWEEP,
        "copy_in(a.dh.base + b * a.dh.row, 0, a.outputs, zero)",
        "pass",
        "backward",
        "lstm",
    ),
    Mutation(
        "lstm: projection added to the old state",
        SWEEP,
        "copy_in(h_new + b * a.h.row, 0, a.outputs, zero)",
        "pass",
        "forward",
        "lstm",
    ),
    Mutation(
        "gru: reset gate unused",
        CELLS,
        "load(gx + 2 * spacing, zero) + r * hn",
        "load(gx + 2 * spacing, zero) + hn",
        "forward",
        "gru",
    ),
    Mutation(
        "gru: z and 1 - z swapped",
        CELLS,
        "return (1.0 - z) * n + z * load(h_prev, zero)",
        "return z * n + (1.0 - z) * load(h_prev, zero)",
        "forward",
        "gru",
    ),
    Mutation(
        "gru: saves n for hn",
        CELLS,
        "store_part(gates + 3 * slot, hn, zero, count)",
        "store_part(gates + 3 * slot, n, zero, count)",
        "forward",
        "gru",
    ),
    Mutation(
        "gru: both biases the same",
        SWEEP,
        "(a.b_h + before, 0) if separate",
        "(a.b_x + before, 0) if separate",
        "forward",
        "gru",
    ),
    Mutation(
        "gru: derivative of n", CELLS, "dn = dh * (1.0 - z) * (1.0 - n * n)", "dn = dh * (1.0 - z)", "backward", "gru"
    ),
    Mutation("gru: derivative of r", CELLS, "dr = dn * hn * r * (1.0 - r)", "dr = dn * hn * r", "backward", "gru"),
    Mutation("gru: derivative of z", CELLS, "- n) * z * (1.0 - z)", "- n) * z", "backward", "gru"),
    Mutation(
        "gru: z meets the new h",
        CELLS,
        "(load_part(h_prev, zero, count) - n)",
        "(load_part(h, zero, count) - n)",
        "backward",
        "gru",
    ),
    Mutation(
        "W_hh not transposed in backward",
        BACKEND,
        "call.packed(weights.weight_hh.t(), 1)",
        "call.packed(weights.weight_hh, 1)",
        "backward",
        "rnn_tanh",
    ),
    Mutation("rnn: no tanh", CELLS, "return tanh(load(gh, zero))", "return load(gh, zero)", "forward", "rnn_tanh"),
    Mutation(
        "rnn: no relu", CELLS, "return positive_part(load(gh, zero))", "return load(gh, zero)", "forward", "rnn_relu"
    ),
    Mutation(
        "rnn: derivative of relu", CELLS, "unless_negative(load_part(h, zero, count), dh)", "dh", "backward", "rnn_relu"
    ),
    Mutation(
        "a panel sees the new state",
        SWEEP,
        "h_old, h_new = h + (s % 2) * a.h.step, h + ((s + 1) % 2) * a.h.step",
        "h_old, h_new = h, h",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "every panel of a product is the first",
        SWEEP,
        "panel = panels + v * depth * VECTOR_BYTES",
        "panel = panels",
        "backward",
        "rnn_tanh",
    ),
    Mutation(
        "dropped dy",
        SWEEP,
        "load(dh + at, zero) + load_part(dy + at, zero, a.outputs - u)",
        "load(dh + at, zero)",
        "backward",
        "rnn_tanh",
    ),
    Mutation(
        "last step's final states lost",
        SWEEP,
        "if s + 1 < a.steps else 0",
        "if s + 1 < a.steps else rows",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "previous state from this step's rows",
        SWEEP,
        "start_prev = load_int(a.starts + 8 * t_prev)",
        "start_prev = load_int(a.starts + 8 * t)",
        "backward",
        "gru",
    ),
    Mutation(
        "dh0 without the first step's product",
        SWEEP,
        "product(rows, dgh, a.dgh.row, a.w_hh, a.recurrent,",
        "product(rows, dgh, a.dgh.row, a.w_hh, a.recurrent - 1,",
        "backward",
        "rnn_tanh",
    ),
    Mutation(
        "a tile's rows all see the first row's input",
        "backends/numba_cpu/tile.py",
        "vector, elements[row], weights",
        "vector, elements[0], weights",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "a tile starts from the first row's C0",
        "backends/numba_cpu/tile.py",
        "(sums[rc], start[rc], new[rc])",
        "(sums[rc], start[0, rc[1]], new[rc])",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "tanh slightly off",
        "backends/numba_cpu/gates.py",
        "range(14, 1, -1)",
        "range(7, 1, -1)",
        "forward",
        "rnn_tanh",
    ),
    Mutation(
        "tasks after the first share its rows",
        BACKEND,
        "operands = [arguments[direction], first, last]",
        "operands = [arguments[0], first, last]",
        "forward",
        "rnn_tanh",
    ),
]
