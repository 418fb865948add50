"""Masks from random words in one pass: `rnnkern.masks.choose`, in calls that have a plan."""

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic
from torch import Tensor

from rnnkern import masks
from rnnkern.backends.numba_cpu.jit import kernel, ready
from rnnkern.backends.numba_cpu.vector import ir_scalar

_SCALARS = {torch.float32: np.float32, torch.float64: np.float64}


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


@kernel
def bools_of_words(words, last, count, into, zero):
    for i in range(count):
        put_bool(into, i, is_word_below(words, i, last))


@kernel
def factors_of_words(words, last, count, into, scale):
    zero = scale - scale
    for i in range(count):
        put_number(into, i, zero if is_word_below(words, i, last) else scale)


def choose(draws: Tensor, shape: tuple[int, ...], last: int, scale: float | None, like: Tensor) -> Tensor:
    """As `rnnkern.masks.choose`; by torch for dtypes of which there are no plans."""
    scalar = _SCALARS.get(like.dtype)
    if scalar is None:
        return masks.choose(draws, shape, last, scale, like)
    if scale is None:
        found, of_words, number = like.new_empty(shape, dtype=torch.bool), bools_of_words, scalar(0)
    else:
        found, of_words, number = like.new_empty(shape), factors_of_words, scalar(scale)
    ready(of_words, 4, number)(draws.data_ptr(), last, found.numel(), found.data_ptr(), number)
    return found
