"""For those who come from Keras: its layers as modules and back, and its initialisation.

Keras is not imported: a layer is known by its class's name, its `get_config` and its `get_weights`. Keras keeps
matrices the other way round, (I, G*H), and the gates in another order; a GRU that resets after the product has both of
torch's biases, (2, G*H), every other layer one, which is their sum.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rnnkern.modules import GRU, LSTM, RNN
from rnnkern.options import kind_of

Array = NDArray[Any]

# Keras's class -> ours
CLASSES: dict[str, type[LSTM | GRU | RNN]] = {"LSTM": LSTM, "GRU": GRU, "SimpleRNN": RNN}
# The blocks of Keras's weights in our order: it has i f c o, which is ours, and z r h. The same the other way round.
GATES = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "RNN": (0,)}
# What a layer's configuration may say, where rnnkern cannot do everything: the values, and what to do about others.
LIMITS: dict[str, tuple[tuple[object, ...], str]] = {
    "recurrent_activation": (("sigmoid",), "train it anew with that, or write the cell in torch"),
    "go_backwards": ((False,), "give the module the flipped input, x.flip(1)"),
    "stateful": ((False,), "set it to False, and hand the states from call to call, as hx"),
    "time_major": ((False,), "set it to False, and transpose the input"),
    "kernel_regularizer": ((None,), "set it to None, and add the penalty to the loss"),
    "recurrent_regularizer": ((None,), "set it to None, and add the penalty to the loss"),
    "bias_regularizer": ((None,), "set it to None, and add the penalty to the loss"),
    "activity_regularizer": ((None,), "set it to None, and add the penalty to the loss"),
    "kernel_constraint": ((None,), "set it to None, and project weight_ih after each step of the optimizer"),
    "recurrent_constraint": ((None,), "set it to None, and project weight_hh after each step of the optimizer"),
    "bias_constraint": ((None,), "set it to None, and project the biases after each step of the optimizer"),
}
ACTIVATIONS = {"LSTM": ("tanh",), "GRU": ("tanh",), "SimpleRNN": ("tanh", "relu")}
INITIAL = ("kernel_initializer", "recurrent_initializer", "bias_initializer", "unit_forget_bias")
# In what the two layers of a Bidirectional may differ.
OF_ITS_OWN = ("name", "go_backwards", "seed", "zero_output_for_mask", "unroll", *INITIAL)

# What `init_keras_` draws: the modules, and the parameters of recurrent ones.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
DRAWN = (*RECURRENT, nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
OF_KERAS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Read(NamedTuple):
    """What a recurrent layer of Keras is."""

    kind: str
    config: dict[str, Any]
    weights: list[Array]  # kernel (I, G*H), recurrent kernel (H, G*H), with a bias (G*H,) or (2, G*H)


def from_keras(layer: Any) -> LSTM | GRU | RNN:
    """A module with the weights of a built Keras layer: LSTM, GRU (either ``reset_after``), SimpleRNN (tanh or relu),
    or Bidirectional around one of them with ``merge_mode="concat"``.

    The module takes (B, T, I), as Keras does (``batch_first``). ``dropout`` becomes ``input_dropout``, and
    ``recurrent_dropout`` its namesake: one mask a call, sequence and direction for all gates, where Keras, in a layer
    with ``recurrent_dropout`` or ``implementation=1``, draws one for each gate of LSTM and GRU.

    What a call returns does not depend on ``return_sequences`` and ``return_state``: it is always ``(y, states)``. y
    (B, T, H) is what ``return_sequences=True`` gives. Without it Keras gives the last state, which is ``h_n[-1]``, or,
    in both directions, ``torch.cat([h_n[0], h_n[1]], 1)``. Where Keras is given a mask, a call here takes ``lengths=``;
    outputs past a length are 0, as with ``zero_output_for_mask=True``, and the mask has to be one of padding behind.

    Keras's one bias of an LSTM, SimpleRNN or GRU with ``reset_after=False`` becomes ``bias_ih``, and ``bias_hh`` is 0.
    If training goes on, both learn, each at the full rate; ``module.bias_hh_l0.requires_grad_(False)`` leaves one to
    learn, as Keras has it. Initialisers, seed, name and unroll are dropped: they have no say in what the layer
    computes. A layer that is not trainable gives parameters without gradients. The module is in training mode, as every
    new one: ``.eval()`` has no dropout, as Keras's call outside of ``fit``.

    Raises:
        TypeError: another kind of layer.
        ValueError: a layer that is not built, or with something that rnnkern's lacks; the message names it.
    """
    if type(layer).__name__ != "Bidirectional":
        return _module([_read(layer, "")])
    merge = layer.get_config()["merge_mode"]
    if merge != "concat":
        raise ValueError(
            f"merge_mode: expected 'concat', got {merge!r}; merge the halves of y yourself, after from_keras of "
            "the same layer with 'concat'"
        )
    forward, backward = _read(layer.forward_layer, "forward_layer: "), _read(layer.backward_layer, "backward_layer: ")
    ours, theirs = ({k: v for k, v in r.config.items() if k not in OF_ITS_OWN} for r in (forward, backward))
    different = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if forward.kind != backward.kind or different:
        raise ValueError(
            f"backward_layer: expected the same kind and configuration as forward_layer, {forward.kind}, got "
            f"{backward.kind}, different in {sorted(different)}; use two modules, one on x.flip(1)"
        )
    return _module([forward, backward])


def to_keras_weights(module: nn.Module) -> list[Array]:
    """The weights of an LSTM, GRU or RNN of one layer as ``layer.set_weights`` of the Keras layer takes them; in both
    directions, of a Bidirectional. `from_keras` undone.

    Where Keras has one bias for both of torch's, it is their sum.

    Raises:
        TypeError: not one of rnnkern's modules.
        ValueError: several layers, or an option that Keras's layers lack.
    """
    if not isinstance(module, LSTM | GRU | RNN):
        raise TypeError(
            f"module: expected rnnkern's LSTM, GRU or RNN, got {type(module).__name__}; rnnkern.convert makes those of "
            "torch.nn's, and a model's layers are given one by one"
        )
    lacking = {
        name: value
        for name, value in module.options.changed().items()
        if name not in ("input_dropout", "recurrent_dropout", "reset_after", "recompute")
    }
    if module.num_layers > 1:
        lacking["num_layers"] = module.num_layers
    if module.proj_size:
        lacking["proj_size"] = module.proj_size
    if lacking:
        said = ", ".join(f"{name}={value}" for name, value in lacking.items())
        raise ValueError(
            f"module: expected one layer without options that Keras's layers lack, got {said}; stacked layers have to "
            "be modules of their own, and the rest cannot be carried over"
        )
    return [array for names in module._all_weights for array in _keras_arrays(module, [*names])]


def init_keras_(model: nn.Module) -> nn.Module:
    """Draws the weights of a model anew as Keras does by default, in place.

    - Recurrent layers and cells, rnnkern's and torch.nn's: ``weight_ih`` glorot uniform, U(-a, a) with
      a = sqrt(6 / (I + G*H)), the gates being one matrix; ``weight_hh`` with orthonormal columns, one matrix likewise;
      the biases 0, but 1 in ``bias_ih`` for the forget gate of an LSTM. torch.nn draws all of them from
      U(-1/sqrt(H), 1/sqrt(H)), from which a plain RNN learns markedly worse: an orthogonal matrix keeps the length of
      what goes through it, so gradients last over the steps.
    - Linear and convolutions of any kind: glorot uniform, the bias 0.
    - Embedding: U(-0.05, 0.05), but 0 at ``padding_idx``.

    All other parameters stay as they are: of modules of other kinds, peepholes, LayerNorm, projections. Where torch has
    two biases Keras has one for LSTM, SimpleRNN and GRU with ``reset_after=False``: both learn here, so their sum moves
    twice as far in a step of Adam; ``lstm.bias_hh_l0.requires_grad_(False)`` leaves one to learn.

    Returns:
        ``model``.

    Raises:
        ValueError: a weight is parametrised or pruned; initialise first. Nothing has been changed then.

    Source: the defaults of Keras 3's layers; Glorot and Bengio 2010; Saxe et al. 2014.
    """
    chosen = [
        (module, _own_parameters(name, module)) for name, module in model.named_modules() if isinstance(module, DRAWN)
    ]
    for module, parameters in chosen:
        for name, parameter in parameters.items():
            _draw(module, name, parameter)
    return model


def _own_parameters(where: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that Keras's layer has, too."""
    if nn.utils.parametrize.is_parametrized(module) or any(name.endswith("_orig") for name in module._parameters):
        raise ValueError(
            f"{where or 'the model itself'}: expected plain parameters, got {sorted(dict(module.named_parameters()))}: "
            "it is parametrised or pruned; initialise it before that. Nothing was changed"
        )
    found = {name: p for name, p in module._parameters.items() if p is not None}
    return {k: p for k, p in found.items() if k.startswith(OF_KERAS)} if isinstance(module, RECURRENT) else found


@torch.no_grad()
def _draw(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.uniform_(parameter, -0.05, 0.05)
        if module.padding_idx is not None:
            parameter[module.padding_idx] = 0
    elif name.startswith("bias"):
        nn.init.zeros_(parameter)
        if name.startswith("bias_ih") and (isinstance(module, nn.LSTMCell) or getattr(module, "mode", "") == "LSTM"):
            parameter.chunk(4)[1].fill_(1)  # gates i f g o
    elif name.startswith("weight_hh"):
        nn.init.orthogonal_(parameter)
    else:
        nn.init.xavier_uniform_(parameter)


def _read(layer: Any, where: str) -> _Read:
    """A layer of Keras, if rnnkern can compute it; `where` it is begins the message."""
    kind = type(layer).__name__
    if kind not in CLASSES:
        raise TypeError(
            f"layer: expected Keras's {', '.join(CLASSES)} or Bidirectional, got {where}{kind}; a model's layers are "
            "given one by one"
        )
    config: dict[str, Any] = layer.get_config()
    limits = LIMITS | {"activation": (ACTIVATIONS[kind], "train it anew with that, or write the cell in torch")}
    if where.startswith("backward"):
        limits["go_backwards"] = ((True,), "make the Bidirectional of a layer that goes forwards")
    for name, (values, remedy) in limits.items():
        if name in config and config[name] not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"{where}{name}: expected {expected}, got {config[name]!r}; {remedy}")
    weights = layer.get_weights()
    if not weights:
        raise ValueError(f"layer: expected a built layer, got {where}{kind} without weights; call it on an input first")
    if weights[0].dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"{where}weights: expected float16, float32 or float64, got {weights[0].dtype}; give the layer one of those"
        )
    return _Read(kind, config, weights)


def _module(directions: Sequence[_Read]) -> LSTM | GRU | RNN:
    """The module of one direction or both."""
    kind, config, weights = directions[0]
    own: dict[str, Any] = {}
    if kind == "GRU":
        own["reset_after"] = config["reset_after"]
    if kind == "SimpleRNN":
        own["nonlinearity"] = config["activation"]
    module = CLASSES[kind](
        weights[0].shape[0],
        config["units"],
        bias=config["use_bias"],
        batch_first=True,
        bidirectional=len(directions) == 2,
        dtype=torch.from_numpy(weights[0]).dtype,
        input_dropout=config["dropout"],
        recurrent_dropout=config["recurrent_dropout"],
        **own,
    )
    with torch.no_grad():
        for names, read in zip(module._all_weights, directions, strict=True):
            for name, array in zip(names, _torch_arrays(module, read.weights), strict=True):
                getattr(module, name).copy_(torch.from_numpy(array))
    return module.requires_grad_(config.get("trainable", True))


def _reordered(module: LSTM | GRU | RNN, array: Array) -> Array:
    """The blocks of the last dimension in the other library's order."""
    order = GATES[kind_of(module.mode)]
    blocks = np.split(array, len(order), axis=-1)
    return np.concatenate([blocks[k] for k in order], axis=-1)


def _torch_arrays(module: LSTM | GRU | RNN, weights: Sequence[Array]) -> list[Array]:
    """weight_ih, weight_hh and the biases, from Keras's weights."""
    kernel, recurrent, *biases = (_reordered(module, w) for w in weights)
    rows = [kernel.T, recurrent.T]
    for bias in biases:
        rows += [bias[0], bias[1]] if bias.ndim == 2 else [bias, np.zeros_like(bias)]
    return rows


def _keras_arrays(module: LSTM | GRU | RNN, names: Sequence[str]) -> list[Array]:
    """Kernel, recurrent kernel and bias of a direction, from torch's weights."""
    parameters = (getattr(module, name).detach().cpu() for name in names)
    arrays = ((p.float() if p.dtype == torch.bfloat16 else p).numpy() for p in parameters)  # numpy has no bfloat16
    w_ih, w_hh, *biases = (_reordered(module, array.T) for array in arrays)
    if not biases:
        return [w_ih, w_hh]
    both = isinstance(module, GRU) and module.reset_after
    return [w_ih, w_hh, np.stack(biases) if both else biases[0] + biases[1]]
