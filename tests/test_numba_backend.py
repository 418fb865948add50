"""The Numba backend as a whole: every form of call, what it is asked for, and calls without a sequence."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import reference
from rnnkern.backends import Layer, Needs, numba_cpu
from rnnkern.cells import TORCH_CELLS, Weights
from tests.numba_support import (
    LIMIT,
    ODD,
    all_needs,
    bitwise_equal,
    difference,
    layer_forms,
    oracle,
    random_gradients,
    random_layer,
    sweeps,
)
from tests.tables import layer_class, nonlinearity

DTYPES = list(LIMIT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_every_form_of_call(cell: str, dtype: torch.dtype) -> None:
    wide = random_layer(cell, steps=3, batch=7, inputs=2, hidden=70, dtype=dtype)
    for layer in (*layer_forms(cell, dtype), random_layer(cell, **ODD, dtype=dtype), wide):
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[dtype]


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_without_biases(cell: str) -> None:
    for layer in (random_layer(cell, **ODD, bias=False), random_layer(cell, steps=2, bias=False)):
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]


@pytest.mark.parametrize("bias", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_with_one_bias_of_two(cell: str, bias: str) -> None:
    layer = random_layer(cell, **ODD)
    nothing: dict[str, Any] = {bias: None}
    layer = layer._replace(weights=tuple(w._replace(**nothing) for w in layer.weights))
    assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]


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


# What backward is asked for


def asked(layer: Layer, names: tuple[str, ...]) -> Needs:
    """Asks for the gradients of the operands so named."""
    weights = (Weights(*(n in names for n in Weights._fields)) for _ in layer.weights)  # type: ignore[arg-type]
    return Needs("x" in names, "h0" in names, "c0" in names and layer.c0 is not None, False, False, tuple(weights))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_any_subset_of_gradients(cell: str) -> None:
    """What is asked for has the same bits as if all were asked for; the rest is None."""
    for layer in layer_forms(cell)[-3:]:
        names = [n for n in ("x", "h0", "c0") if n != "c0" or layer.c0 is not None]
        names += [n for n, w in zip(Weights._fields, layer.weights[0], strict=True) if w is not None]
        states = numba_cpu.forward(layer, save=True)
        grads = random_gradients(states)
        everything = numba_cpu.backward(layer, states.saved, grads, all_needs(layer))
        order = ("x", "h0", "c0", "reset_h", "reset_c", *Weights._fields * len(layer.weights))
        for wanted in ((), *((n,) for n in names), *combinations(names, 2), tuple(names[:-1]), tuple(names[1:])):
            found = numba_cpu.backward(layer, states.saved, grads, asked(layer, wanted))
            expected = [g if name in wanted else None for name, g in zip(order, everything, strict=True)]
            assert bitwise_equal(found, expected), wanted
            by_oracle = reference.backward(layer, states.saved, grads, asked(layer, wanted))
            assert difference(by_oracle, expected) < LIMIT[torch.float64], wanted


def test_gradients_of_one_direction_alone() -> None:
    layer = random_layer("gru", **ODD)
    states = numba_cpu.forward(layer, save=True)
    grads, nothing = random_gradients(states), Weights(*[False] * 12)  # type: ignore[arg-type]
    everything = numba_cpu.backward(layer, states.saved, grads, all_needs(layer))
    for d in range(2):
        one = [nothing, nothing]
        one[d] = all_needs(layer).weights[d]
        found = numba_cpu.backward(layer, states.saved, grads, Needs(False, False, False, False, False, tuple(one)))
        expected = [None] * len(found)
        expected[5 + 12 * d : 17 + 12 * d] = everything[5 + 12 * d : 17 + 12 * d]  # type: ignore[assignment]
        assert bitwise_equal(found, expected)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_frozen_and_alone_through_modules(cell: str) -> None:
    """Each leaf of a module alone asks for its gradient, in calls that go by a plan too."""
    layer = layer_class(rnnkern, cell)(3, 5, bidirectional=True, dtype=torch.float64, **nonlinearity(cell))
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    everything = torch.autograd.grad(layer(x)[0].square().sum(), leaves)
    for leaf, expected in zip(leaves, everything, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        for _ in range(3):
            (found,) = torch.autograd.grad(layer(x)[0].square().sum(), [leaf])
            assert torch.equal(found, expected)


# No sequence


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_an_empty_batch(cell: str, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    for lengths in (None, ()):
        layer = random_layer(cell, batch=0, lengths=lengths)
        y, h_n, _, _, _, dx, dh0, dc0, _, _, *of_weights = sweeps(layer)
        shapes = [None if t is None else tuple(t.shape) for t in (y, h_n, dx, dh0)]
        assert shapes == [(5, 0, 10), (2, 0, 5), (5, 0, 3), (2, 0, 5)]
        assert (dc0 is None) == (layer.c0 is None)
        given = [w for d in layer.weights for w in d]
        for g, w in zip(of_weights, given, strict=True):
            assert (g is None) == (w is None)
            assert g is None or w is None or (g.shape == w.shape and not g.any())


@pytest.mark.parametrize("cell", [rnnkern.LSTM, rnnkern.GRU, rnnkern.RNN])
def test_an_empty_batch_has_gradients_of_zero(cell: type[rnnkern.LSTM]) -> None:
    module = cell(3, 5, bidirectional=True, backend="numba")
    for lengths in (None, torch.zeros(0, dtype=torch.int64)):
        for _ in range(3):
            module.zero_grad()
            x = torch.randn(4, 0, 3, requires_grad=True)
            module(x, lengths=lengths)[0].sum().backward()
            assert x.grad is not None
            assert x.grad.shape == x.shape
            assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
            with torch.no_grad():
                assert module(x)[0].shape == (4, 0, 10)


# Inference


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_inference_has_the_same_bits_and_saves_nothing(cell: str) -> None:
    for layer in layer_forms(cell):
        saving, without = (numba_cpu.forward(layer, save=save) for save in (True, False))
        assert bitwise_equal(without[:3], saving[:3])
        assert without.gates is without.cells is None


def test_final_states_are_memory_of_their_own() -> None:
    """Callers may change them in place, and the output, without a change of anything else."""
    layer = random_layer("lstm")
    states = numba_cpu.forward(layer, save=True)
    parts: list[Tensor] = [t for t in (*states, layer.h0, layer.c0, layer.x) if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in parts}) == len(parts)
