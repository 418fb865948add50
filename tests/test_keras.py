"""Our results are those of Keras's layers with the same weights, and so are the gradients and what dropout does.

Keras is in float32: on torch its products are, whatever the dtype. Ours is in float64, so the error is Keras's alone.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from rnnkern import functional
from tests.option_layers import OPTION_BACKENDS
from tests.option_modules import what_is_drawn
from tests.tables import TOLERANCES, relative_rms

B, T, I, H = 4, 6, 3, 5  # noqa: E741
LENGTHS = (3, 6, 1, 4)
CELL: dict[str, Any] = {"use_cudnn": False}  # the equations of Keras's cells, not its ways around them
# Keras's class and arguments, our function and arguments.
LAYERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "lstm": ("LSTM", CELL, "lstm", {}),
    "gru": ("GRU", CELL | {"reset_after": True}, "gru", {"reset_after": True}),
    "gru_reset_before": ("GRU", CELL | {"reset_after": False}, "gru", {"reset_after": False}),
    "rnn_tanh": ("SimpleRNN", {"activation": "tanh"}, "rnn", {"nonlinearity": "tanh"}),
    "rnn_relu": ("SimpleRNN", {"activation": "relu"}, "rnn", {"nonlinearity": "relu"}),
}
# The blocks of Keras's weights that are ours in our order: it has i f c o, which is ours, and z r h.
GATES = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "SimpleRNN": (0,)}

every_layer = pytest.mark.parametrize("name", LAYERS)
every_backend = pytest.mark.parametrize("backend", OPTION_BACKENDS)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


class Pair:
    """A layer of Keras and our function on the very same parameters, so that both give gradients of the same leaves."""

    def __init__(self, keras: Any, name: str, bias: bool = True, **arguments: Any) -> None:
        self.kind, own, self.function, self.options = LAYERS[name]
        self.layer = getattr(keras.layers, self.kind)(
            H, return_sequences=True, return_state=True, zero_output_for_mask=True, use_bias=bias,
            **own, **arguments,
        )  # fmt: skip
        self.layer.build((B, T, I))
        for variable in self.layer.weights:
            variable.assign(torch.randn(variable.shape) * 0.7)
        self.parameters = [variable.value for variable in self.layer.trainable_weights]
        self.x = random(B, T, I)
        self.states = [random(B, H) for _ in range(2 if name == "lstm" else 1)]

    def weights(self) -> list[Tensor]:
        """Ours, from Keras's kernel (I, G*H), recurrent kernel (H, G*H) and bias: (G*H,) is the sum of our two, here
        shared out between them; a GRU that resets after the product has both, (2, G*H)."""
        kernel, recurrent, *biases = self.parameters
        rows = [kernel.t(), recurrent.t()]
        for bias in biases:
            rows += list(bias) if bias.dim() == 2 else [0.25 * bias, 0.75 * bias]
        order = GATES[self.kind]
        return [torch.cat([w.chunk(len(order))[k] for k in order]).double() for w in rows]

    def ours(self, backend: str, **call: Any) -> list[Tensor]:
        """Output and final states."""
        hx = tuple(s.unsqueeze(0).double() for s in self.states)
        y, finals = getattr(functional, self.function)(
            self.x.double(), hx if len(hx) == 2 else hx[0], [self.weights()], batch_first=True, backend=backend,
            **self.options, **call,
        )  # fmt: skip
        return [y, *(s.squeeze(0) for s in (finals if len(hx) == 2 else (finals,)))]

    def keras(self, **call: Any) -> list[Tensor]:
        """The same by Keras."""
        return list(self.layer(self.x, initial_state=self.states, **call))

    def check(self, found: list[Tensor], expected: list[Tensor]) -> None:
        """Results, and gradients of input, initial states and Keras's parameters."""
        limit, leaves = TOLERANCES[torch.float32], [self.x, *self.states, *self.parameters]
        cotangents = [torch.randn_like(r) for r in expected]
        got = torch.autograd.grad(found, leaves, [c.double() for c in cotangents])
        wanted = torch.autograd.grad(expected, leaves, cotangents)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_rms(theirs, ours) <= limit.forward
        for ours, theirs in zip(got, wanted, strict=True):
            assert relative_rms(theirs, ours) <= limit.gradient


@every_backend
@every_layer
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_results_and_gradients(keras: Any, name: str, backend: str, bias: bool) -> None:
    pair = Pair(keras, name, bias)
    assert len(pair.parameters) == 2 + bias
    pair.check(pair.ours(backend), pair.keras())


@every_backend
@every_layer
def test_lengths_are_a_mask(keras: Any, name: str, backend: str) -> None:
    pair, lengths = Pair(keras, name), torch.tensor(LENGTHS)
    mask = torch.arange(T) < lengths.unsqueeze(1)  # (B, T)
    pair.check(pair.ours(backend, lengths=lengths), pair.keras(mask=mask))


@every_backend
@every_layer
@pytest.mark.parametrize("dropped", [("input",), ("recurrent",), ("input", "recurrent")], ids="-".join)
def test_dropout(keras: Any, name: str, backend: str, dropped: tuple[str, ...]) -> None:
    """Keras's cells ask for a mask once a call, too, but LSTM and GRU for one for each gate: here all the same, those
    that were drawn for ours."""
    names = {"input": ("dropout", "input_dropout"), "recurrent": ("recurrent_dropout", "recurrent_dropout")}
    arguments: dict[str, Any] = {names[d][0]: 0.4 for d in dropped}
    if not name.startswith("rnn"):
        arguments["implementation"] = 1  # 2 has one product for all gates, so one mask
    pair = Pair(keras, name, **arguments)
    with what_is_drawn() as drawn:
        found = pair.ours(backend, training=True, **{names[d][1]: 0.4 for d in dropped})
    gates = len(GATES[pair.kind])
    for kind, ask in (("input", "get_dropout_mask"), ("recurrent", "get_recurrent_dropout_mask")):
        mask = getattr(drawn[0], kind)  # (1, B, I) or (1, B, H)
        assert (mask is not None) == (kind in dropped)
        if mask is not None:
            assert mask.unique().tolist() == [0.0, 1 / 0.6]
            mask = mask.float()
            known = mask[0] if gates == 1 else [mask[0]] * gates
            setattr(pair.layer.cell, ask, lambda _, known=known: known)
    pair.check(found, pair.keras(training=True))
    pair.check(pair.ours(backend), pair.keras(training=False))
