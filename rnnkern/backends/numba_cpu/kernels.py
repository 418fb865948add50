"""The compiled entry points: packing, and for each cell its two sweeps over a range of rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rnnkern.backends.numba_cpu import cells
from rnnkern.backends.numba_cpu.jit import kernel
from rnnkern.backends.numba_cpu.sweep import backward_sweep, forward_sweep
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES, item_bytes, load_scalar, store_scalar, vector_lanes

PACK_BLOCK = 16


class Weight(NamedTuple):
    """A weight to pack, element (gate, unit, k) at source + gate*gate_stride + unit*unit_stride + k*k_stride bytes."""

    source: int
    gate_stride: int
    unit_stride: int
    k_stride: int
    gates: int
    units: int
    depth: int


@kernel
def pack(weight, per_panel, target, zero):
    """Writes `weight` as panels (depth, gates, vectors, lanes), at most `per_panel` vectors each; units past the last
    are zero."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    vectors = (weight.units + lanes - 1) // lanes
    panel = target
    for v in range(0, vectors, per_panel):
        width = min(per_panel, vectors - v)
        panel_row = weight.gates * width * VECTOR_BYTES
        # A block of k at a time, so that the lines written stay in L1 until each of their lanes has come by.
        for first in range(0, weight.depth, PACK_BLOCK):
            last = min(first + PACK_BLOCK, weight.depth)
            for gate in range(weight.gates):
                for lane in range(width * lanes):
                    unit = v * lanes + lane
                    source = weight.source + gate * weight.gate_stride + unit * weight.unit_stride
                    into = panel + gate * width * VECTOR_BYTES + lane * item
                    for k in range(first, last):
                        value = load_scalar(source + k * weight.k_stride, zero) if unit < weight.units else zero
                        store_scalar(into + k * panel_row, value)
        panel += weight.depth * panel_row


@kernel
def lstm_forward(a, first, last, scratch, zero):
    forward_sweep(a, first, last, scratch, 4, False, cells.lstm_forward, zero)


@kernel
def lstm_backward(a, first, last, zero):
    backward_sweep(a, first, last, cells.lstm_backward, zero)


@kernel
def gru_forward(a, first, last, scratch, zero):
    forward_sweep(a, first, last, scratch, 3, True, cells.gru_forward, zero)


@kernel
def gru_backward(a, first, last, zero):
    backward_sweep(a, first, last, cells.gru_backward, zero)


@kernel
def rnn_tanh_forward(a, first, last, scratch, zero):
    forward_sweep(a, first, last, scratch, 1, False, cells.rnn_tanh_forward, zero)


@kernel
def rnn_tanh_backward(a, first, last, zero):
    backward_sweep(a, first, last, cells.rnn_tanh_backward, zero)


@kernel
def rnn_relu_forward(a, first, last, scratch, zero):
    forward_sweep(a, first, last, scratch, 1, False, cells.rnn_relu_forward, zero)


@kernel
def rnn_relu_backward(a, first, last, zero):
    backward_sweep(a, first, last, cells.rnn_relu_backward, zero)


class Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


KERNELS = {
    "lstm": Kernels(lstm_forward, lstm_backward),
    "gru": Kernels(gru_forward, gru_backward),
    "rnn_tanh": Kernels(rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": Kernels(rnn_relu_forward, rnn_relu_backward),
}
