"""Padded sequences of different lengths as packed rows, and back: the rows that exist, step after step, longest
sequence first.

Rows of step t are rows starts[t] to starts[t] + batch_sizes[t], as in torch.nn.utils.rnn.PackedSequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern import checks


class Packing(NamedTuple):
    """Which element of a padded (T, B, ...) tensor each packed row is."""

    step: Tensor  # (N,) int64
    sequence: Tensor  # (N,) int64
    order: Tensor  # (B,) int64: the sequences, longest first
    batch_sizes: Tensor  # (T,) int64

    def gather(self, padded: Tensor) -> Tensor:
        """(T, B, ...) -> (N, ...)."""
        return padded[self.step, self.sequence]

    def scatter(self, rows: Tensor, steps: int, batch: int) -> Tensor:
        """(N, ...) -> (T, B, ...), zero where a sequence has ended."""
        padded = rows.new_zeros(steps, batch, *rows.shape[1:])
        padded[self.step, self.sequence] = rows
        return padded

    def sort(self, states: Tensor | None) -> Tensor | None:
        """(D, B, ...) in the order of the packed rows."""
        return None if states is None else states.index_select(1, self.order)

    def unsort(self, states: Tensor | None) -> Tensor | None:
        """`sort` undone."""
        return None if states is None else torch.empty_like(states).index_copy(1, self.order, states)


def pack(lengths: Tensor, steps: int) -> Packing:
    """The packing of sequences of these lengths, (B,) int64 on the CPU, in a padded tensor of `steps` steps."""
    checks.length_values(lengths, steps)
    falling, order = lengths.sort(descending=True, stable=True)
    real = torch.arange(steps, device="cpu").unsqueeze(1) < falling  # (T, B)
    step, row = real.nonzero(as_tuple=True)
    return Packing(step, order[row], order, real.sum(1))


def positions(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(step, sequence) of each packed row, (N,) int64 each."""
    starts = torch.cumsum(batch_sizes, 0) - batch_sizes
    rows = int(batch_sizes.sum())
    step = torch.repeat_interleave(torch.arange(len(batch_sizes), device="cpu"), batch_sizes, output_size=rows)
    return step, torch.arange(rows, device="cpu") - starts[step]


def previous_rows(batch_sizes: Tensor, reverse: bool) -> Tensor:
    """For each packed row, the row of the same sequence at the step swept before; N + b where that is the initial state
    of sequence b."""
    starts = torch.cumsum(batch_sizes, 0) - batch_sizes
    step, sequence = positions(batch_sizes)
    before = step + 1 if reverse else step - 1
    exists = (before >= 0) & (before < len(batch_sizes))
    before = before.clamp(0, len(batch_sizes) - 1)
    exists &= sequence < batch_sizes[before]
    return torch.where(exists, starts[before] + sequence, len(step) + sequence)
