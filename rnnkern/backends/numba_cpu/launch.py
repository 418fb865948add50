"""How the sweeps of a plan are started: their operands copied, the addresses of a call filled in, and the kernels run,
on several threads where the plan says so."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from rnnkern import native
from rnnkern.backends.numba_cpu import team
from rnnkern.backends.numba_cpu.jit import address, kernel, ready
from rnnkern.backends.numba_cpu.vector import load_int

# The number of the array itself among the tensors of a call.
_ITSELF = -1


@intrinsic
def _store_int(typingctx, address, number):
    def codegen(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@kernel
def fill_in(fields, count, addresses, operands):
    """Writes `count` addresses into operands: for each field (position, number of an address, offset behind it)."""
    for field in range(fields, fields + 24 * count, 24):
        address = load_int(addresses + 8 * load_int(field + 8)) + load_int(field + 16)
        _store_int(operands + 8 * load_int(field), address)


def _place(integers: "array[int]") -> int:
    return integers.buffer_info()[0]


class _Region(NamedTuple):
    """A kernel that runs over shares, whose addresses are relative to the operands of a call."""

    run: Any
    shares: Sequence[team.Share]
    work: team.Work | None  # of the team; None where the calling thread does all
    at: int  # from how many bytes on that lies in the array of a call


class Launch:
    """Starts a plan's sweeps. One array has the operands of each direction, once more for each thread where threads go
    together, and the team's work; a call copies it and fills in where its tensors lie, and where the copy does."""

    def __init__(self, plan: Any, kernel: Any, pack: Any) -> None:
        self.zero, self.fill_in = plan.zero, ready(fill_in, 4)
        self.template, self.fields = array("q"), array("q")
        self.regions: list[_Region] = []
        starts = [self._add(*direction) for direction in plan.directions]
        if plan.packs:
            parts = plan.parts * plan.members
            packing = [(start, plan.gates, part, parts) for start in starts for part in range(parts)]
            self._add_region(pack, packing, plan.divided)
        together = []
        for operands, addresses in plan.directions if plan.members > 1 else ():
            for member in range(plan.members):
                own = operands[:]
                own[plan.member_at : plan.member_at + 3] = array("q", (member, plan.members, team.BARRIER))
                together.append((self._add(own, addresses), 0, plan.batch, member))
        shares = [(starts[d], first, last, place) for d, first, last, place in plan.shares]
        self._add_region(kernel, shares, plan.divided, together)
        self.filled = _place(self.fields), len(self.fields) // 3

    def _add(self, integers: "array[int]", addresses: Iterable[tuple[int, int, int]]) -> int:
        """Adds integers, some of which are addresses, to those of a call; returns how many bytes lie before them."""
        first = len(self.template)
        self.template.extend(integers)
        for position, number, offset in addresses:
            self.fields.extend((first + position, 1 + number, offset))
        return 8 * first

    def _add_region(
        self, kernel: Any, shares: Sequence[team.Share], divided: bool, together: Sequence[team.Share] = ()
    ) -> None:
        """Adds a kernel to those that run one after the other, on several threads if that is worth it."""
        work, at = None, 0
        if divided and (len(shares) > 1 or together):
            work = team.Work(kernel, shares, self.zero, together)
            at = self._add(work.integers, [(i, _ITSELF, work.integers[i]) for i in work.addresses])
        self.regions.append(_Region(ready(kernel, 4, self.zero), shares, work, at))

    def __call__(self, addresses: Sequence[int], alive: object) -> None:
        """Packs the weights of each direction, then runs all shares. Addresses are those of the plan's `tensors`, which
        `alive` holds."""
        operands = self.template[:]
        place = _place(operands)
        given = array("q", (place, *addresses))
        self.fill_in(*self.filled, _place(given), place)
        for run, shares, work, at in self.regions:
            if work is not None:
                team.run(work, place, place + at, (operands, alive))
            else:
                for start, first, last, part in shares:
                    run(place + start, first, last, part, self.zero)

    def native(self) -> Any:
        """The same in C++."""
        wide = isinstance(self.zero, np.float64)
        fields = np.array(self.fields).reshape(-1, 3).tolist()
        regions = []
        for run, shares, work, at in self.regions:
            taking = 0 if work is None else work.taking
            regions.append((address(run, 4, self.zero), wide, shares, taking, at))
        return native.calls.Launch(self.template.tolist(), fields, regions, team.ENTRY)
