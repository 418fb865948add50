"""What rows of steps met, for any number of them at once: the states before each step, and the input. Backward needs
them for sums over rows, and to compute activations anew."""

from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern.backends import Layer
from rnnkern.backends.cuda.products import product
from rnnkern.backends.cuda.rows import Chunk, Sequences, Span, flat, part, unflat
from rnnkern.cells import Weights
from rnnkern.packing import positions
from rnnkern.reference_cells import Before, Zone, normalised, step


class Rows:
    """The rows of a span of one direction, (S, B, n) or packed (S, n)."""

    def __init__(self, layer: Layer, sequences: Sequences, direction: int, span: Span) -> None:
        self.layer, self.direction, self.span = layer, direction, span
        self.sequence: Tensor | None = None  # (S,) of packed rows
        self.exists: Tensor | None = None  # (S, B, 1) where sequences have lengths
        device = layer.x.device
        if sequences.counts is not None:
            counts = sequences.counts
            steps, sequence = positions(counts)
            steps, sequence = span.of(steps), span.of(sequence)
            starts, towards = counts.cumsum(0) - counts, 1 if direction else -1
            within = (steps + towards).clamp(0, len(counts) - 1)
            begins = (sequence >= counts[within]) if direction else steps == 0
            begins |= within == steps
            self.sequence = sequence.to(device)
            self._previous = torch.where(begins, 0, starts[within] + sequence).to(device)
            self._begins = begins.to(device).unsqueeze(1)
        elif sequences.lengths is not None:
            at = torch.arange(span.first, span.last, device=device)[:, None]
            self.exists = (at < sequences.lengths).unsqueeze(2)
            self._begins = (at + 1 >= sequences.lengths).unsqueeze(2)  # of the reverse direction

    def by_sequence(self, states: Tensor) -> Tensor:
        """Numbers of sequences, (B, n), as they meet the rows."""
        return states if self.sequence is None else states[self.sequence]

    def own(self, rows: Tensor) -> Tensor:
        """The span of (T, B, D*n) or (N, D*n), this direction's columns."""
        return part(self.span.of(rows), self.direction, len(self.layer.weights))

    def _before(self, rows: Tensor, start: Tensor) -> Tensor:
        """What of (T, B, D*n) or (N, D*n) the steps before these gave; `start` (B, n) where there is none."""
        rows = part(rows, self.direction, len(self.layer.weights))
        first, last = self.span
        if self.sequence is not None:
            return torch.where(self._begins, start[self.sequence], rows[self._previous])
        if self.direction == 0:
            return torch.cat([rows[first - 1 : first] if first > 0 else start[None], rows[first : last - 1]])
        found = torch.cat([rows[first + 1 : last], rows[last : last + 1] if last < len(rows) else start[None]])
        return found if self.exists is None else torch.where(self._begins, start, found)

    def _after_reset(self, states: Tensor, given: Tensor | None) -> Tensor:
        reset = self.layer.extras.reset
        if reset is not None:
            new = torch.zeros_like(states) if given is None else given if given.dim() == 2 else self.span.of(given)
            states = torch.where(self.span.of(reset).unsqueeze(2), new, states)
        return states if self.exists is None else states.masked_fill(~self.exists, 0)

    def h_before(self, y: Tensor) -> Tensor:
        """h' of the steps; y (T, B, D*P) or (N, D*P)."""
        layer = self.layer
        return self._after_reset(self._before(y, layer.h0[self.direction]), layer.extras.reset_h)

    def c_before(self, cells: Tensor, c0: Tensor) -> Tensor:
        """c' of the steps; cells (T, B, D*H) or (N, D*H), c0 (D, B, H)."""
        return self._after_reset(self._before(cells, c0[self.direction]), self.layer.extras.reset_c)

    def x(self) -> Tensor:
        """The input as it meets W_ih: masked, and zeros past a length, where it may be NaN."""
        x, mask = self.span.of(self.layer.x), self.layer.extras.input_mask
        x = x if self.exists is None else x.masked_fill(~self.exists, 0)
        return x if mask is None else x * self.by_sequence(mask[self.direction])


class States(NamedTuple):
    """What forward left, laid out like rows of y."""

    y: Tensor  # (T, B, D*P)
    cells: Tensor | None  # real, (T, B, D*H)
    c0: Tensor | None  # real, (D, B, H)


def _times(layer: Layer, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """rows W^T, in `dtype`."""
    matrix = flat(layer, rows)
    out = matrix.new_empty(len(matrix), len(weight), dtype=dtype)
    product(matrix, weight.t(), out=out)
    return unflat(layer, out, len(rows))


def activations(layer: Layer, sequences: Sequences, chunk: Chunk, states: States, dtype: torch.dtype) -> Tensor:
    """The gates of a chunk's steps anew, as `Chunk.rows` lays them out. Not step by step: all h and c are there."""
    cell, directions = layer.cell, len(layer.weights)
    kept = cell.kept(layer.extras.zones, layer.weights[0].ln_ih_weight is not None)
    gates = chunk.rows(layer, directions * kept * layer.hidden, dtype)
    for d, span in enumerate(chunk.spans):
        rows = Rows(layer, sequences, d, span)
        found = _activations(rows, states, layer.weights[d], dtype)
        part(gates[: span.size], d, directions).copy_(torch.cat(found, -1))
    return gates


def _activations(rows: Rows, states: States, w: Weights, dtype: torch.dtype) -> list[Tensor]:
    """The blocks that a step of one direction keeps (`CellSpec.kept`)."""
    layer, mask = rows.layer, rows.layer.extras.recurrent_mask
    extras, real = layer.extras, w.map(lambda t: t.to(dtype))
    h = rows.h_before(states.y)
    u = h if mask is None else h * rows.by_sequence(mask[rows.direction])
    of_x, of_h = (_times(layer, *pair, dtype) for pair in ((rows.x(), w.weight_ih), (u, w.weight_hh)))
    gx = normalised(of_x, real.ln_ih_weight, real.ln_ih_bias)
    gh = normalised(of_h, real.ln_hh_weight, real.ln_hh_bias)
    if real.bias_ih is not None and real.bias_hh is not None:
        gx, gh = gx + real.bias_ih, gh + real.bias_hh
    c = None if states.cells is None or states.c0 is None else rows.c_before(states.cells, states.c0)
    zone_c = Zone(None if extras.zoneout_mask_c is None else rows.own(extras.zoneout_mask_c), extras.zoneout_c)
    new = step(layer.cell, gx, gh, Before(h.to(dtype), c, u.to(dtype)), real, zone_c)
    return [*new.saved, *([of_x, of_h] if w.ln_ih_weight is not None else [])]
