"""The Numba backend on several threads and in forked processes: results, and the same bits from run to run."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset

import rnnkern
from rnnkern.backends import Layer
from rnnkern.backends.numba_cpu import jit, plans, pool, team
from rnnkern.cells import TORCH_CELLS
from tests.numba_support import (
    FORKS,
    LIMIT,
    ODD,
    Parts,
    bitwise_equal,
    but_weights,
    difference,
    forget_plans,
    in_forked_child,
    layer_forms,
    oracle,
    random_layer,
    sweeps,
)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads(
    cell: str, threads: Callable[[int], None], always_split: list[int]
) -> None:
    """Of all but gradients of weights, which are sums over shares: those have the same bits on as many threads."""
    for layer in (*layer_forms(cell), random_layer(cell, **ODD), random_layer(cell, **ODD, directions=1)):
        threads(1)
        first = sweeps(layer)
        assert bitwise_equal(sweeps(layer), first)
        for count in (2, 3, 5):
            threads(count)
            several = sweeps(layer)
            assert bitwise_equal(but_weights(several), but_weights(first))
            assert difference(several, first) < LIMIT[torch.float64]
            for _ in range(3):
                assert bitwise_equal(sweeps(layer), several)
    assert set(always_split) >= {2, 3, 4, 5}  # tasks: shares of the batch times directions


def test_more_threads_than_sequences(threads: Callable[[int], None], always_split: list[int]) -> None:
    threads(7)
    for layer in (random_layer("gru", batch=2), random_layer("lstm", batch=1, directions=1), *layer_forms("rnn_tanh")):
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]


def test_shares_of_one_direction_have_about_as_many_steps(
    threads: Callable[[int], None], always_split: list[int]
) -> None:
    """A few long sequences weigh as much as many short ones."""
    threads(2)
    lengths = [20] * 2 + [1] * 40
    layer = random_layer("rnn_tanh", steps=20, batch=42, lengths=lengths, directions=1)
    assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]
    (share, other) = plans.Cut(layer, backward=False).shares
    steps = [sum(lengths[s.first : s.last]) for s in (share, other)]
    assert abs(steps[0] - steps[1]) <= 20


@pytest.mark.parametrize("lengths", [[3, 2, 1], [9, 8, 4], [30, 20, 10, 9]], ids=sum)
@pytest.mark.parametrize("ragged", [None, "lengths", "packed"])
def test_as_many_sums_as_shares_where_rows_are_few(
    lengths: list[int], ragged: str | None, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward has fewer shares than forward then. What nobody has written is NaN here."""
    monkeypatch.setattr(plans, "WORTH_A_THREAD", 1)
    module, options = rnnkern.LSTM(5, 33), {"lengths": torch.tensor(lengths)} if ragged == "lengths" else {}
    x: Any = torch.randn(max(lengths), len(lengths), 5)
    x = pack_padded_sequence(x, torch.tensor(lengths)) if ragged == "packed" else x

    def gradients() -> list[Tensor | None]:
        module.zero_grad()
        y, _ = module(x, **options)
        (y.data if ragged == "packed" else y).square().sum().backward()
        return [p.grad for p in module.parameters()]

    threads(1)
    wanted = gradients()
    threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        found = [gradients() for _ in range(3)]  # the ordinary way, and by a plan
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(difference(got, wanted) < LIMIT[torch.float32] for got in found)


def test_threads_of_our_own_where_torchs_cannot_be_had(
    threads: Callable[[int], None], always_split: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(3)
    layers = [layer for cell in TORCH_CELLS for layer in layer_forms(cell)]
    by_the_team = [sweeps(layer) for layer in layers]
    monkeypatch.setattr(team, "_enter", None)
    assert all(bitwise_equal(sweeps(layer), want) for layer, want in zip(layers, by_the_team, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="only there torch's runtime is known to have the entry")
def test_the_team_is_torchs() -> None:
    """A region that torch's operations and sweeps share, not a thread more."""
    script = """
import os, torch, rnnkern
from rnnkern.backends.numba_cpu import plans, team
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
plans.WORTH_A_THREAD = 1
torch.ones(1 << 20).add_(1)  # torch has its team
layer, x = rnnkern.LSTM(4, 8), torch.randn(2, 32, 4)
with torch.no_grad():
    layer(x[:, :1])  # compiled, or loaded
    before = count()
    layer(x)
    assert count() == before, (before, count())
    team._enter = None
    layer(x)
    assert count() > before, (before, count())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


@FORKS
def test_a_child_forked_before_the_first_call() -> None:
    """The parent has torch's team, and rnnkern's kernels have not been loaded yet."""
    script = """
import os, torch, rnnkern
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1)
child = os.fork()
if not child:
    with torch.no_grad():
        rnnkern.RNN(64, 64)(torch.randn(8, 64, 64))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


# Concurrent calls

JOBS = [
    *((random_layer(cell, **ODD, seed=i), i) for i, cell in enumerate(TORCH_CELLS)),
    *((form, 100) for cell in TORCH_CELLS for form in layer_forms(cell)),
    *(
        (random_layer(cell, steps=6, batch=32, inputs=16, hidden=33, directions=1, seed=i), i)
        for i, cell in enumerate(TORCH_CELLS)
    ),
]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_concurrent_calls(count: int, threads: Callable[[int], None], always_split: list[int]) -> None:
    threads(count)
    layers = [layer for layer, _ in JOBS]
    expected = [oracle(layer) for layer in layers]
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(sweeps, layers * 3))
    for got, want in zip(results, expected * 3, strict=True):
        assert difference(got, want) < LIMIT[torch.float64]


def test_concurrent_modules_with_gradients() -> None:
    def train(seed: int) -> tuple[Tensor, ...]:
        cls = (rnnkern.LSTM, rnnkern.GRU, rnnkern.RNN)[seed % 3]
        generator = torch.Generator().manual_seed(seed)
        module = cls(3 + seed, 9, num_layers=2, bidirectional=True, dtype=torch.float64, backend="numba")
        for p in module.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3
        x = torch.randn(6, 4, 3 + seed, generator=generator, dtype=torch.float64)
        module(x, lengths=torch.tensor([6, 1, 3, 6]))[0].square().sum().backward()
        return tuple(p.grad for p in module.parameters() if p.grad is not None)

    alone = [train(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as executor:
        together = list(executor.map(train, range(6)))
    assert all(difference(a, b) < 1e-12 for a, b in zip(together, alone, strict=True))


def test_the_pool_may_grow_while_others_hand_it_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that a call has been given still takes its tasks when another call replaces it by a wider one."""

    class Slow(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.02)
            return super().submit(*args, **kwargs)

    pool._forget()
    monkeypatch.setattr(pool, "ThreadPoolExecutor", Slow)
    ended: list[int] = []
    with ThreadPoolExecutor(3) as executor:
        calls = [executor.submit(pool.run, [partial(ended.append, width)] * width) for width in (2, 3, 4)]
        for call in calls:
            call.result()
    assert sorted(ended) == [2] * 2 + [3] * 3 + [4] * 4
    pool._forget()


def test_an_error_in_a_task_is_raised_after_all_have_ended() -> None:
    ended: list[str] = []

    def fail() -> None:
        raise ValueError("broken")

    def late() -> None:
        time.sleep(0.1)
        ended.append("late")

    with pytest.raises(ValueError, match="broken"):
        pool.run([lambda: None, fail, late])
    assert ended == ["late"]


# Forks


def _errors(layers: list[Layer]) -> list[float]:
    torch.set_num_threads(1)  # as DataLoader's workers do: torch's own operations do not survive a fork on several
    return [difference(sweeps(layer), oracle(layer)) for layer in layers]


@FORKS
def test_a_forked_child_and_its_parent_afterwards(threads: Callable[[int], None], always_split: list[int]) -> None:
    threads(2)
    layers = [layer for layer, _ in JOBS[:6]]
    before = [sweeps(layer) for layer in layers]  # the team has its threads
    assert max(in_forked_child(_errors, layers)) < LIMIT[torch.float64]
    assert all(bitwise_equal(sweeps(layer), want) for layer, want in zip(layers, before, strict=True))


def _has_the_same_bits_on_threads_of_its_own(layer: Layer, want: Parts) -> bool:
    torch.set_num_threads(2)
    return bitwise_equal(sweeps(layer), want)


@FORKS
def test_a_forked_child_may_have_several_threads(threads: Callable[[int], None], always_split: list[int]) -> None:
    """Threads of its own: it would wait for ever for those of the team."""
    threads(2)
    layer = random_layer("lstm", **ODD)
    want = sweeps(layer)
    assert in_forked_child(_has_the_same_bits_on_threads_of_its_own, layer, want)


def _compile_in_child(layer: Layer, answers: Any) -> None:
    jit._compiled.clear()  # as if it had never run
    forget_plans()
    answers.put(_errors([layer]))


@FORKS
def test_a_child_forked_while_another_thread_compiles() -> None:
    """The child must not inherit a lock that none of its threads will ever release."""
    layer = random_layer("gru")
    sweeps(layer)

    def compile_slowly() -> None:
        with jit._compile_lock:
            time.sleep(0.5)

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_compile_in_child, args=(layer, answers))
    with ThreadPoolExecutor(1) as executor:
        compiling = executor.submit(compile_slowly)
        time.sleep(0.1)
        child.start()
        compiling.result()
    child.join(10)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs
    assert answers.get()[0] < LIMIT[torch.float64]


def _numbers_of_a_pool() -> list[int]:
    ended: list[int] = []
    pool.run([partial(ended.append, i) for i in range(3)])
    return sorted(ended)


@FORKS
def test_the_pool_is_made_anew_in_a_forked_child() -> None:
    pool.run([lambda: None] * 3)
    assert in_forked_child(_numbers_of_a_pool) == [0, 1, 2]


class Encoded(Dataset[Tensor]):
    """Samples that a frozen recurrent layer has encoded, with its gradient for one weight beside them."""

    def __init__(self) -> None:
        self.module = rnnkern.GRU(4, 7, bidirectional=True, dtype=torch.float64, backend="numba")
        self.weight = self.module.get_parameter("weight_hh_l0")
        self.samples = torch.randn(6, 5, 4, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        y, _ = self.module(self.samples[index])
        (gradient,) = torch.autograd.grad(y.sum(), self.weight)
        return torch.cat([y.detach().flatten(), gradient.flatten()])


@FORKS
def test_in_the_workers_of_a_data_loader() -> None:
    dataset = Encoded()
    expected = torch.stack([dataset[i] for i in range(len(dataset))])
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(dataset[0], expected[0])
