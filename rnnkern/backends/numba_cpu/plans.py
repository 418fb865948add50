"""Plans: how calls that look alike are laid out for the kernels, worked out once.

A plan holds for each direction the operands of its sweep (operands.py), all sizes and strides filled in and all
addresses left out; what the addresses are; and how the batch is cut into shares. A call copies the operands and writes
the addresses into them, which takes a few microseconds, where laying out a call takes a hundred.
"""

from array import array
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnnkern.backends import Layer, Saved, States
from rnnkern.backends.numba_cpu import team
from rnnkern.backends.numba_cpu.launch import Launch
from rnnkern.backends.numba_cpu.operands import (
    Backward,
    Forward,
    Matrix,
    OptionalBackward,
    OptionalForward,
    Rows,
    Sizes,
    flatten,
)
from rnnkern.backends.numba_cpu.tile import CACHE_LINE, MAX_ROWS, MAX_VECTORS
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES
from rnnkern.cells import Weights

# the fields of cells.Weights as the kernels call them; plain calls have the first five at most
WEIGHTS = (
    "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "w_ch",
    "ln_ih_weight", "ln_ih_bias", "ln_hh_weight", "ln_hh_bias", "ln_c_weight", "ln_c_bias",
)  # fmt: skip

# How kernels are told a dtype: by a number of it.
SCALARS = {torch.float32: np.float32, torch.float64: np.float64}
# A share under this many multiply-adds, some 30 us of work, is not worth another thread: a team that has just been at
# work starts within a few, one that sleeps takes some 50, and weights are packed and sequences met in a region each.
WORTH_A_THREAD = 2_000_000
# Nor is one of fewer rows in backward: the gradients of the weights, a sum for each share, are still to be added up.
ROWS_WORTH_A_SUM = 24
# Nor are more shares than half of the sequences, rounded up: each reads all the weights.
LEAST_SEQUENCES = 2
# Threads may also go through the steps together, each with some of the units. They wait for each other at every step,
# two of them for about a microsecond: a step needs so many multiply-adds for each of them to be worth it.
WORTH_A_BARRIER = 24_000
# And they must be so many times faster than shares of the sequences would be: panels do not divide evenly.
WORTH_TOGETHER = 1.5
# Sequences carried through time together: their states and the products of a step stay in the second cache.
MOST_SEQUENCES = 64
# Rows of a chunk: enough for full tiles, few enough for the second cache, and in backward for a panel of x or h in half
# of the first one: a core's other thread has its part too.
CHUNK_ROWS = 64
BACKWARD_CHUNK_ROWS = 96
# Up to so many rows in all, reading the weights in place costs less than packing them first: a step of a batch. Small
# weights are packed within the caches, so that fewer rows are worth it.
ROWS_IN_PLACE = 64
FEW_ROWS_IN_PLACE = 20
MANY_WEIGHTS = 100_000  # numbers of a layer
# Backward, where packing only moves rows of a weight together, and those of whole vectors may stay. Weights that come
# from behind the second cache at every step come faster as panels.
BACKWARD_ROWS_IN_PLACE = 128
BACKWARD_FEW_ROWS_IN_PLACE = 24
TOO_MANY_WEIGHTS = 1_000_000


def positions(kind: Any, prefix: str = "", start: int = 0) -> dict[str, int]:
    """Which integer of the operands `kind` each field is: "x.base" -> 10."""
    found: dict[str, int] = {}
    for name, field in kind.__annotations__.items():
        nested = {prefix + name: start + len(found)}
        found |= nested if field is int else positions(field, f"{prefix}{name}.", start + len(found))
    return found


POSITIONS = {kind: positions(kind) for kind in (Forward, Backward, OptionalForward, OptionalBackward)}


class Share(NamedTuple):
    """A thread's part of a call: sequences [first, last) of a direction."""

    direction: int
    first: int
    last: int
    place: int  # among the shares of its direction


class Address(NamedTuple):
    """An integer of the operands that is `offset` bytes behind the address of a tensor of the call."""

    position: int
    tensor: int  # its number in `tensors` of the plan
    offset: int


class Space:
    """Offsets of buffers one behind the other, each from the beginning of a cache line; a row is a whole number of
    vectors."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, rows: int, row_bytes: int) -> int:
        offset, self.bytes = self.bytes, self.bytes + -(-rows * row_bytes // CACHE_LINE) * CACHE_LINE
        return offset


class Cut:
    """The sizes of a layer call in the kernels' terms, and its shares; in backward each of them has sums of its own."""

    def __init__(self, layer: Layer, backward: bool) -> None:
        spec, x = layer.cell, layer.x
        self.zero = SCALARS[x.dtype](0)
        self.item = x.element_size()
        self.gates, self.inputs, self.hidden, self.outputs = len(spec.gates), x.shape[-1], layer.hidden, layer.outputs
        self.recurrent = self.gates * self.hidden
        self.batch = layer.h0.shape[1]
        self.packed, self.ragged = layer.batch_sizes is not None and layer.order is None, layer.batch_sizes is not None
        self.steps = x.shape[0] if layer.batch_sizes is None else len(layer.batch_sizes)
        self.total = self.steps * self.batch if layer.batch_sizes is None else int(layer.batch_sizes.sum())
        self.members = 1  # threads that run a share together
        self.shares = self._shares(layer, len(layer.weights), backward)
        self.parts = max((share.place + 1 for share in self.shares), default=1)  # of a direction
        self.most = max((share.last - share.first for share in self.shares), default=1)

    def _shares(self, layer: Layer, directions: int, backward: bool) -> list[Share]:
        """Of all directions, as many real steps in one as in another."""
        multiply_adds = self.total * self.recurrent * (self.inputs + self.outputs) * directions
        threads = min(torch.get_num_threads(), max(1, multiply_adds // WORTH_A_THREAD))
        self.divided = threads > 1  # of several directions each is a share in any case
        parts = min(-(-threads // directions), self.batch, (self.batch + 1) // LEAST_SEQUENCES)
        parts = max(1, min(parts, self.total // ROWS_WORTH_A_SUM) if backward else parts)
        if threads == torch.get_num_threads() and self._go_together(layer, threads, directions, parts):
            self.members, parts = threads // directions, 1
        edges = [self.batch * part // parts for part in range(parts + 1)]
        if layer.batch_sizes is not None and parts > 1:
            lengths = (layer.batch_sizes.unsqueeze(1) > torch.arange(self.batch, device="cpu")).sum(0)
            goals = torch.tensor([self.total * part // parts for part in range(1, parts)], device="cpu")
            edges[1:-1] = (torch.searchsorted(lengths.cumsum(0), goals) + 1).tolist()  # with the one that crosses it
        spans = [(first, last) for first, last in pairwise(edges) if first < last]
        return [Share(d, *span, place) for d in range(directions) for place, span in enumerate(spans)]

    def _go_together(self, layer: Layer, threads: int, directions: int, parts: int) -> bool:
        """Whether all of torch's threads can run the sweeps of a call together, and that beats `parts` of the batch."""
        members, rest = divmod(threads, directions)
        if rest or not layer.plain or self.ragged or layer.weights[0].weight_hr is not None or not team.can_meet():
            return False
        panels = -(-self.outputs * self.item // (MAX_VECTORS * VECTOR_BYTES))  # of backward, which are the larger ones
        faster = panels / -(-panels // members)
        step = self.batch * self.recurrent * self.outputs
        return faster >= WORTH_TOGETHER * parts and step >= members * WORTH_A_BARRIER


class Plan(Cut):
    """What forward and backward plans have in common."""

    operands: Any

    def __init__(self, layer: Layer, chunk_rows: int, backward: bool) -> None:
        super().__init__(layer, backward)
        self.block = -(-self.most // -(-self.most // MOST_SEQUENCES))
        self.chunk = max(1, min(self.steps, chunk_rows // self.block))
        self.space = Space()
        self.packs = False
        self._launch: Launch | None = None
        self.tensors = ["workspace"]  # of a call, by name, in the order in which `run` is told their addresses
        self.directions: list[tuple[array[int], list[Address]]] = []
        self._addresses: list[Address] = []

    def width(self, units: int) -> int:
        """Bytes of a workspace row of `units` numbers: whole vectors."""
        return -(-units * self.item // VECTOR_BYTES) * VECTOR_BYTES

    def apart(self, units: int) -> int:
        """The same where outer products walk down the rows: sweep.py's apart_bytes."""
        lines = -(-self.width(units) // CACHE_LINE)
        return (lines + 1 if lines % 4 == 0 else lines) * CACHE_LINE

    def at(self, field: str, tensor: str, offset: int = 0) -> None:
        """Says what address goes into an operand of the direction that is being laid out."""
        if tensor not in self.tensors:
            self.tensors.append(tensor)
        self._addresses.append(Address(POSITIONS[self.operands][field], self.tensors.index(tensor), offset))

    def rows(self, field: str, name: str, tensor: Tensor | None, offset: int = 0) -> Rows:
        """Rows of (T, B, n), or of packed (N, n)."""
        if tensor is None:
            return Rows()
        self.at(f"{field}.base", name, offset * self.item)
        if self.packed:
            return Rows(0, 0, tensor.stride(0) * self.item)
        return Rows(0, tensor.stride(0) * self.item, tensor.stride(1) * self.item)

    def saved_rows(self, field: str, tensor: Tensor | None, d: int) -> Rows:
        """Rows of direction d of what backward reads, (T, B, D, n), or (N, D, n) wherever there are lengths."""
        if tensor is None:
            return Rows()
        self.at(f"{field}.base", field, d * tensor.stride(-2) * self.item)
        if self.ragged:
            return Rows(0, 0, tensor.stride(0) * self.item)
        return Rows(0, tensor.stride(0) * self.item, tensor.stride(1) * self.item)

    def cell_rows(self, field: str, tensor: Tensor | None, d: int, outer: bool) -> Rows:
        """The same of c of every step, (T, B, D, H) or (N, D, H), or in the rows of y."""
        if tensor is None or not outer:
            return self.saved_rows(field, tensor, d)
        self.at(f"{field}.base", field, d * tensor.stride(-2) * self.item)
        return Rows(0, 0 if self.packed else tensor.stride(0) * self.item, tensor.stride(-3) * self.item)

    def states(self, field: str, tensor: Tensor | None, d: int, name: str = "") -> Rows:
        """Rows of direction d of a state or mask (D, B, n), called as the field is if not by another name."""
        if tensor is None:
            return Rows()
        self.at(f"{field}.base", name or field, d * tensor.stride(0) * self.item)
        return Rows(0, 0, tensor.stride(1) * self.item)

    def sizes(self, d: int) -> Sizes:
        if self.ragged:
            self.at("sizes.starts", "starts")
            self.at("sizes.counts", "counts")
            if not self.packed:
                self.at("sizes.order", "order")
        return Sizes(
            steps=self.steps, reverse=d, inputs=self.inputs, hidden=self.hidden, outputs=self.outputs,
            starts=0, counts=0, order=0, block=self.block, chunk=self.chunk,
        )  # fmt: skip

    def matrix(self, field: str, tensor: str, weight: Tensor | None, panel_bytes: int, offset: int = 0) -> Matrix:
        """A weight, or what of it lies from `offset` bytes on, in place if it takes no bytes as panels."""
        if weight is None:
            return Matrix()
        self.at(f"{field}.base", tensor, offset)
        if panel_bytes:
            self.at(f"{field}.panels", "workspace", self.space.take(1, panel_bytes))
        return Matrix(0, weight.stride(0) * self.item, 0)

    def add_direction(self, operands: Any) -> None:
        """Ends the layout of a direction."""
        self.at("workspace", "workspace", self.space.take(self.parts * self.members, operands.workspace_bytes))
        self.directions.append((array("q", flatten(operands)), self._addresses))
        self._addresses = []

    @property
    def rows_in_place(self) -> int:
        """Up to so many rows in all a forward sweep reads the weights in place."""
        many = self.recurrent * (self.inputs + self.outputs) >= MANY_WEIGHTS
        return ROWS_IN_PLACE if many else FEW_ROWS_IN_PLACE

    @property
    def member_at(self) -> int:
        """Which integer of the operands says which member they are for; their number and the barrier follow."""
        return POSITIONS[self.operands]["sizes.member"]

    def launch(self, kernel: Any, pack: Any) -> Launch:
        """What packs the weights of each direction, then runs all shares; of calls whose addresses are those of
        `tensors`."""
        if self._launch is None:
            self._launch = Launch(self, kernel, pack)
        return self._launch


class ForwardPlan(Plan):
    """The layout of forward sweeps. Its tensors are among x, y, gates, cells, h0, c0, h_n, c_n, starts, counts, order
    and, for each direction d, w_ih<d> and so on."""

    operands = Forward

    def __init__(self, layer: Layer, states: States) -> None:
        super().__init__(layer, CHUNK_ROWS, backward=False)
        self.packs = self.total > self.rows_in_place
        for d, weights in enumerate(layer.weights):
            self.add_direction(self._direction(layer, states, d, weights))

    def _panels(self, gates: int, units: int, depth: int) -> int:
        return gates * self.width(units) * depth if self.packs else 0

    def _direction(self, layer: Layer, states: States, d: int, w: Weights) -> Forward:
        space, rows = Space(), self.chunk * self.block
        hidden, outputs = self.width(self.hidden), self.width(self.outputs)
        gates = self.width(self.recurrent) + VECTOR_BYTES  # vectors of the last gate may end behind it
        for name, bias in (("b_ih", w.bias_ih), ("b_hh", w.bias_hh)):
            if bias is not None:
                self.at(name, f"{name}{d}")
        return Forward(
            sizes=self.sizes(d),
            x=self.rows("x", "x", layer.x),
            y=self.rows("y", "y", states.y, d * self.outputs),
            gates=self.saved_rows("gates", states.gates, d),
            cells=self.saved_rows("cells", states.cells, d),
            h0=self.states("h0", layer.h0, d),
            c0=self.states("c0", layer.c0, d),
            h_n=self.states("h_n", states.h_n, d),
            c_n=self.states("c_n", states.c_n, d),
            w_ih=self.matrix("w_ih", f"w_ih{d}", w.weight_ih, self._panels(1, self.recurrent, self.inputs)),
            w_hh=self.matrix("w_hh", f"w_hh{d}", w.weight_hh, self._panels(self.gates, self.hidden, self.outputs)),
            w_hr=self.matrix("w_hr", f"w_hr{d}", w.weight_hr, self._panels(1, self.outputs, self.hidden)),
            b_ih=0,
            b_hh=0,
            workspace=0,
            b_x=space.take(1, gates),
            b_h=space.take(1, gates) if layer.cell.separate else 0,
            xs=space.take(rows, self.width(self.inputs)),
            gx=space.take(rows, gates),
            h=space.take(2 * self.block, outputs),
            c=space.take(self.block, hidden) if layer.cell.has_c else 0,
            m=space.take(self.block, hidden) if w.weight_hr is not None else 0,
            tile=space.take(self.block * MAX_VECTORS, VECTOR_BYTES),
            workspace_bytes=space.bytes,
        )


class BackwardPlan(Plan):
    """The layout of backward sweeps. Its tensors are among those of a ForwardPlan without h_n and c_n, and dy, dh_n,
    dc_n, dh0, dc0 and, for each direction d, dx<d>, dw_ih<d> and so on."""

    operands = Backward

    def __init__(self, layer: Layer, saved: Saved, tensors: dict[str, Tensor | None]) -> None:
        super().__init__(layer, BACKWARD_CHUNK_ROWS, backward=True)
        for d, weights in enumerate(layer.weights):
            self.add_direction(self._direction(layer, saved, tensors, d, weights))

    def _panels(self, units: int, depth: int) -> int:
        """Of a weight's panels; 0 where it may stay as it is."""
        wide = units * depth >= TOO_MANY_WEIGHTS
        most = BACKWARD_FEW_ROWS_IN_PLACE if wide else BACKWARD_ROWS_IN_PLACE
        if self.total <= most and units * self.item % VECTOR_BYTES == 0:
            return 0
        self.packs = True
        return self.width(units) * depth

    def _direction(self, layer: Layer, saved: Saved, tensors: dict[str, Tensor | None], d: int, w: Weights) -> Backward:
        space, rows = Space(), self.chunk * self.block
        hidden, outputs = self.width(self.hidden), self.width(self.outputs)
        for name in ("dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr"):
            if tensors[f"{name}{d}"] is not None:
                self.at(name, f"{name}{d}")
        projected = w.weight_hr is not None
        # A tile may read MAX_ROWS numbers past the last. An odd count of vectors keeps rows of a power of two from
        # meeting in few lines of a cache.
        dg_row = (self.width(self.recurrent + max(MAX_ROWS)) // VECTOR_BYTES | 1) * VECTOR_BYTES
        dgx = space.take(rows, dg_row)
        return Backward(
            sizes=self.sizes(d),
            x=self.rows("x", "x", layer.x),
            gates=self.saved_rows("gates", saved.gates, d),
            cells=self.saved_rows("cells", saved.cells, d),
            y=self.rows("y", "y", saved.y, d * self.outputs),
            h0=self.states("h0", layer.h0, d),
            c0=self.states("c0", layer.c0, d),
            dy=self.rows("dy", "dy", tensors["dy"], d * self.outputs),
            dh_n=self.states("dh_n", tensors["dh_n"], d),
            dc_n=self.states("dc_n", tensors["dc_n"], d),
            dx=self.rows("dx", f"dx{d}", tensors[f"dx{d}"]),
            dh0=self.states("dh0", tensors["dh0"], d),
            dc0=self.states("dc0", tensors["dc0"], d),
            w_ih=self.matrix("w_ih", f"w_ih{d}", w.weight_ih, self._panels(self.inputs, self.recurrent)),
            w_hh=self.matrix("w_hh", f"w_hh{d}", w.weight_hh, self._panels(self.outputs, self.recurrent)),
            w_hr=self.matrix(
                "w_hr", f"w_hr{d}", w.weight_hr, self._panels(self.hidden, self.outputs) if projected else 0
            ),
            dw_ih=0,
            dw_hh=0,
            db_ih=0,
            db_hh=0,
            dw_hr=0,
            workspace=0,
            dg_row=dg_row,
            dgx=dgx,
            dgh=space.take(rows, dg_row) if layer.cell.separate else dgx,
            xs=space.take(rows, self.apart(self.inputs)),
            hs=space.take(rows, self.apart(self.outputs)),
            ms=space.take(rows, hidden) if projected else 0,
            dp=space.take(rows, outputs) if projected else 0,
            dh=space.take(self.block, outputs),
            dc=space.take(self.block, hidden) if layer.cell.has_c else 0,
            dm=space.take(self.block, hidden) if projected else 0,
            tile=space.take(1 + max(MAX_ROWS), MAX_VECTORS * VECTOR_BYTES) + MAX_VECTORS * VECTOR_BYTES,
            workspace_bytes=space.bytes,
        )
