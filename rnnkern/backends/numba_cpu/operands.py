"""What a sweep is told: sizes, addresses and strides, as 64-bit integers one behind the other in memory.

Python writes them (rnnkern/backends/numba_cpu/calls.py) and hands a kernel their address: one argument, where Numba
would take longer to unpack a tuple of a hundred numbers than a short sweep runs.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic


class Rows(NamedTuple):
    """Where the rows of a buffer lie, in bytes; base 0 where there is no such buffer."""

    base: int = 0
    step: int = 0
    row: int = 0


class Matrix(NamedTuple):
    """A weight (units, depth): in place, and packed into panels (tile.py), 0 where a sweep reads it in place."""

    base: int = 0
    row: int = 0  # bytes from one unit to the next; the numbers of a unit are adjacent
    panels: int = 0


class Sizes(NamedTuple):
    """What both sweeps know of the layer, and how they cut it."""

    steps: int  # T
    reverse: int
    inputs: int  # I
    hidden: int  # H
    outputs: int  # P
    starts: int  # (T) int64: the first of a step's packed rows, or 0
    counts: int  # (T) int64: how many sequences take part in a step, or 0 where all do
    order: int  # (B) int64: the sequence that is b-th longest, where x and y are padded and ragged, or 0
    block: int  # most sequences that a sweep carries at a time
    chunk: int  # steps whose input product is formed, or whose gradients are collected, at a time


class Forward(NamedTuple):
    """The operands of a forward sweep. Offsets are in a share's workspace; W is a size rounded up to whole vectors."""

    sizes: Sizes
    x: Rows  # (T, B, I)
    y: Rows  # (T, B, P) written
    gates: Rows  # (T, B, saved gates * H) written, or none in inference
    cells: Rows  # (T, B, H) written, or none
    h0: Rows  # (B, P), or none for zeros
    c0: Rows  # (B, H), or none
    h_n: Rows  # (B, P) written
    c_n: Rows  # (B, H) written, or none
    w_ih: Matrix  # (G*H, I)
    w_hh: Matrix  # (G*H, P)
    w_hr: Matrix  # (P, H), or none
    b_ih: int  # (G*H), or 0
    b_hh: int  # (G*H), or 0
    workspace: int  # (shares, workspace_bytes)
    workspace_bytes: int
    b_x: int  # offset of (G, W): what the input product starts from
    b_h: int  # offset of (G, W): what the recurrent product starts from, where the cell keeps the two apart
    xs: int  # offset of (chunk*block, W): the inputs of a chunk
    gx: int  # offset of (chunk*block, G, W): their products
    h: int  # offset of (2, block, W)
    c: int  # offset of (block, W)
    m: int  # offset of (block, W): the cell's output before the projection
    tile: int  # offset of a tile's result


class Backward(NamedTuple):
    """The operands of a backward sweep, and where the gradients go; addresses of gradients are 0 where nobody asks."""

    sizes: Sizes
    x: Rows  # (T, B, I)
    gates: Rows  # (T, B, saved gates * H), or none
    cells: Rows  # (T, B, H), or none
    y: Rows  # (T, B, P)
    h0: Rows  # (B, P), or none for zeros
    c0: Rows  # (B, H), or none
    dy: Rows  # (T, B, P), or none
    dh_n: Rows  # (B, P), or none
    dc_n: Rows  # (B, H), or none
    dx: Rows  # (T, B, I) written, or none: the share of this direction
    dh0: Rows  # (B, P) written
    dc0: Rows  # (B, H) written, or none
    w_ih: Matrix  # (G*H, I), panels of (depth G*H, units I)
    w_hh: Matrix  # (G*H, P), panels of (depth G*H, units P)
    w_hr: Matrix  # (P, H), panels of (depth P, units H), or none
    dw_ih: int  # (shares, G*H, I)
    dw_hh: int  # (shares, G*H, P)
    db_ih: int  # (shares, G*H)
    db_hh: int  # (shares, G*H)
    dw_hr: int  # (shares, P, H)
    workspace: int
    workspace_bytes: int
    dg_row: int  # bytes of a row of dgx and dgh
    dgx: int  # offset of (chunk*block, G*H)
    dgh: int  # offset of (chunk*block, G*H), that of dgx where the cell does not keep the two apart
    xs: int  # offset of (chunk*block, W): what met W_ih
    hs: int  # offset of (chunk*block, W): what met W_hh
    ms: int  # offset of (chunk*block, W): what met W_hr
    dp: int  # offset of (chunk*block, W): the gradient of the projected state
    dh: int  # offset of (block, W)
    dc: int  # offset of (block, W)
    dm: int  # offset of (block, W)
    tile: int  # offset of a tile's result, with a row of zeros before it


def _numba_type(kind: Any) -> Any:
    if kind is int:
        return types.intp
    return types.BaseTuple.from_types([_numba_type(k) for k in kind.__annotations__.values()], kind)


@intrinsic
def read_operands(typingctx, address, kind):
    """The operands of the NamedTuple class `kind` from the integers at `address`."""
    result = _numba_type(kind.instance_class)

    def codegen(context, builder, sig, args):
        integers = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        position = iter(range(1 << 16))

        def read(kind):
            if kind == types.intp:
                return builder.load(builder.gep(integers, [ir.Constant(ir.IntType(64), next(position))]))
            return context.make_tuple(builder, kind, [read(field) for field in kind.types])

        return read(result)

    return result(types.intp, kind), codegen


def flatten(operands: Any) -> list[int]:
    """The integers of operands, in the order in which `read_operands` reads them."""
    return [number for field in operands for number in (flatten(field) if isinstance(field, tuple) else (field,))]
