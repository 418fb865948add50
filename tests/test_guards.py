"""How repeated calls find their plan, in C++ and in Python: by torch's own checks of tensors, of which every one that a
plan relies on is asserted here, since that interface is not public."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern import native, planned, shortcut
from tests.numba_support import forget_plans


class Sub(Tensor):
    pass


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "dtype": lambda x: x.double(),
    "size": lambda x: torch.randn(3, 7),
    "rank": lambda x: x[0],
    "stride": lambda x: torch.randn(3, 8)[:, ::2],
    "order": lambda x: torch.randn(4, 3).t(),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "subclass": lambda x: x.as_subclass(Sub),
    "negated": lambda x: torch._neg_view(x),
    "device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "no tensor": lambda x: 3.0,
    "nothing": lambda x: None,
}


RESULTS = ("output", ("state",))


def plan(*_: object) -> tuple[Any, ...]:
    return RESULTS


def known_calls() -> Any:
    return shortcut.KnownCalls() if native.calls is None else native.calls.KnownCalls()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("each_way")
def test_what_plans_rely_on_is_seen(change: str) -> None:
    known, x, weight = known_calls(), torch.randn(3, 4), torch.nn.Parameter(torch.randn(5, 4))
    known.add(plan, None, x, None, [weight], ())
    assert known(x, None, [weight], ()) == RESULTS
    assert known(torch.randn(3, 4), None, [torch.nn.Parameter(torch.randn(5, 4))], ()) == RESULTS
    assert known(CHANGES[change](x), None, [weight], ()) is None
    assert known(x, None, [weight, CHANGES[change](x)], ()) is None


@pytest.mark.usefixtures("each_way")
def test_other_data_of_a_parameter_are_seen() -> None:
    known, x, weight = known_calls(), torch.randn(3, 4), torch.nn.Parameter(torch.randn(4, 4))
    known.add(plan, None, x, None, [weight], ())
    weight.data = weight.data.t()
    assert known(x, None, [weight], ()) is None
    weight.data = weight.data.t()
    assert known(x, None, [weight], ()) == RESULTS


@pytest.mark.usefixtures("each_way")
def test_tensors_in_another_place_are_seen() -> None:
    """The same tensors, some as states, or as resets."""
    known, x, h, weight = known_calls(), torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    known.add(plan, None, x, (h,), [weight], ())
    assert known(x, (h,), [weight], ()) == RESULTS
    assert known(x, (), [h, weight], ()) is None
    assert known(x, None, [h, weight], ()) is None
    assert known(x, [h], [weight], ()) is None
    assert known(x, (h,), [weight], (h,)) is None


def forward_derivatives() -> AbstractContextManager[Any]:
    return torch.autograd.forward_ad.dual_level()


class FunctionMode(TorchFunctionMode):
    pass


class DispatchMode(TorchDispatchMode):
    pass


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "function mode": FunctionMode,
    "dispatch mode": DispatchMode,
    "forward derivatives": forward_derivatives,
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "another grad mode": torch.no_grad,
}


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("mode", MODES)
def test_modes_are_seen(mode: str) -> None:
    known, x, weight = known_calls(), torch.randn(3, 4), torch.randn(4, 4)
    known.add(plan, None, x, None, [weight], ())
    with MODES[mode]():
        assert known(x, None, [weight], ()) is None
    assert known(x, None, [weight], ()) == RESULTS


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("each_way")
def test_other_surroundings_are_seen(threads: Callable[[int], None]) -> None:
    """Another number of threads, a transform, a tracer; hooks only where something is saved."""
    known, x, weight = known_calls(), torch.randn(3, 4), torch.randn(4, 4)
    seen: list[object] = []

    def look(x: Tensor) -> Tensor:
        seen.append(known(other, None, [weight], ()))
        return x * 2

    other = torch.randn(3, 4)
    with torch.no_grad():
        known.add(plan, None, x, None, [weight], ())
        threads(2)
        look(x)
        threads(1)
        torch.func.vmap(look)(x)
        torch.jit.trace(look, x, check_trace=False)
        assert seen == [None] * 3
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            look(x)
        look(x)
        with torch.inference_mode():
            look(x)
        assert seen[3:] == [RESULTS, RESULTS, None if native.calls is None else RESULTS]  # torch's guards see that mode


def described(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each call that had to be described."""
    found: list[object] = []
    describe = shortcut._describe

    def watched(*arguments: Any) -> object:
        found.append(describe(*arguments))
        return found[-1]

    monkeypatch.setattr(shortcut, "_describe", watched)
    return found


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("graded", [False, True])
def test_repeated_calls_are_not_described(graded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = described(monkeypatch)
    looks = Mock(wraps=planned.looks)
    monkeypatch.setattr(planned, "looks", looks)
    layer, x = rnnkern.GRU(3, 4), torch.randn(5, 2, 3)
    for _ in range(6):
        with torch.set_grad_enabled(graded):
            y, _ = layer(x)
            if graded:
                y.sum().backward()
    assert len(seen) == 3  # to have come by, to have a plan, to be known
    if native.calls is None:
        assert looks.call_count == 2 * graded  # by the first forward and the first backward with the plan


@pytest.mark.usefixtures("each_way")
def test_a_tensor_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's guards never know such tensors."""
    seen = described(monkeypatch)
    cell, x, h = rnnkern.LSTMCell(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    theirs = rnnkern.to_torch(cell)
    for _ in range(5):
        torch.testing.assert_close(cell(x, (h, h)), theirs(x, (h, h)))
    assert len(seen) == (5 if native.calls is None else 3)
    for _ in range(3):
        torch.testing.assert_close(cell(x, (h, h.clone())), theirs(x, (h, h)))
    assert [len(known) for known in shortcut._known.values()] == [1]


@pytest.mark.usefixtures("each_way")
def test_few_calls_of_a_form_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "MOST_KNOWN", 2)
    layer = rnnkern.RNN(3, 4)
    theirs = rnnkern.to_torch(layer)
    with torch.no_grad():
        for steps in [1, 2, 3, 4] * 4:
            x = torch.randn(steps, 2, 3)
            torch.testing.assert_close(layer(x), theirs(x))
    assert [len(known) for known in shortcut._known.values()] == [2]
    forget_plans()
    assert not shortcut._known


@pytest.mark.usefixtures("each_way")
def test_equal_tensors_in_calls_of_two_forms() -> None:
    """Where the tensors are the same."""
    layer, x = rnnkern.RNN(3, 3, bidirectional=True), torch.randn(4, 4, 3)
    first = rnnkern.RNN(3, 3, bidirectional=True, batch_first=True)
    first.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(first(x)[0], layer(x.transpose(0, 1).contiguous())[0].transpose(0, 1))
    assert len(shortcut._known) == 2
