"""The compiled entry points of calls that ask for more than the plain cell; kernels.py has the plain ones."""

from rnnkern.backends.numba_cpu import optional_cells as cells
from rnnkern.backends.numba_cpu.jit import kernel
from rnnkern.backends.numba_cpu.kernels import Kernels
from rnnkern.backends.numba_cpu.operands import OptionalBackward, OptionalForward, read_operands
from rnnkern.backends.numba_cpu.optional_backward import optional_backward_sweep, pack_optional_backward
from rnnkern.backends.numba_cpu.optional_forward import optional_forward_sweep, pack_optional_forward
from rnnkern.backends.numba_cpu.vector import flush_denormals, restore_mode


@kernel
def pack_for_optional_forward(address, gates, part, parts, zero):
    pack_optional_forward(read_operands(address, OptionalForward), gates, part, parts, zero)


@kernel
def pack_for_optional_backward(address, gates, part, parts, zero):
    pack_optional_backward(read_operands(address, OptionalBackward), gates, part, parts, zero)


@kernel
def lstm_optional_forward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_forward_sweep(address, first, last, share, 4, 4, False, False, cells.lstm_optional_forward, zero)
    restore_mode(mode)


@kernel
def lstm_optional_backward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_backward_sweep(
        address, first, last, share, 4, 4, False, False, cells.lstm_optional_forward,
        cells.lstm_optional_backward, zero,
    )  # fmt: skip
    restore_mode(mode)


@kernel
def gru_optional_forward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_forward_sweep(address, first, last, share, 4, 3, True, False, cells.gru_optional_forward, zero)
    restore_mode(mode)


@kernel
def gru_optional_backward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_backward_sweep(
        address, first, last, share, 4, 3, True, False, cells.gru_optional_forward,
        cells.gru_optional_backward, zero,
    )  # fmt: skip
    restore_mode(mode)


@kernel
def gru_reset_before_optional_forward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_forward_sweep(
        address, first, last, share, 3, 3, False, True, cells.gru_reset_before_optional_forward, zero
    )
    restore_mode(mode)


@kernel
def gru_reset_before_optional_backward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_backward_sweep(
        address, first, last, share, 3, 3, False, True, cells.gru_reset_before_optional_forward,
        cells.gru_reset_before_optional_backward, zero,
    )  # fmt: skip
    restore_mode(mode)


@kernel
def rnn_tanh_optional_forward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_forward_sweep(address, first, last, share, 0, 1, False, False, cells.rnn_tanh_optional_forward, zero)
    restore_mode(mode)


@kernel
def rnn_tanh_optional_backward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_backward_sweep(
        address, first, last, share, 0, 1, False, False, cells.rnn_tanh_optional_forward,
        cells.rnn_tanh_optional_backward, zero,
    )  # fmt: skip
    restore_mode(mode)


@kernel
def rnn_relu_optional_forward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_forward_sweep(address, first, last, share, 0, 1, False, False, cells.rnn_relu_optional_forward, zero)
    restore_mode(mode)


@kernel
def rnn_relu_optional_backward(address, first, last, share, zero):
    mode = flush_denormals()
    optional_backward_sweep(
        address, first, last, share, 0, 1, False, False, cells.rnn_relu_optional_forward,
        cells.rnn_relu_optional_backward, zero,
    )  # fmt: skip
    restore_mode(mode)


OPTIONAL_KERNELS = {
    "lstm": Kernels(lstm_optional_forward, lstm_optional_backward),
    "gru": Kernels(gru_optional_forward, gru_optional_backward),
    "gru_reset_before": Kernels(gru_reset_before_optional_forward, gru_reset_before_optional_backward),
    "rnn_tanh": Kernels(rnn_tanh_optional_forward, rnn_tanh_optional_backward),
    "rnn_relu": Kernels(rnn_relu_optional_forward, rnn_relu_optional_backward),
}
