"""How the sweeps of a plan are started: their operands copied, the addresses of a call filled in, and the kernels run,
on several threads where the plan says so."""

from array import array
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from rnnkern.backends.numba_cpu import team
from rnnkern.backends.numba_cpu.jit import kernel, ready
from rnnkern.backends.numba_cpu.vector import load_int


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


class Launch:
    """Starts a plan's sweeps. The operands of its directions lie one behind the other."""

    def __init__(self, plan: Any, kernel: Any, pack: Any) -> None:
        self.plan, self.zero = plan, plan.zero
        self.kernel, self.pack, self.fill_in = ready(kernel, 4, plan.zero), ready(pack, 4, plan.zero), ready(fill_in, 4)
        self.template, self.fields = array("q"), array("q")
        self.starts: list[int] = []  # bytes from the first direction's operands to each one's
        for integers, addresses in plan.directions:
            first = len(self.template)
            self.starts.append(8 * first)
            self.template.extend(integers)
            for position, number, offset in addresses:
                self.fields.extend((first + position, number, offset))
        self.filled = _place(self.fields), len(self.fields) // 3
        self.shares = [(self.starts[direction], *rest) for direction, *rest in plan.shares]
        self.alone = not plan.packs and len(self.shares) == 1 and plan.members == 1

    def __call__(self, addresses: Sequence[int], alive: object) -> None:
        """Packs the weights of each direction, then runs all shares. Addresses are those of the plan's `tensors`, which
        `alive` holds."""
        operands, given = self.template[:], array("q", addresses)
        place = _place(operands)
        self.fill_in(*self.filled, _place(given), place)
        if self.alone:
            ((start, first, last, part),) = self.shares
            self.kernel(place + start, first, last, part, self.zero)
            return
        plan, alive = self.plan, (operands, alive)
        if plan.packs:
            parts = plan.parts * plan.members
            packing = [(place + start, plan.gates, part, parts) for start in self.starts for part in range(parts)]
            self._run(self.pack, packing, alive)
        shares = [(place + start, first, last, part) for start, first, last, part in self.shares]
        if plan.members == 1:
            self._run(self.kernel, shares, alive)
        else:
            self._run_together(operands, shares, alive)

    def _run(self, kernel: Any, shares: list[team.Share], alive: object) -> None:
        """Runs the kernel once for each share, on several threads if that is worth it."""
        if self.plan.divided and len(shares) > 1:
            team.run(kernel, shares, self.zero, alive)
        else:
            for share in shares:
                kernel(*share, self.zero)

    def _run_together(self, operands: "array[int]", shares: list[team.Share], alive: object) -> None:
        """Runs each direction by the plan's members, each with operands that say which one it is."""
        plan, size = self.plan, len(operands) // len(self.starts)
        copies = []
        for start in self.starts:
            for member in range(plan.members):
                copy = operands[start // 8 : start // 8 + size]
                copy[plan.member_at : plan.member_at + 3] = array("q", (member, plan.members, team.BARRIER))
                copies.append(copy)
        each = [(_place(copy), 0, plan.batch, i % plan.members) for i, copy in enumerate(copies)]
        # held until all are done: the threads are told where they lie
        team.run_together(self.kernel, each, shares, self.zero, (copies, alive))
