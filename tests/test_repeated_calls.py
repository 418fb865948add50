"""Calls made again and again, which then go by a plan: the results of the first, whatever has changed in between."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern import shortcut
from rnnkern.cells import TORCH_CELLS
from tests.numba_support import bitwise_equal, forget_plans
from tests.option_modules import flat
from tests.tables import Case, cases, cell_class, layer_class, nonlinearity, relative_rms

pytestmark = pytest.mark.usefixtures("each_way")
every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)


def layer(cell: str, **options: Any) -> Any:
    options = {"dtype": torch.float64, **nonlinearity(cell), **options}
    return layer_class(rnnkern, cell)(3, 7, **options)


def train(module: nn.Module, *arguments: Any) -> list[Tensor]:
    """Results and the gradients of parameters."""
    results = flat(module(*arguments))
    total = torch.stack([(r * torch.arange(1, r.numel() + 1).view(r.shape)).sum() for r in results]).sum()
    return [*(r.detach() for r in results), *torch.autograd.grad(total, list(module.parameters()))]


def infer(module: nn.Module, *arguments: Any) -> list[Tensor]:
    with torch.no_grad():
        return flat(module(*arguments))


def anew(call: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """What a call gives that no other came before."""
    forget_plans()
    found = call(*arguments)
    forget_plans()
    return found


def steps(case: Case) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Inputs of the same form with other numbers in other memory."""
    for factor in (1.0, -0.5, 2.0, 0.25):
        x, states = case.inputs()
        yield (x.detach() * factor).requires_grad_(), tuple((s.detach() * factor).requires_grad_() for s in states)


def check_repeated(case: Case) -> None:
    """Results and every gradient of four calls, and of four in inference, against each call by itself."""
    module = case.module()

    def graded(x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
        results = list(case.call(module, x, states)[1].values())
        leaves = [x, *(states if case.hx else ()), *module.parameters()]
        cotangents = [torch.linspace(-1, 1, r.numel()).to(r.dtype).view(r.shape) for r in results]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, cotangents)]

    def inference(x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            return list(case.call(module, x, states)[1].values())

    for call in (graded, inference):
        alone = [anew(call, x, states) for x, states in steps(case)]
        for (x, states), expected in zip(steps(case), alone, strict=True):
            assert bitwise_equal(call(x, states), expected)
    planned = any(shortcut._plans.values())
    quick = case.dtype in (torch.float32, torch.float64) and case.rows in ("padded", "unbatched")
    assert planned == (quick and case.backend == "numba")


SOME, ALL = dict(cases(1)), dict(cases())
NAMES = [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL if name not in SOME)]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_by_a_plan(name: str) -> None:
    check_repeated(ALL[name])


@every_cell
@pytest.mark.parametrize("count", [1, 2])
def test_everything_at_once(cell: str, count: int, threads: Callable[[int], None], always_split: list[int]) -> None:
    threads(count)
    check_repeated(Case(cell, layers=3, bidirectional=True, batch_first=True, hx=True, B=9))


# Weights


def halve(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.5)


def add_past_the_version(module: nn.Module) -> None:
    for p in module.parameters():
        p.data.add_(0.25)


def through_numpy(module: nn.Module) -> None:
    for p in module.parameters():
        p.detach().numpy()[:] *= -1


def load(module: nn.Module) -> None:
    module.load_state_dict({name: torch.full_like(p, 0.1) for name, p in module.named_parameters()})


def assign(module: nn.Module) -> None:
    module.load_state_dict({name: torch.full_like(p, 0.1) for name, p in module.named_parameters()}, assign=True)


def descend(module: nn.Module) -> None:
    torch.optim.Adam(module.parameters(), lr=0.1).step()


def other_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data.roll(1, 0)


def turned_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data.roll(1, 0).t().contiguous().t() if p.dim() == 2 else p.data * 2


def strided_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = torch.stack([p.data, p.data * 0.5], -1)[..., 1]


def other_parameters(module: nn.Module) -> None:
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(p.detach() * -1))


def as_a_vector(module: nn.Module) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(module.parameters()) * 0.3, module.parameters())


CHANGES = (
    halve, add_past_the_version, through_numpy, load, assign, descend, other_data, turned_data, strided_data,
    other_parameters, as_a_vector,
)  # fmt: skip


@every_cell
@pytest.mark.parametrize("kind", ["layer", "stack", "step"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_new_weights_are_always_seen(cell: str, kind: str, change: Callable[[nn.Module], None]) -> None:
    """In training and in inference, by a plan or not, of sizes with weights packed and in place."""
    for size in (2, 30):
        if kind == "step":
            module, shape = cell_class(rnnkern, cell)(3, 7, dtype=torch.float64, **nonlinearity(cell)), (size, 3)
        else:
            stacked = {"num_layers": 2, "bidirectional": True} if kind == "stack" else {}
            module, shape = layer(cell, **stacked), (2, size, 3)  # type: ignore[assignment]
        x = torch.randn(shape, dtype=torch.float64)
        for _ in range(4):
            before = train(module, x), infer(module, x)
        train(module, x)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        change(module)
        after = train(module, x), infer(module, x)
        twin = copy.deepcopy(module)
        expected = anew(train, twin, x), anew(infer, twin, x)
        for own, other, old in zip(after, expected, before, strict=True):
            assert bitwise_equal(own, other)
            assert relative_rms(own[0], old[0]) > 1e-3


def test_other_weights_for_one_call() -> None:
    module, x = layer("lstm"), torch.randn(4, 2, 3, dtype=torch.float64)
    expected = [infer(module, x) for _ in range(4)][-1]
    others = {name: p.detach() * 0.5 for name, p in module.named_parameters()}
    with torch.no_grad():
        found = flat(torch.func.functional_call(module, others, (x,)))
    assert bitwise_equal(infer(module, x), expected)
    halve(module)
    assert bitwise_equal(found, anew(infer, module, x))


def test_a_change_while_the_graph_waits_is_noticed() -> None:
    """As torch.nn does: weights that backward reads must be those of forward."""
    module = layer("gru")
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(4):
        y, _ = module(x)
        halve(module)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@every_cell
def test_more_or_fewer_frozen_weights(cell: str) -> None:
    module = layer(cell, bidirectional=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    everything = dict(
        zip(dict(module.named_parameters()), train(module, x)[-len(list(module.parameters())) :], strict=True)
    )
    for frozen in (*everything, *everything):
        for name, p in module.named_parameters():
            p.requires_grad_(name != frozen)
            p.grad = None
        for _ in range(3):
            module.zero_grad()
            results = flat(module(x))
            torch.stack([(r * torch.arange(1, r.numel() + 1).view(r.shape)).sum() for r in results]).sum().backward()
        for name, p in module.named_parameters():
            assert (p.grad is None) == (name == frozen)
            assert p.grad is None or torch.equal(p.grad, everything[name])


# What changes around a call


@every_cell
def test_one_kind_of_call_after_another(cell: str) -> None:
    """Sizes, layouts, dtypes, states, grad modes and threads in turn, through one module: each as by itself."""
    module, single = layer(cell, bidirectional=True), layer(cell, bidirectional=True, dtype=torch.float32)
    state = torch.randn(2, 4, 7, dtype=torch.float64)
    hx = (state, state * 2) if TORCH_CELLS[cell].has_c else state
    base = torch.randn(6, 4, 6, dtype=torch.float64)
    calls: list[Callable[[], list[Tensor]]] = [
        lambda: train(module, base[..., :3]),
        lambda: train(module, base[..., ::2]),
        lambda: train(module, base[:5, :, :3].contiguous()),
        lambda: train(module, base[:, :3, :3]),
        lambda: train(module, base[:, 0, :3]),
        lambda: train(module, base[..., :3], hx),
        lambda: infer(module, base[..., :3], hx),
        lambda: infer(module, base[..., :3]),
        lambda: train(single, base[..., :3].float()),
        lambda: infer(single, base[..., :3].float()),
        lambda: infer(module, base.transpose(0, 1)[..., 3:]),
        lambda: infer(module, base[::2, :, :3]),
        lambda: infer(module, base[..., :3].flip(0)),
        lambda: infer(module, base[..., :1].expand(6, 4, 3)),
    ]
    alone = [anew(call) for call in calls]
    for _ in range(4):
        for call, expected in zip(calls, alone, strict=True):
            assert bitwise_equal(call(), expected)
    with torch.inference_mode():
        for _ in range(4):
            assert torch.equal(module(base[..., :3])[0], alone[7][0])
    for call, expected in zip(calls, alone, strict=True):
        assert bitwise_equal(call(), expected)


def test_results_are_memory_of_their_own() -> None:
    """Of each call, and not that of its inputs or of what a plan keeps."""
    module, x = layer("lstm"), torch.randn(4, 2, 3, dtype=torch.float64)
    results = [t for _ in range(5) for t in (*infer(module, x), *flat(module(x)))]
    assert len({t.untyped_storage().data_ptr() for t in (*results, x, *module.parameters())}) == len(results) + 5
    expected = infer(module, x)
    for t in results:
        t.detach().fill_(torch.nan)
    assert bitwise_equal(infer(module, x), expected)


def test_several_graphs_at_a_time() -> None:
    """Calls of one form, all forward before any backward, and backward in another order."""
    module = layer("gru", num_layers=2)
    xs = [torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    alone = [anew(train, module, x) for x in xs]
    graphs = [flat(module(x)) for x in xs]
    for index in (3, 0, 4, 2, 1):
        total = sum((r * torch.arange(1, r.numel() + 1).view(r.shape)).sum() for r in graphs[index])
        found = torch.autograd.grad(total, list(module.parameters()))  # type: ignore[arg-type]
        assert bitwise_equal(found, alone[index][len(graphs[index]) :])


def test_several_threads_at_a_time() -> None:
    """One module and one plan, results and gradients."""
    module = layer("lstm", bidirectional=True)
    xs = [torch.randn(6, 4, 3, dtype=torch.float64) for _ in range(6)]
    for x in xs[:3]:
        train(module, x)
        infer(module, x)
    alone = [(train(module, x), infer(module, x)) for x in xs]
    with ThreadPoolExecutor(8) as executor:
        for _ in range(20):
            for found, expected in zip(
                executor.map(lambda x: (train(module, x), infer(module, x)), xs), alone, strict=True
            ):
                assert all(bitwise_equal(own, other) for own, other in zip(found, expected, strict=True))


class Tagged(Tensor):
    """A tensor of another type."""


def disturbances(module: nn.Module, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that something watches or changes, with what they give of y."""
    yield "vmap", lambda: torch.func.vmap(lambda v: module(v)[0])(torch.stack([x, x]))[1]
    yield "functional_call", lambda: torch.func.functional_call(module, dict(module.named_parameters()), (x,))[0]
    yield "checkpoint", lambda: checkpoint(module, x, use_reentrant=False)[0]
    yield "subclass", lambda: module(x.as_subclass(Tagged))[0].as_subclass(Tensor)
    yield "jit.trace", lambda: torch.jit.trace(module, (x,), check_trace=False)(x)[0]
    yield "make_fx", lambda: make_fx(lambda v: module(v)[0])(x)(x)
    yield "compile", lambda: torch.compile(module, backend="aot_eager")(x)[0]
    yield "parameter as input", lambda: module(nn.Parameter(x))[0]


@every_cell
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")
@pytest.mark.parametrize("graded", [False, True])
def test_something_else_at_work(cell: str, graded: bool) -> None:
    """After calls that left a plan."""
    module, x = layer(cell), torch.randn(4, 2, 3, dtype=torch.float64)
    module.requires_grad_(graded)
    expected = [module(x)[0].detach() for _ in range(4)][-1]
    for name, call in disturbances(module, x):
        torch._dynamo.reset()
        for _ in range(2):
            assert torch.equal(call().detach(), expected), name
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(torch.empty(4, 2, 3, dtype=torch.float64))[0].shape == expected.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(cell, dtype=torch.float32)(x.float())[0].dtype == torch.bfloat16
    assert torch.equal(module(x)[0], expected)


def turned(t: Tensor) -> Tensor:
    """The same numbers in another layout."""
    return t.detach().movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)


def in_one_block(t: Tensor) -> Tensor:
    return t.detach().contiguous()


@every_cell
@pytest.mark.parametrize("kind", ["layer", "stack", "step"])
@pytest.mark.parametrize("way", [turned, in_one_block])
def test_saved_tensors_that_hooks_change(cell: str, kind: str, way: Callable[[Tensor], Tensor]) -> None:
    """What backward is given has the numbers of what was saved, not its layout."""
    if kind == "step":
        module, x = cell_class(rnnkern, cell)(3, 7, dtype=torch.float64, **nonlinearity(cell)), random_rows(6)
    else:
        stacked = {"num_layers": 2, "bidirectional": True, "batch_first": True} if kind == "stack" else {}
        module, x = layer(cell, **stacked), random_rows(4, 5)
    assert not x.is_contiguous()
    expected = anew(train, module, x)
    for index in range(4):
        with torch.autograd.graph.saved_tensors_hooks(way, way):
            found = train(module, x)
        errors = [relative_rms(own, other) for own, other in zip(found, expected, strict=True)]
        assert max(errors) < 1e-12, f"call {index}"


def random_rows(*shape: int) -> Tensor:
    """(*shape, 3) with gaps between its rows."""
    return torch.randn(*shape, 6, dtype=torch.float64)[..., 2:5]


@every_cell
@pytest.mark.parametrize(
    "negated", [torch._neg_view, lambda g: torch.complex(g, -g).conj().imag], ids=["whole", "apart"]
)
def test_lazily_negated_gradients(cell: str, negated: Callable[[Tensor], Tensor]) -> None:
    """Views whose memory holds the number with the other sign, in one block or not."""
    module, x = layer(cell), torch.randn(4, 2, 3, dtype=torch.float64)
    for index in range(4):
        results = flat(module(x))
        cotangents = [negated(torch.randn_like(r)) for r in results]
        assert all(g.is_neg() for g in cotangents)
        found, expected = (
            torch.autograd.grad(results, list(module.parameters()), given, retain_graph=True)
            for given in (cotangents, [g.resolve_neg() for g in cotangents])
        )
        assert bitwise_equal(found, expected), f"call {index}"


def test_gradients_of_some_results_alone() -> None:
    """Others are None, or zeros of no memory."""
    module, x = layer("lstm"), torch.randn(4, 2, 3, dtype=torch.float64)

    def gradients(pick: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(pick(flat(module(x))), list(module.parameters())))

    picks: list[Callable[[list[Tensor]], Tensor]] = [
        lambda r: r[0].sum(),
        lambda r: r[1].sum(),
        lambda r: r[2].square().sum(),
        lambda r: r[0][1, 1].sum(),
        lambda r: (r[1] * r[2]).sum(),
        lambda r: (
            r[0].transpose(0, 1).mul(torch.randn(2, 4, 7, dtype=torch.float64, generator=torch.manual_seed(1))).sum()
        ),
    ]
    alone = [anew(gradients, pick) for pick in picks]
    for _ in range(4):
        for pick, expected in zip(picks, alone, strict=True):
            assert bitwise_equal(gradients(pick), expected)
