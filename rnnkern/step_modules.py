"""LSTMCell, GRUCell and RNNCell: one step, with torch.nn's parameters, initialisation, state_dict and repr."""

from typing import Any

import torch
from torch import Tensor

from rnnkern import checks, shortcut
from rnnkern.autograd import apply_layer
from rnnkern.cells import CELLS, CellSpec, Weights
from rnnkern.compat import autocast_dtype
from rnnkern.layer import Settings, plain_operands
from rnnkern.module_base import Shared, attributes
from rnnkern.stack import one_state
from rnnkern.views import States


def _cell_in_autocast(
    spec: CellSpec, dtype: torch.dtype, input: Tensor, hx: States, weights: Weights
) -> tuple[Tensor, States, Weights]:
    """All in one dtype, as torch's cells choose it under autocast: that of the state (c, which rounding at every step
    would spoil), but the autocast dtype for a plain RNN."""
    plain = spec.mode.startswith("RNN") and hx[-1].dtype != torch.float64
    dtype = dtype if plain else hx[-1].dtype
    return input.to(dtype), tuple(s.to(dtype) for s in hx), weights.map(lambda w: w.to(dtype))


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(Shared, torch.nn.RNNCellBase):
    """The part of a *Cell module that does not depend on its cell: one step, which is a sequence of length 1."""

    def _step(self, cell: str, input: Tensor, hx: States | None) -> States:
        flat = attributes(self, _CELL_WEIGHTS if self.bias else _CELL_WEIGHTS[:2])
        if torch.compiler.is_compiling():
            return self._ordinary_step(cell, input, hx, Weights(*flat))
        form = (cell, self.backend, 1, 1, False, True)
        found: States = shortcut.through(
            form, input, hx, flat, lambda: (None, self._ordinary_step(cell, input, hx, Weights(*flat)))
        )[1]
        return found

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

    The equation, the backends and the errors are those of :class:`rnnkern.LSTM`. B = 0 works.
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

    The equation, the backends and the errors are those of :class:`rnnkern.GRU`. B = 0 works.
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

    The equation, the backends and the errors are those of :class:`rnnkern.RNN`. B = 0 works.
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
