"""The cells of the optional sweeps, on vectors of units, as cells.py has the plain ones: the LSTM with peepholes
`w_ch`, zoneout of c (a mask or the address of a share, lanes.py) and LayerNorm of c, the others under the same
signature, and the GRU that resets before its last product, which is in two parts.
"""

from rnnkern.backends.numba_cpu.cells import gru_backward, gru_forward, rnn_relu_backward, rnn_tanh_backward
from rnnkern.backends.numba_cpu.gates import sigmoid, tanh
from rnnkern.backends.numba_cpu.jit import inlined
from rnnkern.backends.numba_cpu.lanes import mix, of_new, of_old
from rnnkern.backends.numba_cpu.vector import broadcast, load, load_part, positive_part, store, store_part


@inlined
def lstm_optional_forward(gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, w_ch, zone, share, v, count, zero):
    """Where v is not 0, c is still to be normalised: its new value before zoneout goes there, and o where its
    pre-activation was."""
    before = load(c, zero)
    a_i, a_f = load(gh, zero), load(gh + spacing, zero)
    if w_ch != 0:
        a_i = a_i + load_part(w_ch, zero, count) * before
        a_f = a_f + load_part(w_ch + slot, zero, count) * before
    i, f, g = sigmoid(a_i), sigmoid(a_f), tanh(load(gh + 2 * spacing, zero))
    new = f * before + i * g
    c_new = mix(zone, share, before, new, count, zero)
    a_o = load(gh + 3 * spacing, zero)
    if w_ch != 0:
        a_o = a_o + load_part(w_ch + 2 * slot, zero, count) * c_new
    o = sigmoid(a_o)
    store(c, c_new)
    if gates != 0:
        store_part(gates, i, zero, count)
        store_part(gates + slot, f, zero, count)
        store_part(gates + 2 * slot, g, zero, count)
        store_part(gates + 3 * slot, o, zero, count)
    if cells != 0:
        store_part(cells, c_new, zero, count)
    if v != 0:
        store(v, new)
        store(gh + 3 * spacing, o)
        return o
    return o * tanh(new)


@inlined
def add_part(at, v, zero, count):
    store_part(at, load_part(at, zero, count) + v, zero, count)


@inlined
def lstm_optional_backward(
    dh, gates, slot, cells, c_prev, h, h_prev, dc, w_ch, dw_ch, zone, share, tanh_v, dv, dgx, dgh, m, count, zero
):
    """Where tanh_v is not 0, c was normalised: there is its tanh, and at dv what comes back through the norm."""
    i = load_part(gates, zero, count)
    f = load_part(gates + slot, zero, count)
    g = load_part(gates + 2 * slot, zero, count)
    o = load_part(gates + 3 * slot, zero, count)
    before = load(c_prev, zero)
    if tanh_v != 0:
        tanh_c, through = load(tanh_v, zero), load(dv, zero)
    else:
        tanh_c = tanh(f * before + i * g)
        through = dh * o * (1.0 - tanh_c * tanh_c)
    do = dh * tanh_c * o * (1.0 - o)
    of_c = load(dc, zero)
    if w_ch != 0:
        of_c = of_c + load_part(w_ch + 2 * slot, zero, count) * do
    new = through + of_new(zone, share, of_c, count, zero)
    di, df = new * g * i * (1.0 - i), new * before * f * (1.0 - f)
    dc_prev = new * f + of_old(zone, share, of_c, count, zero)
    if w_ch != 0:
        dc_prev = dc_prev + load_part(w_ch, zero, count) * di + load_part(w_ch + slot, zero, count) * df
    if dw_ch != 0:
        add_part(dw_ch, di * before, zero, count)
        add_part(dw_ch + slot, df * before, zero, count)
        add_part(dw_ch + 2 * slot, do * load_part(cells, zero, count), zero, count)
    store_part(dgx, di, zero, count)
    store_part(dgx + slot, df, zero, count)
    store_part(dgx + 2 * slot, new * i * (1.0 - g * g), zero, count)
    store_part(dgx + 3 * slot, do, zero, count)
    store(dc, dc_prev)
    if m != 0:
        store(m, o * tanh_c)
    return broadcast(zero)


@inlined
def gru_optional_forward(gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, w_ch, zone, share, v, count, zero):
    return gru_forward(gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, count, zero)


@inlined
def gru_optional_backward(
    dh, gates, slot, cells, c_prev, h, h_prev, dc, w_ch, dw_ch, zone, share, tanh_v, dv, dgx, dgh, m, count, zero
):
    return gru_backward(dh, gates, slot, cells, c_prev, h, h_prev, dc, dgx, dgh, m, count, zero)


@inlined
def rnn_tanh_optional_forward(
    gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, w_ch, zone, share, v, count, zero
):
    return tanh(load(gh, zero))


@inlined
def rnn_tanh_optional_backward(
    dh, gates, slot, cells, c_prev, h, h_prev, dc, w_ch, dw_ch, zone, share, tanh_v, dv, dgx, dgh, m, count, zero
):
    return rnn_tanh_backward(dh, gates, slot, cells, c_prev, h, h_prev, dc, dgx, dgh, m, count, zero)


@inlined
def rnn_relu_optional_forward(
    gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, w_ch, zone, share, v, count, zero
):
    return positive_part(load(gh, zero))


@inlined
def rnn_relu_optional_backward(
    dh, gates, slot, cells, c_prev, h, h_prev, dc, w_ch, dw_ch, zone, share, tanh_v, dv, dgx, dgh, m, count, zero
):
    return rnn_relu_backward(dh, gates, slot, cells, c_prev, h, h_prev, dc, dgx, dgh, m, count, zero)


@inlined
def reset_gate(gh, u, ru, zero):
    """The first part of a GRU that resets before its last product: r, where its pre-activation was, and r * u."""
    r = sigmoid(load(gh, zero))
    store(gh, r)
    store(ru, r * load(u, zero))


@inlined
def gru_reset_before_optional_forward(
    gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, w_ch, zone, share, v, count, zero
):
    r, z, n = load(gh, zero), sigmoid(load(gh + spacing, zero)), tanh(load(gh + 2 * spacing, zero))
    if gates != 0:
        store_part(gates, r, zero, count)
        store_part(gates + slot, z, zero, count)
        store_part(gates + 2 * slot, n, zero, count)
    return (1.0 - z) * n + z * load(h_prev, zero)


@inlined
def gru_reset_before_optional_backward(
    dh, gates, slot, cells, c_prev, h, h_prev, dc, w_ch, dw_ch, zone, share, tanh_v, dv, dgx, dgh, m, count, zero
):
    """But for r, whose gradient comes by way of the product with W_hn (`reset_gate_backward`)."""
    z = load_part(gates + slot, zero, count)
    n = load_part(gates + 2 * slot, zero, count)
    store_part(dgx + slot, dh * (load_part(h_prev, zero, count) - n) * z * (1.0 - z), zero, count)
    store_part(dgx + 2 * slot, dh * (1.0 - z) * (1.0 - n * n), zero, count)
    return dh * z


@inlined
def reset_gate_backward(of_ru, gates, u, dgx, count, zero):
    """Of r, from the gradient of r * u; returns what reaches u."""
    r = load_part(gates, zero, count)
    store_part(dgx, of_ru * load(u, zero) * r * (1.0 - r), zero, count)
    return of_ru * r
