"""Tensors of a call as its layers see them: time first, with a batch, one layer at a time. Views, all differentiable.

T steps, B sequences, L layers, D directions, n numbers of a state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

States = tuple[Tensor, ...]


def reset_rows(reset: Tensor, batch_first: bool, unbatched: bool) -> Tensor:
    """`reset` (T, B), (B, T) with batch_first, or (T,) unbatched, as (T, B)."""
    if unbatched:
        return reset.unsqueeze(1)
    return reset.t() if batch_first else reset


def reset_states(reset_to: States, batch: int, unbatched: bool) -> States:
    """`reset_to` (L, 1, n), (L, B, n) or (T, L, B, n), unbatched without B, as (L, B, n) or (T, L, B, n)."""
    states = tuple(s.unsqueeze(-2) for s in reset_to) if unbatched else reset_to
    return tuple(s.expand(-1, batch, -1) if s.dim() == 3 and s.shape[1] != batch else s for s in states)


def reset_states_of(reset_to: States | None, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """What `reset_states` gave, of one layer: h and c, (B, n) or (T, B, n)."""
    # backward of squeeze is a view, that of an index fills a whole with zeros
    parts = [s.squeeze(-3) if s.shape[-3] == 1 else s.select(-3, layer) for s in reset_to or ()]
    return parts[0] if parts else None, parts[1] if len(parts) > 1 else None


def all_states(directions: int, outputs: Sequence[Tensor], cells: Sequence[Tensor]) -> States:
    """Every state of every step, (T, L*D, B, n), from the outputs (T, B, D*n) of all layers, and their c (T, B, D, n)
    where they have it."""

    def grid(rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], directions, rows.shape[-1] // directions).transpose(1, 2)

    found = [[grid(y) for y in outputs], [c.transpose(1, 2) for c in cells]]
    return tuple(torch.cat(grids, 1) for grids in found if grids)
