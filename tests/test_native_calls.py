"""Planned calls in C++ (csrc/calls): the same bits as in Python, on threads and in forks too; what they leave to
Python; what is said where the extension cannot be used. That they are right is for the tests of plans, which run both.
"""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import native, planned, shortcut
from rnnkern.backends.numba_cpu import ahead, team
from rnnkern.cells import TORCH_CELLS
from tests.numba_support import FORKS, bitwise_equal, forget_plans, in_forked_child, plan_constants
from tests.option_modules import flat
from tests.tables import cell_class, layer_class, nonlinearity

pytestmark = pytest.mark.skipif(native.calls is None, reason=f"calls run in Python: {native.obstacle()}")

every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)
# Calls of any size on several threads, sums over shares among them; and on threads that go together.
DIVIDED = {"WORTH_A_THREAD": 1, "LEAST_SEQUENCES": 1, "ROWS_WORTH_A_SUM": 1}
TOGETHER = {"WORTH_A_THREAD": 1, "WORTH_A_BARRIER": 0}
Call = Callable[[], list[Tensor]]


def training(module: torch.nn.Module, *arguments: Any) -> Call:
    """Results and gradients of weights and inputs."""
    leaves = [*module.parameters(), *(t.requires_grad_() for t in flat(arguments))]

    def call() -> list[Tensor]:
        results = flat(module(*arguments))
        cotangents = [torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, cotangents)]

    return call


def inference(module: torch.nn.Module, *arguments: Any) -> Call:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return flat(module(*arguments))

    return call


def by_a_plan(call: Call, monkeypatch: pytest.MonkeyPatch | None = None) -> list[Tensor]:
    """What the fourth of equal calls gives, whose gradients are planned too; in Python with a monkeypatch."""
    forget_plans()
    if monkeypatch is None:
        return [call() for _ in range(4)][3]
    with monkeypatch.context() as patch:
        patch.setattr(native, "calls", None)
        found = [call() for _ in range(4)][3]
    forget_plans()
    return found


def calls_of(cell: str, batch: int = 5, hidden: int = 7, **options: Any) -> list[Call]:
    """Of a layer and of a step."""
    arguments: dict[str, Any] = {"dtype": torch.float64, **nonlinearity(cell)}
    layer = layer_class(rnnkern, cell)(3, hidden, **arguments, **options)
    step = cell_class(rnnkern, cell)(3, hidden, **arguments)
    x = torch.randn(4, batch, 3, dtype=torch.float64)
    return [make(module, t.clone()) for module, t in ((layer, x), (step, x[0])) for make in (inference, training)]


@every_cell
@pytest.mark.parametrize("count", [1, 3])
def test_the_same_bits_as_in_python(
    cell: str, count: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(count)
    with plan_constants(**DIVIDED):
        for call in calls_of(cell, num_layers=2, bidirectional=True) + calls_of(cell, batch_first=True):
            assert bitwise_equal(by_a_plan(call), by_a_plan(call, monkeypatch))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_on_threads_that_go_together(
    cell: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    with plan_constants(**TOGETHER):
        for call in calls_of(cell, batch=1, hidden=80):
            found = by_a_plan(call)
            assert bitwise_equal(found, by_a_plan(call, monkeypatch))
            monkeypatch.setattr(team, "ENTRY", 0)  # no team: threads of its own
            assert bitwise_equal(found, by_a_plan(call))
            monkeypatch.undo()


def test_without_torchs_threads(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    threads(3)
    with plan_constants(**DIVIDED):
        calls = calls_of("gru", bidirectional=True)
        by_the_team = [by_a_plan(call) for call in calls]
        monkeypatch.setattr(team, "ENTRY", 0)
        assert all(bitwise_equal(by_a_plan(call), want) for call, want in zip(calls, by_the_team, strict=True))


def _agree(calls: list[Call], wanted: list[list[Tensor]]) -> bool:
    return all(bitwise_equal(call(), want) for call, want in zip(calls, wanted, strict=True))


@FORKS
@pytest.mark.parametrize("constants", [DIVIDED, TOGETHER], ids=["divided", "together"])
def test_in_a_forked_child(constants: dict[str, int], threads: Callable[[int], None]) -> None:
    """With the plans of its parent, whose team it would wait for."""
    threads(2)
    with plan_constants(**constants):
        calls = calls_of("lstm", batch=1 if constants is TOGETHER else 5, hidden=80)[::2]
        layer = torch.nn.Sequential(rnnkern.GRU(3, 80))
        x = torch.randn(4, 3, 3)
        calls.append(lambda: flat(layer(x)))  # with gradients, which torch computes on no thread but this one
        wanted = [by_a_plan(call) for call in calls]
        for call in calls:  # by_a_plan has forgotten the plans of those before
            for _ in range(3):
                call()
        assert in_forked_child(_agree, calls, wanted)
        assert _agree(calls, wanted)


def test_large_workspaces_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LEAST_BYTES", 1)
    layer = rnnkern.LSTM(40, 400, dtype=torch.float64)
    call = training(layer, torch.randn(30, 40, 40, dtype=torch.float64))
    assert bitwise_equal(by_a_plan(call), by_a_plan(call, monkeypatch))


# What is left to Python


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one with each backward that goes the ordinary way."""
    seen: list[bool] = []
    ordinary = planned._again

    def watched(*arguments: Any) -> list[Tensor | None]:
        seen.append(True)
        return ordinary(*arguments)

    monkeypatch.setattr(planned, "_again", watched)
    return seen


def trained(layer: torch.nn.Module, x: Tensor, times: int = 4) -> Tensor:
    for _ in range(times):
        y: Tensor = layer(x)[0]
        y.sum().backward()
    return y


def test_plain_backward_stays_in_cpp(again: list[bool]) -> None:
    layer, x = rnnkern.GRU(3, 5), torch.randn(4, 2, 3)
    y = trained(layer, x)
    assert type(y.grad_fn).__name__ == "CppFunction"
    assert not again
    (dx,) = torch.autograd.grad(layer(x.requires_grad_())[0].square().sum(), x)
    assert dx.shape == x.shape
    assert not again


def test_a_graph_of_the_gradients(again: list[bool]) -> None:
    layer, x = rnnkern.GRU(3, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    trained(layer, x)
    x.requires_grad_()
    trained(layer, x)
    y = layer(x)[0]
    assert type(y.grad_fn).__name__ == "CppFunction"
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    found = torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()])
    assert len(again) == 1
    judge = rnnkern.to_torch(layer)
    (dx,) = torch.autograd.grad(judge(x)[0].square().sum(), x, create_graph=True)
    wanted = torch.autograd.grad(dx.square().sum(), [x, *judge.parameters()])
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_weights_with_other_data_at_backward(again: list[bool]) -> None:
    """Of another layout, or another dtype: the plan's addresses would not fit."""
    layer, x = rnnkern.RNN(5, 5, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    trained(layer, x)
    y = layer(x)[0]
    weight = layer.get_parameter("weight_hh_l0")
    weight.data = weight.data.t().contiguous().t()
    layer.zero_grad()
    y.sum().backward()
    assert len(again) == 1
    judge = rnnkern.to_torch(layer)
    judge(x)[0].sum().backward()
    for got, want in zip(layer.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks for it itself
@pytest.mark.parametrize("public", [False, True])
def test_compiled_autograd(public: bool) -> None:
    layer, x = rnnkern.GRU(3, 5), torch.randn(4, 2, 3)
    trained(layer, x)
    wanted = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    trained(layer, x, 3)
    y = layer(x)[0].sum()
    if public:
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss: loss.backward(), backend="eager")(y)
    else:
        with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
            y.backward()
    assert bitwise_equal([p.grad for p in layer.parameters()], wanted)


def test_a_call_that_autograd_refuses_is_no_model_for_others(again: list[bool]) -> None:
    """The first with a plan, of a tensor of inference mode, which is kept for no backward."""
    layer, x = rnnkern.GRU(3, 5), torch.randn(4, 2, 3)
    with torch.inference_mode():
        from_inference = x.clone()
    trained(layer, x, 2)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(from_inference)
    trained(layer, x)
    assert not again


def test_an_output_changed_in_place_is_refused() -> None:
    layer, x = rnnkern.GRU(3, 5), torch.randn(4, 2, 3)
    trained(layer, x)
    y = layer(x)[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_is_refused_unless_the_graph_is_kept() -> None:
    layer, x = rnnkern.GRU(3, 5), torch.randn(4, 2, 3)
    trained(layer, x)
    y = layer(x)[0].sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_a_gradient_of_any_strides() -> None:
    """Those that kernels cannot read are copied, and take no other's place."""
    layer, x = rnnkern.LSTM(3, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    trained(layer, x)
    weights = list(layer.parameters())
    judge = rnnkern.to_torch(layer)
    dy = torch.randn(4, 2, 10, dtype=torch.float64)
    for g in [dy[..., ::2], dy[..., :5], dy[..., :5].contiguous(), torch.ones((), dtype=dy.dtype).expand(4, 2, 5)] * 3:
        found = torch.autograd.grad(layer(x)[0], weights, g)
        wanted = torch.autograd.grad(judge(x)[0], list(judge.parameters()), g)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want)


def test_an_error_at_the_layout_of_gradients_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no layout")

    layer, x = rnnkern.GRU(3, 5), torch.randn(4, 2, 3)
    monkeypatch.setattr(ahead.LayerPlan, "_back", broken)
    with pytest.raises(ValueError, match="no layout"):
        trained(layer, x)


def test_what_is_no_tensor_is_refused() -> None:
    layer, x = rnnkern.GRU(3, 5), torch.randn(4, 2, 3)
    trained(layer, x)
    (plan,) = filter(None, shortcut._plans.values())
    assert isinstance(plan, planned.LayeredCall)
    with pytest.raises(TypeError, match="expected a tensor, got 'x'"):
        plan.layers[0]("x")


def test_plans_that_are_forgotten_leave_nothing() -> None:
    layer, x = rnnkern.GRU(3, 5), torch.randn(4, 2, 3)
    y = trained(layer, x)
    (plan,) = filter(None, shortcut._plans.values())
    assert isinstance(plan, planned.LayeredCall)
    left = weakref.ref(plan.plans[0])
    del plan, y
    forget_plans()
    gc.collect()
    assert left() is None


# Where the extension cannot be used


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"torch": "1.0", "reason": None},
            "was built for torch 1.0, and this is .*; install rnnkern",
        ),
        ({}, "was built for torch an unknown version"),
        (None, "was built for torch an unknown version"),
    ],
)
def test_an_extension_of_another_torch_is_not_loaded(
    record: dict[str, Any] | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "RECORD", tmp_path / "record.json")
    if record is not None:
        native.RECORD.write_text(json.dumps(record))
    monkeypatch.setattr(native, "obstacle", native.obstacle.__wrapped__)
    with pytest.warns(RuntimeWarning, match=f"calls run in Python, which takes longer: .*{reason}"):
        assert native._load() is None


def test_an_extension_that_was_not_built_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NAME", "rnnkern._none")
    monkeypatch.setattr(native, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(native, "obstacle", native.obstacle.__wrapped__)
    native.RECORD.write_text(json.dumps({"torch": None, "reason": "no g++"}))
    assert native.obstacle() == "the extension rnnkern._none was not built: no g++"
    assert native._load() is None


def test_a_broken_extension_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_calls.py").write_text("raise ImportError('undefined symbol')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(native, "NAME", "broken_calls")
    monkeypatch.setattr(native, "obstacle", native.obstacle.__wrapped__)
    assert native.obstacle() == "the extension broken_calls cannot be loaded: undefined symbol; install rnnkern again"
