"""The oracle's equations: one step of every cell, with everything that a layer may be asked for, and its backward
written out by hand, in plain torch. The sweeps over a sequence are in reference.py.

A step meets the states h' and c' of the step before, after a reset, and the pre-activations gx = W_ih x_t + b_ih and
gh = W_hh u + b_hh, (B, G*H) each; u is h', or h' times the recurrent mask. With * elementwise, s the sigmoid:

    LSTM   i, f = s(gx + gh + p*c'),  g = tanh(gx + gh)     v = f*c' + i*g     c = zone(c', v)
           o = s(gx + gh + p*c)                             h = o*tanh(norm(v))
    GRU    r, z = s(gx + gh),  n = tanh(gx_n + r*gh_n)      h = (1-z)*n + z*h'
           reset before the product: n = tanh(gx_n + W_hn (r*u) + b_hn)
    RNN    h = tanh(gx + gh)  or  relu(gx + gh)

p are the peepholes, norm is LayerNorm of c; without them p*c is 0 and norm(v) is v. With LayerNorm the two products are
normalised before their biases come on top: gx = LN(W_ih x_t) + b_ih, over all gates of a row at once, and gh likewise.
zone(old, new) is zoneout: old where the mask is set, or a share of each; h goes through it after any projection.

(LSTM: Hochreiter 1997, Gers 2000; peepholes: Gers 2002. GRU: Cho 2014, reset after the product as in cuDNN. RNN: Elman
1990. Zoneout: Krueger 2016. LayerNorm: Ba 2016.)

Backward, with s' = s(1-s) and tanh' = 1 - tanh^2 in terms of the outputs, dc what reaches c from later steps:

    LSTM   do = dh*tanh(norm(v))*o(1-o);  dc += do*p_o;  dv = norm'(dh*o*(1-tanh(norm(v))^2)) + (dc's part of the new v)
           di = dv*g*i(1-i);  df = dv*c'*f(1-f);  dg = dv*i*(1-g^2)
           dc' = dv*f + (dc's part of the old c') + di*p_i + df*p_f;      dp_i = di*c',  dp_f = df*c',  dp_o = do*c
    GRU    dn = dh*(1-z)*(1-n^2);  dr = dn*gh_n*r(1-r);  dz = dh*(h'-n)*z(1-z);  of gh_n: dn*r;  straight to h': dh*z
           reset before: d(r*u) = dn W_hn;  dr = d(r*u)*u*r(1-r);  to u beside its own product: d(r*u)*r
    RNN    dh*(1-h^2)  or  0 where h <= 0, else dh
    LN     y = w*a + b with a = (x - mean)/sigma:  da = dy*w;  dx = (da - mean(da) - a*mean(da*a))/sigma
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern.cells import CellSpec, Weights

LAYER_NORM_EPSILON = 1e-5


class Zone(NamedTuple):
    """Where a state keeps its old value: by a mask, or with a share of it in each new one."""

    mask: Tensor | None  # (B, n) bool
    share: float

    def mix(self, old: Tensor, new: Tensor) -> Tensor:
        """The state after a step."""
        if self.mask is not None:
            return torch.where(self.mask, old, new)
        return new if self.share == 0 else self.share * old + (1 - self.share) * new

    def split(self, gradient: Tensor) -> tuple[Tensor | int, Tensor]:
        """What of the gradient of `mix` goes to old and to new."""
        if self.mask is not None:
            zero = torch.zeros_like(gradient)
            return torch.where(self.mask, gradient, zero), torch.where(self.mask, zero, gradient)
        return (0, gradient) if self.share == 0 else (self.share * gradient, (1 - self.share) * gradient)


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """LayerNorm of the rows of x; x itself without a weight. Not by torch's function, whose third derivative is wrong
    (tried in torch 2.13)."""
    if weight is None or bias is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPSILON).rsqrt() * weight + bias


class NormGradients(NamedTuple):
    """What `normalised_backward` gives."""

    dx: Tensor
    dweight: Tensor | None  # (B, n): to be summed over rows


def normalised_backward(x: Tensor, weight: Tensor | None, dy: Tensor) -> NormGradients:
    """The gradients of `normalised`; that of the bias is dy."""
    if weight is None:
        return NormGradients(dy, None)
    centred = x - x.mean(-1, keepdim=True)
    over_sigma = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPSILON).rsqrt()
    a, da = centred * over_sigma, dy * weight
    dx = (da - da.mean(-1, keepdim=True) - a * (da * a).mean(-1, keepdim=True)) * over_sigma
    return NormGradients(dx, dy * a)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b."""
    product = x @ weight.t()
    return product if bias is None else product + bias


class Products(NamedTuple):
    """A pre-activation and the product it came from."""

    product: Tensor  # (..., G*H)
    full: Tensor  # (..., G*H): normalised, with its bias


def input_products(x: Tensor, w: Weights) -> Products:
    """gx of rows of x."""
    product = x @ w.weight_ih.t()
    full = normalised(product, w.ln_ih_weight, w.ln_ih_bias)
    return Products(product, full if w.bias_ih is None else full + w.bias_ih)


def recurrent_products(u: Tensor, w: Weights) -> Products:
    """gh of rows of u."""
    product = u @ w.weight_hh.t()
    full = normalised(product, w.ln_hh_weight, w.ln_hh_bias)
    return Products(product, full if w.bias_hh is None else full + w.bias_hh)


class Before(NamedTuple):
    """The states a step starts from, after a reset."""

    h: Tensor  # (B, P)
    c: Tensor | None  # (B, H)
    u: Tensor  # (B, P): h as it meets W_hh


class Step(NamedTuple):
    """One step of the cell, before any projection and zoneout of h."""

    h: Tensor  # (B, H)
    c: Tensor | None  # (B, H)
    saved: tuple[Tensor, ...]  # (B, H) each, as the cell's spec names them


def _peephole(w: Weights, gate: int, x: Tensor) -> Tensor | int:
    """x times the peephole of i, f or o (0, 1, 2); 0, whatever x is, without one."""
    return 0 if w.weight_ch is None else w.weight_ch.chunk(3)[gate] * x


def step(cell: CellSpec, gx: Tensor, gh: Tensor, before: Before, w: Weights, zone_c: Zone) -> Step:
    """The cell's equations. `gh` is not used by the last gate of a cell that resets before the product."""
    if cell.name == "lstm":
        assert before.c is not None
        a_i, a_f, a_g, a_o = (gx + gh).chunk(4, -1)
        i, f = (a_i + _peephole(w, 0, before.c)).sigmoid(), (a_f + _peephole(w, 1, before.c)).sigmoid()
        g = a_g.tanh()
        v = f * before.c + i * g
        c = zone_c.mix(before.c, v)
        o = (a_o + _peephole(w, 2, c)).sigmoid()
        return Step(o * normalised(v, w.ln_c_weight, w.ln_c_bias).tanh(), c, (i, f, g, o))
    if cell.name in ("gru", "gru_reset_before"):
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        if cell.resets_before:
            bias = None if w.bias_hh is None else w.bias_hh.chunk(3)[2]
            n = (xn + linear(r * before.u, w.weight_hh.chunk(3)[2], bias)).tanh()
        else:
            n = (xn + r * hn).tanh()
        saved = (r, z, n) if cell.resets_before else (r, z, n, hn)
        return Step((1 - z) * n + z * before.h, None, saved)
    if cell.name == "rnn_tanh":
        h = (gx + gh).tanh()
        return Step(h, None, (h,))
    if cell.name == "rnn_relu":
        h = (gx + gh).relu()
        return Step(h, None, (h,))
    raise ValueError(f"cell: no equations for {cell.name!r}")


class StepGradients(NamedTuple):
    """What `step_backward` gives."""

    dgx: Tensor  # (B, G*H)
    dgh: Tensor  # (B, G*H)
    dc: Tensor | None  # (B, H): of the c before
    direct: Tensor | int  # (B, H): what of dh reaches the h before past W_hh
    du: Tensor | int = 0  # (B, P): what reaches u past dgh W_hh
    dpeepholes: Tensor | None = None  # (B, 3*H): to be summed over rows
    dnorm: tuple[Tensor, Tensor] | None = None  # (B, H) each, of LayerNorm's weight and bias for c: to be summed


class Around(NamedTuple):
    """The values around a step that its backward reads."""

    saved: tuple[Tensor, ...]
    before: Before
    c: Tensor | None
    zone_c: Zone


def _lstm_backward(at: Around, w: Weights, dh: Tensor, dc: Tensor) -> StepGradients:
    i, f, g, o = at.saved
    c_prev = at.before.c
    assert c_prev is not None
    assert at.c is not None
    v = f * c_prev + i * g
    tanh_v = normalised(v, w.ln_c_weight, w.ln_c_bias).tanh()
    do = dh * tanh_v * o * (1 - o)
    dc_old, dc_new = at.zone_c.split(dc + _peephole(w, 2, do))
    of_norm = dh * o * (1 - tanh_v**2)
    norm = normalised_backward(v, w.ln_c_weight, of_norm)
    dv = norm.dx + dc_new
    di, df, dg = dv * g * i * (1 - i), dv * c_prev * f * (1 - f), dv * i * (1 - g**2)
    dgx = torch.cat([di, df, dg, do], -1)
    return StepGradients(
        dgx,
        dgx,
        dv * f + dc_old + _peephole(w, 0, di) + _peephole(w, 1, df),
        0,
        dpeepholes=None if w.weight_ch is None else torch.cat([di * c_prev, df * c_prev, do * at.c], -1),
        dnorm=None if norm.dweight is None else (norm.dweight, of_norm),
    )


def step_backward(cell: CellSpec, at: Around, w: Weights, dh: Tensor, dc: Tensor | None) -> StepGradients:
    """The gradients of a step from those of its h (before any projection and zoneout) and c."""
    if cell.name == "lstm":
        assert dc is not None
        return _lstm_backward(at, w, dh, dc)
    if cell.name == "gru":
        r, z, n, hn = at.saved
        dn = dh * (1 - z) * (1 - n**2)
        dr, dz = dn * hn * r * (1 - r), dh * (at.before.h - n) * z * (1 - z)
        return StepGradients(torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1), None, dh * z)
    if cell.name == "gru_reset_before":
        r, z, n = at.saved
        dn = dh * (1 - z) * (1 - n**2)
        of_product = dn @ w.weight_hh.chunk(3)[2]
        dr, dz = of_product * at.before.u * r * (1 - r), dh * (at.before.h - n) * z * (1 - z)
        dgx = torch.cat([dr, dz, dn], -1)
        return StepGradients(dgx, dgx, None, dh * z, du=of_product * r)
    if cell.name == "rnn_tanh":
        (h,) = at.saved
        dgx = dh * (1 - h**2)
        return StepGradients(dgx, dgx, None, 0)
    if cell.name == "rnn_relu":
        (h,) = at.saved
        dgx = torch.where(h <= 0, torch.zeros_like(dh), dh)
        return StepGradients(dgx, dgx, None, 0)
    raise ValueError(f"cell: no equations for {cell.name!r}")
