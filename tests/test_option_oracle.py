"""What torch.nn lacks, in the oracle: its backward, written out by hand, against torch's autograd."""

from typing import Any

import pytest
import torch

from rnnkern import reference
from rnnkern.layer import finish
from tests.numba_support import all_needs, random_gradients
from tests.option_layers import FULL, optional_cases
from tests.tables import TOLERANCES, relative_rms

CASES = dict(optional_cases()) | FULL


@pytest.mark.parametrize("name", CASES)
def test_oracle_backward_against_autograd(name: str) -> None:
    """The backward written by hand is the derivative of the forward."""
    layer = CASES[name].layer()
    extras = layer.extras
    weights = [t for w in layer.weights for t in w.present()]
    inputs = (layer.x, layer.h0, layer.c0, extras.reset_h, extras.reset_c)
    leaves = [t.requires_grad_() for t in (*inputs, *weights) if t is not None]
    states = reference.forward(layer)
    grads = random_gradients(states, extras.states)
    results = (*finish(states, layer.x.dtype), states.cells if extras.states else None)
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r is not None]
    expected: Any = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    with torch.no_grad():
        everything = reference.backward(layer, states.saved, grads, all_needs(layer))
    found = [g for g in everything if g is not None]
    assert len(found) == len(expected)
    for own, theirs in zip(found, expected, strict=True):
        assert (
            relative_rms(own, torch.zeros_like(own) if theirs is None else theirs) < TOLERANCES[torch.float64].gradient
        )
