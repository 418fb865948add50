"""Recurrent layers as functions, for those who hold the weights themselves; the modules call these.

Layers x directions, dropout between layers, packed and padded sequences, batch_first, unbatched input and autocast are
settled here: below, `rnnkern.autograd.apply_layer` sees one layer, time first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from rnnkern import checks, shortcut
from rnnkern.autograd import apply_layer
from rnnkern.backends import backend_names
from rnnkern.cells import CELLS, CellSpec, Weights, named_weights
from rnnkern.compat import autocast_dtype
from rnnkern.layer import Settings, plain_operands

LayerWeights = Sequence[Sequence[Tensor]]
States = tuple[Tensor, ...]
Input = TypeVar("Input", Tensor, PackedSequence)


class _Stack(NamedTuple):
    """What the layers of a call have in common."""

    cell: CellSpec
    who: str  # for messages
    weights: Sequence[Weights]  # layers x directions
    directions: int
    dropout: float
    training: bool
    batch_first: bool
    backend: str

    def state_shapes(self, batch: int) -> list[tuple[int, int, int]]:
        hidden = self.weights[0].weight_hh.shape[0] // len(self.cell.gates)
        units = (self.weights[0].weight_hh.shape[1], hidden)[: self.cell.states]
        return [(len(self.weights), batch, n) for n in units]


def _in_autocast(stack: _Stack, input: Tensor, hx: States | None) -> tuple[_Stack, Tensor, States | None]:
    """Everything in the autocast dtype where autocast is on, float64 excepted as in torch."""
    dtype = autocast_dtype(input.device.type)
    if dtype is None:
        return stack, input, hx

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    weights = [w.map(cast) for w in stack.weights]
    return stack._replace(weights=weights), cast(input), None if hx is None else tuple(map(cast, hx))


def _dropout(stack: _Stack, x: Tensor) -> Tensor:
    """Dropout of x (T, B, n) or (N, n), drawn in this order whatever the layout in memory: the same mask as torch.nn's
    for a seed."""
    if stack.batch_first:
        return x * drop(torch.ones_like(x, memory_format=torch.contiguous_format), stack.dropout, training=True)
    return drop(x, stack.dropout, training=True)


def _layers(
    stack: _Stack, x: Tensor, hx: States, lengths: Tensor | None, batch_sizes: Tensor | None
) -> tuple[Tensor, States]:
    """x (T, B, I) or packed rows through all layers; states (layers*directions, B, units)."""
    settings = Settings(stack.cell.name, stack.backend, stack.batch_first)
    count = stack.directions
    finals: list[States] = []
    for first in range(0, len(stack.weights), count):
        if first and stack.dropout and stack.training:
            x = _dropout(stack, x)
        h0, c0 = hx[0][first : first + count], hx[1][first : first + count] if stack.cell.has_c else None
        weights = tuple(t for w in stack.weights[first : first + count] for t in w.present())
        x, h_n, c_n, _ = apply_layer(settings, plain_operands(x, h0, c0, weights, lengths, batch_sizes))
        finals.append((h_n,) if c_n is None else (h_n, c_n))
    if len(finals) == 1:
        return x, finals[0]
    return x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))


def _initial(stack: _Stack, x: Tensor, hx: States | None, batch: int) -> States:
    """The states given, checked, or zeros."""
    shapes = stack.state_shapes(batch)
    if hx is None:
        return tuple(x.new_zeros(shape) for shape in shapes)
    checks.states(hx, shapes, x, stack.who)
    return hx


def _run_packed(stack: _Stack, input: PackedSequence, hx: States | None) -> tuple[PackedSequence, States]:
    checks.packed(input, stack.who)
    data, batch_sizes, sorted_indices, unsorted_indices = input
    stack, data, hx = _in_autocast(stack, data, hx)
    checks.input_kind(data, stack.weights[0].weight_ih, stack.who)
    states = _initial(stack, data, hx, int(batch_sizes[0]))
    if hx is not None and sorted_indices is not None:
        states = tuple(s.index_select(1, sorted_indices) for s in states)
    y, states = _layers(stack, data, states, None, batch_sizes)
    if unsorted_indices is not None:
        states = tuple(s.index_select(1, unsorted_indices) for s in states)
    return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), states


def _run_padded(stack: _Stack, input: Tensor, hx: States | None, lengths: Tensor | None) -> tuple[Tensor, States]:
    checks.input_rank(input, (2, 3), stack.who)
    unbatched = input.dim() == 2
    if unbatched:
        checks.no_lengths(lengths, "an unbatched input (T, I) is one sequence of its own length T")
        input = input.unsqueeze(0 if stack.batch_first else 1)
        if hx is not None:
            checks.states_rank(hx, 2, stack.who)
            hx = tuple(s.unsqueeze(1) for s in hx)
    stack, input, hx = _in_autocast(stack, input, hx)
    checks.input_kind(input, stack.weights[0].weight_ih, stack.who)
    x = input.transpose(0, 1) if stack.batch_first else input
    if lengths is not None:
        lengths = checks.lengths(lengths, x.shape[1])
    states = _initial(stack, x, hx, x.shape[1])
    y, states = _layers(stack, x, states, lengths, None)
    y = y.transpose(0, 1) if stack.batch_first else y
    if unbatched:
        return y.squeeze(0 if stack.batch_first else 1), tuple(s.squeeze(1) for s in states)
    return y, states


def one_state(hx: Tensor | None) -> States | None:
    """The hx of a cell without c, in the form of all cells."""
    return None if hx is None else (hx,)


class Options(NamedTuple):
    """How a layer or stack of layers is called, apart from its tensors."""

    bidirectional: bool
    batch_first: bool
    dropout: float
    training: bool
    backend: str


def run(
    cell: str,
    who: str,
    input: Tensor | PackedSequence,
    hx: States | None,
    weights: LayerWeights,
    lengths: Tensor | None,
    options: Options,
) -> tuple[Any, States]:
    """What every cell's function and module does; states are tuples here whatever the cell; weights, lists of tensors
    for each layer and direction."""
    if lengths is not None or (options.dropout and options.training) or torch.compiler.is_compiling():
        return _ordinary(cell, who, input, hx, weights, lengths, options)
    directions = 2 if options.bidirectional else 1
    form = (cell, options.backend, len(weights) // directions, directions, options.batch_first, False)
    flat = [weight for layer in weights for weight in layer]
    description = shortcut.describe(form, input, hx, flat)
    plan = shortcut.find(description)
    if plan is not None:
        return plan(input, hx or (), flat)  # type: ignore[arg-type]
    results = _ordinary(cell, who, input, hx, weights, lengths, options)
    shortcut.learn(description, form, input, hx, flat)
    return results


def _ordinary(
    cell: str,
    who: str,
    input: Tensor | PackedSequence,
    hx: States | None,
    weights: LayerWeights,
    lengths: Tensor | None,
    options: Options,
) -> tuple[Any, States]:
    """A call with all its checks."""
    checks.backend_name(options.backend, backend_names())
    stack = _Stack(
        CELLS[cell],
        who,
        [named_weights(CELLS[cell], flat) for flat in weights],
        directions=2 if options.bidirectional else 1,
        dropout=options.dropout,
        training=options.training,
        batch_first=options.batch_first and not isinstance(input, PackedSequence),
        backend=options.backend,
    )
    if isinstance(input, PackedSequence):
        checks.no_lengths(lengths, "a PackedSequence has its own")
        return _run_packed(stack, input, hx)
    return _run_padded(stack, input, hx, lengths)


def _checked(
    cell: str, who: str, input: Any, hx: States | None, weights: Any, lengths: Tensor | None, options: Options
) -> tuple[Any, States]:
    """`run` for weights that anyone may have put together."""
    checks.weight_lists(weights, 2 if options.bidirectional else 1, who)
    return run(cell, who, input, hx, weights, lengths, options)


def lstm(
    input: Input,
    hx: tuple[Tensor, Tensor] | None,
    weights: LayerWeights,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Input, tuple[Tensor, Tensor]]:
    r"""Runs a (multi-layer, bidirectional) LSTM over a sequence.

    .. math:: i, f, o = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad g = \tanh(\ldots), \quad
        c_t = f * c_{t-1} + i * g, \quad h_t = o * \tanh(c_t)

    and, with a projection, :math:`h_t = W_{hr} (o * \tanh(c_t))`.

    Args:
        input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence.
        hx: (h0, c0) of shapes (layers*directions, B, P) and (layers*directions, B, H), without B when unbatched; None
            for zeros.
        weights: for each layer and direction ``[w_ih (4H, I), w_hh (4H, P), b_ih (4H,), b_hh (4H,), w_hr (P, H)]``,
            biases and projection optional: ``torch.nn.LSTM.all_weights``. P is H, or the size of the projection. Gate
            order i, f, g, o.
        bidirectional: ``weights`` hold two directions for each layer.
        batch_first: the batch is the first dimension of input and output.
        dropout: probability for the outputs of each layer but the last, drawn when ``training``.
        lengths: (B,) int64, 1 <= length <= T, in any order: the result of packing, without packing. Outputs past a
            length are zero, the final states are those of each sequence's own last step.
        backend: "auto", or one that ``python -m rnnkern`` lists.

    Returns:
        output (T, B, directions*P) in the form of the input, and (h_n, c_n) in the shapes of ``hx``.

    Raises:
        ValueError: input of another rank or dtype, lengths out of range, an unknown backend.
        RuntimeError: sizes, dtypes or devices that do not fit each other, a sequence of length 0, a backend that cannot
            run here.

    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000; projection: Sak et al. 2014.
    """
    options = Options(bidirectional, batch_first, dropout, training, backend)
    output, (h_n, c_n) = _checked("lstm", "lstm", input, hx, weights, lengths, options)
    return output, (h_n, c_n)


def gru(
    input: Input,
    hx: Tensor | None,
    weights: LayerWeights,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Input, Tensor]:
    r"""Runs a (multi-layer, bidirectional) GRU over a sequence.

    .. math:: r, z = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad
        n = \tanh(W_{in} x_t + b_{in} + r * (W_{hn} h_{t-1} + b_{hn})), \quad h_t = (1 - z) * n + z * h_{t-1}

    Arguments, results and errors as for :func:`lstm`, with one state, h, and three gates r, z, n.

    Source: Cho et al. 2014, with the reset gate applied after the product, as torch.nn.GRU and cuDNN have it.
    """
    options = Options(bidirectional, batch_first, dropout, training, backend)
    output, (h_n,) = _checked("gru", "gru", input, one_state(hx), weights, lengths, options)
    return output, h_n


def rnn(
    input: Input,
    hx: Tensor | None,
    weights: LayerWeights,
    *,
    nonlinearity: str = "tanh",
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Input, Tensor]:
    r"""Runs a (multi-layer, bidirectional) plain RNN over a sequence.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or the relu of the same (``nonlinearity="relu"``). Arguments, results and errors as for :func:`lstm`, with one
    state, h.

    Source: Elman 1990.
    """
    checks.nonlinearity(nonlinearity)
    options = Options(bidirectional, batch_first, dropout, training, backend)
    output, (h_n,) = _checked(f"rnn_{nonlinearity}", "rnn", input, one_state(hx), weights, lengths, options)
    return output, h_n
