"""A model from its layers: built, initialised, moved to torch.nn if asked for, and described layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import rnnkern
from examples.layers import TORCH, Dense, Layer, Recurrent, Shape, Steps, walk


def build(layers: Sequence[Layer], given: Shape, backend: str) -> nn.Sequential:
    """The model for examples of a shape, with Keras's initialisation. The same seed draws the same weights whatever the
    backend.

    Raises:
        ValueError: backend "torch" for a layer with what torch.nn lacks (`torch_has`).
    """
    model = nn.Sequential(*(layer.make(shape, backend) for layer, shape, _ in walk(layers, given)))
    rnnkern.init_keras_(model)
    for layer, module in zip(layers, model, strict=True):
        if isinstance(layer, Dense) and layer.normal:
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    if backend == TORCH:
        use_torch(model)
    return model


def torch_has(layers: Sequence[Layer]) -> bool:
    """Whether torch.nn can compute a model."""
    recurrent = (layer for layer in layers if isinstance(layer, Recurrent))
    return all(layer.reset_after and not layer.recurrent_dropout for layer in recurrent)


def use_torch(model: nn.Module) -> None:
    """Replaces rnnkern's modules inside by torch.nn's with the same parameters."""
    for module in model.modules():
        if isinstance(module, Steps):
            rnn = module.rnn
            assert isinstance(rnn, rnnkern.LSTM | rnnkern.GRU | rnnkern.RNN)
            module.masked, rnn.input_dropout = rnn.input_dropout, 0.0
    rnnkern.to_torch(model)


def counts(module: nn.Module) -> tuple[int, int]:
    """The number of parameters as Keras has them, and as torch has them: Keras has one bias for the two of torch's
    recurrent layers, but for a GRU that resets after the product."""
    total = sum(parameter.numel() for parameter in module.parameters())
    second = sum(
        parameter.numel()
        for inner in module.modules()
        if isinstance(inner, nn.RNNBase | nn.RNNCellBase) and not has_both_biases(inner)
        for name, parameter in inner.named_parameters()
        if name.startswith("bias_hh")
    )
    return total - second, total


def has_both_biases(module: nn.Module) -> bool:
    """Whether Keras's layer of this kind has two biases."""
    is_gru = isinstance(module, nn.GRUCell) or getattr(module, "mode", "") == "GRU"
    return is_gru and getattr(module, "reset_after", True)


def summary(layers: Sequence[Layer], given: Shape, model: nn.Sequential) -> str:
    """A line a layer: what it gives, and its parameters in both conventions."""
    rows = [["layer", "output", "parameters (Keras)", "(torch)"], ["input", str(given), "", ""]]
    for (layer, _, gives), module in zip(walk(layers, given), model, strict=True):
        rows.append([str(layer), str(gives), *(f"{count:,}" for count in counts(module))])
    rows.append(["all", "", *(f"{count:,}" for count in counts(model))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    )
