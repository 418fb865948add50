"""The matrix tile: rows of A times one panel of weights, accumulated in registers, written as LLVM vector code.

A panel is the part of a weight matrix that belongs to some vectors of units (`lanes` units a vector), all gates of them
side by side, so that a tile's result holds every gate of the units that a cell then needs:

    panel (K, gates, vectors, lanes)     K the reduction: I, H, or G*H in backward
    a weight packed: panels one behind the other, the last one with as many vectors as are left; units past H are zero

The tile of R rows and V vectors computes C (R, V*lanes) = C0 + A (R, K) @ panel with R*V accumulators. For each k it
loads V vectors and R scalars for R*V multiply-adds, so R is as large as the registers allow: beside the accumulators
they hold the fewer of both, and one of the others at a time, R*V + min(R, V) + 1 <= REGISTERS.
Each element of C is summed in the order of k whatever the tile, so a row's result depends neither on its neighbours nor
on how the batch was split over threads.

While it works, a tile may ask for the lines at another address, one for each k: where weights come from the third cache
or from memory, the panel that follows is there when it is needed.

The same code with A walked the other way, C (R, V*lanes) = C0 + A (K, R)^T @ panel, sums the outer products that make
a weight's gradient: K are then rows of a batch, R gates and the panel their inputs. C0, what other rows of the batch
gave, comes to the sum last there, so that a long sum is one of sums and loses little to rounding.
"""

from typing import NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from rnnkern.backends.numba_cpu.jit import shared
from rnnkern.backends.numba_cpu.vector import (
    REGISTERS,
    VECTOR_BYTES,
    VectorType,
    emit_prefetch,
    ir_scalar,
    ir_vector,
    multiply_add,
    splat,
)

MAX_VECTORS = 4  # in a panel; more would leave too few rows in the registers
# The most rows of a tile, by the vectors of its panel.
MAX_ROWS = (0, 8, 8, 8, 6) if REGISTERS == 32 else (0, 8, 6, 4, 3)
CACHE_LINE = 64
# Of a tile with fewer multiply-adds for each k, loads are what takes its time, and another one would cost some. The
# largest tiles of 16 registers have 12.
LEAST_WITH_FETCH = 16 if REGISTERS == 32 else 12


def fetches_ahead(rows, vectors):
    """Whether such a tile asks for a cache line ahead of time for each k."""
    return rows * vectors >= LEAST_WITH_FETCH


class _Operands(NamedTuple):
    """LLVM values: pointers to bytes, and strides in bytes."""

    a: ir.Value
    a_stride: ir.Value  # of a row; where A is walked the other way, of a k
    panel: ir.Value
    panel_row: ir.Value
    depth: ir.Value
    ahead: ir.Value
    c0: ir.Value
    c0_row: ir.Value
    c0_column: ir.Value
    c: ir.Value
    c_row: ir.Value
    c_column: ir.Value


_POINTERS = ("a", "panel", "ahead", "c0", "c")


def _number(value):
    return ir.Constant(ir.IntType(64), value)


def _products(builder, vector, sums, rows, vectors, splatted, weights):
    """The sums with a product added to each, in an order that needs few registers: of rows and vectors, those of which
    there are fewer are loaded first, the others one by one where they are used."""
    new = {}

    def add(row, element, column, weight):
        new[row, column] = multiply_add(builder, vector, element, weight, sums[row, column])

    if rows >= vectors:
        held = [weights(column) for column in range(vectors)]
        for row in range(rows):
            element = splatted(row)
            for column in range(vectors):
                add(row, element, column, held[column])
    else:
        held = [splatted(row) for row in range(rows)]
        for column in range(vectors):
            weight = weights(column)
            for row in range(rows):
                add(row, held[row], column, weight)
    return new


def _emit_tile(builder, vector, rows, vectors, at, transposed):
    """Writes the code of one tile, in three blocks: C0 or zeros into registers, the loop over the depth, registers, and
    C0 if it comes last, into C."""

    def pointer(base, offset):
        return builder.bitcast(builder.gep(base, [offset]), ir_vector(vector).as_pointer())

    def load(base, offset):
        value = builder.load(pointer(base, offset))
        value.align = item
        return value

    def offset(row_stride, row, column_stride, column):
        return builder.add(builder.mul(row_stride, _number(row)), builder.mul(column_stride, _number(column)))

    def c0(row, column):
        return load(at.c0, offset(at.c0_row, row, at.c0_column, column))

    def element(base, offset):
        return builder.load(builder.bitcast(builder.gep(base, [offset]), ir_scalar(vector.scalar).as_pointer()))

    item = vector.scalar.bitwidth // 8
    grid = [(row, column) for row in range(rows) for column in range(vectors)]
    zeros = ir.Constant(ir_vector(vector), None)
    start = {(row, column): zeros if transposed else c0(row, column) for row, column in grid}
    if transposed:
        a_rows, a_step = [builder.gep(at.a, [_number(row * item)]) for row in range(rows)], at.a_stride
    else:
        a_rows = [builder.gep(at.a, [builder.mul(at.a_stride, _number(row))]) for row in range(rows)]
        a_step = _number(item)
    entry, body, done = builder.block, builder.append_basic_block("depth"), builder.append_basic_block("write")
    builder.cbranch(builder.icmp_signed(">", at.depth, _number(0)), body, done)

    builder.position_at_end(body)
    k = builder.phi(ir.IntType(64))
    a_offset = builder.phi(ir.IntType(64))
    panel = builder.phi(at.panel.type)
    sums = {rc: builder.phi(ir_vector(vector)) for rc in grid}
    if fetches_ahead(rows, vectors) and not transposed:
        emit_prefetch(builder, builder.gep(at.ahead, [builder.mul(k, _number(CACHE_LINE))]))
    new = _products(
        builder, vector, sums, rows, vectors,
        lambda row: splat(builder, element(a_rows[row], a_offset), vector.lanes),
        lambda column: load(panel, _number(column * VECTOR_BYTES)),
    )  # fmt: skip
    following = builder.add(k, _number(1))
    for phi, first, later in [
        (k, _number(0), following),
        (a_offset, _number(0), builder.add(a_offset, a_step)),
        (panel, at.panel, builder.gep(panel, [at.panel_row])),
        *((sums[rc], start[rc], new[rc]) for rc in grid),
    ]:
        phi.add_incoming(first, entry)
        phi.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, at.depth), body, done)

    builder.position_at_end(done)
    result = {rc: builder.phi(ir_vector(vector)) for rc in grid}
    for rc in grid:
        result[rc].add_incoming(start[rc], entry)
        result[rc].add_incoming(new[rc], body)
    for row, column in grid:
        total = builder.fadd(result[row, column], c0(row, column)) if transposed else result[row, column]
        builder.store(total, pointer(at.c, offset(at.c_row, row, at.c_column, column))).align = item


def _codegen(sizes, transposed):
    """The code of every size of tile, and the jump to the one asked for."""

    def codegen(context, builder, sig, args):
        rows, vectors, *operands = args[:-1]
        vector, byte = VectorType(sig.args[-1]), ir.IntType(8).as_pointer()
        names = zip(_Operands._fields, operands, strict=True)
        at = _Operands(*(builder.inttoptr(value, byte) if name in _POINTERS else value for name, value in names))
        done = builder.append_basic_block("tile_done")
        shape = builder.add(builder.mul(vectors, _number(max(MAX_ROWS) + 1)), rows)
        choice = builder.switch(shape, done)
        for r, v in sizes:
            block = builder.append_basic_block(f"tile_{r}x{v}")
            choice.add_case(_number(v * (max(MAX_ROWS) + 1) + r), block)
            builder.position_at_end(block)
            _emit_tile(builder, vector, r, v, at, transposed)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return codegen


@intrinsic
def _tile(
    typingctx, rows, vectors, a, a_row, panel, panel_row, depth, ahead, c0, c0_row, c0_column, c, c_row, c_column, zero
):
    sizes = [(r, v) for v in range(1, MAX_VECTORS + 1) for r in range(1, MAX_ROWS[v] + 1)]
    return types.void(*[types.intp] * 14, zero), _codegen(sizes, transposed=False)


@intrinsic
def _outer_tile(
    typingctx, rows, vectors, a, a_k, panel, panel_row, depth, ahead, c0, c0_row, c0_column, c, c_row, c_column, zero
):
    sizes = [(MAX_ROWS[v], v) for v in range(1, MAX_VECTORS + 1)]
    return types.void(*[types.intp] * 14, zero), _codegen(sizes, transposed=True)


@shared
def tile(rows, vectors, a, a_row, panel, panel_row, depth, ahead, c0, c0_row, c0_column, c, c_row, c_column, zero):
    """C (rows, vectors*lanes) = C0 + A (rows, depth) @ panel, for 1 <= vectors <= MAX_VECTORS and 1 <= rows <=
    MAX_ROWS[vectors].

    a, panel, c0 and c are addresses, the other names' strides count bytes: from row to row (0 repeats one), and from
    one vector of a row to the next. C may be C0. `ahead` is where lines that will be read soon begin, any address.
    """
    _tile(rows, vectors, a, a_row, panel, panel_row, depth, ahead, c0, c0_row, c0_column, c, c_row, c_column, zero)


@shared
def outer_tile(vectors, a, a_k, panel, panel_row, depth, c0, c0_row, c, c_row, zero):
    """C (MAX_ROWS[vectors], vectors*lanes) = A (depth, MAX_ROWS[vectors])^T @ panel + C0; a row of C0 and of C lies in
    one piece."""
    rows, ahead = MAX_ROWS[vectors], 0
    _outer_tile(
        rows, vectors, a, a_k, panel, panel_row, depth, ahead, c0, c0_row, VECTOR_BYTES, c, c_row, VECTOR_BYTES, zero
    )
