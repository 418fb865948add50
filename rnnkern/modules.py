"""LSTM, GRU and RNN: torch.nn's parameters, initialisation, state_dict and repr, rnnkern's computation and options.

The layers derive from torch.nn.RNNBase, not from torch.nn.LSTM: TorchDynamo refuses every instance of torch.nn.LSTM,
GRU and RNN.
"""

from collections.abc import Iterable
from math import sqrt
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter, init
from torch.nn.utils.rnn import PackedSequence

from rnnkern import checks
from rnnkern.cells import CELL_OF_MODE, CELLS, own_weight_names, weight_shapes
from rnnkern.module_base import Shared, attributes
from rnnkern.options import PLAIN, Option, Options, Zoneout, checked, kind_of
from rnnkern.stack import Call, one_state, run
from rnnkern.step_modules import GRUCell, LSTMCell, RNNCell
from rnnkern.views import States

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class _Layers(Shared, torch.nn.RNNBase):
    """The part of a layer module that does not depend on its cell."""

    options: Options
    input_dropout, recurrent_dropout, weight_dropout, zoneout = Option(), Option(), Option(), Option()
    layer_norm, peephole, reset_after, recompute = Option(), Option(), Option(), Option()

    def __init__(
        self, mode: str, input_size: int, hidden_size: int, *args: Any, backend: str, options: Options
    ) -> None:
        self._set_backend(backend)
        self.options = checked(kind_of(mode), options)
        super().__init__(mode, input_size, hidden_size, *args)
        self._add_weights()

    def _add_weights(self) -> None:
        """Registers what torch.nn lacks behind all that it has."""
        cell, outputs = CELL_OF_MODE[self.mode], self.proj_size or self.hidden_size
        names = own_weight_names(cell, self.options.peephole, self.options.layer_norm)
        if not names:
            return
        shapes = weight_shapes(cell, self.input_size, self.hidden_size, outputs)
        like: Any = self.weight_ih_l0
        added = []
        for own in self._all_weights:
            suffix = own[0].removeprefix("weight_ih")
            for name in names:
                parameter = Parameter(torch.empty(shapes[name], device=like.device, dtype=like.dtype))
                self.register_parameter(name + suffix, parameter)
                own.append(name + suffix)
                added.append((name + suffix, parameter))
        self._flat_weights_names = [name for own in self._all_weights for name in own]
        self._init_flat_weights()
        self._initialise(added)

    def reset_parameters(self) -> None:
        """Draws all weights anew, but for those of LayerNorm, which become 1, and its biases, 0."""
        self._initialise(self.named_parameters())

    def _initialise(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        bound = 1 / sqrt(self.hidden_size)
        for full_name, parameter in parameters:
            name = full_name.removeprefix("parametrizations.")
            if name.startswith("ln_"):
                init.constant_(parameter, float("_weight_" in name))
            else:
                init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return super().extra_repr() + self.options.text()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("options", PLAIN)  # of a module from before there were any

    def flatten_parameters(self) -> None:
        """Nothing to do: rnnkern's kernels read weights wherever they lie. Kept for code written for torch.nn."""

    def _run(
        self, input: Any, hx: States | None, lengths: Tensor | None, reset: Tensor | None, reset_to: States | None
    ) -> tuple[Any, States]:
        weights = [attributes(self, names) for names in self._all_weights]
        call = Call(
            self.bidirectional,
            self.batch_first,
            self.dropout,
            self.training,
            self.backend,
            self.options,
            lengths,
            reset,
            reset_to,
        )
        return run(CELL_OF_MODE[self.mode].name, type(self).__name__, input, hx, weights, call)


class LSTM(_Layers):
    r"""A (multi-layer, bidirectional) LSTM in place of ``torch.nn.LSTM``.

    .. math:: i, f, o = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad g = \tanh(\ldots), \quad
        c_t = f * c_{t-1} + i * g, \quad h_t = o * \tanh(c_t)

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as in ``torch.nn.LSTM``, with the same parameters, names, shapes and initialisation.
        backend: "auto" (the fastest for the device of the input), or one that ``python -m rnnkern`` lists: it runs,
            or raises.
        input_dropout: probability p: x_t * m in every layer, m (B, I) drawn once a call, layer and direction, 0 or
            1/(1-p), the same at every step. In training. (Gal and Ghahramani 2016)
        recurrent_dropout: probability: h_{t-1} * m where it meets W_hh, m (B, P) likewise. (Gal and Ghahramani 2016)
        weight_dropout: probability: W_hh * m, m of its shape, drawn once a call. In training. (Merity 2017)
        zoneout: probability z for h and c, or (of h, of c): each unit keeps its old value with probability z, drawn for
            each step and unit in training; z*old + (1-z)*new otherwise. On the projected h. (Krueger 2016)
        layer_norm: LN(W_ih x_t) + b_ih and LN(W_hh h_{t-1}) + b_hh, each over all 4H, and h = o * tanh(LN(c)); c itself
            is carried as it is; eps 1e-5. Parameters ln_ih_weight_l0, ln_ih_bias_l0, ln_hh_weight_l0, ln_hh_bias_l0
            (4H,), ln_c_weight_l0, ln_c_bias_l0 (H,) and so on, 1 and 0 at first. (Ba 2016)
        peephole: i and f also see p * c_{t-1}, o sees p * c_t. Parameter weight_ch_l0 (3H,) and so on, in the order
            i, f, o. (Gers 2002)
        recompute: nothing but h and c of each step is kept for backward, which runs forward again: less memory.
        reset_after: of :class:`GRU`.

        All of them can be read as attributes, and changed there but for layer_norm and peephole.

    Call with:
        input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence; in the dtype of the
            weights.
        hx: (h0, c0) of shapes (layers*directions, B, P) and (layers*directions, B, H); without B when unbatched; zeros
            if left out. P is H, or proj_size.
        lengths: (B,) int64, 1 <= length <= T, in any order, for padded input: outputs past a length are zero, the
            final states are each sequence's own, and the reverse direction starts at its end. Not with a
            PackedSequence, not unbatched.
        reset: bool (T, B), (B, T) with ``batch_first``, (T,) unbatched: where true, the states of that sequence are
            replaced before that step (at the first one: hx is). One direction, not with a PackedSequence; ignored past
            a length. No value and no gradient of the old state passes.
        reset_to: what by: zeros if left out, or (h, c), each (layers, 1, n) or (layers, B, n) for all steps or
            (T, layers, B, n) one for each; time first also with ``batch_first``; without B when unbatched.

    Returns:
        output (T, B, directions*P) in the form of the input, and (h_n, c_n) in the shapes of hx.

    Raises:
        ValueError: input of another rank or dtype, lengths out of range, an unknown backend, a probability outside
            0..1, an option that has no meaning for the cell, a reset of another shape or where it has no meaning.
        TypeError: a switch that is no bool, a reset that is no bool tensor.
        RuntimeError: sizes, states or devices that do not fit, a sequence of length 0, a backend that cannot run here.

    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000; proj_size: Sak et al. 2014.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: Zoneout = 0.0,
        layer_norm: bool = False,
        peephole: bool = False,
        recompute: bool = False,
        reset_after: bool = True,
    ) -> None:
        options = Options(
            input_dropout, recurrent_dropout, weight_dropout, zoneout, layer_norm, peephole, reset_after, recompute
        )
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            backend=backend,
            options=options,
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, lengths: None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        output, (h_n, c_n) = self._run(input, hx, lengths, reset, reset_to)
        return output, (h_n, c_n)


class _OneState(_Layers):
    """The layers whose cell carries h alone."""

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, lengths: None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        output, (h_n,) = self._run(input, one_state(hx), lengths, reset, one_state(reset_to))
        return output, h_n


class GRU(_OneState):
    r"""A (multi-layer, bidirectional) GRU in place of ``torch.nn.GRU``.

    .. math:: r, z = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad
        n = \tanh(W_{in} x_t + b_{in} + r * (W_{hn} h_{t-1} + b_{hn})), \quad h_t = (1 - z) * n + z * h_{t-1}

    or, with ``reset_after=False``, :math:`n = \tanh(W_{in} x_t + b_{in} + W_{hn} (r * h_{t-1}) + b_{hn})`, where
    layer_norm is not to be had and dropout of the recurrent input is of :math:`r * (h_{t-1} * m)`.

    Arguments, call, results and errors as for :class:`LSTM`, without proj_size and peephole and with one state: hx is
    h0, reset_to is h, zoneout is a number, layer_norm has no weights for c, and h_n is returned.

    Source: Cho et al. 2014, with the reset gate applied after the product, as torch.nn.GRU and cuDNN have it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        reset_after: bool = True,
        recompute: bool = False,
        peephole: bool = False,
        proj_size: int = 0,
    ) -> None:
        checks.no_projection(proj_size)
        options = Options(
            input_dropout, recurrent_dropout, weight_dropout, zoneout, layer_norm, peephole, reset_after, recompute
        )
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            backend=backend,
            options=options,
        )


class RNN(_OneState):
    r"""A (multi-layer, bidirectional) plain RNN in place of ``torch.nn.RNN``.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or the relu of the same with ``nonlinearity="relu"``. Arguments, call, results and errors as for :class:`GRU`,
    without reset_after and recompute (nothing but h is kept anyway).

    Source: Elman 1990.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        reset_after: bool = True,
        recompute: bool = False,
        peephole: bool = False,
        proj_size: int = 0,
    ) -> None:
        checks.no_projection(proj_size)
        options = Options(
            input_dropout, recurrent_dropout, weight_dropout, zoneout, layer_norm, peephole, reset_after, recompute
        )
        checks.nonlinearity(nonlinearity)
        self.nonlinearity = nonlinearity
        mode = CELLS[f"rnn_{nonlinearity}"].mode
        super().__init__(
            mode,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            backend=backend,
            options=options,
        )
