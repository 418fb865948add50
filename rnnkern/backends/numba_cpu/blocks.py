"""Squares of vectors: as many vectors as one has lanes. Transposed, they turn rows of a weight into a panel; summed
along their lanes, they are dot products with rows of a weight that is read where it lies.

A panel costs a pass over the weight before the first step. Where a call has few rows that pass takes longer than what
the products gain by it, and `dot_units` does without: lane u of a row's result is the sum over k of w[u, k] * a[k].
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from rnnkern.backends.numba_cpu.jit import shared, woven
from rnnkern.backends.numba_cpu.vector import (
    REGISTERS,
    VECTOR_BYTES,
    VectorType,
    constant,
    emit_load,
    emit_load_part,
    emit_store,
    item_bytes,
    load_part,
    multiply_add,
    store,
    vector_lanes,
)

# Units of up to three rows that are accumulated side by side: enough to hide the latency of an addition, and sums that
# fit the registers.
MOST_DOTS = 8 if REGISTERS == 32 else 4


def _number(value):
    return ir.Constant(ir.IntType(64), value)


def _shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))


def _transposed(builder, rows):
    """The columns of a square: its quarters off the diagonal change places, then those of each quarter, and so on."""
    rows, lanes = list(rows), len(rows)
    half = lanes // 2
    while half:
        low = [lane if lane // half % 2 == 0 else lanes + lane - half for lane in range(lanes)]
        high = [lane + half if lane // half % 2 == 0 else lanes + lane for lane in range(lanes)]
        for i in range(lanes):
            if i // half % 2 == 0:
                a, b = rows[i], rows[i + half]
                rows[i], rows[i + half] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
        half //= 2
    return rows


def _sum_of_lanes(builder, rows):
    """The vector whose lane u is the sum of rows[u]: neighbouring lanes are added and two rows put into one, until one
    is left."""
    lanes = len(rows)
    even, odd = list(range(0, 2 * lanes, 2)), list(range(1, 2 * lanes, 2))
    while len(rows) > 1:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd)) for a, b in pairs]
    return rows[0]


@intrinsic
def _transpose_square(typingctx, source, source_row, target, target_row, zero):
    vector = VectorType(zero)

    def codegen(context, builder, sig, args):
        source, source_row, target, target_row, _ = args
        rows = [builder.add(source, builder.mul(source_row, _number(u))) for u in range(vector.lanes)]
        columns = _transposed(builder, [emit_load(builder, vector, row) for row in rows])
        for k, column in enumerate(columns):
            emit_store(builder, vector, builder.add(target, builder.mul(target_row, _number(k))), column)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, zero), codegen


@intrinsic
def _transpose_part(typingctx, source, source_row, units, depth, target, target_row, zero):
    vector = VectorType(zero)

    def codegen(context, builder, sig, args):
        source, source_row, units, depth, target, target_row, _ = args

        def row(u):
            exists = builder.icmp_signed("<", _number(u), units)
            count = builder.select(exists, depth, _number(0))
            return emit_load_part(builder, vector, builder.add(source, builder.mul(source_row, _number(u))), count)

        columns = _transposed(builder, [row(u) for u in range(vector.lanes)])
        for k, column in enumerate(columns):
            with builder.if_then(builder.icmp_signed("<", _number(k), depth)):
                emit_store(builder, vector, builder.add(target, builder.mul(target_row, _number(k))), column)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, zero), codegen


def _dots(rows):
    """The intrinsic of `dot_units` for so many rows."""

    def typed(typingctx, w, w_row, units, a, a_row, depth, c0, c0_row, c, c_row, zero):
        return types.void(*[types.intp] * 10, zero), codegen

    def codegen(context, builder, sig, args):
        w, w_row, units, a, a_row, depth, c0, c0_row, c, c_row, _ = args
        vector = VectorType(sig.args[-1])
        item, last = vector.scalar.bitwidth // 8, builder.sub(units, _number(1))
        tail = builder.and_(depth, _number(vector.lanes - 1))
        whole = builder.mul(builder.sub(depth, tail), _number(item))  # bytes

        def nth(base, row, n):
            return builder.add(base, builder.mul(row, _number(n)))

        def unit(u):  # past the last: the last again, so that no memory is read that is not the weight's
            index = builder.select(builder.icmp_signed("<", _number(u), units), _number(u), last)
            return builder.add(w, builder.mul(w_row, index))

        def accumulate(pointers, sums, offset, count):
            factors = [
                emit_load_part(builder, vector, builder.add(nth(a, a_row, r), offset), count) for r in range(rows)
            ]
            for pointer, of_unit in zip(pointers, sums, strict=True):
                value = emit_load_part(builder, vector, builder.add(pointer, offset), count)
                for factor, total in zip(factors, of_unit, strict=True):
                    builder.store(multiply_add(builder, vector, value, factor, builder.load(total)), total)

        every = []  # of all units, a sum for each row
        group = min(vector.lanes, MOST_DOTS)
        for first in range(0, vector.lanes, group):
            pointers = [unit(u) for u in range(first, first + group)]
            # on the stack in this text; LLVM lifts them into registers
            sums = [[cgutils.alloca_once_value(builder, constant(vector, 0)) for _ in range(rows)] for _ in pointers]
            for total in (total for of_unit in sums for total in of_unit):
                builder.store(constant(vector, 0), total)
            step = _number(VECTOR_BYTES)
            with cgutils.for_range_slice(builder, _number(0), whole, step, inc=True) as (offset, _):
                accumulate(pointers, sums, offset, None)
            with builder.if_then(builder.icmp_signed(">", tail, _number(0))):
                accumulate(pointers, sums, whole, tail)
            every += [[builder.load(total) for total in of_unit] for of_unit in sums]
        for r in range(rows):
            start = emit_load(builder, vector, nth(c0, c0_row, r))
            of_row = _sum_of_lanes(builder, [of_unit[r] for of_unit in every])
            emit_store(builder, vector, nth(c, c_row, r), builder.fadd(start, of_row))
        return context.get_dummy_value()

    return intrinsic(typed)


_dots_1, _dots_2, _dots_3 = _dots(1), _dots(2), _dots(3)


@shared
def dot_units(rows, w, w_row, units, a, a_row, depth, c0, c0_row, c, c_row, zero):
    """C (rows, lanes) = C0 + a (rows, depth) @ w (units, depth)^T, for up to a vector of units; a row's numbers at `a`,
    the weight's rows w_row bytes apart."""
    r = 0
    while r + 3 <= rows:
        _dots_3(w, w_row, units, a + r * a_row, a_row, depth, c0 + r * c0_row, c0_row, c + r * c_row, c_row, zero)
        r += 3
    if rows - r == 2:
        _dots_2(w, w_row, units, a + r * a_row, a_row, depth, c0 + r * c0_row, c0_row, c + r * c_row, c_row, zero)
    elif rows - r == 1:
        _dots_1(w, w_row, units, a + r * a_row, a_row, depth, c0 + r * c0_row, c0_row, c + r * c_row, c_row, zero)


@shared
def transpose_block(source, source_row, units, depth, target, target_row, zero):
    """Up to a square of a weight (units, depth), its rows source_row bytes apart, as rows of a panel (depth, lanes);
    zeros where units are missing."""
    if units >= vector_lanes(zero) and depth == vector_lanes(zero):
        _transpose_square(source, source_row, target, target_row, zero)
    else:
        _transpose_part(source, source_row, units, depth, target, target_row, zero)


@woven
def pack_units(weight, gates, units, depth, per_panel, part, parts, zero):
    """Panels of units: the weight (gates*units, depth) for a product with rows of `depth` numbers. A part of several
    is every so many panels."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    vectors = (units + lanes - 1) // lanes
    for v in range(part * per_panel, vectors, parts * per_panel):
        width = min(per_panel, vectors - v)
        panel = weight.panels + v * gates * depth * VECTOR_BYTES
        panel_row = gates * width * VECTOR_BYTES
        for column in range(gates * width):  # outside, so that few rows are read at a time and are seen to come
            unit = (v + column % width) * lanes
            for k in range(0, depth, lanes):
                source = weight.base + (column // width * units + unit) * weight.row + k * item
                target = panel + k * panel_row + column * VECTOR_BYTES
                transpose_block(source, weight.row, units - unit, min(lanes, depth - k), target, panel_row, zero)


@woven
def pack_depth(weight, depth, units, per_panel, part, parts, zero):
    """Panels of what the weight (depth, units) takes in: for a product with rows of gradients of what it gives. Parts
    as those of `pack_units`."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    vectors = (units + lanes - 1) // lanes
    for v in range(part * per_panel, vectors, parts * per_panel):
        width = min(per_panel, vectors - v)
        panel = weight.panels + v * depth * VECTOR_BYTES
        for k in range(depth):
            for column in range(width):
                unit = (v + column) * lanes
                store(panel, load_part(weight.base + k * weight.row + unit * item, zero, units - unit))
                panel += VECTOR_BYTES
