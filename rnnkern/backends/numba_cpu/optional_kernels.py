"""The compiled entry points of calls that ask for more than the plain cell; kernels.py has the plain ones."""

from rnnkern.backends.numba_cpu import optional_cells as cells
from rnnkern.backends.numba_cpu.jit import constants, kernel, kernel_for
from rnnkern.backends.numba_cpu.kernels import Kernels
from rnnkern.backends.numba_cpu.operands import OptionalBackward, OptionalForward, read_operands
from rnnkern.backends.numba_cpu.optional_backward import optional_backward_sweep, pack_optional_backward
from rnnkern.backends.numba_cpu.optional_forward import optional_forward_sweep, pack_optional_forward
from rnnkern.cells import CELLS, CellSpec


@kernel
def pack_for_optional_forward(address, gates, part, parts, zero):
    pack_optional_forward(read_operands(address, OptionalForward), gates, part, parts, zero)


@kernel
def pack_for_optional_backward(address, gates, part, parts, zero):
    pack_optional_backward(read_operands(address, OptionalBackward), gates, part, parts, zero)


def _kernels(spec: CellSpec) -> Kernels:
    forward, backward = f"{spec.name}_optional_forward", f"{spec.name}_optional_backward"
    cell = constants(
        activations=len(spec.saved),  # blocks of them that a step keeps
        gates=len(spec.gates),
        separate=spec.separate,
        resets_before=spec.resets_before,
        forward=getattr(cells, forward),
        backward=getattr(cells, backward),
    )
    return Kernels(
        kernel_for(cell, optional_forward_sweep, forward), kernel_for(cell, optional_backward_sweep, backward)
    )


OPTIONAL_KERNELS = {name: _kernels(spec) for name, spec in CELLS.items()}
