"""Layers of Keras as rnnkern's modules, with the same results and gradients, and their weights back."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rnnkern
from tests.option_modules import what_is_drawn
from tests.tables import TOLERANCES, relative_rms

# Keras asks its own variables for arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

B, T, I, H = 4, 6, 3, 5  # noqa: E741
# Keras's class and arguments.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {"reset_after": True}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
    "rnn_tanh": ("SimpleRNN", {}),
    "rnn_relu": ("SimpleRNN", {"activation": "relu"}),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
both_ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])


def ours(layer: Any) -> Any:
    """The module of a layer, on the backend that has nothing to compile: the others have tests of their own."""
    module = rnnkern.from_keras(layer)
    module.backend = "reference"
    return module


@pytest.fixture
def make(keras: Any) -> Any:
    """Makes a layer of Keras with random weights, biases too."""

    def made(name: str, bidirectional: bool = False, **arguments: Any) -> Any:
        kind, own = LAYERS[name]
        layer = getattr(keras.layers, kind)(H, **({"return_sequences": True, "return_state": True} | own | arguments))
        if bidirectional:
            layer = keras.layers.Bidirectional(layer)
        layer.build((B, T, I))
        layer.set_weights([np.random.default_rng(k).normal(0, 0.5, w.shape) for k, w in enumerate(layer.get_weights())])
        return layer

    return made


def close(layer: Any, module: Any) -> None:
    """The same results and gradients without dropout."""
    x = torch.randn(B, T, I, requires_grad=True)
    y, states = module.eval()(x)
    compare(layer, module, x, y, states, training=False)


def results(y: Tensor, states: Any) -> list[Tensor]:
    """In Keras's order: the output, then the states of each direction."""
    states = states if isinstance(states, tuple) else (states,)
    return [y, *(state[d] for d in range(len(states[0])) for state in states)]


def compare(layer: Any, module: Any, x: Tensor, y: Tensor, states: Any, training: bool) -> None:
    """The module's results for x, and the gradients of x and of the weights as Keras has them, against Keras's."""
    limit = TOLERANCES[torch.float32]
    found, expected = results(y, states), list(layer(x, training=training))
    cotangents = [torch.randn_like(r) for r in expected]
    module.zero_grad()
    (of_input,) = torch.autograd.grad(found, [x], cotangents, retain_graph=True)
    torch.autograd.backward(found, cotangents)
    theirs = torch.autograd.grad(expected, [x, *(v.value for v in layer.trainable_weights)], cotangents)
    gradients = rnnkern.to_keras_weights(with_gradients(module))
    for result, wanted in zip(found, expected, strict=True):
        assert relative_rms(result, wanted) <= limit.forward
    for gradient, wanted in zip([of_input, *map(torch.from_numpy, gradients)], theirs, strict=True):
        assert relative_rms(gradient, wanted) <= limit.gradient


def with_gradients(module: Any) -> Any:
    """A module whose weights are the gradients of this one's, but for the second bias where Keras's one is the sum."""
    one_bias = not (isinstance(module, rnnkern.GRU) and module.reset_after)
    copy = type(module)(I, H, bidirectional=module.bidirectional, bias=module.bias)
    copy.options = module.options
    for name, parameter in module.named_parameters():
        getattr(copy, name).data = torch.zeros_like(parameter) if one_bias and "bias_hh" in name else parameter.grad
    return copy


@both_ways
@every_layer
def test_results_and_gradients(make: Any, name: str, bidirectional: bool) -> None:
    for bias in (True, False):
        layer = make(name, bidirectional, use_bias=bias)
        module = ours(layer)
        assert (module.bias, module.bidirectional, module.batch_first) == (bias, bidirectional, True)
        close(layer, module)
        for back, there in zip(rnnkern.to_keras_weights(module), layer.get_weights(), strict=True):
            np.testing.assert_array_equal(back, there)


@every_layer
def test_the_last_state_is_what_keras_gives_without_sequences(make: Any, name: str) -> None:
    x = torch.randn(B, T, I)
    for bidirectional in (False, True):
        layer = make(name, bidirectional, return_sequences=False, return_state=False)
        _, state = ours(layer)(x)
        h_n = state[0] if isinstance(state, tuple) else state
        assert relative_rms(torch.cat(list(h_n), 1), layer(x)) <= TOLERANCES[torch.float32].forward


@both_ways
@every_layer
def test_training_with_dropout(make: Any, name: str, bidirectional: bool) -> None:
    """With Keras's cached masks set to those drawn for ours."""
    layer = make(name, bidirectional, dropout=0.3, recurrent_dropout=0.4)
    module = ours(layer)
    assert (module.input_dropout, module.recurrent_dropout) == (0.3, 0.4)
    close(layer, module)
    x = torch.randn(B, T, I, requires_grad=True)
    with what_is_drawn() as drawn:
        y, states = module.train()(x)
    gates = {"LSTM": 4, "GRU": 3}.get(LAYERS[name][0], 1)
    directions = [layer.forward_layer, layer.backward_layer] if bidirectional else [layer]
    for k, direction in enumerate(directions):
        for mask, ask in ((drawn[0].input, "get_dropout_mask"), (drawn[0].recurrent, "get_recurrent_dropout_mask")):
            assert mask is not None
            known = mask[k] if gates == 1 else [mask[k]] * gates
            setattr(direction.cell, ask, lambda _, known=known: known)
    compare(layer, module, x, y, states, training=True)


def test_what_trains_and_in_which_type_stays(make: Any) -> None:
    layer = make("gru", dtype="float64")
    layer.trainable = False
    module = ours(layer)
    assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.float64, False)}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lstm", {"activation": "relu"}, r"^activation: expected 'tanh', got 'relu'; train it anew"),
        ("gru", {"recurrent_activation": "hard_sigmoid"}, r"^recurrent_activation: expected 'sigmoid', got 'hard_sig"),
        ("rnn_relu", {"activation": "elu"}, r"^activation: expected 'tanh' or 'relu', got 'elu'"),
        ("lstm", {"go_backwards": True}, r"^go_backwards: expected False, got True; give the module the flipped"),
        ("gru", {"stateful": True}, r"^stateful: expected False, got True; .* hand the states from call to call"),
        ("lstm", {"kernel_regularizer": "l2"}, r"^kernel_regularizer: expected None, got .*L2.* add the penalty"),
        ("lstm", {"bias_constraint": "non_neg"}, r"^bias_constraint: expected None, got .*project the biases"),
    ],
)
def test_what_cannot_be_carried_over(make: Any, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rnnkern.from_keras(make(name, **arguments))


def test_what_is_no_such_layer(keras: Any, make: Any) -> None:
    layers = keras.layers
    with pytest.raises(TypeError, match=r"^layer: expected Keras's LSTM, GRU, SimpleRNN or Bidirectional, got Dense"):
        rnnkern.from_keras(layers.Dense(3))
    with pytest.raises(ValueError, match=r"^layer: expected a built layer, got LSTM without weights"):
        rnnkern.from_keras(layers.LSTM(3))
    with pytest.raises(ValueError, match=r"^merge_mode: expected 'concat', got 'sum'; merge the halves"):
        rnnkern.from_keras(layers.Bidirectional(layers.GRU(3), merge_mode="sum"))
    mixed = layers.Bidirectional(make("lstm"), backward_layer=make("lstm", go_backwards=True, dropout=0.1))
    mixed.build((B, T, I))
    with pytest.raises(ValueError, match=r"^backward_layer: .* LSTM, got LSTM, different in \['dropout'\]"):
        rnnkern.from_keras(mixed)
    inner = layers.Bidirectional(layers.LSTM(3, stateful=True))
    with pytest.raises(ValueError, match=r"^forward_layer: stateful: expected False"):
        rnnkern.from_keras(inner)


def test_what_keras_lacks() -> None:
    with pytest.raises(TypeError, match=r"^module: expected rnnkern's LSTM, GRU or RNN, got LSTM; rnnkern\.convert"):
        rnnkern.to_keras_weights(torch.nn.LSTM(3, 4))
    for arguments, said in (
        ({"num_layers": 2}, "num_layers=2"),
        ({"zoneout": 0.1, "proj_size": 2}, "zoneout=0.1, proj_size=2"),
    ):
        with pytest.raises(ValueError, match=f"got {said}; stacked layers have to be"):
            rnnkern.to_keras_weights(rnnkern.LSTM(3, 4, **arguments))


def test_a_mask_of_padding_is_lengths(make: Any) -> None:
    layer = make("lstm", True, zero_output_for_mask=True)
    module, x, lengths = ours(layer), torch.randn(B, T, I), torch.tensor([3, 6, 1, 4])
    found = results(*module(x, lengths=lengths))
    for result, wanted in zip(found, layer(x, mask=torch.arange(T) < lengths.unsqueeze(1)), strict=True):
        assert relative_rms(result, wanted) <= TOLERANCES[torch.float32].forward


def test_keras_is_not_imported() -> None:
    code = "import sys, rnnkern.keras; assert 'keras' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
