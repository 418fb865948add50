"""Layers in the form that backends take, for the tests of the Numba backend and of its mutants."""

import ctypes
import mmap
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from rnnkern import reference, shortcut
from rnnkern.backends import Cotangents, Layer, Needs, States, numba_cpu
from rnnkern.backends.numba_cpu import plans, team
from rnnkern.cells import CELLS, Weights
from rnnkern.packing import sort_lengths

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
# Sizes that leave rests everywhere: of a vector, of a panel, of a tile, of a share.
ODD: dict[str, Any] = {"steps": 4, "batch": 13, "inputs": 7, "hidden": 19}

# Python 3.12 warns of a fork in a process that has threads. That it works is what tests show that are marked so.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

Parts = tuple[Tensor | None, ...]


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
    lengths: Sequence[int] | None = None,
    bias: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> Layer:
    """A call of random operands; `outputs` gives it a projection, `batch_sizes` (falling, from `batch`) packed rows,
    `lengths` (of `batch` sequences) padded ones; weights are drawn from [-scale, scale]."""
    spec, generator, units = CELLS[cell], torch.Generator().manual_seed(seed), outputs or hidden
    recurrent = len(spec.gates) * hidden

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).to(dtype)

    def weights() -> Weights:
        w_hr = None if outputs is None else draw(outputs, hidden)
        b_ih, b_hh = (draw(recurrent), draw(recurrent)) if bias else (None, None)
        drawn = Weights(draw(recurrent, inputs), draw(recurrent, units), b_ih, b_hh, w_hr)
        return drawn.map(lambda w: w * scale)

    order, counts = None, None if batch_sizes is None else torch.tensor(batch_sizes)
    if lengths is not None:
        order, counts = sort_lengths(torch.tensor(lengths, dtype=torch.int64), steps)
    return Layer(
        cell=spec,
        x=draw(steps, batch, inputs) if batch_sizes is None else draw(sum(batch_sizes), inputs),
        h0=draw(directions, batch, units),
        c0=draw(directions, batch, hidden) if spec.has_c else None,
        weights=tuple(weights() for _ in range(directions)),
        batch_sizes=counts,
        order=order,
        batch_major=False,
    )


def layer_forms(cell: str, dtype: torch.dtype = torch.float64) -> list[Layer]:
    """The forms a call can take: padded, packed, with lengths and with a projection; both directions in each. Some have
    few enough rows to read weights in place, some do not."""
    packed = random_layer(cell, batch_sizes=[5, 4, 4, 2, 1], hidden=11, dtype=dtype, seed=1)
    lengths = random_layer(cell, steps=7, batch=6, lengths=[2, 6, 6, 1, 4, 6], dtype=dtype, seed=3)
    vectors = {
        "inputs": 16,
        "hidden": 32,
        "outputs": 16 if CELLS[cell].has_c else None,
    }  # whole ones on any machine
    whole = random_layer(cell, steps=3, batch=4, **vectors, scale=0.2, dtype=dtype, seed=5)  # type: ignore[arg-type]
    many = random_layer(cell, steps=14, batch=5, hidden=11, scale=0.5, dtype=dtype, seed=6)
    forms = [random_layer(cell, dtype=dtype), many, packed, lengths, whole]
    if CELLS[cell].has_c:
        forms.append(random_layer(cell, outputs=3, batch_sizes=[5, 3, 3], dtype=dtype, seed=2))
        some = [6, 3, 6, 1, 5]
        forms.append(random_layer(cell, outputs=4, hidden=6, steps=6, lengths=some, dtype=dtype, seed=4))
    return forms


def all_needs(layer: Layer) -> Needs:
    """Asks for every gradient that there is."""
    there = [Weights(*(w is not None for w in weights)) for weights in layer.weights]  # type: ignore[arg-type]
    optional = (t is not None for t in (layer.c0, layer.extras.reset_h, layer.extras.reset_c))
    return Needs(True, True, *optional, tuple(there))  # type: ignore[call-arg, arg-type]


def random_gradients(states: States, of_cells: bool = False) -> Cotangents:
    """Those of y, h_n, c_n and, where asked, of c of every step, for what a forward sweep gave."""
    generator = torch.Generator().manual_seed(7)
    return Cotangents(states.y, states.h_n, states.c_n, states.cells if of_cells else None).map(
        lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
    )


def sweeps(layer: Layer) -> Parts:
    """All that a forward and a backward sweep give: y, h_n, c_n, gates, cells, dx, dh0, dc0, gradients of weights."""
    states = numba_cpu.forward(layer, save=True)
    grads = random_gradients(states, layer.extras.states)
    return (*states, *numba_cpu.backward(layer, states.saved, grads, all_needs(layer)))


def oracle(layer: Layer) -> Parts:
    """The same by the reference."""
    states = reference.forward(layer, save=True)
    grads = random_gradients(states, layer.extras.states)
    return (*states, *reference.backward(layer, states.saved, grads, all_needs(layer)))


def but_weights(parts: Parts) -> Parts:
    """Of what `sweeps` gives all but the gradients of weights: what no cutting into shares, blocks or chunks may
    change."""
    return parts[:8]


def forget_plans() -> None:
    """Every call is laid out anew."""
    numba_cpu._plans.clear()
    shortcut.forget()


@contextmanager
def plan_constants(**values: int) -> Iterator[None]:
    """Calls within are laid out with these constants of plans.py."""
    forget_plans()
    try:
        with ExitStack() as stack:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(plans, name, value))
            yield
    finally:
        forget_plans()


def count_shares(monkeypatch: pytest.MonkeyPatch, together: bool) -> list[int]:
    """How many shares each work of the team has from now on: work whose threads go together, or other."""
    counts: list[int] = []
    run = team.run

    def counted(work: team.Work, *rest: Any) -> None:
        if bool(work.together) == together:
            counts.append(len(work.together or work.shares))
        run(work, *rest)

    monkeypatch.setattr(team, "run", counted)
    return counts


def in_forked_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns there; the child must end well."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=lambda: answers.put(work(*arguments)))
    child.start()
    found = answers.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    return found


# What allocates memory that the backend is to fill.
ALLOCATORS = ("new_empty", "new_zeros", "new_empty_strided")


@contextmanager
def every_buffer(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """All memory that is allocated within goes through `change`."""

    def changed(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            return change(allocate(*args, **options))

        return call

    patches: dict[str, Any] = {name: changed(getattr(Tensor, name)) for name in ALLOCATORS}
    with (
        mock.patch.multiple(Tensor, **patches),
        mock.patch.object(torch, "empty_like", changed(torch.empty_like)),
    ):
        yield


class Guards:
    """Within, every buffer that is allocated lies between guards, numbers that nobody may touch."""

    MARGIN, NUMBER = 64, -12345.0

    def __init__(self) -> None:
        self.allocated: list[Tensor] = []
        self._changing = every_buffer(self._guarded)

    def _guarded(self, inside: Tensor) -> Tensor:
        around = torch.full((inside.numel() + 2 * self.MARGIN,), self.NUMBER, dtype=inside.dtype)
        self.allocated.append(around)
        return around.as_strided(inside.shape, inside.stride(), self.MARGIN).copy_(inside)

    def __enter__(self) -> "Guards":
        self._changing.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._changing.__exit__(*error)

    def whole(self) -> bool:
        """Whether nobody has."""
        ends = [(around[: self.MARGIN], around[-self.MARGIN :]) for around in self.allocated]
        return all((end == self.NUMBER).all() for both in ends for end in both)


def before_a_forbidden_page(size: int) -> tuple[mmap.mmap, int]:
    """Memory, and the place in it of `size` bytes, the last that may be touched: the page behind them is protected."""
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + usable), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return memory, usable - size


def difference(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> float:
    """The largest error of any part, relative to the largest number of that part; inf where one is NaN or missing."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            worst = worst if a is b else float("inf")
        elif a.shape != b.shape:
            worst = float("inf")
        elif a.numel():
            error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            worst = max(worst, error) if error == error else float("inf")
    return worst


def bitwise_equal(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(got, want, strict=True)
    )
