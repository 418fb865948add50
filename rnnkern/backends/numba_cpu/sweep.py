"""What the two sweeps share: where rows lie, how a step's sequences are found, and products with packed weights.

Memory. T steps, B sequences, I inputs, H units, P outputs (H, or proj_size), lanes units a vector, W a size rounded up
to whole vectors; everything in the dtype of `zero`. Operands are in operands.py. A row of x or y, of sequence b at step
t, lies at

    base + t*step + b*row              padded
    base + (starts[t] + b)*row         packed: step is 0, and counts[t] sequences take part, the longest ones
    base + t*step + order[b]*row       padded with lengths: as packed, but rows stay where they are

and a row of what is saved for backward at base + t*step + b*row or, ragged, at base + (starts[t] + b)*row.

A thread runs a whole sweep over its share, sequences [first, last), and shares nothing it writes: no barrier. Only
where there are too few sequences for that, several threads are members of one sweep, each with a part of the units: the
rows that a product takes whole lie in the first one's workspace for all of them, and they wait for each other at every
step. A thread carries `block` sequences at a time through all steps, so that their states stay in the caches, and takes
`chunk` steps at a time where something can be done for all of them at once: the product with W_ih, which no step waits
for, and in backward everything but the recurrence. The rows of a chunk lie one behind the other in the order in which
the sweep meets them.
"""

from typing import NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from rnnkern.backends.numba_cpu.jit import inlined, woven
from rnnkern.backends.numba_cpu.tile import CACHE_LINE, MAX_ROWS, MAX_VECTORS, tile
from rnnkern.backends.numba_cpu.vector import (
    VECTOR_BYTES,
    broadcast,
    item_bytes,
    load,
    load_int,
    load_part,
    store,
    store_part,
    vector_lanes,
)

DEPTH_PART = 512  # of a product in backward: at most 128 KiB of a panel
ROWS_THAT_STAY = 64


@inlined
def sequence(sizes, b):
    """Which sequence of the caller's is b-th in the sweep."""
    return load_int(sizes.order + 8 * b) if sizes.order != 0 else b


@inlined
def outer_step(sizes, rows, t):
    """Where the rows of step t begin in what comes from or goes to the caller."""
    first = load_int(sizes.starts + 8 * t) if sizes.starts != 0 and sizes.order == 0 else 0
    return rows.base + t * rows.step + first * rows.row


@inlined
def outer_row(sizes, rows, step, b):
    """A row of the step that begins at `step` (`outer_step`)."""
    return step + sequence(sizes, b) * rows.row


@inlined
def given_row(sizes, rows, step, b):
    """The same, 0 where nobody gave such rows."""
    return outer_row(sizes, rows, step, b) if rows.base != 0 else 0


@inlined
def behind(address, offset):
    """An address further on; 0 stays 0, for what is not there."""
    return address + offset if address != 0 else 0


@inlined
def saved_step(sizes, rows, t):
    """Where the rows of step t begin in what forward keeps for backward; row b is b * rows.row further."""
    first = load_int(sizes.starts + 8 * t) if sizes.starts != 0 else 0
    return rows.base + t * rows.step + first * rows.row


@inlined
def state_row(sizes, rows, b):
    """A row of an initial or final state; 0 where there is none, which copy_in takes for zeros."""
    return rows.base + sequence(sizes, b) * rows.row if rows.base != 0 else 0


@inlined
def step_order(sizes, s):
    """The step that a sweep in this direction takes as its s-th."""
    return sizes.steps - 1 - s if sizes.reverse else s


@inlined
def rows_in(sizes, t, first, last):
    """How many sequences of [first, last) take part in step t."""
    return max(0, min(load_int(sizes.counts + 8 * t), last) - first) if sizes.counts != 0 else last - first


class Own(NamedTuple):
    """The vectors [first, last) of rows of each width that are a member's to write."""

    inputs: tuple[int, int]
    hidden: tuple[int, int]
    outputs: tuple[int, int]


@inlined
def own_vectors(sizes, units, per_panel, zero):
    """Those of a row of `units` that are this thread's: whole panels."""
    vectors = padded_bytes(units, zero) // VECTOR_BYTES
    panels = (vectors + per_panel - 1) // per_panel
    first, last = panels * sizes.member // sizes.members, panels * (sizes.member + 1) // sizes.members
    return first * per_panel, min(last * per_panel, vectors)


@inlined
def own_units(sizes, per_panel, zero):
    """What of the units this thread works on."""
    return Own(
        own_vectors(sizes, sizes.inputs, per_panel, zero),
        own_vectors(sizes, sizes.hidden, per_panel, zero),
        own_vectors(sizes, sizes.outputs, per_panel, zero),
    )


@intrinsic
def _call(typingctx, function):
    """Calls a C function without arguments by its address."""

    def codegen(context, builder, sig, args):
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@inlined
def wait_for_members(sizes):
    """Waits for the other members, if there are any: what they wrote before can be read now."""
    if sizes.barrier != 0:
        _call(sizes.barrier)


@inlined
def common(a, space):
    """The workspace of rows that all members read."""
    return a.workspace if a.sizes.members > 1 else space


@inlined
def tile_height(rows, most):
    """Rows of the next tile: as many tiles as needed, of nearly equal height."""
    tiles = (rows + most - 1) // most
    return (rows + tiles - 1) // tiles


@inlined
def padded_bytes(units, zero):
    """Bytes of a row of `units` numbers in a workspace: whole vectors."""
    lanes = vector_lanes(zero)
    return (units + lanes - 1) // lanes * VECTOR_BYTES


@inlined
def apart_bytes(units, zero):
    """The same where an outer product walks down the rows: whole cache lines, and no multiple of four of them, or the
    lines that a panel takes of each row would crowd in a part of the first cache."""
    lines = (padded_bytes(units, zero) + CACHE_LINE - 1) // CACHE_LINE
    return (lines + 1 if lines % 4 == 0 else lines) * CACHE_LINE


@inlined
def copy_in(target, source, units, zero):
    """`units` numbers into a workspace row, zeros behind them to the end of the vector; all zeros where there is no
    source."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for u in range(0, units, lanes):
        store(target + u * item, broadcast(zero) if source == 0 else load_part(source + u * item, zero, units - u))


@inlined
def copy_out(target, source, units, zero):
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for u in range(0, units, lanes):
        store_part(target + u * item, load(source + u * item, zero), zero, units - u)


@inlined
def copy_in_own(target, source, own, units, zero):
    """`copy_in` of a member's vectors."""
    at, first = own[0] * VECTOR_BYTES, own[0] * vector_lanes(zero)
    copy_in(target + at, behind(source, at), min(own[1] * vector_lanes(zero), units) - first, zero)


@inlined
def copy_out_own(target, source, own, units, zero):
    """`copy_out` of them."""
    at, first = own[0] * VECTOR_BYTES, own[0] * vector_lanes(zero)
    copy_out(target + at, source + at, min(own[1] * vector_lanes(zero), units) - first, zero)


@inlined
def gather(sizes, rows, t, first, count, units, target, zero):
    """The rows of `count` sequences at step t into a workspace."""
    row, step = padded_bytes(units, zero), outer_step(sizes, rows, t)
    for b in range(count):
        copy_in(target + b * row, outer_row(sizes, rows, step, first + b), units, zero)


@inlined
def clear_ended(sizes, rows, t, first, last, units, zero):
    """Zeros in the rows of those sequences of [first, last) that have ended before step t; packed rows have none."""
    if sizes.order != 0 and rows.base != 0:
        lanes, item, step = vector_lanes(zero), item_bytes(zero), outer_step(sizes, rows, t)
        for b in range(first + rows_in(sizes, t, first, last), last):
            row = outer_row(sizes, rows, step, b)
            for u in range(0, units, lanes):
                store_part(row + u * item, broadcast(zero), zero, units - u)


@inlined
def ahead(following, lines, b, rows):
    """Which lines a tile of `rows` rows that begins with row b asks for: all tiles together the `lines` of what is
    multiplied next."""
    return following + lines * b // rows * CACHE_LINE


@inlined
def count_panels(own, per_panel):
    """Of vectors `own`."""
    return (own[1] - own[0] + per_panel - 1) // per_panel


@inlined
def panel_of(own, per_panel, panels, p, s):
    """Where the panel begins that the s-th step meets as its p-th: every other step goes from the last one back to the
    first. Of weights that are larger than the second cache, those that a step has met last are still there. Behind the
    last panel of a step none follows, and what is fetched from there has no use: the next step begins where it ends."""
    return own[0] + (panels - 1 - p if s % 2 else p) * per_panel


@woven
def product(rows, a, a_row, weight, depth, own, s, c, c_row, zero):
    """c (rows, units) += a (rows, depth) @ weight (depth, units), packed by its depth, or in place where its units are
    whole vectors; of `own` vectors of the units, which are whole panels, in the order of the s-th step.

    The depth, which is that of all gates, is taken in parts: those of a panel and of the one that follows stay in the
    second cache while all rows meet them. Where rows are many, their parts stay there while they meet all panels."""
    packed, item = weight.panels != 0, item_bytes(zero)
    panels, parts = count_panels(own, MAX_VECTORS), (depth + DEPTH_PART - 1) // DEPTH_PART
    rows_stay = not packed or rows >= ROWS_THAT_STAY
    for i in range(panels * parts):
        p, k = (i % panels, i // panels * DEPTH_PART) if rows_stay else (i // parts, i % parts * DEPTH_PART)
        v, part = panel_of(own, MAX_VECTORS, panels, p, s), min(DEPTH_PART, depth - k)
        width = min(MAX_VECTORS, own[1] - v)
        panel_row = width * VECTOR_BYTES if packed else weight.row
        panel = (weight.panels + v * depth * VECTOR_BYTES if packed else weight.base + v * VECTOR_BYTES) + k * panel_row
        lines = part * panel_row // CACHE_LINE
        following = panel + part * panel_row
        if rows_stay or k + part == depth:
            after = panel_of(own, MAX_VECTORS, panels, p + 1, s)
            following = weight.panels + after * depth * VECTOR_BYTES + (k * panel_row if rows_stay else 0)
        b = 0
        while b < rows:
            height = tile_height(rows - b, MAX_ROWS[width])
            at = c + b * c_row + v * VECTOR_BYTES
            tile(
                height, width, a + b * a_row + k * item, a_row, panel, panel_row, part,
                ahead(following, lines, b, rows) if packed else a, at, c_row, VECTOR_BYTES, at, c_row, VECTOR_BYTES,
                zero,
            )  # fmt: skip
            b += height
