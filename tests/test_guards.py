"""The guards by which repeated calls find their plan: torch's own checks of tensors, of which every one that a plan
relies on is asserted here, since that interface is not public."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import compat, planned, shortcut
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
    "class": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "subclass": lambda x: x.as_subclass(Sub),
    "negated": lambda x: torch._neg_view(x),
    "device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "no tensor": lambda x: 3.0,
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_guard_sees_what_plans_rely_on(change: str) -> None:
    x, weight = torch.randn(3, 4), torch.nn.Parameter(torch.randn(5, 4))
    looks_alike = compat.guard((x, weight))
    assert looks_alike(x, weight)
    assert looks_alike(torch.randn(3, 4), torch.nn.Parameter(torch.randn(5, 4)))
    assert not looks_alike(CHANGES[change](x), weight)


def test_a_guard_sees_other_data_of_a_parameter() -> None:
    x, weight = torch.randn(3, 4), torch.nn.Parameter(torch.randn(4, 4))
    looks_alike = compat.guard((x, weight))
    weight.data = weight.data.t()
    assert not looks_alike(x, weight)
    weight.data = weight.data.t()
    assert looks_alike(x, weight)


def described(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each call that had to be described."""
    found: list[object] = []
    describe = shortcut._describe

    def watched(*arguments: Any) -> object:
        found.append(describe(*arguments))
        return found[-1]

    monkeypatch.setattr(shortcut, "_describe", watched)
    return found


@pytest.mark.usefixtures("in_python")
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
    assert len(seen) == 3  # to be known, to have a plan, to have a guard
    assert looks.call_count == 2 * graded  # by the first forward and the first backward with the plan


def test_a_tensor_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards never know such tensors."""
    seen = described(monkeypatch)
    cell, x, h = rnnkern.LSTMCell(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    theirs = rnnkern.to_torch(cell)
    for _ in range(5):
        torch.testing.assert_close(cell(x, (h, h)), theirs(x, (h, h)))
    assert len(seen) == 5
    assert not shortcut._guarded
    for _ in range(3):
        torch.testing.assert_close(cell(x, (h, h.clone())), theirs(x, (h, h)))
    assert len(shortcut._guarded) == 1


def test_there_are_few_guards_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """More would take longer to try than a description to make."""
    monkeypatch.setattr(shortcut, "MOST_GUARDED", 2)
    layer = rnnkern.RNN(3, 4)
    theirs = rnnkern.to_torch(layer)
    with torch.no_grad():
        for steps in [1, 2, 3, 4] * 4:
            x = torch.randn(steps, 2, 3)
            torch.testing.assert_close(layer(x), theirs(x))
    assert [len(of_kind) for of_kind in shortcut._guarded.values()] == [2]
    forget_plans()
    assert not shortcut._guarded


def test_kinds_of_calls_have_guards_of_their_own() -> None:
    """Where the tensors are the same."""
    layer, x = rnnkern.RNN(3, 3, bidirectional=True), torch.randn(4, 4, 3)
    first = rnnkern.RNN(3, 3, bidirectional=True, batch_first=True)
    first.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(first(x)[0], layer(x.transpose(0, 1).contiguous())[0].transpose(0, 1))
    assert len(shortcut._guarded) == 2
