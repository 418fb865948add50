"""The compiled entry points of calls that ask for more than the plain cell; kernels.py has the plain ones."""

from rnnkern.backends.numba_cpu import optional_cells as cells
from rnnkern.backends.numba_cpu.jit import kernel
from rnnkern.backends.numba_cpu.kernels import kernels_of
from rnnkern.backends.numba_cpu.operands import OptionalBackward, OptionalForward, read_operands
from rnnkern.backends.numba_cpu.optional_backward import optional_backward_sweep, pack_optional_backward
from rnnkern.backends.numba_cpu.optional_forward import optional_forward_sweep, pack_optional_forward
from rnnkern.cells import CELLS


@kernel
def pack_for_optional_forward(address, gates, part, parts, zero):
    pack_optional_forward(read_operands(address, OptionalForward), gates, part, parts, zero)


@kernel
def pack_for_optional_backward(address, gates, part, parts, zero):
    pack_optional_backward(read_operands(address, OptionalBackward), gates, part, parts, zero)


OPTIONAL_KERNELS = {
    name: kernels_of(spec, cells, "_optional", (optional_forward_sweep, optional_backward_sweep))
    for name, spec in CELLS.items()
}
