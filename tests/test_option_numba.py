"""What torch.nn lacks, in the Numba sweeps, against the oracle."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import reference
from rnnkern.backends import numba_cpu
from rnnkern.cells import Weights
from tests.numba_support import all_needs, random_gradients
from tests.option_layers import FULL, in_double, optional_cases
from tests.tables import TOLERANCES, relative_rms

CASES = dict(optional_cases()) | FULL


def check(name: str, found: Tensor | None, expected: Tensor | None, limit: float) -> None:
    if found is None or expected is None:
        assert found is expected, name
    else:
        error = relative_rms(found, expected)
        assert error <= limit, f"{name}: relative RMS error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("nan_buffers")
def test_kernels_against_the_oracle(name: str) -> None:
    layer, limit = CASES[name].layer(), TOLERANCES[torch.float64]
    expected, found = reference.forward(layer), numba_cpu.forward(layer, save=True)
    for part, own, theirs in zip(expected._fields, found, expected, strict=True):
        check(part, own, theirs, limit.forward)
    inference = numba_cpu.forward(layer, save=False)
    assert torch.equal(inference.y, found.y)
    assert torch.equal(inference.h_n, found.h_n)
    assert (inference.cells is not None) == layer.extras.states
    grads, needs = random_gradients(expected, layer.extras.states), all_needs(layer)
    wanted = reference.backward(layer, expected.saved, grads, needs)
    got = numba_cpu.backward(layer, expected.saved, grads, needs)
    names = ("x", "h0", "c0", "reset_h", "reset_c", *Weights._fields * len(layer.weights))
    for part, own, theirs in zip(names, got, wanted, strict=True):
        check(f"d{part}", own, theirs, limit.gradient)


@pytest.mark.parametrize("name", FULL)
def test_single_precision(name: str) -> None:
    """Everything at once in float32, against the oracle in float64 on the same numbers."""
    limit = TOLERANCES[torch.float32]
    layer = replace(FULL[name], dtype=torch.float32).layer()
    exact = in_double(layer)
    found, expected = numba_cpu.forward(layer, save=True), reference.forward(exact, save=True)
    grads = random_gradients(expected, layer.extras.states).map(lambda t: t.float())
    got = numba_cpu.backward(layer, found.saved, grads, all_needs(layer))
    wanted = reference.backward(exact, expected.saved, grads.map(Tensor.double), all_needs(layer))
    for part, own, theirs in zip(("y", "h_n", "c_n"), found, expected, strict=False):
        check(part, own, theirs, limit.forward)
    for i, (own, theirs) in enumerate(zip(got, wanted, strict=True)):
        check(f"gradient {i}", own, theirs, limit.gradient)


def test_the_default_device_does_not_matter() -> None:
    """Numbers that a call makes for itself lie where its input does."""
    module, x = rnnkern.LSTM(5, 4, zoneout=0.3, backend="numba").eval(), torch.randn(4, 3, 5)
    lengths = torch.tensor([2, 4, 1])
    with torch.no_grad():
        expected = module(x, lengths=lengths)[0]
        with torch.device("meta"):
            assert torch.equal(module(x, lengths=lengths)[0], expected)
