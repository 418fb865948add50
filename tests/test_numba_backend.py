"""The Numba backend as a whole: memory it may touch, threads, forks, and the same bits from run to run."""

import ctypes
import mmap
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rnnkern
from rnnkern import reference
from rnnkern.backends import Layer, numba_cpu
from rnnkern.backends.numba_cpu import pool
from rnnkern.cells import CELLS, Weights
from tests.numba_support import bitwise_equal, difference, layer_forms, random_gradients, random_layer

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = list(LIMIT)
# Sizes that leave rests everywhere: of a vector, of a panel, of a tile, of a share.
ODD: dict[str, Any] = {"steps": 4, "batch": 13, "inputs": 7, "hidden": 19}
# Python 3.12 warns of a fork in a process that has threads. That it works is what is shown here.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

Parts = tuple[Tensor | None, ...]


def sweeps(layer: Layer) -> Parts:
    """All that a forward and a backward sweep give."""
    states = numba_cpu.forward(layer, save=True)
    return (*states, *numba_cpu.backward(layer, states.saved, *random_gradients(states)))


def oracle(layer: Layer) -> Parts:
    states = reference.forward(layer, save=True)
    return (*states, *reference.backward(layer, states.saved, *random_gradients(states)))


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and sets it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def always_split(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Even the smallest call is shared among threads; the list holds how many tasks each had."""
    counts: list[int] = []
    run = pool.run

    def counted(tasks: Any) -> None:
        counts.append(len(tasks))
        run(tasks)

    monkeypatch.setattr(numba_cpu, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(pool, "run", counted)
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_form_of_call(cell: str, dtype: torch.dtype) -> None:
    wide = random_layer(cell, steps=3, batch=7, inputs=2, hidden=70, dtype=dtype)
    for layer in (*layer_forms(cell, dtype), random_layer(cell, **ODD, dtype=dtype), wide):
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[dtype]


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads(
    cell: str, threads: Callable[[int], None], always_split: list[int]
) -> None:
    for layer in (*layer_forms(cell), random_layer(cell, **ODD), random_layer(cell, **ODD, directions=1)):
        threads(1)
        first = sweeps(layer)
        assert bitwise_equal(sweeps(layer), first)
        for count in (2, 3, 5):
            threads(count)
            assert bitwise_equal(sweeps(layer), first)
    assert set(always_split) >= {2, 3, 4, 5}  # tasks: shares of the batch times directions


def test_a_row_does_not_see_its_neighbours() -> None:
    layer = random_layer("gru", **ODD)
    before = sweeps(layer)[0]
    layer.x[:, 5] = float("nan")
    after = sweeps(layer)[0]
    assert before is not None
    assert after is not None
    assert after[:, 5].isnan().all()
    others = [b for b in range(layer.x.shape[1]) if b != 5]
    assert torch.equal(after[:, others], before[:, others])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch(cell: str, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    y, h_n, _, *_ = sweeps(random_layer(cell, batch=0))
    assert y is not None
    assert y.shape == (5, 0, 10)
    assert h_n is not None
    assert h_n.shape == (2, 0, 5)


def test_an_empty_batch_has_gradients_of_zero() -> None:
    module = rnnkern.LSTM(3, 5, bidirectional=True, backend="numba")
    module(torch.randn(4, 0, 3))[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


# Memory


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_unwritten_is_read(cell: str, nan_buffers: None, always_split: list[int]) -> None:
    assert torch.zeros(1).new_empty(3).isnan().all()  # torch does fill what the backend allocates
    for layer in (*layer_forms(cell), random_layer(cell, **ODD)):
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_written_past_a_buffer(cell: str, monkeypatch: pytest.MonkeyPatch, always_split: list[int]) -> None:
    """Every buffer the backend asks for, results, packed weights and workspaces, lies between guards."""
    margin, guard = 64, -12345.0
    allocated: list[Tensor] = []
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def guarded(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        inside = new_empty(self, *shape, **options)
        around = new_empty(self, inside.numel() + 2 * margin).fill_(guard)
        allocated.append(around)
        return around[margin:-margin].view(inside.shape)

    forms = [*layer_forms(cell), random_layer(cell, **ODD)]
    wanted = [oracle(layer) for layer in forms]
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: guarded(tensor, tensor.shape))
    got = [sweeps(layer) for layer in forms]
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    assert all(difference(a, b) < LIMIT[torch.float64] for a, b in zip(got, wanted, strict=True))
    assert len(allocated) > 10 * len(forms)
    for around in allocated:
        assert (around[:margin] == guard).all()
        assert (around[around.numel() - margin :] == guard).all()


def _before_a_forbidden_page(tensor: Tensor) -> Tensor:
    """A copy whose last number is the last that may be touched: the page behind it is protected."""
    size = tensor.numel() * tensor.element_size()
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + usable), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=usable - size).view(tensor.shape)
    return copy.copy_(tensor)


def _sweep_before_forbidden_pages(layers: list[Layer], answers: Any) -> None:
    torch.set_num_threads(1)
    new_empty = torch.Tensor.new_empty

    def protected(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        return _before_a_forbidden_page(new_empty(self, *shape, **options))

    worst = 0.0
    for layer in layers:
        want = oracle(layer)
        weights = (Weights(*(None if w is None else _before_a_forbidden_page(w) for w in d)) for d in layer.weights)  # type: ignore[arg-type]
        guarded = replace(
            layer,
            x=_before_a_forbidden_page(layer.x),
            h0=_before_a_forbidden_page(layer.h0),
            c0=None if layer.c0 is None else _before_a_forbidden_page(layer.c0),
            weights=tuple(weights),
        )
        torch.Tensor.new_empty = protected  # type: ignore[method-assign, assignment]
        got = sweeps(guarded)
        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]
        worst = max(worst, difference(got, want))
    answers.put(worst)


@FORKS
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages by Linux's mprotect")
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_touched_past_a_buffer(cell: str, always_split: list[int]) -> None:
    """In a child, which a touch of a protected page kills: operands and buffers end where such a page begins."""
    layers = [*layer_forms(cell), random_layer(cell, **ODD)]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_sweep_before_forbidden_pages, args=(layers, answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0, f"ended with {child.exitcode}; -{signal.SIGSEGV.value} tells of a protected page"
    assert answers.get() < LIMIT[torch.float64]


def test_operands_may_lie_in_memory_in_any_way() -> None:
    """Rows and columns far apart, one row repeated, weights transposed and sliced: values count, strides do not."""
    plain = random_layer("gru", **ODD)
    spread = torch.full((8, 26, 21), float("nan"), dtype=torch.float64)
    x = spread[::2, ::2, ::3]
    x.copy_(plain.x)
    one_row = plain.h0[:, :1].expand_as(plain.h0)
    weights = tuple(
        w._replace(weight_hh=w.weight_hh.t().contiguous().t(), weight_ih=torch.cat([w.weight_ih] * 2, 1)[:, :7])
        for w in plain.weights
    )
    strided = Layer(plain.cell, x, one_row, None, weights, None, batch_major=False)
    contiguous = Layer(plain.cell, plain.x, one_row.contiguous(), None, plain.weights, None, batch_major=False)
    assert bitwise_equal(sweeps(strided), sweeps(contiguous))
    states = numba_cpu.forward(plain, save=True)
    one = torch.ones((), dtype=torch.float64)
    expanded = numba_cpu.backward(plain, states.saved, one.expand_as(states.y), one.expand_as(states.h_n), None)
    assert bitwise_equal(
        expanded, numba_cpu.backward(plain, states.saved, torch.ones_like(states.y), torch.ones_like(states.h_n), None)
    )


@pytest.mark.parametrize("hidden", [1, 5])
def test_a_lazily_negated_operand(hidden: int) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the number with the other sign."""
    layer = random_layer("rnn_tanh", inputs=hidden, hidden=hidden)
    x = torch.complex(layer.x, layer.x).conj().imag
    one = rnnkern.RNN(hidden, hidden, dtype=torch.float64, backend="numba")
    assert x.is_neg()
    assert torch.equal(one(x)[0], one(-layer.x)[0])


def test_a_batch_first_layer_writes_the_layout_it_reads() -> None:
    plain = random_layer("lstm", **ODD)
    x = plain.x.transpose(0, 1).contiguous().transpose(0, 1)
    turned = Layer(plain.cell, x, plain.h0, plain.c0, plain.weights, None, batch_major=True)
    got = sweeps(turned)
    assert bitwise_equal(got, sweeps(plain))
    assert got[0] is not None
    assert got[0].transpose(0, 1).is_contiguous()


# Threads

JOBS = [
    *((random_layer(cell, **ODD, seed=i), i) for i, cell in enumerate(CELLS)),
    *((form, 100) for cell in CELLS for form in layer_forms(cell)),
    *(
        (random_layer(cell, steps=6, batch=32, inputs=16, hidden=33, directions=1, seed=i), i)
        for i, cell in enumerate(CELLS)
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


def _in_child(layers: list[Layer], answers: Any) -> None:
    torch.set_num_threads(1)  # as DataLoader's workers do: torch's own OpenMP pool does not survive a fork
    answers.put([difference(sweeps(layer), oracle(layer)) for layer in layers])


@FORKS
def test_a_forked_child_and_its_parent_afterwards(threads: Callable[[int], None], always_split: list[int]) -> None:
    threads(2)
    layers = [layer for layer, _ in JOBS[:6]]
    before = [sweeps(layer) for layer in layers]  # the pool has its threads
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(layers, answers))
    child.start()
    errors = answers.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert max(errors) < LIMIT[torch.float64]
    assert all(bitwise_equal(sweeps(layer), want) for layer, want in zip(layers, before, strict=True))


def _compile_in_child(layer: Layer, answers: Any) -> None:
    numba_cpu._compiled.clear()  # as if it had never run
    _in_child([layer], answers)


@FORKS
def test_a_child_forked_while_another_thread_compiles() -> None:
    """The child must not inherit a lock that none of its threads will ever release."""
    layer = random_layer("gru")
    sweeps(layer)

    def compile_slowly() -> None:
        with numba_cpu._compile_lock:
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


def _pool_in_child(answers: Any) -> None:
    ended: list[int] = []
    pool.run([partial(ended.append, i) for i in range(3)])
    answers.put(sorted(ended))


@FORKS
def test_the_pool_is_made_anew_in_a_forked_child() -> None:
    pool.run([lambda: None] * 3)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_pool_in_child, args=(answers,))
    child.start()
    assert answers.get(timeout=60) == [0, 1, 2]
    child.join(60)
    assert child.exitcode == 0


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
