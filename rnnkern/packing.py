"""Sequences of different lengths: which of them have each step, and where their rows are.

Sequences are taken longest first, so that those that have a step are always the first ones: batch_sizes[t] of them, as
in torch.nn.utils.rnn.PackedSequence, whose rows of step t are rows starts[t] to starts[t] + batch_sizes[t].
"""

import torch
from torch import Tensor

from rnnkern import checks


def sort_lengths(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(order, batch_sizes) of lengths (B,), int64 on the CPU: the sequences, longest first, (B,), and how many of them
    have each of the `steps` steps, (T,)."""
    checks.length_values(lengths, steps)
    order = lengths.argsort(descending=True, stable=True)
    ended = torch.bincount(lengths, minlength=steps + 1).cumsum(0)  # at [t], those of length t or less
    return order, len(lengths) - ended[:steps]


def positions(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(step, sequence) of each packed row, (N,) int64 each; sequences are counted longest first."""
    starts = torch.cumsum(batch_sizes, 0) - batch_sizes
    rows = int(batch_sizes.sum())
    step = torch.repeat_interleave(torch.arange(len(batch_sizes), device="cpu"), batch_sizes, output_size=rows)
    return step, torch.arange(rows, device="cpu") - starts[step]
