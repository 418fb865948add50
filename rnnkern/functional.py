"""Recurrent layers as functions, for those who hold the weights themselves.

The modules do the same with the weights that they hold; what both run is in stack.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern import checks
from rnnkern.cells import CELLS
from rnnkern.options import PLAIN, Options, Zoneout, checked, kind_of, looks_plain
from rnnkern.stack import Call, LayerWeights, one_state, run
from rnnkern.views import States

if TYPE_CHECKING:
    from typing_extensions import Unpack

Input = TypeVar("Input", Tensor, PackedSequence)
Pair = tuple[Tensor, Tensor]


class _Arguments(TypedDict, total=False):
    """The types of the arguments that all functions have, for their overloads."""

    bidirectional: bool
    batch_first: bool
    dropout: float
    training: bool
    lengths: Tensor | None
    backend: str
    input_dropout: float
    recurrent_dropout: float
    weight_dropout: float
    layer_norm: bool
    recompute: bool
    reset: Tensor | None


class _LSTMArguments(_Arguments, total=False):
    zoneout: Zoneout
    peephole: bool
    reset_to: Pair | None


class _GRUArguments(_Arguments, total=False):
    zoneout: float
    reset_after: bool
    reset_to: Tensor | None


class _RNNArguments(_Arguments, total=False):
    nonlinearity: str
    zoneout: float
    reset_to: Tensor | None


def _call(cell: str, who: str, input: Any, hx: States | None, weights: Sequence[Any], call: Call) -> tuple[Any, ...]:
    """Output, final states and with `return_states` all states, for arguments that anyone may have put together."""
    spec = CELLS[cell]
    options = PLAIN if looks_plain(call.options) else checked(kind_of(spec.mode), call.options)
    call = call._replace(options=options)
    directions = 2 if call.bidirectional else 1
    checks.weight_lists(weights, directions, spec, options.peephole, options.layer_norm, who)
    return run(cell, who, input, hx, weights, call)


@overload
def lstm(
    input: Input,
    hx: Pair | None,
    weights: LayerWeights,
    *,
    return_states: Literal[False] = False,
    **arguments: "Unpack[_LSTMArguments]",
) -> tuple[Input, Pair]: ...


@overload
def lstm(
    input: Input,
    hx: Pair | None,
    weights: LayerWeights,
    *,
    return_states: Literal[True],
    **arguments: "Unpack[_LSTMArguments]",
) -> tuple[Input, Pair, Pair]: ...


def lstm(
    input: Any,
    hx: Pair | None,
    weights: LayerWeights,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
    input_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    zoneout: Zoneout = 0.0,
    layer_norm: bool = False,
    peephole: bool = False,
    recompute: bool = False,
    reset: Tensor | None = None,
    reset_to: Pair | None = None,
    return_states: bool = False,
) -> Any:
    r"""Runs a (multi-layer, bidirectional) LSTM over a sequence.

    .. math:: i, f, o = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad g = \tanh(\ldots), \quad
        c_t = f * c_{t-1} + i * g, \quad h_t = o * \tanh(c_t)

    and, with a projection, :math:`h_t = W_{hr} (o * \tanh(c_t))`. The options below change these equations.

    Args:
        input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence.
        hx: (h0, c0) of shapes (layers*directions, B, P) and (layers*directions, B, H), without B when unbatched; None
            for zeros.
        weights: for each layer and direction ``[w_ih (4H, I), w_hh (4H, P), b_ih (4H,), b_hh (4H,), w_hr (P, H)]``,
            biases and projection optional: ``torch.nn.LSTM.all_weights``. P is H, or the size of the projection. Gate
            order i, f, g, o. Then with ``peephole`` w_ch (3H,), and with ``layer_norm`` ln_ih_weight, ln_ih_bias,
            ln_hh_weight, ln_hh_bias (4H,) each, ln_c_weight, ln_c_bias (H,) each.
        bidirectional: ``weights`` hold two directions for each layer.
        batch_first: the batch is the first dimension of input and output.
        dropout: probability for the outputs of each layer but the last, drawn when ``training``.
        training: whether the masks of dropout and zoneout are drawn.
        lengths: (B,) int64, 1 <= length <= T, in any order: the result of packing, without packing. Outputs past a
            length are zero, the final states are those of each sequence's own last step.
        backend: "auto", or one that ``python -m rnnkern`` lists.
        input_dropout: probability p: x_t * m in every layer, m (B, I) drawn once a call, layer and direction, 0 or
            1/(1-p), the same at every step. In training. (Gal and Ghahramani 2016)
        recurrent_dropout: probability: h_{t-1} * m where it meets W_hh, m (B, P) likewise. (Gal and Ghahramani 2016)
        weight_dropout: probability: W_hh * m, m of its shape, drawn once a call. In training. (Merity 2017)
        zoneout: probability z for h and c, or (of h, of c): each unit keeps its old value with probability z, drawn for
            each step and unit in training; z*old + (1-z)*new otherwise. On the projected h. (Krueger 2016)
        layer_norm: LN(W_ih x_t) + b_ih and LN(W_hh h_{t-1}) + b_hh, each over all 4H, and h = o * tanh(LN(c)); c itself
            is carried as it is; eps 1e-5. (Ba 2016)
        peephole: i and f also see p * c_{t-1}, o sees p * c_t; p is w_ch, in the order i, f, o. (Gers 2002)
        recompute: nothing but h and c of each step is kept for backward, which runs forward again: less memory.
        reset: bool (T, B), (B, T) with ``batch_first``, (T,) unbatched: where true, the states of that sequence are
            replaced before that step (at the first one: hx is). One direction, not with a PackedSequence; ignored past
            a length. No value and no gradient of the old state passes.
        reset_to: what by: None for zeros, or (h, c), each (layers, 1, n) or (layers, B, n) for all steps or
            (T, layers, B, n) one for each; time first also with ``batch_first``; without B when unbatched.
        return_states: a third result.

    Returns:
        output (T, B, directions*P) in the form of the input, and (h_n, c_n) in the shapes of ``hx``. With
        ``return_states`` also (h, c) of every step, (T, layers*directions, B, n) whatever the form of the input
        (without B when unbatched), zero past the end of a sequence: h of a layer is its output before any dropout. They
        have the form of ``reset_to``.

    Raises:
        ValueError: input of another rank or dtype, lengths out of range, an unknown backend, a probability outside
            0..1, a reset of another shape or where it has no meaning.
        TypeError: a reset that is no bool tensor.
        RuntimeError: sizes, dtypes or devices that do not fit each other, a sequence of length 0, a backend that cannot
            run here.

    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000; projection: Sak et al. 2014.
    """
    options = Options(
        input_dropout,
        recurrent_dropout,
        weight_dropout,
        zoneout,
        layer_norm=layer_norm,
        peephole=peephole,
        recompute=recompute,
    )
    call = Call(
        bidirectional, batch_first, dropout, training, backend, options, lengths, reset, reset_to, return_states
    )
    return _call("lstm", "lstm", input, hx, weights, call)


@overload
def gru(
    input: Input,
    hx: Tensor | None,
    weights: LayerWeights,
    *,
    return_states: Literal[False] = False,
    **arguments: "Unpack[_GRUArguments]",
) -> tuple[Input, Tensor]: ...


@overload
def gru(
    input: Input,
    hx: Tensor | None,
    weights: LayerWeights,
    *,
    return_states: Literal[True],
    **arguments: "Unpack[_GRUArguments]",
) -> tuple[Input, Tensor, Tensor]: ...


def gru(
    input: Any,
    hx: Tensor | None,
    weights: LayerWeights,
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
    input_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    zoneout: float = 0.0,
    layer_norm: bool = False,
    reset_after: bool = True,
    recompute: bool = False,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
    return_states: bool = False,
) -> Any:
    r"""Runs a (multi-layer, bidirectional) GRU over a sequence.

    .. math:: r, z = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad
        n = \tanh(W_{in} x_t + b_{in} + r * (W_{hn} h_{t-1} + b_{hn})), \quad h_t = (1 - z) * n + z * h_{t-1}

    or, with ``reset_after=False``, :math:`n = \tanh(W_{in} x_t + b_{in} + W_{hn} (r * h_{t-1}) + b_{hn})` (not with
    ``layer_norm``). Arguments, results and errors as for :func:`lstm`, with one state, h, and three gates r, z, n;
    ``zoneout`` is a number, ``layer_norm`` has no weights for c, and there is no ``peephole``.

    Source: Cho et al. 2014, with the reset gate applied after the product, as torch.nn.GRU and cuDNN have it.
    """
    options = Options(
        input_dropout,
        recurrent_dropout,
        weight_dropout,
        zoneout,
        layer_norm=layer_norm,
        reset_after=reset_after,
        recompute=recompute,
    )
    resets = one_state(reset_to)
    call = Call(bidirectional, batch_first, dropout, training, backend, options, lengths, reset, resets, return_states)
    return _one_state_results("gru", "gru", input, hx, weights, call)


@overload
def rnn(
    input: Input,
    hx: Tensor | None,
    weights: LayerWeights,
    *,
    return_states: Literal[False] = False,
    **arguments: "Unpack[_RNNArguments]",
) -> tuple[Input, Tensor]: ...


@overload
def rnn(
    input: Input,
    hx: Tensor | None,
    weights: LayerWeights,
    *,
    return_states: Literal[True],
    **arguments: "Unpack[_RNNArguments]",
) -> tuple[Input, Tensor, Tensor]: ...


def rnn(
    input: Any,
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
    input_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    zoneout: float = 0.0,
    layer_norm: bool = False,
    recompute: bool = False,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
    return_states: bool = False,
) -> Any:
    r"""Runs a (multi-layer, bidirectional) plain RNN over a sequence.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or the relu of the same (``nonlinearity="relu"``). Arguments, results and errors as for :func:`gru`, without
    ``reset_after``; ``recompute`` is refused, since only h is kept anyway.

    Source: Elman 1990.
    """
    checks.nonlinearity(nonlinearity)
    options = Options(
        input_dropout, recurrent_dropout, weight_dropout, zoneout, layer_norm=layer_norm, recompute=recompute
    )
    resets = one_state(reset_to)
    call = Call(bidirectional, batch_first, dropout, training, backend, options, lengths, reset, resets, return_states)
    return _one_state_results(f"rnn_{nonlinearity}", "rnn", input, hx, weights, call)


def _one_state_results(
    cell: str, who: str, input: Any, hx: Tensor | None, weights: LayerWeights, call: Call
) -> tuple[Any, ...]:
    """`_call` of a cell without c."""
    output, *states = _call(cell, who, input, one_state(hx), weights, call)
    return (output, *(h for (h,) in states))
