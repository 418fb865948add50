"""A SIMD vector as a Numba type, so that cells and gates read as arithmetic and compile to the widest instructions of
this machine.

`vector_lanes(zero)` elements of one dtype live in a register: 64 bytes of it with AVX-512, 32 with AVX, 16 elsewhere
(SSE2, NEON). Addresses are plain integers, strides are counted by the caller. `zero`, a scalar 0 of the wanted dtype,
tells float32 from float64. Compare, minimum and maximum forms that lose NaN are left out on purpose: `clamp` keeps it.
"""

import operator
import platform

import numba
from llvmlite import binding, ir
from numba.core import cgutils, types, typing
from numba.core.extending import intrinsic, lower_builtin, models, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global


def host_features() -> set[str]:
    """The instruction sets Numba compiles for: what the CPU has, or what NUMBA_CPU_FEATURES says it has."""
    if numba.config.CPU_FEATURES is not None:
        return {name[1:] for name in numba.config.CPU_FEATURES.split(",") if name.startswith("+")}
    return {name for name, present in binding.get_host_cpu_features().items() if present}


_FEATURES = host_features()
VECTOR_BYTES = 64 if "avx512f" in _FEATURES else 32 if "avx" in _FEATURES else 16
ON_X86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
FLUSH_BITS = 0x8040  # of MXCSR: denormals are zero, flush to zero
# A processor by Intel takes 16 cycles to divide a vector of AVX-512, in which it can do 32 multiply-adds. One by AMD
# divides beside them.
DIVIDES_SLOWLY = "avx512f" in _FEATURES and not (numba.config.CPU_NAME or binding.get_host_cpu_name()).startswith(
    "znver"
)
REGISTERS = 32 if "avx512f" in _FEATURES or "neon" in _FEATURES else 16

# (mantissa bits, exponent bias) of the two dtypes a sweep computes in
_FORMAT = {types.float32: (23, 127), types.float64: (52, 1023)}


class VectorType(types.Type):
    """`lanes` numbers of the type `scalar`, passed and returned in a register."""

    def __init__(self, scalar):
        self.scalar = scalar
        self.lanes = VECTOR_BYTES * 8 // scalar.bitwidth
        super().__init__(name=f"vector({scalar} x {self.lanes})")


def ir_scalar(scalar):
    return ir.FloatType() if scalar == types.float32 else ir.DoubleType()


def ir_vector(vector):
    return ir.VectorType(ir_scalar(vector.scalar), vector.lanes)


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir_vector(vector))


def splat(builder, value, lanes):
    """Every lane of the result holds the scalar `value`."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def constant(vector, value):
    return ir.Constant(ir_vector(vector), [float(value)] * vector.lanes)


def call_llvm(builder, name, result, *arguments):
    function = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def llvm_suffix(vector):
    return f"v{vector.lanes}f{vector.scalar.bitwidth}"


def multiply_add(builder, vector, a, b, c):
    """a * b + c: fused where the machine has it, two roundings where not (a call into libm would cost more than the
    sweep)."""
    return call_llvm(builder, f"llvm.fmuladd.{llvm_suffix(vector)}", ir_vector(vector), a, b, c)


def vector_pointer(builder, vector, address):
    return builder.inttoptr(address, ir_vector(vector).as_pointer())


def _arithmetic(python_operator, emit):
    @infer_global(python_operator)
    class VectorArithmetic(AbstractTemplate):
        def generic(self, args, kws):
            vectors = [a for a in args if isinstance(a, VectorType)]
            others = [a for a in args if not isinstance(a, (VectorType, types.Number))]
            if vectors and not others and not kws:
                return typing.signature(vectors[0], *args)
            return None

    def lower(context, builder, sig, args):
        vector = sig.return_type
        operands = []
        for value, kind in zip(args, sig.args, strict=True):
            if not isinstance(kind, VectorType):
                value = splat(builder, context.cast(builder, value, kind, vector.scalar), vector.lanes)
            operands.append(value)
        return emit(builder, *operands)

    for pair in ((VectorType, VectorType), (VectorType, types.Number), (types.Number, VectorType)):
        lower_builtin(python_operator, *pair)(lower)


_arithmetic(operator.add, lambda builder, a, b: builder.fadd(a, b))
_arithmetic(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_arithmetic(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_arithmetic(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


@intrinsic
def vector_lanes(typingctx, zero):
    """How many numbers of the dtype of `zero` a vector holds, known when the kernel is compiled."""
    lanes = VectorType(zero).lanes
    return types.intp(zero), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), lanes)


@intrinsic
def item_bytes(typingctx, zero):
    """Bytes of one number of the dtype of `zero`."""
    size = zero.bitwidth // 8
    return types.intp(zero), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), size)


@intrinsic
def broadcast(typingctx, value):
    """The vector whose every lane is `value`."""
    vector = VectorType(value)
    return vector(value), lambda context, builder, sig, args: splat(builder, args[0], vector.lanes)


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c."""
    vector = next(kind for kind in (a, b, c) if isinstance(kind, VectorType))

    def codegen(context, builder, sig, args):
        operands = [
            value
            if isinstance(kind, VectorType)
            else splat(builder, context.cast(builder, value, kind, vector.scalar), vector.lanes)
            for value, kind in zip(args, sig.args, strict=True)
        ]
        return multiply_add(builder, vector, *operands)

    return vector(a, b, c), codegen


@intrinsic
def clamp(typingctx, v, limit):
    """`v` held within [-limit, limit]; a NaN stays, since every ordered comparison with it is false."""
    vector = v

    def codegen(context, builder, sig, args):
        high = splat(builder, context.cast(builder, args[1], sig.args[1], vector.scalar), vector.lanes)
        low = builder.fneg(high)
        capped = builder.select(builder.fcmp_ordered(">", args[0], high), high, args[0])
        return builder.select(builder.fcmp_ordered("<", capped, low), low, capped)

    return vector(v, limit), codegen


def _estimated(builder, vector, v):
    """1 / v to 14 bits."""
    kind, lanes = ir_vector(vector), vector.lanes
    suffix = f"{'ps' if vector.scalar == types.float32 else 'pd'}.{VECTOR_BYTES * 8}"
    every = ir.Constant(ir.IntType(lanes), (1 << lanes) - 1)
    return call_llvm(builder, f"llvm.x86.avx512.rcp14.{suffix}", kind, v, ir.Constant(kind, ir.Undefined), every)


@intrinsic
def reciprocal(typingctx, v):
    """1 / v, for v that are neither 0 nor infinite."""

    def codegen(context, builder, sig, args):
        (value,) = args
        if not DIVIDES_SLOWLY:
            return builder.fdiv(constant(v, 1), value)
        found, negated = _estimated(builder, v, value), builder.fneg(value)
        for _ in range(1 if v.scalar == types.float32 else 2):  # Newton's step doubles the bits
            error = multiply_add(builder, v, negated, found, constant(v, 1))
            found = multiply_add(builder, v, found, error, found)
        return found

    return v(v), codegen


@intrinsic
def positive_part(typingctx, v):
    """max(v, 0), and NaN where v is NaN: torch.relu."""

    def codegen(context, builder, sig, args):
        zero = constant(v, 0)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[0])

    return v(v), codegen


@intrinsic
def unless_negative(typingctx, test, v):
    """0 where test <= 0, else `v` (where test is NaN too): the derivative of torch.relu."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<=", args[0], constant(test, 0)), constant(v, 0), args[1])

    return v(test, v), codegen


@intrinsic
def nearest_power(typingctx, v, log2_of_base):
    """(n, 2^n) for n = v * log2_of_base rounded to the nearest integer; |n| must stay under 126 (float32) or 1022
    (float64).

    Adding 1.5 * 2^mantissa rounds to an integer and leaves it, biased, in the low bits, from where a shift makes it the
    exponent. No conversion to an integer is asked of a NaN, which LLVM leaves undefined: garbage bits here meet the NaN
    of the remainder later.
    """
    mantissa, bias = _FORMAT[v.scalar]
    pair = types.UniTuple(v, 2)

    def codegen(context, builder, sig, args):
        magic = constant(v, 1.5 * 2.0**mantissa + bias)
        factor = splat(builder, context.cast(builder, args[1], sig.args[1], v.scalar), v.lanes)
        shifted = multiply_add(builder, v, args[0], factor, magic)
        integers = ir.VectorType(ir.IntType(v.scalar.bitwidth), v.lanes)
        bits = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [mantissa] * v.lanes))
        return context.make_tuple(builder, pair, (builder.fsub(shifted, magic), builder.bitcast(bits, ir_vector(v))))

    return pair(v, log2_of_base), codegen


def emit_load(builder, vector, address):
    value = builder.load(vector_pointer(builder, vector, address))
    value.align = vector.scalar.bitwidth // 8
    return value


def emit_store(builder, vector, address, value):
    builder.store(value, vector_pointer(builder, vector, address)).align = vector.scalar.bitwidth // 8


def lanes_below(builder, vector, count):
    """The mask of the first `count` lanes."""
    integers = ir.VectorType(ir.IntType(64), vector.lanes)
    return builder.icmp_signed(
        "<", ir.Constant(integers, list(range(vector.lanes))), splat(builder, count, vector.lanes)
    )


def emit_load_part(builder, vector, address, count):
    """The first `count` numbers (None: all), the other lanes 0."""
    if count is None:
        return emit_load(builder, vector, address)
    name, align = f"llvm.masked.load.{llvm_suffix(vector)}.p0", ir.Constant(ir.IntType(32), vector.scalar.bitwidth // 8)
    pointer, mask = vector_pointer(builder, vector, address), lanes_below(builder, vector, count)
    return call_llvm(builder, name, ir_vector(vector), pointer, align, mask, constant(vector, 0))


@intrinsic
def load(typingctx, address, zero):
    """A whole vector from `address`, which need not be aligned."""
    vector = VectorType(zero)
    return vector(types.intp, zero), lambda context, builder, sig, args: emit_load(builder, vector, args[0])


@intrinsic
def store(typingctx, address, v):
    """A whole vector to `address`, which need not be aligned."""

    def codegen(context, builder, sig, args):
        emit_store(builder, v, *args)
        return context.get_dummy_value()

    return types.void(types.intp, v), codegen


@intrinsic
def _load_masked(typingctx, address, zero, count):
    vector = VectorType(zero)

    def codegen(context, builder, sig, args):
        return emit_load_part(builder, vector, args[0], args[2])

    return vector(types.intp, zero, types.intp), codegen


@intrinsic
def _store_masked(typingctx, address, v, count):
    def codegen(context, builder, sig, args):
        name = f"llvm.masked.store.{llvm_suffix(v)}.p0"
        align = ir.Constant(ir.IntType(32), v.scalar.bitwidth // 8)
        mask = lanes_below(builder, v, args[2])
        call_llvm(builder, name, ir.VoidType(), args[1], vector_pointer(builder, v, args[0]), align, mask)
        return context.get_dummy_value()

    return types.void(types.intp, v, types.intp), codegen


@numba.njit
def load_part(address, zero, count):
    """The first `count` numbers at `address`, the other lanes 0. Memory past `count` is not touched."""
    if count >= vector_lanes(zero):
        return load(address, zero)
    return _load_masked(address, zero, count)


@numba.njit
def store_part(address, v, zero, count):
    """The first `count` lanes of `v` to `address`. Memory past `count` is not touched."""
    if count >= vector_lanes(zero):
        store(address, v)
    else:
        _store_masked(address, v, count)


def emit_prefetch(builder, pointer):
    """Asks for the cache line at `pointer`, which may be any address, to come into the second cache."""
    read, second_cache, data = (ir.Constant(ir.IntType(32), number) for number in (0, 2, 1))
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, second_cache, data)


@intrinsic
def prefetch(typingctx, address):
    """Asks for the cache line at any address to come into the second cache."""

    def codegen(context, builder, sig, args):
        emit_prefetch(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def load_int(typingctx, address):
    """The 64-bit integer at `address`."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.intp), codegen


def _control(builder, name, slot):
    pointer = builder.bitcast(slot, ir.IntType(8).as_pointer())
    call_llvm(builder, f"llvm.x86.sse.{name}", ir.VoidType(), pointer)


@intrinsic
def flush_denormals(typingctx):
    """Makes this thread read and write numbers too small for a full mantissa as zero, since a processor takes a hundred
    cycles for each; the mode there was before, for `restore_mode`. Of x86 only: elsewhere nothing changes."""

    def codegen(context, builder, sig, args):
        if not ON_X86:
            return ir.Constant(ir.IntType(32), 0)
        slot = cgutils.alloca_once(builder, ir.IntType(32))
        _control(builder, "stmxcsr", slot)
        before = builder.load(slot)
        builder.store(builder.or_(before, ir.Constant(ir.IntType(32), FLUSH_BITS)), slot)
        _control(builder, "ldmxcsr", slot)
        return before

    return types.uint32(), codegen


@intrinsic
def restore_mode(typingctx, before):
    """Undoes `flush_denormals`."""

    def codegen(context, builder, sig, args):
        if ON_X86:
            _control(builder, "ldmxcsr", cgutils.alloca_once_value(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.uint32), codegen
