"""Defects that test_mutations.py puts into the source, each to be seen by a check of numba_mutant.py.

Here are those that are tried at every run; the others are in mutations_cells.py and mutations_sweeps.py.
"""

from typing import NamedTuple

NUMBA = "backends/numba_cpu/"
CELLS, GATES, TILE, BLOCKS = (NUMBA + name for name in ("cells.py", "gates.py", "tile.py", "blocks.py"))
SWEEP, FORWARD, BACKWARD = (NUMBA + name for name in ("sweep.py", "forward.py", "backward.py"))
VECTOR, CHOICE = (NUMBA + name for name in ("vector.py", "choice.py"))
PLANS, LAUNCH, BACKEND, AHEAD = (NUMBA + name for name in ("plans.py", "launch.py", "__init__.py", "ahead.py"))


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    check: str  # of numba_mutant.CHECKS
    cell: str


def mutations(file: str, check: str, cell: str, changes: dict[str, tuple[str, str]]) -> list[Mutation]:
    """Mutations of one file, {name: (old, new)}, that one check of one cell sees."""
    return [Mutation(name, file, *change, check, cell) for name, change in changes.items()]


def changed(source: str, file: str, old: str, new: str) -> str:
    """The text of a file with a change that fits one place in it."""
    assert source.count(old) == 1, f"{file}: {old!r} is found {source.count(old)} times, not once"
    return source.replace(old, new)


# One of each kind. These change what is compiled, and cost a compilation each.
COMPILED = [
    *mutations(
        CHOICE,
        "masks_of_words",
        "",
        {
            "options: the last word left out": ('icmp_signed("<="', 'icmp_signed("<"'),
            "options: a word compared without its sign": ('icmp_signed("<="', 'icmp_unsigned("<="'),
            "options: rows of words without their gaps": ("(width + 3) // 4 * 4", "width"),
        },
    ),
    *mutations(
        CELLS,
        "backward",
        "rnn_tanh",
        {
            "rnn: derivative of tanh": ("dh * (1.0 - h_new * h_new)", "dh"),
        },
    ),
    *mutations(
        SWEEP,
        "forward",
        "rnn_tanh",
        {
            "length edge: a row too few": (
                "min(load_int(sizes.counts + 8 * t), last)",
                "min(load_int(sizes.counts + 8 * t) - 1, last)",
            ),
            "order ignored on x": (
                "outer_row(sizes, rows, step, first + b), units, zero)",
                "step + (first + b) * rows.row, units, zero)",
            ),
        },
    ),
    *mutations(
        BACKWARD,
        "backward",
        "rnn_tanh",
        {
            "length edge: a continuing row taken for a joining one": (
                "if r < continuing else state_row(sizes, a.h0, b)",
                "if r + 1 < continuing else state_row(sizes, a.h0, b)",
            ),
            "gradients of a chunk in place of those before": (
                "                fresh = False",
                "                fresh = True",
            ),
        },
    ),
    *mutations(
        BLOCKS,
        "forward",
        "rnn_tanh",
        {
            "a dot product with one unit too few": (
                "pointers = [unit(u) for u in range(first, first + group)]",
                "pointers = [unit(min(u, vector.lanes - 2)) for u in range(first, first + group)]",
            ),
        },
    ),
]

# These change no kernel, and so cost little.
PYTHON = [
    *mutations(
        BACKEND,
        "backward",
        "rnn_tanh",
        {
            "dx of the reverse direction dropped": ("dx.add_(other)", "pass"),
        },
    ),
    *mutations(
        BACKEND,
        "shares",
        "rnn_tanh",
        {
            "gradients of shares not added": ("total(of_shares, zero)", "of_shares[0]"),
        },
    ),
    *mutations(
        LAUNCH,
        "shares",
        "rnn_tanh",
        {
            "tasks after the first share its rows": (
                "(starts[d], first, last, place) for d, first, last, place",
                "(starts[d], 0, last - first, place) for d, first, last, place",
            ),
            "tasks after the first share its sums": (
                "(starts[d], first, last, place) for d, first, last, place",
                "(starts[d], first, last, 0) for d, first, last, place",
            ),
        },
    ),
    *mutations(
        PLANS,
        "forward",
        "rnn_tanh",
        {
            "both directions write the same outputs": (
                'self.rows("y", "y", states.y, d * self.outputs)',
                'self.rows("y", "y", states.y, 0)',
            ),
            "both directions end in the same state": (
                'self.at(f"{field}.base", name or field, d * tensor.stride(0) * self.item)',
                'self.at(f"{field}.base", name or field, 0)',
            ),
            "both directions have the same weights": (
                'self.matrix("w_hh", f"w_hh{d}", w.weight_hh, self._panels(self.gates, self.hidden, self.outputs))',
                'self.matrix("w_hh", "w_hh0", w.weight_hh, self._panels(self.gates, self.hidden, self.outputs))',
            ),
        },
    ),
    *mutations(
        PLANS,
        "forward",
        "gru",
        {
            "both directions write the same gates": (
                'self.at(f"{field}.base", field, d * tensor.stride(-2) * self.item)\n        if self.ragged',
                'self.at(f"{field}.base", field, 0)\n        if self.ragged',
            ),
            "saved rows of lengths where they would be padded": (
                "        if self.ragged:\n            return Rows",
                "        if self.packed:\n            return Rows",
            ),
        },
    ),
    *mutations(
        PLANS,
        "backward",
        "rnn_tanh",
        {
            "both directions read the same dy": ('tensors["dy"], d * self.outputs)', 'tensors["dy"], 0)'),
        },
    ),
    *mutations(
        LAUNCH,
        "repeated",
        "GRU",
        {
            "stale packed weights": (
                "in self.regions:\n            if work",
                'in self.regions[vars(self).setdefault("packed", given) is not given :]:\n            if work',
            ),
        },
    ),
    *mutations(
        BACKEND,
        "strides",
        "rnn_tanh",
        {
            "a plan of other strides": ("(t.shape, t.stride()) for t in tensors", "(t.shape, None) for t in tensors"),
        },
    ),
    *mutations(
        AHEAD,
        "repeated",
        "GRU",
        {
            "by a plan: dx of the reverse direction dropped": ("made[0].add_(other)", "pass"),
            "by a plan: gradients of shares not added": ("total(made[i], self.zero)", "made[i][0]"),
            "by a plan: another layout of the gradient": (
                "tuple(needs), *[None if g is None else g.stride() for g in given])",
                "tuple(needs), *[g is None for g in given])",
            ),
        },
    ),
    *mutations(
        AHEAD,
        "repeated",
        "LSTM",
        {
            "by a plan: every layer starts from the first one's states": (
                "int(part.storage_offset() - begins",
                "0 * int(part.storage_offset() - begins",
            ),
        },
    ),
    *mutations(
        "shortcut.py",
        "repeated",
        "GRU",
        {
            "by a plan: another layout of the input": ("(t.shape, t.stride(), t.dtype,", "(t.shape, t.dtype,"),
        },
    ),
    *mutations(
        "reference.py",
        "layers",
        "RNN",
        {
            "previous rows not shifted": (
                "h = at.grid.keep(previous, saved.y[previous], h)",
                "h = at.grid.keep(previous, saved.y[t], h)",
            ),
            "previous rows of reverse on the wrong side": (
                "previous = at.order[index - 1]",
                "previous = max(t - 1, 0)",
            ),
            "previous row of a sequence that has none": (
                "h = at.grid.keep(previous, saved.y[previous], h)",
                "h = saved.y[previous]",
            ),
        },
    ),
    *mutations(
        "reference.py",
        "layers",
        "GRU",
        {
            "gru: dW_hh from dgx": ('found["weight_hh"] = outer(g.dgh, g.u)', 'found["weight_hh"] = outer(g.dgx, g.u)'),
            "gru: db_hh a copy of db_ih": ('"bias_hh": g.dgh', '"bias_hh": g.dgx'),
        },
    ),
    *mutations(
        "reference.py",
        "layers",
        "LSTM",
        {
            "sequences not in their order": ("sequence if layer.order is None else layer.order[sequence]", "sequence"),
            "rows past an end not zero": (
                "return self.collect(grid) if self.packed else self.mask(grid)",
                "return self.collect(grid) if self.packed else grid",
            ),
        },
    ),
    *mutations(
        "packing.py",
        "layers",
        "LSTM",
        {
            "shortest sequence first": ("descending=True", "descending=False"),
            "a step too few for a length": ("ended[:steps]", "ended[1 : steps + 1]"),
        },
    ),
    *mutations(
        "stack.py",
        "layers",
        "LSTM",
        {
            "initial states not sorted": ("states = tuple(s.index_select(1, sorted_indices) for s in states)", "pass"),
            "final states not unsorted": (
                "states = tuple(s.index_select(1, unsorted_indices) for s in states)",
                "pass",
            ),
        },
    ),
]
