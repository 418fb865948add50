"""Masks from random words in one pass: `rnnkern.masks.choose`, in calls that have a plan."""

import torch
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic
from torch import Tensor

from rnnkern import masks
from rnnkern.backends.numba_cpu.jit import inlined, kernel, ready
from rnnkern.backends.numba_cpu.plans import SCALARS
from rnnkern.backends.numba_cpu.vector import ir_scalar


@intrinsic
def is_word_below(typingctx, words, i, last):
    """Whether the i-th of the 16-bit numbers at `words` is up to `last`, of 16 bits too: compared in lanes of 16."""

    def codegen(context, builder, sig, args):
        base = builder.inttoptr(args[0], ir.IntType(16).as_pointer())
        word = builder.load(builder.gep(base, [args[1]]))
        return builder.icmp_signed("<=", word, builder.trunc(args[2], ir.IntType(16)))

    return types.boolean(types.intp, types.intp, types.intp), codegen


@intrinsic
def put_bool(typingctx, into, i, value):
    """The i-th byte at `into` becomes a bool."""

    def codegen(context, builder, sig, args):
        base = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        builder.store(builder.zext(args[2], ir.IntType(8)), builder.gep(base, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.boolean), codegen


@intrinsic
def put_number(typingctx, into, i, value):
    """The i-th number at `into`."""

    def codegen(context, builder, sig, args):
        base = builder.inttoptr(args[0], ir_scalar(value).as_pointer())
        builder.store(args[2], builder.gep(base, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, value), codegen


@inlined
def words_of_row(width):
    """A row has whole draws of four words."""
    return (width + 3) // 4 * 4


@kernel
def bools_of_words(words, last, rows, width, into, zero):
    of_row = words_of_row(width)
    for row in range(rows):
        for i in range(width):
            put_bool(into, row * width + i, is_word_below(words, row * of_row + i, last))


@kernel
def factors_of_words(words, last, rows, width, into, scale):
    zero, of_row = scale - scale, words_of_row(width)
    for row in range(rows):
        for i in range(width):
            put_number(into, row * width + i, zero if is_word_below(words, row * of_row + i, last) else scale)


def choose(draws: Tensor, shape: tuple[int, ...], last: int, scale: float | None, like: Tensor) -> Tensor:
    """As `rnnkern.masks.choose`; by torch for dtypes of which there are no plans."""
    scalar = SCALARS.get(like.dtype)
    if scalar is None:
        return masks.choose(draws, shape, last, scale, like)
    if scale is None:
        found, of_words, number = like.new_empty(shape, dtype=torch.bool), bools_of_words, scalar(0)
    else:
        found, of_words, number = like.new_empty(shape), factors_of_words, scalar(scale)
    numbers, width = found.numel(), shape[-1]
    rows, width = (1, numbers) if width % 4 == 0 else (numbers // width, width)
    ready(of_words, 5, number)(draws.data_ptr(), last, rows, width, found.data_ptr(), number)
    return found
