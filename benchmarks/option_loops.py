"""A layer with an option as a loop over steps in torch: what people write where torch.nn lacks it.

Around torch's cell where the option leaves the cell as it is, else with the step written out. Three things are in
favour of the loop: it calls the function that torch.nn's cells call, without a module around it; it draws its masks as
rnnkern does, which is some 7 times quicker than bernoulli_; and it slices and masks weights once a call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from rnnkern import masks
from rnnkern.cells import CELL_OF_MODE, CELLS, Weights
from rnnkern.options import cell_name

States = tuple[Tensor, ...]  # h, and c of an LSTM, (B, H) each
# x_t (B, I), the states before, and h as it meets W_hh -> the states after
Step = Callable[[Tensor, States, Tensor], States]


def cell_step(kind: str, w: Weights) -> Step:
    """By torch's cell, in which u is all that is left of h."""
    w_ih, w_hh, b_ih, b_hh = w[:4]
    if kind == "lstm":
        return lambda x, before, u: torch.lstm_cell(x, (u, before[1]), w_ih, w_hh, b_ih, b_hh)
    cell = torch.gru_cell if kind == "gru" else torch.rnn_tanh_cell
    return lambda x, before, u: (cell(x, u, w_ih, w_hh, b_ih, b_hh),)


def products(w: Weights, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The pre-activations gx and gh, (B, G*H) each."""
    gx = product(x, w.weight_ih, w.bias_ih, w.ln_ih_weight, w.ln_ih_bias)
    return gx, product(u, w.weight_hh, w.bias_hh, w.ln_hh_weight, w.ln_hh_bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x W^T + b; with LayerNorm's weights LN(x W^T) + b."""
    if scale is None:
        return linear(x, weight, bias)
    normalised = layer_norm(linear(x, weight), scale.shape, scale, shift)
    return normalised if bias is None else normalised + bias


def lstm_step(w: Weights) -> Step:
    """An LSTM's, with LayerNorm or peepholes."""
    peepholes = None if w.weight_ch is None else w.weight_ch.chunk(3)

    def step(x: Tensor, before: States, u: Tensor) -> States:
        gx, gh = products(w, x, u)
        i, f, g, o = (gx + gh).chunk(4, -1)
        c = before[1]
        if peepholes is not None:
            i, f = i + peepholes[0] * c, f + peepholes[1] * c
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if peepholes is not None:
            o = o + peepholes[2] * c
        seen = c if w.ln_c_weight is None else layer_norm(c, w.ln_c_weight.shape, w.ln_c_weight, w.ln_c_bias)
        return o.sigmoid() * seen.tanh(), c

    return step


def gru_step(w: Weights) -> Step:
    """A GRU's that resets after the product, with LayerNorm or with a mask where h meets W_hh and nowhere else."""

    def step(x: Tensor, before: States, u: Tensor) -> States:
        gx, gh = products(w, x, u)
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        return (n + z * (before[0] - n),)

    return step


def reset_before_step(w: Weights) -> Step:
    """A GRU's that resets before the product."""
    hidden = w.weight_hh.shape[1]
    gates, last = w.weight_hh.split([2 * hidden, hidden])
    gates_bias, last_bias = (None, None) if w.bias_hh is None else w.bias_hh.split([2 * hidden, hidden])

    def step(x: Tensor, before: States, u: Tensor) -> States:
        xr, xz, xn = linear(x, w.weight_ih, w.bias_ih).chunk(3, -1)
        hr, hz = linear(u, gates, gates_bias).chunk(2, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + linear(r * u, last, last_bias)).tanh()
        return (n + z * (before[0] - n),)

    return step


def rnn_step(w: Weights) -> Step:
    """A plain RNN's with LayerNorm."""

    def step(x: Tensor, before: States, u: Tensor) -> States:
        gx, gh = products(w, x, u)
        return ((gx + gh).tanh(),)

    return step


WRITTEN = {"lstm": lstm_step, "gru": gru_step, "gru_reset_before": reset_before_step, "rnn_tanh": rnn_step}


class Loop(nn.Module):
    """The loop of a layer of rnnkern's with one direction: its own copy of the parameters, by the same names."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.options = layer.options
        self.spec = CELLS[cell_name(CELL_OF_MODE[layer.mode].name, layer.options)]
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def weights(self) -> Weights:
        """The parameters of the layer."""
        own = {name.removesuffix("_l0"): tensor for name, tensor in self.named_parameters()}
        return Weights(**{name: tensor for name, tensor in own.items() if name in Weights._fields})

    def step(self, w: Weights, masked: bool) -> Step:
        """The cell's step; `masked` if what meets W_hh is not h."""
        written = self.options.layer_norm or self.options.peephole or self.spec.resets_before
        kept_beside = self.spec.name == "gru" and masked  # (1-z)*n + z*h has h itself
        return WRITTEN[self.spec.name](w) if written or kept_beside else cell_step(self.spec.name, w)

    def forward(
        self, x: Tensor, *, reset: Tensor | None = None, reset_to: Any = None, return_states: bool = False
    ) -> tuple[Tensor, Any]:
        """Output (T, B, H) and final states, by name and with those of all steps if asked for; x (T, B, I), reset
        (T, B), reset_to (1, 1, H) or a pair of it."""
        w, drawn = self.weights(), masks.Masks()
        if self.training:
            drawn = masks.draw(masks.wanted(self.spec, self.options, x, x.shape[1], [w]), x)
            (w,) = masks.drop_weights([w], drawn)
        x = x if drawn.input is None else x * drawn.input[0]
        factor = None if drawn.recurrent is None else drawn.recurrent[0]
        step, zone, renew = self.step(w, factor is not None), self.zone(drawn), renewal(reset, reset_to)
        states: States = tuple(x.new_zeros(x.shape[1], w.weight_hh.shape[1]) for _ in range(self.spec.states))
        every: list[States] = []
        for t, x_t in enumerate(x.unbind(0)):
            before = renew(t, states)
            u = before[0] if factor is None else before[0] * factor
            states = zone(t, before, step(x_t, before, u))
            every.append(states)
        output, finals = torch.stack([h for h, *_ in every]), tuple(state.unsqueeze(0) for state in states)
        if not return_states:
            return output, finals
        cells = [torch.stack([c for _, c in every]).unsqueeze(1)] if self.spec.has_c else []
        return output, all_named(finals, (output.unsqueeze(1), *cells))

    def zone(self, drawn: masks.Masks) -> Callable[[int, States, States], States]:
        """Zoneout of the states after step t."""
        shares = self.options.zones(self.spec)[: self.spec.states]
        if not any(shares):
            return lambda t, old, new: new
        if not self.training:
            return lambda t, old, new: tuple(
                z * before + (1 - z) * after for z, before, after in zip(shares, old, new, strict=True)
            )
        keeps = [mask.unbind(0) for mask in (drawn.zoneout_h, drawn.zoneout_c) if mask is not None]
        return lambda t, old, new: tuple(
            torch.where(keep[t], before, after) for keep, before, after in zip(keeps, old, new, strict=True)
        )


def renewal(reset: Tensor | None, reset_to: Any) -> Callable[[int, States], States]:
    """What becomes of the states before step t: zeros, or those of `reset_to`, where `reset` says so."""
    if reset is None:
        return lambda t, states: states
    if reset_to is None:
        going_on = (~reset).to(torch.get_default_dtype()).unsqueeze(-1).unbind(0)
        return lambda t, states: tuple(state * going_on[t] for state in states)
    begins = reset.unsqueeze(-1).unbind(0)
    first = [start[0] for start in (reset_to if isinstance(reset_to, tuple) else (reset_to,))]
    return lambda t, states: tuple(
        torch.where(begins[t], start, state) for start, state in zip(first, states, strict=True)
    )


def all_named(finals: States, every: States = ()) -> dict[str, Tensor]:
    """Final states (1, B, H) and those of all steps (T, 1, B, H) by name."""
    names = ("h", "c")
    found = {f"{name}_n": state for name, state in zip(names, finals, strict=False)}
    return found | {f"{name} of all steps": states for name, states in zip(names, every, strict=False)}
