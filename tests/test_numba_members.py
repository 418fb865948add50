"""Threads that run one sweep together, each with a part of the units, where there are too few sequences."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import rnnkern
from rnnkern import native
from rnnkern.backends import Layer
from rnnkern.backends.numba_cpu import plans, team
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES
from rnnkern.cells import TORCH_CELLS
from tests.numba_support import (
    FORKS,
    LIMIT,
    bitwise_equal,
    count_shares,
    difference,
    forget_plans,
    in_forked_child,
    oracle,
    plan_constants,
    random_layer,
    sweeps,
)


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """However little there is to do for each, threads run single sequences together; the list holds how many did."""
    counts = count_shares(monkeypatch, together=True)
    with plan_constants(WORTH_A_THREAD=1, WORTH_A_BARRIER=0, CHUNK_ROWS=5, BACKWARD_CHUNK_ROWS=12):
        yield counts


# Units: two panels of backward, so that some have nothing to do; rests of vectors and of panels; whole panels. Steps:
# one, and several chunks, the last one not whole. Few, since threads that have no core of their own wait long.
SIZES: list[dict[str, Any]] = [
    {"steps": 1, "hidden": 33},
    {"steps": 4, "hidden": 37, "inputs": 70},
    {"steps": 15, "hidden": 64, "inputs": 16, "batch": 2},
    {"steps": 9, "hidden": 131, "inputs": 33, "bias": False},
]


def layers(cell: str, directions: int) -> list[Layer]:
    """Calls of few sequences."""
    return [random_layer(cell, directions=directions, scale=0.3, **{"batch": 1, **sizes}) for sizes in SIZES]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_the_same_bits_as_on_one_thread(
    cell: str, directions: int, threads: Callable[[int], None], members: list[int]
) -> None:
    """Of weights' gradients too: there is but one sum."""
    for layer in layers(cell, directions):
        threads(1)
        alone = sweeps(layer)
        assert difference(alone, oracle(layer)) < LIMIT[torch.float64]
        count = 2 + 2 * directions
        threads(count)
        assert plans.Cut(layer, backward=False).members == count // directions
        members.clear()
        for _ in range(2):
            assert bitwise_equal(sweeps(layer), alone)
        assert members == [count] * 4


def test_a_batch_is_cut_into_sequences_where_there_are_enough(
    threads: Callable[[int], None], members: list[int]
) -> None:
    threads(4)
    hidden = 2 * VECTOR_BYTES + 3  # five panels of float64
    for batch, together in ((1, 4), (2, 4), (4, 1), (8, 1)):
        cut = plans.Cut(random_layer("gru", batch=batch, hidden=hidden, directions=1), backward=False)
        assert (cut.members, len(cut.shares) > 1) == (together, together == 1)


@pytest.mark.parametrize(
    "form",
    [
        {"lengths": [5]},
        {"batch_sizes": [1, 1, 1]},
        {"outputs": 130},
        {"directions": 2, "count": 3},
        {"hidden": 5},
        {"WORTH_A_BARRIER": 100_000},
        {"WORTH_A_THREAD": 200_000},
    ],
    ids=lambda form: ", ".join(form),
)
def test_calls_that_nobody_runs_together(
    form: dict[str, Any], threads: Callable[[int], None], members: list[int]
) -> None:
    sizes = {name: form[name] for name in form if name.islower() and name != "count"}
    layer = random_layer("lstm", **{"batch": 1, "hidden": 131, "directions": 1, "scale": 0.3, **sizes})
    threads(form.get("count", 2))
    with plan_constants(**{name: form[name] for name in form if name.isupper()}):
        assert plans.Cut(layer, backward=False).members == 1
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]
    assert not members


def test_layers_with_options_are_not_run_together(threads: Callable[[int], None], members: list[int]) -> None:
    threads(2)
    layer = rnnkern.LSTM(4, 80, layer_norm=True)
    layer(torch.randn(5, 1, 4))[0].sum().backward()
    assert not members
    layer = rnnkern.LSTM(4, 80)
    layer(torch.randn(5, 1, 4))[0].sum().backward()
    assert members


@pytest.mark.skipif(sys.platform != "linux", reason="only there OMP_THREAD_LIMIT is known to be heard")
@pytest.mark.usefixtures("each_way")
def test_a_team_that_is_not_complete() -> None:
    """One thread does all, and none waits for those that never came."""
    script = f"""
import torch, rnnkern
from rnnkern import native
from rnnkern.backends.numba_cpu import plans, team
native.calls = native.calls if {native.calls is not None} else None
plans.WORTH_A_THREAD = plans.WORTH_A_BARRIER = 1
layer, x = rnnkern.GRU(4, 80), torch.randn(9, 1, 4)
torch.set_num_threads(1)
want = layer(x)[0]
calls, run = [], team.run
team.run = lambda work, *rest: (calls.append(work) if work.together else None, run(work, *rest))
torch.set_num_threads(4)
for _ in range(3):
    y = layer(x)[0]
    assert torch.equal(y, want)
    y.sum().backward()
assert len(calls) == {6 if native.calls is None else 4}  # planned calls in C++ run no team in Python
"""
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100, env=environment)


def test_without_torchs_threads(
    threads: Callable[[int], None], members: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    (*_, layer) = layers("lstm", 1)
    want = sweeps(layer)
    monkeypatch.setattr(team, "_enter", None)
    forget_plans()
    assert bitwise_equal(sweeps(layer), want)


def test_concurrent_calls(threads: Callable[[int], None], members: list[int]) -> None:
    """Each has a team of its own."""
    threads(2)
    calls = [layers(cell, 1)[i] for cell in TORCH_CELLS for i in (0, 1)]
    wanted = [sweeps(layer) for layer in calls]
    with ThreadPoolExecutor(3) as executor:
        found = list(executor.map(sweeps, calls * 2))
    assert all(bitwise_equal(got, want) for got, want in zip(found, wanted * 2, strict=True))


@FORKS
def test_in_a_forked_child(threads: Callable[[int], None], members: list[int]) -> None:
    """It would wait for ever for the threads of its parent's team."""
    threads(2)
    layer = layers("gru", 1)[1]  # so small that torch compares its tensors on one thread
    want = sweeps(layer)
    assert in_forked_child(lambda: bitwise_equal(sweeps(layer), want))
