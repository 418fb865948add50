"""Defects of the optional sweeps of the Numba backend. Each costs a long compilation."""

from tests.mutations import NUMBA, mutations

CELLS, LANES, NORMS = (NUMBA + name for name in ("optional_cells.py", "lanes.py", "norms.py"))
FORWARD, BACKWARD = (NUMBA + name for name in ("optional_forward.py", "optional_backward.py"))

OF_OPTIONAL = [
    *mutations(
        LANES,
        "optional_forward",
        "rnn_tanh",
        {
            "zoneout: old and new swapped": (
                "return where_set(mask, old, new, count, zero)",
                "return where_set(mask, new, old, count, zero)",
            ),
            "zoneout: the share of the new given to the old": (
                "part * old + (1.0 - part) * new",
                "part * new + (1.0 - part) * old",
            ),
            "LayerNorm: the squares of units that are not there": (
                "off = first_lanes(load_part(row + u * item, zero, units - u) - mean, units - u)",
                "off = load_part(row + u * item, zero, units - u) - mean",
            ),
        },
    ),
    *mutations(
        NORMS,
        "optional_forward",
        "gru",
        {
            "LayerNorm: the statistics of one gate": (
                "moments(gx, gates, gate_row, hidden, EPSILON, zero)",
                "moments(gx, 1, gate_row, hidden, EPSILON, zero)",
            ),
        },
    ),
    *mutations(
        FORWARD,
        "optional_forward",
        "rnn_tanh",
        {
            "a reset one step late": (
                "reset.base + t * reset.step + sequence(sizes, b) * reset.row",
                "reset.base + max(t - 1, 0) * reset.step + sequence(sizes, b) * reset.row",
            ),
            "recurrent mask left out": ("u = space + a.u if a.beside.recurrent_mask.base != 0 else h_old", "u = h_old"),
            "input mask of the first sequence for all": (
                "times_mask(into, into, state_row(sizes, mask, first + b), sizes.inputs, zero)",
                "times_mask(into, into, state_row(sizes, mask, 0), sizes.inputs, zero)",
            ),
        },
    ),
    *mutations(
        CELLS,
        "optional_forward",
        "lstm",
        {
            "peephole of o sees the old c": (
                "load_part(w_ch + 2 * slot, zero, count) * c_new",
                "load_part(w_ch + 2 * slot, zero, count) * before",
            ),
        },
    ),
    *mutations(
        CELLS,
        "optional_backward",
        "lstm",
        {
            "peepholes: nothing of i reaches c": (
                "dc_prev + load_part(w_ch, zero, count) * di + load_part(w_ch + slot, zero, count) * df",
                "dc_prev + load_part(w_ch + slot, zero, count) * df",
            ),
            "zoneout of c: the old gets nothing": (
                "dc_prev = new * f + of_old(zone, share, of_c, count, zero)",
                "dc_prev = new * f",
            ),
        },
    ),
    *mutations(
        CELLS,
        "optional_backward",
        "gru_reset_before",
        {
            "reset before: nothing reaches u by way of r * u": ("    return of_ru * r\n", "    return of_ru * 0.0\n"),
        },
    ),
    *mutations(
        BACKWARD,
        "optional_backward",
        "rnn_tanh",
        {
            "the gradient leaks over a reset": ("        store(row + at, broadcast(zero))", "        pass"),
            "mask left out of the gradient of h": (
                "times_mask(du, du, state_row(sizes, mask, b), outputs, zero)",
                "pass",
            ),
            "mask left out of the gradient of x": (
                "times_mask(dx, dx, state_row(sizes, mask, b), sizes.inputs, zero)",
                "pass",
            ),
        },
    ),
    *mutations(
        BACKWARD,
        "optional_backward",
        "lstm",
        {
            "gradients of every c left out": ("if a.dcells.base != 0:", "if a.dcells.base == 1:"),
        },
    ),
    *mutations(
        NORMS,
        "optional_backward",
        "rnn_tanh",
        {
            "LayerNorm: the mean of the gradient forgotten": (
                "(of_normal - fma(normal, slope, shift))",
                "(of_normal - normal * slope)",
            ),
        },
    ),
    *mutations(
        NORMS,
        "optional_backward",
        "gru",
        {
            "LayerNorm: one sum for biases of different gradients": ("    if not separate:\n", "    if True:\n"),
        },
    ),
]
