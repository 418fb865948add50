"""What a sweep is told: sizes, addresses and strides, as 64-bit integers one behind the other in memory.

Python writes them (rnnkern/backends/numba_cpu/plans.py) and hands a kernel their address: one argument, where Numba
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
    member: int = 0  # of the threads that go through the steps together, each with a part of the units
    members: int = 1
    barrier: int = 0  # address of a function that returns when all of them have called it, or 0


class Beside(NamedTuple):
    """What either sweep is asked for beyond the plain cell: a base, an address or a flag is 0 where nobody asks. Masks
    of zoneout and resets are bytes."""

    input_mask: Rows = Rows()  # (B, I)
    recurrent_mask: Rows = Rows()  # (B, P)
    zone_h: Rows = Rows()  # (T, B, P)
    zone_c: Rows = Rows()  # (T, B, H)
    share_h: int = 0  # address of a number
    share_c: int = 0
    reset: Rows = Rows()  # (T, B)
    reset_h: Rows = Rows()  # (B, P), its step 0, or (T, B, P)
    reset_c: Rows = Rows()  # (B, H) or (T, B, H)
    w_ch: int = 0  # (3*H)
    ln_ih_weight: int = 0  # (G*H), and so on
    ln_ih_bias: int = 0
    ln_hh_weight: int = 0
    ln_hh_bias: int = 0
    ln_c_weight: int = 0  # (H)
    ln_c_bias: int = 0
    keeps_h: int = 0  # a step keeps its h before zoneout as its first block
    outer_cells: int = 0  # cells lie as rows of y do


class Recurrence(NamedTuple):
    """The forward products of a step that has everything, and its buffers in a share's workspace. `last` are the rows
    of W_hh of the last gate where it has a product of its own, after the others."""

    w_ih: Matrix  # (G*H, I)
    w_hh: Matrix  # (G*H, P), or (2*H, P) beside
    last: Matrix  # (H, P), or none
    b_ih: int  # (G*H), or 0
    b_hh: int  # (G*H), or 0
    b_x: int  # offset of (G, W): the biases of the input product
    b_h: int  # offset of (G, W): of the recurrent one
    n_x: int  # offset of (G, W): LayerNorm's weights of the input product
    n_h: int  # offset of (G, W)
    nothing: int  # offset of (G, W) zeros
    gx: int  # offset of (rows, G, W)
    gh: int  # offset of (rows, G, W)
    ru: int  # offset of (rows, W): r * u
    v: int  # offset of (W): what LayerNorm of c takes


class OptionalForward(NamedTuple):
    """The operands of a forward sweep that has everything; names as in `Forward`."""

    sizes: Sizes
    x: Rows
    y: Rows
    gates: Rows
    cells: Rows
    h0: Rows
    c0: Rows
    h_n: Rows
    c_n: Rows
    w_hr: Matrix
    step: Recurrence
    beside: Beside
    workspace: int
    workspace_bytes: int
    xs: int
    h: int
    c: int
    m: int
    u: int  # offset of (block, W): h times its mask


class OptionalBackward(NamedTuple):
    """The operands of a backward sweep that has everything; names as in `Backward`. Gradients that are summed row by
    row are zero before."""

    sizes: Sizes
    x: Rows
    gates: Rows
    cells: Rows
    y: Rows
    h0: Rows
    c0: Rows
    dy: Rows
    dcells: Rows  # (T, B, H), or none
    dh_n: Rows
    dc_n: Rows
    dx: Rows
    dh0: Rows
    dc0: Rows
    dreset_h: Rows  # (B, P), its step 0, or (T, B, P), or none
    dreset_c: Rows
    w_ih: Matrix
    w_hh: Matrix  # (G*H, P), or (2*H, P) beside
    last: Matrix  # (H, P), or none: panels of (depth H, units P)
    w_hr: Matrix
    dw_ih: int
    dw_hh: int
    db_ih: int
    db_hh: int
    dw_hr: int
    dw_ch: int  # (shares, 3*H)
    dln_ih_weight: int  # (shares, G*H), and so on
    dln_ih_bias: int
    dln_hh_weight: int
    dln_hh_bias: int
    dln_c_weight: int  # (shares, H)
    dln_c_bias: int
    step: Recurrence  # read where activations are computed anew; its buffers hold a chunk's rows
    recompute: int
    beside: Beside
    workspace: int
    workspace_bytes: int
    dg_row: int
    dgx: int
    dgh: int
    xs: int
    us: int  # offset of (chunk*block, W): what met W_hh
    hs: int  # offset of (chunk*block, W): h before a step, that of us where there is no mask
    cs: int  # offset of (chunk*block, W): c before a step
    rus: int  # offset of (chunk*block, W): r * u, what met the last gate's rows of W_hh
    kept: int  # offset of (chunk*block, kept*H): activations computed anew
    kept_row: int
    ms: int
    dp: int
    dh: int
    dc: int
    dm: int
    old: int  # offset of (block, W): what of dh goes straight to the h before
    du: int  # offset of (block, W): the gradient of u
    tanh_v: int  # offset of (W): tanh of the normalised c
    dv: int  # offset of (W): the gradient of c that comes through its LayerNorm
    tile: int


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
    workspace: int  # (shares or members, workspace_bytes)
    workspace_bytes: int
    b_x: int  # offset of (G*H): what the input product starts from
    b_h: int  # offset of (G*H): what the recurrent product starts from, where the cell keeps the two apart
    xs: int  # offset of (chunk*block, W): the inputs of a chunk
    gx: int  # offset of (chunk*block, G*H): their products
    h: int  # offset of (2, block, W)
    c: int  # offset of (block, W)
    m: int  # offset of (block, W): the cell's output before the projection
    tile: int  # offset of (block, vectors of a panel): the recurrent products of a panel


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
