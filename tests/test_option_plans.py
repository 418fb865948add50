"""Calls with options that look like earlier ones go by plans: they give what the ordinary way gives, to the bit, and
draw what it draws."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import functional, native, planned, shortcut
from rnnkern.backends.numba_cpu.ahead import MOST_BACKWARDS
from rnnkern.cells import CELL_OF_MODE
from tests.numba_support import bitwise_equal, forget_plans
from tests.option_modules import ARGUMENTS, I, assert_same, flat, goes_with, option_cases, random

T, B, H = 6, 3, 5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "-".join((kind, "plain")): (kind, {}) for kind in ("LSTM", "GRU", "RNN")
} | option_cases(2)
EVERYTHING = {
    "LSTM": {k: v for name in ARGUMENTS if name not in ("zoneout", "reset_before") for k, v in ARGUMENTS[name].items()},
    "GRU": {k: v for name in ARGUMENTS if goes_with("GRU", ARGUMENTS[name]) for k, v in ARGUMENTS[name].items()}
    | {"layer_norm": False},
    "RNN": {k: v for name in ARGUMENTS if goes_with("RNN", ARGUMENTS[name]) for k, v in ARGUMENTS[name].items()},
}
# layers, directions, dropout and how the input lies
FORMS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "dropout": 0.4},
    {"num_layers": 2, "dropout": 0.4, "batch_first": True, "bidirectional": True},
]
pytestmark = pytest.mark.usefixtures("each_way")
every_kind = pytest.mark.parametrize("kind", EVERYTHING)

Call = Callable[[], Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget_plans()
    yield
    forget_plans()


def make(kind: str, **arguments: Any) -> Any:
    torch.manual_seed(3)
    return getattr(rnnkern, kind)(I, H, dtype=torch.float64, backend="numba", **arguments)


def shape(module: Any, unbatched: bool) -> tuple[int, ...]:
    """Of the input without its last."""
    return (T,) if unbatched else (B, T) if module.batch_first else (T, B)


def states(module: Any, *lead: int) -> Any:
    """Leaves (*lead, units) in the form that the module takes."""
    units = (module.proj_size or H, H)[: CELL_OF_MODE[module.mode].states]
    found = tuple(random(*lead, n).requires_grad_() for n in units)
    return found if len(found) == 2 else found[0]


def in_turn(call: Call, times: int) -> list[Any]:
    """The results of so many calls after one seed."""
    torch.manual_seed(7)
    return [call() for _ in range(times)]


def ordinary(call: Call, times: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The same without plans."""
    with monkeypatch.context() as patch:
        patch.setattr(shortcut, "through", lambda *call: call[4]())
        return in_turn(call, times)


def results(call: Call, leaves: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """What a call gives, and its gradients for all leaves."""
    found = flat(call())
    total = torch.stack([(r * torch.arange(1.0, r.numel() + 1).view(r.shape).cos()).sum() for r in found]).sum()
    return [*found, *torch.autograd.grad(total, leaves, create_graph=create_graph)]


def check(call: Call, leaves: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four calls with gradients and four without, after one seed: the third is the first to go by a plan."""

    def graded() -> list[Tensor]:
        return results(call, leaves)

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return flat(call())

    for of_call in (graded, inference):
        forget_plans()
        for found, expected in zip(in_turn(of_call, 4), ordinary(of_call, 4, monkeypatch), strict=True):
            assert bitwise_equal(found, expected)
            assert [t.stride() for t in found] == [t.stride() for t in expected]
        assert sum(map(bool, shortcut._plans.values())) == 1


@pytest.mark.parametrize(
    "name",
    [c if c.count("-") == 1 else pytest.param(c, marks=pytest.mark.slow) for c in CASES],  # pairs now and then
)
@pytest.mark.parametrize("form", FORMS, ids=["one", "two", "bidirectional"])
@pytest.mark.parametrize("training", [True, False])
def test_options(name: str, form: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, arguments = CASES[name]
    module = make(kind, **arguments, **form).train(training)
    x = random(*shape(module, unbatched=False), I).requires_grad_()
    hx = states(module, module.num_layers * (1 + module.bidirectional), B)
    check(lambda: module(x, hx), [x, *flat(hx), *module.parameters()], monkeypatch)


@every_kind
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(kind: str, given: bool, batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(kind, num_layers=2, dropout=0.4, batch_first=batch_first, **EVERYTHING[kind])
    x = random(T, I).requires_grad_()
    hx = states(module, 2) if given else None
    check(lambda: module(x, hx), [x, *(flat(hx) if given else ()), *module.parameters()], monkeypatch)


@every_kind
@pytest.mark.parametrize("lead", ["none", "shared", "each", "steps"])
@pytest.mark.parametrize(("unbatched", "batch_first"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("full", [False, True])
def test_resets(
    kind: str, lead: str, unbatched: bool, batch_first: bool, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = EVERYTHING[kind] if full else {}
    module = make(kind, num_layers=2, dropout=0.4 * full, batch_first=batch_first, **arguments)
    x = random(*shape(module, unbatched), I).requires_grad_()
    torch.manual_seed(5)
    call: dict[str, Any] = {"reset": torch.rand(shape(module, unbatched)) < 0.3}
    batch = () if unbatched else (B,)
    leads = {"shared": (2,) if unbatched else (2, 1), "each": (2, *batch), "steps": (T, 2, *batch)}
    if lead != "none":
        call["reset_to"] = states(module, *leads[lead])
    leaves = [x, *flat(call.get("reset_to", ())), *module.parameters()]
    check(lambda: module(x, **call), leaves, monkeypatch)


@every_kind
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_all_states(
    kind: str, layers: int, unbatched: bool, bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one of an LSTM whose c alone is asked for."""
    module = make(kind, num_layers=layers, batch_first=True, bidirectional=bidirectional)
    x = random(*shape(module, unbatched), I).requires_grad_()
    function: Any = getattr(functional, kind.lower())
    weights = [list(own) for own in module.all_weights]

    def call() -> Any:
        return function(x, None, weights, batch_first=True, bidirectional=bidirectional, return_states=True)

    check(call, [x, *module.parameters()], monkeypatch)
    check(lambda: flat(call())[-1], [x, module.weight_ih_l0], monkeypatch)


@every_kind
@pytest.mark.parametrize("wanted", ["x", "hx", "reset_to", "weight_hh_l0"])
def test_some_gradients(kind: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(kind, **EVERYTHING[kind])
    tensors = {"x": [random(T, B, I)], "hx": flat(states(module, 1, B)), "reset_to": flat(states(module, 1, 1))}
    tensors["weight_hh_l0"] = [module.weight_hh_l0]
    for tensor in (*(t for of in tensors.values() for t in of), *module.parameters()):
        tensor.requires_grad_(any(tensor is t for t in tensors[wanted]))
    torch.manual_seed(5)
    reset = torch.rand(T, B) < 0.3
    hx, to = (tuple(tensors[n]) if kind == "LSTM" else tensors[n][0] for n in ("hx", "reset_to"))
    check(lambda: module(tensors["x"][0], hx, reset=reset, reset_to=to), tensors[wanted], monkeypatch)


@every_kind
@pytest.mark.parametrize("count", [1, 2])
def test_shares(
    kind: str,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
    always_split: list[int],
) -> None:
    """A batch cut into shares, each with its own part of the gradients that are added to."""
    threads(count)
    module = make(kind, num_layers=2, dropout=0.4, **EVERYTHING[kind])
    x, reset = random(T, 9, I).requires_grad_(), torch.ones(T, 9, dtype=torch.bool).bernoulli_(0.3)
    check(lambda: module(x, reset=reset), [x, *module.parameters()], monkeypatch)
    assert bool(always_split) == (count > 1)


@every_kind
def test_second_derivatives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(kind, **EVERYTHING[kind])
    x, hx, to = random(T, B, I).requires_grad_(), states(module, 1, B), states(module, 1, B)
    torch.manual_seed(5)
    reset = torch.rand(T, B) < 0.3
    leaves = [x, *flat(hx), *flat(to), *module.parameters()]

    def twice() -> list[Tensor]:
        found = results(lambda: module(x, hx, reset=reset, reset_to=to), leaves, create_graph=True)
        total = torch.stack([f.square().sum() for f in found]).sum()
        return [*found, *torch.autograd.grad(total, leaves)]

    for found, expected in zip(in_turn(twice, 4), ordinary(twice, 4, monkeypatch), strict=True):
        assert_same(found, expected)


@every_kind
def test_second_derivatives_of_all_states(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(kind)
    x, function = random(T, B, I).requires_grad_(), getattr(functional, kind.lower())
    leaves, weights = [x, *module.parameters()], [list(own) for own in module.all_weights]

    def twice() -> list[Tensor]:
        found = results(lambda: function(x, None, weights, return_states=True), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([f.square().sum() for f in found]).sum(), leaves)  # type: ignore[return-value]

    for found, expected in zip(in_turn(twice, 4), ordinary(twice, 4, monkeypatch), strict=True):
        assert_same(found, expected)


@every_kind
def test_masks_are_drawn_at_each_call(kind: str) -> None:
    module, x = make(kind, recurrent_dropout=0.5), random(T, B, I)
    found = [module(x)[0] for _ in range(6)]
    assert not any(torch.equal(a, b) for k, a in enumerate(found) for b in found[:k])


def test_forms_have_plans_of_their_own() -> None:
    """What is at work in a call is part of how it looks."""
    x, reset = random(T, B, I), torch.zeros(T, B, dtype=torch.bool)
    weights = [list(own) for own in make("GRU", num_layers=2).all_weights]
    options: list[dict[str, Any]] = [{}, {"zoneout": 0.5}, {"zoneout": 0.25}, {"reset_after": False}, {"reset": reset}]
    calls: list[dict[str, Any]] = [
        {"training": training, **changes} for training, changes in product((True, False), options)
    ]
    first = [functional.gru(x, None, weights, **call)[0] for call in calls]
    for _ in range(3):
        again = [functional.gru(x, None, weights, **call)[0] for call in calls]
    for call, a, b in zip(calls, first, again, strict=True):
        assert torch.equal(a, b) != (call["training"] and "zoneout" in call)
    assert sum(map(bool, shortcut._plans.values())) == 9  # plain calls are one, in training or not


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda call: call | {"reset": call["reset"].long()}, TypeError, "reset: expected dtype bool"),
        (lambda call: call | {"reset": call["reset"][:-1]}, ValueError, "reset: expected shape"),
        (lambda call: call | {"reset": None}, ValueError, "reset_to"),
        (lambda call: call | {"reset_to": call["reset_to"][0]}, RuntimeError, "reset_to: expected a pair"),
        (lambda call: call | {"reset_to": (call["reset_to"][0], None)}, TypeError, "reset_to c: expected a tensor"),
        (lambda call: call | {"reset_to": 3}, TypeError, "reset_to: expected a pair"),
    ],
)
def test_bad_resets_are_refused_also_where_there_is_a_plan(change: Any, error: Any, words: str) -> None:
    module, x = make("LSTM"), random(T, B, I)
    call = {"reset": torch.ones(T, B, dtype=torch.bool), "reset_to": states(module, 1, B)}
    for _ in range(3):
        module(x, **call)
    with pytest.raises(error, match=words):
        module(x, **change(call))
    assert_same(module(x, reset=call["reset"], reset_to=list(call["reset_to"])), module(x, **call))


def test_laying_out_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is everybody's: another thread may draw from it meanwhile."""
    module, x = make("LSTM", num_layers=2, dropout=0.4, **EVERYTHING["LSTM"]), random(T, B, I)
    learn, before = shortcut.learn, []

    def watched(*args: Any) -> None:
        before.append(torch.get_rng_state())
        learn(*args)
        assert torch.equal(before[-1], torch.get_rng_state())

    monkeypatch.setattr(shortcut, "learn", watched)
    for _ in range(4):
        module(x)
    assert len(before) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_where_there_is_no_plan_none_is_tried_again(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    make_plan = planned.make_plan

    def watched(*args: Any) -> Any:
        made.append(make_plan(*args))
        return made[-1]

    monkeypatch.setattr(planned, "make_plan", watched)
    module, x = make("GRU", recurrent_dropout=0.3).to(dtype), random(T, B, I).to(dtype)
    for _ in range(6):
        module(x)
    assert len(made) == 1
    assert (made[0] is None) == (dtype == torch.bfloat16)


@every_kind
@pytest.mark.parametrize("options", [False, True])
def test_batched_backward(kind: str, options: bool) -> None:
    module, x = make(kind, **(EVERYTHING[kind] if options else {})), random(T, B, I).requires_grad_()
    for _ in range(4):
        y = module(x)[0]
        cotangents = random(3, *y.shape)

        def gradient(cotangent: Tensor, y: Tensor = y) -> Tensor:
            (found,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
            return found

        assert_same(torch.func.vmap(gradient)(cotangents), torch.stack([gradient(c) for c in cotangents]))


def test_gradients_of_many_layouts_are_laid_out_anew() -> None:
    module, x = make("GRU", recurrent_dropout=0.3), random(B, T, I).transpose(0, 1)
    for rest in range(40):
        y = module(x)[0]
        torch.cat([y, random(T, rest, H)], 1).square().sum().backward()
    (plan,) = filter(None, shortcut._plans.values())
    assert 0 < len(plan.plans[0].backwards) <= MOST_BACKWARDS  # type: ignore[attr-defined]


def test_a_change_of_threads_between_forward_and_backward(
    threads: Callable[[int], None], always_split: list[int]
) -> None:
    """The gradients of as many threads as there are, to the bit."""
    module, x = make("LSTM", zoneout=0.3), random(T, 9, I).requires_grad_()

    def gradients(forward: int, backward: int) -> list[Tensor]:
        torch.manual_seed(7)
        threads(forward)
        y = module(x)[0]
        threads(backward)
        return list(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))

    for _ in range(3):
        alone = gradients(1, 1)
    shared = gradients(1, 2)
    assert bitwise_equal(gradients(1, 1), alone)
    assert bitwise_equal(gradients(1, 2), shared)
    assert always_split or native.calls is not None


def test_a_state_is_not_taken_for_a_weight() -> None:
    x, weights = random(T, 4), [random(16, 4), random(16, 4)]
    h0, c0 = random(1, 4), random(1, 4)
    for _ in range(3):
        functional.lstm(x, (h0, c0), [weights])
    with pytest.raises((RuntimeError, ValueError)):
        functional.lstm(x, (h0,), [[c0, *weights]])  # type: ignore[arg-type]
