"""Layers in the form that backends take, for the tests of the Numba backend and of its mutants."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkern.backends import Layer, States
from rnnkern.cells import CELLS, Weights


def random_layer(
    cell: str,
    *,
    steps: int = 5,
    batch: int = 5,
    inputs: int = 3,
    hidden: int = 5,
    outputs: int | None = None,
    directions: int = 2,
    dtype: torch.dtype = torch.float64,
    batch_sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> Layer:
    """A call of random operands; `outputs` gives it a projection, `batch_sizes` (falling, from `batch`) packed rows."""
    spec, generator, units = CELLS[cell], torch.Generator().manual_seed(seed), outputs or hidden
    recurrent = len(spec.gates) * hidden

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).to(dtype)

    def weights() -> Weights:
        w_hr = None if outputs is None else draw(outputs, hidden)
        return Weights(draw(recurrent, inputs), draw(recurrent, units), draw(recurrent), draw(recurrent), w_hr)

    return Layer(
        cell=spec,
        x=draw(steps, batch, inputs) if batch_sizes is None else draw(sum(batch_sizes), inputs),
        h0=draw(directions, batch, units),
        c0=draw(directions, batch, hidden) if spec.has_c else None,
        weights=tuple(weights() for _ in range(directions)),
        batch_sizes=None if batch_sizes is None else torch.tensor(batch_sizes),
        batch_major=False,
    )


def layer_forms(cell: str, dtype: torch.dtype = torch.float64) -> list[Layer]:
    """The forms a call can take: padded, packed, and with a projection; both directions in each."""
    packed = random_layer(cell, batch_sizes=[5, 4, 4, 2, 1], hidden=11, dtype=dtype, seed=1)
    forms = [random_layer(cell, dtype=dtype), packed]
    if CELLS[cell].has_c:
        forms.append(random_layer(cell, outputs=3, batch_sizes=[5, 3, 3], dtype=dtype, seed=2))
    return forms


def random_gradients(states: States) -> tuple[Tensor, Tensor, Tensor | None]:
    """dy, dh_n and dc_n for what a forward sweep gave."""
    generator = torch.Generator().manual_seed(7)
    dy, dh_n, dc_n = (
        None if t is None else torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for t in (states.y, states.h_n, states.c_n)
    )
    assert dy is not None
    assert dh_n is not None
    return dy, dh_n, dc_n


def difference(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> float:
    """The largest error of any part, relative to the largest number of that part; inf where one is NaN or missing."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            worst = worst if a is b else float("inf")
        elif a.numel():
            error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            worst = max(worst, error) if error == error else float("inf")
    return worst


def bitwise_equal(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(got, want, strict=True)
    )
