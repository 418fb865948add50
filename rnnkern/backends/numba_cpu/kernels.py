"""The compiled entry points: the packing of weights, and for each cell its two sweeps over a share of sequences. Each
takes the address of its operands (operands.py)."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from rnnkern.backends.numba_cpu import cells
from rnnkern.backends.numba_cpu.backward import backward_sweep, pack_backward
from rnnkern.backends.numba_cpu.forward import forward_sweep, pack_forward
from rnnkern.backends.numba_cpu.jit import constants, kernel, kernel_for
from rnnkern.backends.numba_cpu.operands import Backward, Forward, read_operands
from rnnkern.backends.numba_cpu.vector import item_bytes, load_part, store_part, vector_lanes
from rnnkern.cells import CELLS, CellSpec


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


class Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def kernels_of(spec: CellSpec, cells: ModuleType, kind: str, sweeps: tuple[Callable[..., Any], ...]) -> Kernels:
    """Forward and backward sweep of a cell, whose functions in the module `cells` have the kernels' names."""
    forward, backward = f"{spec.name}{kind}_forward", f"{spec.name}{kind}_backward"
    cell = constants(
        activations=len(spec.saved),  # blocks of them that a step keeps
        gates=len(spec.gates),
        separate=spec.separate,
        resets_before=spec.resets_before,
        forward=getattr(cells, forward),
        backward=getattr(cells, backward),
    )
    return Kernels(kernel_for(cell, sweeps[0], forward), kernel_for(cell, sweeps[1], backward))


# A cell whose last product waits for a gate has no place in the plain sweeps.
KERNELS = {
    name: kernels_of(spec, cells, "", (forward_sweep, backward_sweep))
    for name, spec in CELLS.items()
    if not spec.resets_before
}
