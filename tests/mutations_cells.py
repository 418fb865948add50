"""The long part of the table of mutations: every gate and every gradient of the cells."""

from tests.mutations import CELLS, GATES, mutations

OF_CELLS = [
    *mutations(
        CELLS,
        "forward",
        "lstm",
        {
            "lstm: i and f swapped": (
                "    i = sigmoid(load(gh, zero))\n    f = sigmoid(load(gh + spacing, zero))",
                "    f = sigmoid(load(gh, zero))\n    i = sigmoid(load(gh + spacing, zero))",
            ),
            "lstm: g through a sigmoid": (
                "g = tanh(load(gh + 2 * spacing, zero))",
                "g = sigmoid(load(gh + 2 * spacing, zero))",
            ),
            "lstm: o reads g": (
                "o = sigmoid(load(gh + 3 * spacing, zero))",
                "o = sigmoid(load(gh + 2 * spacing, zero))",
            ),
            "lstm: c forgets all": ("c_new = f * load(c, zero) + i * g", "c_new = i * g"),
            "lstm: h without tanh": ("return o * tanh(c_new)", "return o * c_new"),
            "lstm: saves i for f": (
                "store_part(gates + slot, f, zero, count)",
                "store_part(gates + slot, i, zero, count)",
            ),
        },
    ),
    *mutations(
        CELLS,
        "backward",
        "lstm",
        {
            "lstm: derivative of i": ("dc_new * g * i * (1.0 - i)", "dc_new * g * i"),
            "lstm: derivative of f": (
                "load_part(c_prev, zero, count) * f * (1.0 - f)",
                "load_part(c_prev, zero, count) * f",
            ),
            "lstm: f meets the new c": (
                "dc_new * load_part(c_prev, zero, count)",
                "dc_new * load_part(cells, zero, count)",
            ),
            "lstm: derivative of g": ("dc_new * i * (1.0 - g * g)", "dc_new * i * (1.0 - g)"),
            "lstm: derivative of o": ("dh * tanh_c * o * (1.0 - o)", "dh * tanh_c * o"),
            "lstm: derivative of tanh(c)": ("dh * o * (1.0 - tanh_c * tanh_c)", "dh * o"),
            "lstm: dc not carried": ("dc_new = load(dc, zero) + dh * o", "dc_new = dh * o"),
            "lstm: dc past f": ("store(dc, dc_new * f)", "store(dc, dc_new)"),
            "lstm: W_hr meets o alone": ("store(m, o * tanh_c)", "store(m, o)"),
        },
    ),
    *mutations(
        CELLS,
        "forward",
        "gru",
        {
            "gru: r and z swapped": (
                "r = sigmoid(load(gx, zero) + load(gh, zero))\n    z = sigmoid(",
                "z = sigmoid(load(gx, zero) + load(gh, zero))\n    r = sigmoid(",
            ),
            "gru: reset gate unused": (
                "load(gx + 2 * x_spacing, zero) + r * hn",
                "load(gx + 2 * x_spacing, zero) + hn",
            ),
            "gru: z and 1 - z swapped": (
                "return (1.0 - z) * n + z * load(h_prev, zero)",
                "return z * n + (1.0 - z) * load(h_prev, zero)",
            ),
            "gru: saves n for hn": (
                "store_part(gates + 3 * slot, hn, zero, count)",
                "store_part(gates + 3 * slot, n, zero, count)",
            ),
        },
    ),
    *mutations(
        CELLS,
        "backward",
        "gru",
        {
            "gru: dgh equal to dgx": (
                "store_part(dgh + 2 * slot, dn * r, zero, count)",
                "store_part(dgh + 2 * slot, dn, zero, count)",
            ),
            "gru: missing dh * z": ("return dh * z\n", "return dh * 0.0\n"),
            "gru: derivative of n": ("dn = dh * (1.0 - z) * (1.0 - n * n)", "dn = dh * (1.0 - z)"),
            "gru: derivative of r": ("dr = dn * hn * r * (1.0 - r)", "dr = dn * hn * r"),
            "gru: derivative of z": ("- n) * z * (1.0 - z)", "- n) * z"),
            "gru: z meets the new h": ("(load_part(h_prev, zero, count) - n)", "(load_part(h, zero, count) - n)"),
        },
    ),
    *mutations(
        CELLS,
        "forward",
        "rnn_tanh",
        {
            "rnn: no tanh": ("return tanh(load(gh, zero))", "return load(gh, zero)"),
        },
    ),
    *mutations(
        CELLS,
        "forward",
        "rnn_relu",
        {
            "rnn: no relu": ("return positive_part(load(gh, zero))", "return load(gh, zero)"),
        },
    ),
    *mutations(
        CELLS,
        "backward",
        "rnn_relu",
        {
            "rnn: derivative of relu": ("unless_negative(load_part(h, zero, count), dh)", "dh"),
        },
    ),
    *mutations(
        GATES,
        "forward",
        "rnn_tanh",
        {
            "tanh slightly off": ("_SERIES[12::-1]", "_SERIES[5::-1]"),
        },
    ),
]
