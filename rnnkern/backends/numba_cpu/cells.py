"""The cells on vectors of units. `reference.py` has the same equations and their derivation in plain torch.

A forward cell reads its pre-activations, gate by gate, at `gh` (`spacing` bytes apart), which is their sum where the
cell adds the two products (not `spec.separate` in rnnkern/cells.py), and else also at `gx` (`x_spacing` bytes apart);
updates the carried `c` in place, saves what backward needs unless `gates` is 0, and returns the new hidden units. A
backward cell turns `dh`, the gradient of those units, into the gradients of the pre-activations and returns the part of
dh that reaches h_{t-1} past the product with W_hh; a cell that can be projected leaves its output at `m`, unless that
is 0. Saved gates and their gradients lie `slot` bytes apart; `count` units are real.
"""

from rnnkern.backends.numba_cpu.gates import sigmoid, tanh
from rnnkern.backends.numba_cpu.jit import inlined
from rnnkern.backends.numba_cpu.vector import (
    broadcast,
    load,
    load_part,
    positive_part,
    store,
    store_part,
    unless_negative,
)


@inlined
def lstm_forward(gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, count, zero):
    i = sigmoid(load(gh, zero))
    f = sigmoid(load(gh + spacing, zero))
    g = tanh(load(gh + 2 * spacing, zero))
    o = sigmoid(load(gh + 3 * spacing, zero))
    c_new = f * load(c, zero) + i * g
    store(c, c_new)
    if gates != 0:
        store_part(gates, i, zero, count)
        store_part(gates + slot, f, zero, count)
        store_part(gates + 2 * slot, g, zero, count)
        store_part(gates + 3 * slot, o, zero, count)
        store_part(cells, c_new, zero, count)
    return o * tanh(c_new)


@inlined
def lstm_backward(dh, gates, slot, cells, c_prev, h, h_prev, dc, dgx, dgh, m, count, zero):
    i = load_part(gates, zero, count)
    f = load_part(gates + slot, zero, count)
    g = load_part(gates + 2 * slot, zero, count)
    o = load_part(gates + 3 * slot, zero, count)
    tanh_c = tanh(load_part(cells, zero, count))
    dc_new = load(dc, zero) + dh * o * (1.0 - tanh_c * tanh_c)
    store_part(dgx, dc_new * g * i * (1.0 - i), zero, count)
    store_part(dgx + slot, dc_new * load_part(c_prev, zero, count) * f * (1.0 - f), zero, count)
    store_part(dgx + 2 * slot, dc_new * i * (1.0 - g * g), zero, count)
    store_part(dgx + 3 * slot, dh * tanh_c * o * (1.0 - o), zero, count)
    store(dc, dc_new * f)
    if m != 0:
        store(m, o * tanh_c)
    return broadcast(zero)


@inlined
def gru_forward(gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, count, zero):
    r = sigmoid(load(gx, zero) + load(gh, zero))
    z = sigmoid(load(gx + x_spacing, zero) + load(gh + spacing, zero))
    hn = load(gh + 2 * spacing, zero)
    n = tanh(load(gx + 2 * x_spacing, zero) + r * hn)
    if gates != 0:
        store_part(gates, r, zero, count)
        store_part(gates + slot, z, zero, count)
        store_part(gates + 2 * slot, n, zero, count)
        store_part(gates + 3 * slot, hn, zero, count)
    return (1.0 - z) * n + z * load(h_prev, zero)


@inlined
def gru_backward(dh, gates, slot, cells, c_prev, h, h_prev, dc, dgx, dgh, m, count, zero):
    r = load_part(gates, zero, count)
    z = load_part(gates + slot, zero, count)
    n = load_part(gates + 2 * slot, zero, count)
    hn = load_part(gates + 3 * slot, zero, count)
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dr = dn * hn * r * (1.0 - r)
    dz = dh * (load_part(h_prev, zero, count) - n) * z * (1.0 - z)
    store_part(dgx, dr, zero, count)
    store_part(dgx + slot, dz, zero, count)
    store_part(dgx + 2 * slot, dn, zero, count)
    store_part(dgh, dr, zero, count)
    store_part(dgh + slot, dz, zero, count)
    store_part(dgh + 2 * slot, dn * r, zero, count)
    return dh * z


@inlined
def rnn_tanh_forward(gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, count, zero):
    return tanh(load(gh, zero))


@inlined
def rnn_tanh_backward(dh, gates, slot, cells, c_prev, h, h_prev, dc, dgx, dgh, m, count, zero):
    h_new = load_part(h, zero, count)
    store_part(dgx, dh * (1.0 - h_new * h_new), zero, count)
    return broadcast(zero)


@inlined
def rnn_relu_forward(gx, x_spacing, gh, spacing, gates, slot, cells, c, h_prev, count, zero):
    return positive_part(load(gh, zero))


@inlined
def rnn_relu_backward(dh, gates, slot, cells, c_prev, h, h_prev, dc, dgx, dgh, m, count, zero):
    store_part(dgx, unless_negative(load_part(h, zero, count), dh), zero, count)
    return broadcast(zero)
