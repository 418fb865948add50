"""Rows of a layer call, one for each step and sequence: how sweeps are told where they lie, and which of them a part of
a backward sweep touches."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern import checks
from rnnkern.backends import Layer, is_readable

Layout = tuple[int, int, int, int]  # address, and what lies between steps, sequences and directions
NOTHING: Layout = (0, 0, 0, 0)


def whole(tensor: Tensor) -> Tensor:
    """The tensor as sweeps read it: one block, nothing to be negated on the way."""
    return tensor.resolve_neg().contiguous()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def layout(rows: Tensor | None, directions: int, firsts: tuple[int, ...] = (0,)) -> Layout:
    """Of (T, B, D*n) or packed (N, D*n), which the caller keeps. `firsts` are the steps, or packed rows, of each
    direction that the first row of the buffer is for."""
    if rows is None:
        return NOTHING
    assert is_readable(rows)
    step, sequence = rows.stride(0), rows.stride(1) if rows.dim() == 3 else rows.stride(0)
    start = rows.data_ptr() - firsts[0] * step * rows.element_size()
    return start, step, sequence, rows.shape[-1] // directions + (firsts[0] - firsts[-1]) * step


def state_layout(states: Tensor | None) -> Layout:
    """Of one block (D, B, n), the same at every step."""
    return NOTHING if states is None else (states.data_ptr(), 0, states.stride(1), states.stride(0))


def reset_layout(given: Tensor | None) -> Layout:
    """Of one block (T, B, n), or (B, n) for all steps, of a single direction."""
    if given is None:
        return NOTHING
    return given.data_ptr(), given.stride(0) if given.dim() == 3 else 0, given.stride(-2), 0


def shifted(at: Layout, numbers: int, size: int) -> Layout:
    """The layout of what is in each row `numbers` further, of `size` bytes each."""
    return at[0] + numbers * size, *at[1:]


def flat(layer: Layer, rows: Tensor) -> Tensor:
    """Rows of a layer call as a matrix (T*B, n) or (N, n), in the order in which they lie in memory."""
    if rows.dim() == 2:
        return rows
    return (rows.transpose(0, 1) if layer.batch_major_rows else rows).flatten(0, 1)


def unflat(layer: Layer, matrix: Tensor, steps: int) -> Tensor:
    """`flat` undone, of so many steps."""
    if layer.x.dim() == 2:
        return matrix
    batch, width = layer.x.shape[1], matrix.shape[1]
    if layer.batch_major_rows:
        return matrix.view(batch, steps, width).transpose(0, 1)
    return matrix.view(steps, batch, width)


def part(rows: Tensor, direction: int, directions: int) -> Tensor:
    """A direction's columns, (..., n) of (..., D*n)."""
    return rows.chunk(directions, -1)[direction]


class Sequences(NamedTuple):
    """Which sequences have which steps, as sweeps want to know it."""

    lengths: Tensor | None  # (B,) on the device
    order: Tensor | None  # (B,) on the device, longest first
    counts: Tensor | None  # (T,) on the CPU

    def addresses(self) -> dict[str, int]:
        return {name: address(t) for name, t in self._asdict().items()}


def sequences_of(layer: Layer, in_sight: Callable[[Tensor], bool]) -> tuple[Layer, Sequences]:
    """Those of the layer. Lengths that are not in sight never come to the host: a sequence whose length is outside 1..T
    starts from NaN, and so its outputs and states are NaN."""
    if layer.lengths is None:
        counts = None if layer.batch_sizes is None else whole(layer.batch_sizes)
        return layer, Sequences(None, None, counts)
    steps, lengths = layer.x.shape[0], whole(layer.lengths)
    if in_sight(lengths):
        checks.length_values(lengths, steps)
        # of pinned memory, which the caller may fill anew, the copy must be made when this returns
        lengths = lengths.to(layer.x.device, non_blocking=not lengths.is_pinned())
    else:
        valid = (lengths >= 1) & (lengths <= steps)
        lengths = torch.where(valid, lengths, steps)
        reset = layer.extras.reset
        layer = layer._replace(
            h0=torch.where(valid[:, None], layer.h0, torch.nan),
            extras=layer.extras._replace(reset=None if reset is None else reset & valid),  # NaN shall stay
        )
    return layer, Sequences(lengths, lengths.argsort(descending=True, stable=True), None)


class Span(NamedTuple):
    """Neighbouring steps of padded rows, or rows of packed ones."""

    first: int
    last: int  # one behind

    def of(self, rows: Tensor) -> Tensor:
        return rows[self.first : self.last]

    @property
    def size(self) -> int:
        return self.last - self.first


class Chunk(NamedTuple):
    """Launches begin to end - 1 of a backward sweep. It starts at the last step of the first direction and at the first
    one of the other."""

    begin: int
    end: int
    spans: tuple[Span, ...]  # of each direction, of its own steps

    def rows(self, layer: Layer, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer for all rows of a direction, and `layout` of it."""
        return layer._replace(x=layer.x[: max(span.size for span in self.spans)]).rows(width, dtype=dtype)

    def layout(self, rows: Tensor | None, directions: int) -> Layout:
        """Of a buffer that `rows` made."""
        return layout(rows, directions, tuple(span.first for span in self.spans))


def chunks(layer: Layer, sequences: Sequences, steps: int) -> Iterator[Chunk]:
    """A backward sweep in chunks of so many steps."""
    total = layer.x.shape[0] if sequences.counts is None else len(sequences.counts)
    starts = list(range(total + 1))
    if sequences.counts is not None:
        starts = [0, *sequences.counts.cumsum(0).tolist()]
    for begin in range(0, total, steps):
        end = min(begin + steps, total)
        spans = (Span(starts[total - end], starts[total - begin]), Span(starts[begin], starts[end]))
        yield Chunk(begin, end, spans[: len(layer.weights)])
