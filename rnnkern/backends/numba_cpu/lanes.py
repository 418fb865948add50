"""What only the optional parts of a sweep do with vectors: lanes by the bytes of a mask, and sums over a row."""

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from rnnkern.backends.numba_cpu.jit import inlined
from rnnkern.backends.numba_cpu.vector import (
    VECTOR_BYTES,
    VectorType,
    broadcast,
    call_llvm,
    constant,
    fma,
    ir_scalar,
    item_bytes,
    lanes_below,
    load,
    load_part,
    splat,
    vector_lanes,
)


@intrinsic
def load_byte(typingctx, address):
    """The byte at `address`."""

    def codegen(context, builder, sig, args):
        byte = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.zext(byte, ir.IntType(64))

    return types.intp(types.intp), codegen


@intrinsic
def number_everywhere(typingctx, address, zero):
    """The vector whose every lane is the number at `address`."""
    vector = VectorType(zero)

    def codegen(context, builder, sig, args):
        number = builder.load(builder.inttoptr(args[0], ir_scalar(vector.scalar).as_pointer()))
        return splat(builder, number, vector.lanes)

    return vector(types.intp, zero), codegen


def _by_bytes(whole):
    """`where_set` for a whole vector of bytes, or a part."""

    def typed(typingctx, mask, yes, no, count):
        vector = yes

        def codegen(context, builder, sig, args):
            mask, yes, no, count = args
            kind = ir.VectorType(ir.IntType(8), vector.lanes)
            pointer, nothing = builder.inttoptr(mask, kind.as_pointer()), ir.Constant(kind, [0] * vector.lanes)
            if whole:
                read = builder.load(pointer)
                read.align = 1
            else:
                name, align = f"llvm.masked.load.v{vector.lanes}i8.p0", ir.Constant(ir.IntType(32), 1)
                there = lanes_below(builder, vector, count)
                read = call_llvm(builder, name, kind, pointer, align, there, nothing)
            return builder.select(builder.icmp_unsigned("!=", read, nothing), yes, no)

        return vector(types.intp, yes, no, types.intp), codegen

    return intrinsic(typed)


_where_all = _by_bytes(whole=True)
_where_some = _by_bytes(whole=False)


@inlined
def where_set(mask, yes, no, count, zero):
    """Lanes of `yes` where the bytes at `mask` are not 0, else of `no`; bytes past `count` are not read."""
    if count >= vector_lanes(zero):
        return _where_all(mask, yes, no, count)
    return _where_some(mask, yes, no, count)


@intrinsic
def first_lanes(typingctx, v, count):
    """The first `count` lanes of v, 0 in the others."""

    def codegen(context, builder, sig, args):
        return builder.select(lanes_below(builder, v, args[1]), args[0], constant(v, 0))

    return v(v, types.intp), codegen


@intrinsic
def total(typingctx, v):
    """The vector whose every lane is the sum of all lanes of v, each of which is added in the same order."""

    def codegen(context, builder, sig, args):
        value, half = args[0], v.lanes // 2
        while half:  # halves that are `half` lanes apart change places: every lane has the sum in the end
            order = ir.Constant(ir.VectorType(ir.IntType(32), v.lanes), [lane ^ half for lane in range(v.lanes)])
            value = builder.fadd(value, builder.shuffle_vector(value, value, order))
            half //= 2
        return value

    return v(v), codegen


@intrinsic
def over_root(typingctx, v, epsilon):
    """1 / sqrt(v + epsilon)."""

    def codegen(context, builder, sig, args):
        small = splat(builder, context.cast(builder, args[1], sig.args[1], v.scalar), v.lanes)
        name = f"llvm.sqrt.v{v.lanes}f{v.scalar.bitwidth}"
        root = call_llvm(builder, name, args[0].type, builder.fadd(args[0], small))
        return builder.fdiv(constant(v, 1), root)

    return v(v, epsilon), codegen


@inlined
def mix(mask, share, old, new, count, zero):
    """A state after zoneout: old where the mask is set, or a share of each; new where neither is given."""
    if mask != 0:
        return where_set(mask, old, new, count, zero)
    if share != 0:
        part = number_everywhere(share, zero)
        return part * old + (1.0 - part) * new
    return new


@inlined
def of_old(mask, share, gradient, count, zero):
    """What of the gradient of `mix` goes to old; what goes to new is `of_new`."""
    if mask != 0:
        return where_set(mask, gradient, broadcast(zero), count, zero)
    return number_everywhere(share, zero) * gradient if share != 0 else broadcast(zero)


@inlined
def of_new(mask, share, gradient, count, zero):
    if mask != 0:
        return where_set(mask, broadcast(zero), gradient, count, zero)
    return (1.0 - number_everywhere(share, zero)) * gradient if share != 0 else gradient


@inlined
def _part_sum(row, units, zero):
    """The sum of `units` numbers, lane by lane; four sums side by side hide the time that an addition takes."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    a = b = c = d = broadcast(zero)
    u = 0
    while u + 4 * lanes <= units:
        at = row + u * item
        a, b = a + load(at, zero), b + load(at + VECTOR_BYTES, zero)
        c, d = c + load(at + 2 * VECTOR_BYTES, zero), d + load(at + 3 * VECTOR_BYTES, zero)
        u += 4 * lanes
    while u < units:
        a = a + load_part(row + u * item, zero, units - u)
        u += lanes
    return (a + b) + (c + d)


@inlined
def _part_squares(row, units, mean, zero):
    """The same of the squares of what differs from `mean`."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    a = b = c = d = broadcast(zero)
    u = 0
    while u + 4 * lanes <= units:
        at = row + u * item
        off_a, off_b = load(at, zero) - mean, load(at + VECTOR_BYTES, zero) - mean
        off_c, off_d = load(at + 2 * VECTOR_BYTES, zero) - mean, load(at + 3 * VECTOR_BYTES, zero) - mean
        a, b, c, d = fma(off_a, off_a, a), fma(off_b, off_b, b), fma(off_c, off_c, c), fma(off_d, off_d, d)
        u += 4 * lanes
    while u < units:
        off = first_lanes(load_part(row + u * item, zero, units - u) - mean, units - u)
        a = fma(off, off, a)
        u += lanes
    return (a + b) + (c + d)


@inlined
def moments(row, parts, spacing, units, epsilon, zero):
    """The mean of a row of `parts` times `units` numbers, the parts `spacing` bytes apart, and one over the root of its
    variance plus epsilon; both in every lane."""
    over_count = 1.0 / (parts * units)
    sums = squares = broadcast(zero)
    for part in range(parts):
        sums = sums + _part_sum(row + part * spacing, units, zero)
    mean = total(sums) * over_count
    for part in range(parts):
        squares = squares + _part_squares(row + part * spacing, units, mean, zero)
    return mean, over_root(total(squares) * over_count, epsilon)
