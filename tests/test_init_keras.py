"""Weights drawn as Keras draws them: against its own initialisers' bounds, and what is left alone."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rnnkern

I, H = 12, 20  # noqa: E741


def uniform_within(parameter: Tensor, bound: float) -> bool:
    """Uniform up to that bound: nothing past it, and something near it."""
    return 0.9 * bound < parameter.abs().max().item() <= bound


@pytest.mark.parametrize("package", [rnnkern, nn], ids=["rnnkern", "torch"])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(package: Any, kind: str, gates: int) -> None:
    layer = getattr(package, kind)(I, H, num_layers=2, bidirectional=True)
    cell = getattr(package, f"{kind}Cell")(I, H)
    model = nn.ModuleList([layer, cell])
    assert rnnkern.init_keras_(model) is model
    for name, weight in model.named_parameters():
        if "weight_ih" in name:
            assert uniform_within(weight, math.sqrt(6 / (weight.shape[1] + gates * H))), name
        elif "weight_hh" in name:
            torch.testing.assert_close(weight.T @ weight, torch.eye(H), msg=name)
        else:
            forget = 1.0 if kind == "LSTM" and "bias_ih" in name else 0.0
            assert weight.tolist() == [forget * (H <= unit < 2 * H) for unit in range(gates * H)], name


def test_other_layers() -> None:
    model = nn.ModuleDict(
        {
            "dense": nn.Linear(30, 50),
            "conv": nn.Conv2d(8, 16, 3),
            "embedding": nn.Embedding(40, 10, padding_idx=3),
            "norm": nn.LayerNorm(4),
        }
    )
    rnnkern.init_keras_(model)
    weights = model.state_dict()
    assert uniform_within(weights["dense.weight"], math.sqrt(6 / 80))
    assert uniform_within(weights["conv.weight"], math.sqrt(6 / (9 * 24)))
    assert uniform_within(weights["embedding.weight"], 0.05)
    assert not weights["embedding.weight"][3].any()
    assert not weights["dense.bias"].any()
    assert not weights["conv.bias"].any()
    assert weights["norm.weight"].tolist() == [1.0] * 4


def test_what_keras_lacks_stays() -> None:
    lstm = rnnkern.LSTM(3, 4, peephole=True, layer_norm=True, proj_size=2, bias=False)
    before = {name: p.clone() for name, p in lstm.named_parameters()}
    rnnkern.init_keras_(lstm)
    changed = {name for name, p in lstm.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"weight_ih_l0", "weight_hh_l0"}


def test_a_parametrised_module_is_refused_before_anything_changes() -> None:
    plain, normed = nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 4))
    before = plain.weight.clone()
    with pytest.raises(ValueError, match=r"^1: expected plain parameters, .*Nothing was changed"):
        rnnkern.init_keras_(nn.Sequential(plain, normed))
    assert torch.equal(plain.weight, before)


# Keras asks its own variables for arrays in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_keras_itself_draws_so(keras: Any, kind: str) -> None:
    """Its weights in the shape of ours: as far from 0, as orthogonal, the same biases."""
    layer = getattr(keras.layers, kind)(H)
    layer.build((None, None, I))
    theirs = rnnkern.from_keras(layer)
    ours = rnnkern.init_keras_(rnnkern.from_keras(layer))
    for name, weight in ours.named_parameters():
        other = getattr(theirs, name)
        if name.startswith("weight_hh"):
            torch.testing.assert_close(other.T @ other, weight.T @ weight)
        elif name.startswith("weight_ih"):
            np.testing.assert_allclose(other.detach().std(), weight.detach().std(), rtol=0.15)
            assert uniform_within(other, math.sqrt(6 / (I + len(weight))))
        else:
            assert torch.equal(other, weight)
