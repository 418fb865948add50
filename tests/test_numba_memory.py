"""What memory the Numba backend reads and writes: nothing that is not its own, and operands wherever they lie."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.backends import Cotangents, Layer, numba_cpu
from rnnkern.backends.numba_cpu import plans
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES
from rnnkern.cells import CELLS, TORCH_CELLS, Weights
from tests.numba_support import (
    FORKS,
    LIMIT,
    ODD,
    Guards,
    all_needs,
    before_a_forbidden_page,
    bitwise_equal,
    difference,
    every_buffer,
    layer_forms,
    oracle,
    plan_constants,
    random_layer,
    sweeps,
)
from tests.option_layers import FULL
from tests.tables import layer_class, nonlinearity

# Few sequences at a time and few steps, so that every buffer of a block or chunk is filled to its end, and used again.
SMALL = {"MOST_SEQUENCES": 4, "CHUNK_ROWS": 9, "BACKWARD_CHUNK_ROWS": 10}


def forms(cell: str) -> list[Layer]:
    return [*layer_forms(cell), random_layer(cell, **ODD), *(c.layer() for c in FULL.values() if c.cell == cell)]


def train_thrice(cell: str, **options: Any) -> list[Tensor]:
    """Results and gradients of a module's third call, for which there is a plan, and of a third one in inference."""
    torch.manual_seed(5)
    module = layer_class(rnnkern, cell)(3, 5, dtype=torch.float64, **nonlinearity(cell), **options)
    x = torch.randn(4, 9, 3, dtype=torch.float64)
    for _ in range(3):
        module.zero_grad()
        y, _ = module(x)
        y.square().sum().backward()
        with torch.no_grad():
            inference = module(x)[0]
    return [y.detach(), inference, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_unwritten_is_read(cell: str, nan_buffers: None, always_split: list[int]) -> None:
    assert torch.zeros(1).new_empty(3).isnan().all()  # torch does fill what the backend allocates
    for layer in forms(cell):
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]
        with plan_constants(**SMALL):
            assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_written_past_a_buffer(cell: str, always_split: list[int]) -> None:
    """Every buffer the backend asks for, results and workspaces, lies between guards."""
    wanted = [oracle(layer) for layer in forms(cell)]
    modules = train_thrice(cell)
    with Guards() as guards:
        got = [sweeps(layer) for layer in forms(cell)]
        guarded_modules = train_thrice(cell)
    assert all(difference(a, b) < LIMIT[torch.float64] for a, b in zip(got, wanted, strict=True))
    assert difference(guarded_modules, modules) < LIMIT[torch.float64]
    assert len(guards.allocated) > 10 * len(wanted)
    assert guards.whole()


class _GuardedSpace(plans.Space):
    """Leaves a gap behind each buffer of a workspace, and remembers where."""

    made: list["_GuardedSpace"] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[int] = []
        self.made.append(self)

    def take(self, rows: int, row_bytes: int) -> int:
        offset: int = super().take(rows, row_bytes)
        self.gaps.append(super().take(1, VECTOR_BYTES))
        return offset


def _gaps(plan: Any, spaces: list[_GuardedSpace]) -> Iterator[int]:
    """Offsets of all gaps in the workspace of a plan."""
    whole, *of_directions = spaces
    yield from whole.gaps
    names = plans.POSITIONS[plan.operands]
    for (operands, addresses), space in zip(plan.directions, of_directions, strict=True):
        first = next(at.offset for at in addresses if at.position == names["workspace"])
        for share in range(plan.parts):
            for gap in space.gaps:
                yield first + share * operands[names["workspace_bytes"]] + gap


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_written_past_a_part_of_a_workspace(
    cell: str, threads: Callable[[int], None], always_split: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(4)
    pattern = 0x7FF8DEADBEEF0001  # a NaN
    checked: list[int] = []
    launch = plans.Plan.launch

    def watched(plan: Any, kernel: Any, pack: Any) -> Any:
        return partial(run, plan, launch(plan, kernel, pack))

    def run(plan: Any, launched: Any, addresses: Any, alive: Any) -> None:
        workspace = alive[0].view(torch.int64).fill_(pattern)
        launched(addresses, alive)
        index = _GuardedSpace.made.index(plan.space)
        spaces = _GuardedSpace.made[index : index + 1 + len(plan.directions)]
        for gap in _gaps(plan, spaces):
            assert (workspace[gap // 8 : (gap + VECTOR_BYTES) // 8] == pattern).all()
            checked.append(gap)

    monkeypatch.setattr(plans, "Space", _GuardedSpace)
    monkeypatch.setattr(plans.Plan, "launch", watched)
    for layer in forms(cell):
        for constants in ({}, SMALL):
            with plan_constants(**constants):
                assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]
    _GuardedSpace.made.clear()
    assert len(checked) > 400


def protected(tensor: Tensor) -> Tensor:
    """A copy that ends where a forbidden page begins."""
    if not tensor.numel():
        return tensor
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory, offset = before_a_forbidden_page(span * tensor.element_size())
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=offset)
    return flat.as_strided(tensor.shape, tensor.stride(), 0).copy_(tensor)


def _protected(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else protected(tensor)


def _sweep_before_forbidden_pages(layers: list[Layer], cell: str, answers: Any) -> None:
    torch.set_num_threads(1)
    worst = 0.0
    for layer in layers:
        guarded = layer._replace(
            x=protected(layer.x),
            h0=protected(layer.h0),
            c0=_protected(layer.c0),
            weights=tuple(Weights(*(_protected(w) for w in d)) for d in layer.weights),  # type: ignore[arg-type]
            batch_sizes=_protected(layer.batch_sizes),
            order=_protected(layer.order),
        )
        want = oracle(layer)
        for constants in ({}, SMALL):
            with plan_constants(**constants), every_buffer(protected):
                got = sweeps(guarded)
            worst = max(worst, difference(got, want))
    modules = train_thrice(cell)
    with every_buffer(protected):
        worst = max(worst, difference(train_thrice(cell), modules))
    answers.put(worst)


@FORKS
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages by Linux's mprotect")
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_nothing_is_touched_past_a_buffer(cell: str, always_split: list[int]) -> None:
    """In a child, which a touch of a protected page kills: operands and buffers end where such a page begins."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_sweep_before_forbidden_pages, args=(forms(cell), cell, answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0, f"ended with {child.exitcode}; -{signal.SIGSEGV.value} tells of a protected page"
    assert answers.get() < LIMIT[torch.float64]


# Operands in any layout

# Each takes a matrix to one of another layout in memory and the same values.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.t().contiguous().t(),
    "rows apart": lambda w: torch.cat([w, w.new_full((w.shape[0], 3), torch.nan)], 1)[:, : w.shape[1]],
    "every other row": lambda w: torch.stack([w, torch.full_like(w, torch.nan)], 1)[:, 0],
    "columns apart": lambda w: torch.stack([w, torch.full_like(w, torch.nan)], 2)[..., 0],
    "in the middle": lambda w: torch.nn.functional.pad(w, (1, 2, 3, 1), value=torch.nan)[3:-1, 1:-2],
    "negated": lambda w: torch.complex(w, -w).conj().imag,
}


def view_of(w: Tensor | None, view: str) -> Tensor | None:
    if w is None or w.dim() == 2:
        return None if w is None else VIEWS[view](w)
    return VIEWS[view](w.unsqueeze(0)).squeeze(0) if view in ("columns apart", "in the middle", "negated") else w


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_weights_that_are_views(cell: str, view: str) -> None:
    for layer in forms(cell):
        weights = tuple(Weights(*(view_of(w, view) for w in d)) for d in layer.weights)  # type: ignore[arg-type]
        assert (view == "negated") == weights[0].weight_hh.is_neg()
        assert bitwise_equal(sweeps(layer._replace(weights=weights)), sweeps(layer))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_parameters_that_are_views(cell: str, view: str) -> None:
    """Of a module, whose later calls go by a plan: the same bits at each call, and those of plain weights."""
    torch.manual_seed(3)
    module = layer_class(rnnkern, cell)(3, 5, dtype=torch.float64, **nonlinearity(cell))
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    function = getattr(rnnkern.functional, cell.partition("_")[0])
    flat = [[w.detach() for w in weights] for weights in module.all_weights]
    expected = module(x)[0]
    gradients = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    for _ in range(4):
        views = [[view_of(w, view).requires_grad_() for w in weights] for weights in flat]  # type: ignore[union-attr]
        y = function(x, None, views, **nonlinearity(cell))[0]
        assert torch.equal(y, expected)
        found = torch.autograd.grad(y.square().sum(), [w for weights in views for w in weights])
        assert bitwise_equal(found, gradients)
        with torch.no_grad():
            assert torch.equal(function(x, None, views, **nonlinearity(cell))[0], expected)


def test_operands_may_lie_in_memory_in_any_way() -> None:
    """Rows and columns far apart, one row repeated: values count, strides do not."""
    plain = random_layer("gru", **ODD)
    spread = torch.full((8, 26, 21), float("nan"), dtype=torch.float64)
    x = spread[::2, ::2, ::3]
    x.copy_(plain.x)
    one_row = plain.h0[:, :1].expand_as(plain.h0)
    strided, contiguous = plain._replace(x=x, h0=one_row), plain._replace(h0=one_row.contiguous())
    assert bitwise_equal(sweeps(strided), sweeps(contiguous))
    states = numba_cpu.forward(plain, save=True)
    one, needs = torch.ones((), dtype=torch.float64), all_needs(plain)
    expanded = numba_cpu.backward(
        plain, states.saved, Cotangents(one.expand_as(states.y), one.expand_as(states.h_n)), needs
    )
    ones = numba_cpu.backward(
        plain, states.saved, Cotangents(torch.ones_like(states.y), torch.ones_like(states.h_n)), needs
    )
    assert bitwise_equal(expanded, ones)


@pytest.mark.parametrize("hidden", [1, 5])
def test_a_lazily_negated_operand(hidden: int) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the number with the other sign."""
    layer = random_layer("rnn_tanh", inputs=hidden, hidden=hidden)
    x = torch.complex(layer.x, layer.x).conj().imag
    one = rnnkern.RNN(hidden, hidden, dtype=torch.float64, backend="numba")
    assert x.is_neg()
    for _ in range(4):
        assert torch.equal(one(x)[0], one(-layer.x)[0])
        with torch.no_grad():
            assert torch.equal(one(x)[0], one(-layer.x)[0])


def test_lazily_negated_gradients() -> None:
    layer = random_layer("lstm", **ODD)
    states = numba_cpu.forward(layer, save=True)
    grads = (states.y, states.h_n, states.c_n)
    dy, dh_n, dc_n = (torch.complex(g, g).conj().imag for g in grads if g is not None)
    assert all(g.is_neg() for g in (dy, dh_n, dc_n))
    found = numba_cpu.backward(layer, states.saved, Cotangents(dy, dh_n, dc_n), all_needs(layer))
    dy, dh_n, dc_n = (g.resolve_neg() for g in (dy, dh_n, dc_n))
    expected = numba_cpu.backward(layer, states.saved, Cotangents(dy, dh_n, dc_n), all_needs(layer))
    assert bitwise_equal(found, expected)


def test_a_batch_first_layer_writes_the_layout_it_reads() -> None:
    plain = random_layer("lstm", **ODD)
    x = plain.x.transpose(0, 1).contiguous().transpose(0, 1)
    got = sweeps(plain._replace(x=x, batch_major=True))
    assert bitwise_equal(got, sweeps(plain))
    for part in (got[0], got[5]):  # y and dx
        assert part is not None
        assert part.transpose(0, 1).is_contiguous()
