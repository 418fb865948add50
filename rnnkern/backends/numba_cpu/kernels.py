"""The compiled entry points: for each cell the packing of its weights and its two sweeps over a share of sequences.

Each takes the address of its operands (operands.py) and runs with denormals flushed, the caller's mode restored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from rnnkern.backends.numba_cpu import cells
from rnnkern.backends.numba_cpu.backward import backward_sweep, pack_backward
from rnnkern.backends.numba_cpu.forward import forward_sweep, pack_forward
from rnnkern.backends.numba_cpu.jit import kernel
from rnnkern.backends.numba_cpu.operands import Backward, Forward, read_operands
from rnnkern.backends.numba_cpu.vector import (
    flush_denormals,
    item_bytes,
    load_part,
    restore_mode,
    store_part,
    vector_lanes,
)


@kernel
def pack_for_forward(address, gates, part, parts, zero):
    pack_forward(read_operands(address, Forward), gates, part, parts, zero)


@kernel
def pack_for_backward(address, gates, part, parts, zero):
    pack_backward(read_operands(address, Backward), gates, part, parts, zero)


@kernel
def add_shares(of_shares, into, numbers, shares, zero):
    """into (numbers) = the sum of of_shares (shares, numbers), in their order."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for u in range(0, numbers, lanes):
        at = of_shares + u * item
        total = load_part(at, zero, numbers - u)
        for share in range(1, shares):
            total = total + load_part(at + share * numbers * item, zero, numbers - u)
        store_part(into + u * item, total, zero, numbers - u)


@kernel
def lstm_forward(address, first, last, share, zero):
    mode = flush_denormals()
    forward_sweep(read_operands(address, Forward), first, last, share, 4, False, cells.lstm_forward, zero)
    restore_mode(mode)


@kernel
def lstm_backward(address, first, last, share, zero):
    mode = flush_denormals()
    backward_sweep(read_operands(address, Backward), first, last, share, 4, cells.lstm_backward, zero)
    restore_mode(mode)


@kernel
def gru_forward(address, first, last, share, zero):
    mode = flush_denormals()
    forward_sweep(read_operands(address, Forward), first, last, share, 3, True, cells.gru_forward, zero)
    restore_mode(mode)


@kernel
def gru_backward(address, first, last, share, zero):
    mode = flush_denormals()
    backward_sweep(read_operands(address, Backward), first, last, share, 3, cells.gru_backward, zero)
    restore_mode(mode)


@kernel
def rnn_tanh_forward(address, first, last, share, zero):
    mode = flush_denormals()
    forward_sweep(read_operands(address, Forward), first, last, share, 1, False, cells.rnn_tanh_forward, zero)
    restore_mode(mode)


@kernel
def rnn_tanh_backward(address, first, last, share, zero):
    mode = flush_denormals()
    backward_sweep(read_operands(address, Backward), first, last, share, 1, cells.rnn_tanh_backward, zero)
    restore_mode(mode)


@kernel
def rnn_relu_forward(address, first, last, share, zero):
    mode = flush_denormals()
    forward_sweep(read_operands(address, Forward), first, last, share, 1, False, cells.rnn_relu_forward, zero)
    restore_mode(mode)


@kernel
def rnn_relu_backward(address, first, last, share, zero):
    mode = flush_denormals()
    backward_sweep(read_operands(address, Backward), first, last, share, 1, cells.rnn_relu_backward, zero)
    restore_mode(mode)


class Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


KERNELS = {
    "lstm": Kernels(lstm_forward, lstm_backward),
    "gru": Kernels(gru_forward, gru_backward),
    "rnn_tanh": Kernels(rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": Kernels(rnn_relu_forward, rnn_relu_backward),
}
