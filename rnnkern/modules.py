"""LSTM, GRU, RNN and their cells: torch.nn's parameters, initialisation, state_dict and repr, rnnkern's computation.

The layers derive from torch.nn.RNNBase, not from torch.nn.LSTM: TorchDynamo refuses every instance of torch.nn.LSTM,
GRU and RNN. Weights are read by attribute at each call, so that parametrisations, weight tying and
torch.func.functional_call are seen.
"""

from collections.abc import Sequence
from typing import Any, NoReturn, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern import checks, shortcut
from rnnkern.autograd import apply_layer
from rnnkern.backends import backend_names
from rnnkern.cells import CELL_OF_MODE, CELLS, CellSpec, Weights
from rnnkern.compat import autocast_dtype
from rnnkern.functional import Options, States, one_state, run
from rnnkern.layer import Settings, plain_operands

NO_SCRIPT = (
    "torch.jit.script cannot compile rnnkern.{}; script the model with torch.nn's own modules, "
    "rnnkern.to_torch(model), or use torch.compile or torch.export"
)


def attributes(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The weights of these names, by the quickest way there is."""
    parameters: dict[str, Any] = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:  # a parametrised or pruned weight is an attribute, not a parameter
        return [getattr(module, name) for name in names]


class _Shared(torch.nn.Module):
    """What the layers and the cells add to torch.nn's base classes."""

    backend: str

    def _set_backend(self, backend: str) -> None:
        checks.backend_name(backend, backend_names())
        self.backend = backend

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("backend", "auto")

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(NO_SCRIPT.format(type(self).__name__))


class _Layers(_Shared, torch.nn.RNNBase):
    """The part of a layer module that does not depend on its cell."""

    def __init__(self, mode: str, input_size: int, hidden_size: int, *args: Any, backend: str, **kwargs: Any) -> None:
        self._set_backend(backend)
        super().__init__(mode, input_size, hidden_size, *args, **kwargs)

    def flatten_parameters(self) -> None:
        """Nothing to do: rnnkern's kernels read weights wherever they lie. Kept for code written for torch.nn."""

    def _run(self, input: Any, hx: States | None, lengths: Tensor | None) -> tuple[Any, States]:
        weights = [attributes(self, names) for names in self._all_weights]
        options = Options(self.bidirectional, self.batch_first, self.dropout, self.training, self.backend)
        return run(CELL_OF_MODE[self.mode].name, type(self).__name__, input, hx, weights, lengths, options)


class LSTM(_Layers):
    r"""A (multi-layer, bidirectional) LSTM in place of ``torch.nn.LSTM``.

    .. math:: i, f, o = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad g = \tanh(\ldots), \quad
        c_t = f * c_{t-1} + i * g, \quad h_t = o * \tanh(c_t)

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as in ``torch.nn.LSTM``, with the same parameters, names, shapes and initialisation.
        backend: "auto" (the fastest for the device of the input), or one that ``python -m rnnkern`` lists: it runs,
            or raises.

    Call with:
        input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence; in the dtype of the
            weights.
        hx: (h0, c0) of shapes (layers*directions, B, P) and (layers*directions, B, H); without B when unbatched; zeros
            if left out. P is H, or proj_size.
        lengths: (B,) int64, 1 <= length <= T, in any order, for padded input: outputs past a length are zero, the
            final states are each sequence's own, and the reverse direction starts at its end. Not with a
            PackedSequence, not unbatched.

    Returns:
        output (T, B, directions*P) in the form of the input, and (h_n, c_n) in the shapes of hx.

    Raises:
        ValueError: input of another rank or dtype, lengths out of range, an unknown backend.
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
    ) -> None:
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
        )

    @overload
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, lengths: None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        output, (h_n, c_n) = self._run(input, hx, lengths)
        return output, (h_n, c_n)


class _OneState(_Layers):
    """The layers whose cell carries h alone."""

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, lengths: None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        output, (h_n,) = self._run(input, one_state(hx), lengths)
        return output, h_n


class GRU(_OneState):
    r"""A (multi-layer, bidirectional) GRU in place of ``torch.nn.GRU``.

    .. math:: r, z = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad
        n = \tanh(W_{in} x_t + b_{in} + r * (W_{hn} h_{t-1} + b_{hn})), \quad h_t = (1 - z) * n + z * h_{t-1}

    Arguments, call, results and errors as for :class:`LSTM`, without proj_size and with one state: hx is h0, and h_n is
    returned.

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
        proj_size: int = 0,
    ) -> None:
        checks.no_projection(proj_size)
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
        )


class RNN(_OneState):
    r"""A (multi-layer, bidirectional) plain RNN in place of ``torch.nn.RNN``.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or the relu of the same with ``nonlinearity="relu"``. Arguments, call, results and errors as for :class:`GRU`.

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
        proj_size: int = 0,
    ) -> None:
        checks.no_projection(proj_size)
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
        )


def _cell_in_autocast(
    spec: CellSpec, dtype: torch.dtype, input: Tensor, hx: States, weights: Weights
) -> tuple[Tensor, States, Weights]:
    """All in one dtype, as torch's cells choose it under autocast: that of the state (c, which rounding at every step
    would spoil), but the autocast dtype for a plain RNN."""
    plain = spec.mode.startswith("RNN") and hx[-1].dtype != torch.float64
    dtype = dtype if plain else hx[-1].dtype
    return input.to(dtype), tuple(s.to(dtype) for s in hx), weights.map(lambda w: w.to(dtype))


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(_Shared, torch.nn.RNNCellBase):
    """The part of a *Cell module that does not depend on its cell: one step, which is a sequence of length 1."""

    def _step(self, cell: str, input: Tensor, hx: States | None) -> States:
        flat = attributes(self, _CELL_WEIGHTS if self.bias else _CELL_WEIGHTS[:2])
        if torch.compiler.is_compiling():
            return self._ordinary_step(cell, input, hx, Weights(*flat))
        form = (cell, self.backend, 1, 1, False, True)
        description = shortcut.describe(form, input, hx, flat)
        plan = shortcut.find(description)
        if plan is not None:
            return plan(input, hx or (), flat)[1]
        states = self._ordinary_step(cell, input, hx, Weights(*flat))
        shortcut.learn(description, form, input, hx, flat)
        return states

    def _ordinary_step(self, cell: str, input: Tensor, hx: States | None, weights: Weights) -> States:
        """A step with all its checks."""
        who, spec = type(self).__name__, CELLS[cell]
        checks.input_rank(input, (1, 2), who)
        unbatched = input.dim() == 1
        if hx is not None:
            checks.cell_states_rank(hx, input.dim(), who)
        if unbatched:
            input, hx = input.unsqueeze(0), None if hx is None else tuple(s.unsqueeze(0) for s in hx)
        if hx is None:
            hx = (input.new_zeros(input.shape[0], weights.weight_hh.shape[1]),) * spec.states
        autocast = autocast_dtype(input.device.type)
        if autocast is not None:
            input, hx, weights = _cell_in_autocast(spec, autocast, input, hx, weights)
        checks.cell_input(input, weights.weight_ih, who)
        checks.cell_states(hx, spec.states, input, weights.weight_hh.shape[1], who)
        h0, c0 = hx[0].unsqueeze(0), hx[1].unsqueeze(0) if spec.has_c else None
        operands = plain_operands(input.unsqueeze(0), h0, c0, tuple(weights.present()))
        results = apply_layer(Settings(cell, self.backend, False), operands)
        states = tuple(state[0] for state in (results.h_n, results.c_n) if state is not None)
        return tuple(s.squeeze(0) for s in states) if unbatched else states


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """One step of an LSTM in place of ``torch.nn.LSTMCell``: input (B, I) or (I,), hx (h, c) of (B, H) or (H,), returns
    (h, c).

    The equation, the backends and the errors are those of :class:`LSTM`. B = 0 works.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        self._set_backend(backend)
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = self._step("lstm", input, hx)
        return h, c


class GRUCell(_Cell, torch.nn.GRUCell):
    """One step of a GRU in place of ``torch.nn.GRUCell``: input (B, I) or (I,), hx (B, H) or (H,), returns the new h.

    The equation, the backends and the errors are those of :class:`GRU`. B = 0 works.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        self._set_backend(backend)
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        (h,) = self._step("gru", input, one_state(hx))
        return h


class RNNCell(_Cell, torch.nn.RNNCell):
    """One step of a plain RNN in place of ``torch.nn.RNNCell``: input (B, I) or (I,), hx (B, H) or (H,), returns the
    new h.

    The equation, the backends and the errors are those of :class:`RNN`. B = 0 works.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        checks.nonlinearity(nonlinearity)
        self._set_backend(backend)
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        (h,) = self._step(f"rnn_{self.nonlinearity}", input, one_state(hx))
        return h
