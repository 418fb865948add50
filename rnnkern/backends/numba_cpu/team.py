"""The threads that run sweeps: torch's own.

torch runs its parallel operations on a team of OpenMP threads. After each they spin for some milliseconds, ready for
the next one. Threads of our own would get half of a core each wherever a sweep follows such an operation: behind a
linear layer, in backward, after a large tensor of zeros. So a call that is cut into shares enters a parallel region of
that same team, as compiled OpenMP code does, through GOMP_parallel of GNU's runtime or LLVM's; each of its threads
takes the next share until none is left, and all meet once, at the end. A team that still spins starts within a few
microseconds.

Where there is no such entry (other runtimes), and in a forked child, which no OpenMP team survives, threads of our own
do the work (pool.py). Numba's parallel layers are not used: its workqueue aborts the process on concurrent calls, and
its OpenMP layer kills forked children.

Where there are few sequences for the threads, all of them may run one share together (sweep.py): each takes a copy of
its own, and they wait for each other at the team's barrier.

The work of a call, as `take_shares` and `take_own` read it, is an array of integers:

    the number of the next share, which each thread of `take_shares` counts up as it takes one
    the number of shares
    the address of the compiled kernel
    1 if it takes a float64, 0 if a float32
    the addresses of omp_get_num_threads and omp_get_thread_num
    for `take_own`, how many more shares there are, which one thread runs if the team is not complete
    and for each share its four arguments
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from rnnkern import forks
from rnnkern.backends.numba_cpu import pool
from rnnkern.backends.numba_cpu.jit import address, inlined, kernel

Share = tuple[int, int, int, int]
_HEAD = 7  # integers in front of the first share


@intrinsic
def next_share(typingctx, work):
    """Counts up the first integer of the work, for all threads, and returns what it was."""

    def codegen(context, builder, sig, args):
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def integer(typingctx, work, i):
    """The i-th integer of the work."""

    def codegen(context, builder, sig, args):
        integers = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(integers, [args[1]]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def call(typingctx, function, a, b, c, d, zero):
    """Calls a kernel by its address."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.IntType(8).as_pointer(), [argument.type for argument in args[1:]])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, zero), codegen


@intrinsic
def ask(typingctx, function):
    """What a C function without arguments returns, an int."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), ir.IntType(64))

    return types.int64(types.int64), codegen


@inlined
def take(work, share):
    at = _HEAD + 4 * share
    a, b, c, d = integer(work, at), integer(work, at + 1), integer(work, at + 2), integer(work, at + 3)
    if integer(work, 3) == 1:
        call(integer(work, 2), a, b, c, d, numba.float64(0))
    else:
        call(integer(work, 2), a, b, c, d, numba.float32(0))


@kernel
def take_shares(work):
    while True:
        share = next_share(work)
        if share >= integer(work, 1):
            return
        take(work, share)


@kernel
def take_own(work):
    own, members = ask(integer(work, 5)), integer(work, 1)
    if ask(integer(work, 4)) == members:
        take(work, own)
    elif own == 0:
        for share in range(members, members + integer(work, 6)):
            take(work, share)


def _entries(*names: str) -> list[Any]:
    """Functions of the OpenMP runtime as torch's libraries find them: the first ones that all of the process can see;
    none if one is missing."""
    process = ctypes.CDLL(None) if os.name == "posix" else None
    found = [getattr(process, name, None) for name in names]
    return [] if None in found else found


_runtime = _entries("GOMP_parallel", "GOMP_barrier", "omp_get_num_threads", "omp_get_thread_num")
_enter: Callable[..., None] | None = _runtime[0] if _runtime else None
if _enter is not None:  # (function, its argument, threads, flags)
    _enter.argtypes, _enter.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None  # type: ignore[attr-defined]
# Addresses of GOMP_parallel, of a function that returns when all threads of a team have called it, and of the two that
# `ask` asks.
ENTRY, BARRIER, *_TEAM = [ctypes.cast(entry, ctypes.c_void_p).value or 0 for entry in _runtime] or [0, 0, 0, 0]


class Work:
    """Shares of a kernel, each its four arguments, of which the first is an address relative to one that a call tells.
    `together` are those that all of torch's threads run at once in their place, one each; they may meet."""

    def __init__(self, kernel: Any, shares: Sequence[Share], zero: Any, together: Sequence[Share] = ()) -> None:
        self.kernel, self.shares, self.zero, self.together = kernel, shares, zero, together
        own, alone = (together, shares) if together else (shares, ())
        head = (0, len(own), address(kernel, 4, zero), isinstance(zero, np.float64), *_TEAM, len(alone))
        self.integers = array("q", head)
        for share in (*own, *alone):
            self.integers.extend(share)
        self.addresses = range(_HEAD, len(self.integers), 4)  # their positions
        self.taking = address(take_own if together else take_shares, 1)


def run(work: Work, base: int, at: int, alive: object) -> None:
    """Runs the kernel once for each share, on as many threads as torch has. Addresses of the shares are relative to
    `base`; a copy of the work's integers with these filled in lies at `at`. `alive` is the memory that they use, which
    threads of our own hold even if the caller is interrupted while they run."""
    if can_meet():
        # always all threads, as torch does: some runtimes end those that are too many for a region
        _enter(work.taking, at, torch.get_num_threads(), 0)  # type: ignore[misc]
    else:
        pool.run([partial(_task, work, base, share, alive) for share in work.shares])


def can_meet() -> bool:
    """Whether there is a team, and it has a barrier."""
    return _enter is not None and not forks.forked


def _task(work: Work, base: int, share: Share, alive: object) -> None:
    address, *rest = share
    work.kernel(base + address, *rest, work.zero)
