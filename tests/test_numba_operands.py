"""What sweeps are told: operands as integers in memory and back, and the names of their places."""

from typing import Any

import numba
import numpy as np
import pytest

from rnnkern.backends.numba_cpu import plans
from rnnkern.backends.numba_cpu.launch import Launch
from rnnkern.backends.numba_cpu.operands import Backward, Forward, flatten, read_operands
from rnnkern.cells import TORCH_CELLS
from tests.numba_support import layer_forms, sweeps

KINDS = [Forward, Backward]


@numba.njit
def _read_forward(address):  # type: ignore[no-untyped-def]
    return read_operands(address, Forward)


@numba.njit
def _read_backward(address):  # type: ignore[no-untyped-def]
    return read_operands(address, Backward)


def numbered(kind: Any, start: int = 0) -> tuple[Any, int]:
    """Operands whose every integer is another: 1000, 1001 ... as they are declared; and how many they are."""
    fields = []
    for field in kind.__annotations__.values():
        value, start = (1000 + start, start + 1) if field is int else numbered(field, start)
        fields.append(value)
    return kind(*fields), start


def at(operands: Any, name: str) -> Any:
    for part in name.split("."):
        operands = getattr(operands, part)
    return operands


@pytest.mark.parametrize("kind", KINDS)
def test_operands_come_back_from_memory(kind: Any) -> None:
    operands, count = numbered(kind)
    integers = np.array(flatten(operands), np.int64)
    assert integers.tolist() == list(range(1000, 1000 + count))
    read = (_read_forward if kind is Forward else _read_backward)(integers.ctypes.data)
    assert read == operands
    assert read._fields == operands._fields
    assert read.sizes._asdict() == operands.sizes._asdict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_is_at_its_position(kind: Any) -> None:
    operands, count = numbered(kind)
    integers = flatten(operands)
    leaves = {name: place for name, place in plans.positions(kind).items() if isinstance(at(operands, name), int)}
    assert sorted(leaves.values()) == list(range(count))
    for name, place in plans.positions(kind).items():
        value = at(operands, name)
        assert integers[place] == (value if isinstance(value, int) else flatten(value)[0]), name
    assert plans.POSITIONS[kind] == plans.positions(kind)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_a_plan_fills_in_every_address_it_needs(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan leaves 0 is an address that the call fills in, or of a buffer that is not there; none is filled in
    twice."""
    made: list[Any] = []
    launch = plans.Plan.launch

    def spy(plan: Any, *rest: Any) -> Launch:
        made.append(plan)
        return launch(plan, *rest)

    monkeypatch.setattr(plans.Plan, "launch", spy)
    for layer in layer_forms(cell):
        sweeps(layer)
    assert {type(plan) for plan in made} == {plans.ForwardPlan, plans.BackwardPlan}
    for plan in made:
        for integers, addresses in plan.directions:
            places = [address.position for address in addresses]
            assert len(set(places)) == len(places)
            assert all(integers[place] == 0 for place in places)
            assert {address.tensor for address in addresses} <= set(range(len(plan.tensors)))
