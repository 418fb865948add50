"""LayerNorm of the rows of a step: of the two products before the cell, and of c before its tanh; and back.

y = a * weight + bias with a = (x - mean) / sigma, sigma^2 = variance + EPSILON, mean and variance of a row
da = dy * weight        dx = (da - mean(da) - a * mean(da * a)) / sigma

The rows of both products go through a loop together: forward gives their sum where the cell adds them, and their
gradients are then the same.
"""

from typing import NamedTuple

from rnnkern.backends.numba_cpu.gates import tanh
from rnnkern.backends.numba_cpu.jit import inlined, shared
from rnnkern.backends.numba_cpu.lanes import moments, total
from rnnkern.backends.numba_cpu.optional_cells import add_part
from rnnkern.backends.numba_cpu.sweep import behind, padded_bytes
from rnnkern.backends.numba_cpu.vector import (
    broadcast,
    fma,
    item_bytes,
    load,
    load_part,
    store,
    store_part,
    vector_lanes,
)

EPSILON = 1e-5


@shared
def normalise(gx, gh, n_x, n_h, b_x, b_h, of_x, of_h, gates, separate, hidden, zero):
    """gx, gh (G, W) = LN(gx) * n_x + b_x, LN(gh) * n_h + b_h, or only gh = the sum of both, unless the cell wants them
    `separate`; what they were goes to of_x and of_h (G, H), unless these are 0."""
    lanes, item, gate_row = vector_lanes(zero), item_bytes(zero), padded_bytes(hidden, zero)
    mean_x, over_x = moments(gx, gates, gate_row, hidden, EPSILON, zero)
    mean_h, over_h = moments(gh, gates, gate_row, hidden, EPSILON, zero)
    for gate in range(gates):
        for u in range(0, hidden, lanes):
            at = gate * gate_row + u * item
            x, h = load(gx + at, zero), load(gh + at, zero)
            if of_x != 0:
                to = (gate * hidden + u) * item
                store_part(of_x + to, x, zero, hidden - u)
                store_part(of_h + to, h, zero, hidden - u)
            x = fma((x - mean_x) * over_x, load(n_x + at, zero), load(b_x + at, zero))
            h = fma((h - mean_h) * over_h, load(n_h + at, zero), load(b_h + at, zero))
            if separate:
                store(gx + at, x)
                store(gh + at, h)
            else:
                store(gh + at, x + h)


@shared
def normalised_outputs(v, weight, bias, o, out, hidden, zero):
    """out = o * tanh(LN(v) * weight + bias), an LSTM's."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    mean, over_sigma = moments(v, 1, 0, hidden, EPSILON, zero)
    for u in range(0, hidden, lanes):
        at, count = u * item, hidden - u
        normal = (load(v + at, zero) - mean) * over_sigma
        c = fma(normal, load_part(weight + at, zero, count), load_part(bias + at, zero, count))
        store(out + at, load(o + at, zero) * tanh(c))


@inlined
def of_share(address, share, count, zero):
    """Where a share's sum of `count` numbers is, 0 where nobody asks for it."""
    return behind(address, share * count * item_bytes(zero))


class NormSums(NamedTuple):
    """Where a share's sums for the gradients of LayerNorm form, 0 where nobody asks. LayerNorm's bias and the product's
    own have the same gradient, and where the cell adds the two products all four have: one sum is enough."""

    x_weight: int  # (G*H)
    h_weight: int  # (G*H)
    x_bias: int  # (G*H)
    h_bias: int  # (G*H)
    c_weight: int  # (H)
    c_bias: int  # (H)


@inlined
def norm_sums(a, share, gates, separate, zero):
    """The places of an OptionalBackward where sums form."""
    hidden, count = a.sizes.hidden, gates * a.sizes.hidden
    of_x = a.dln_ih_bias if a.dln_ih_bias != 0 else a.db_ih
    of_h = a.dln_hh_bias if a.dln_hh_bias != 0 else a.db_hh
    if not separate:
        of_x = of_h = of_x if of_x != 0 else of_h
    return NormSums(
        of_share(a.dln_ih_weight, share, count, zero),
        of_share(a.dln_hh_weight, share, count, zero),
        of_share(of_x, share, count, zero),
        of_share(of_h, share, count, zero),
        of_share(a.dln_c_weight, share, hidden, zero),
        of_share(a.dln_c_bias, share, hidden, zero),
    )


@shared
def copy_sum(target, source, count, zero):
    """A sum to where else somebody asks for it, if so."""
    if target != 0 and target != source:
        for u in range(0, count, vector_lanes(zero)):
            at = u * item_bytes(zero)
            store_part(target + at, load_part(source + at, zero, count - u), zero, count - u)


@inlined
def end_norm_sums(a, share, gates, separate, zero):
    """Gives the sums of biases to all that have them."""
    count, sums = gates * a.sizes.hidden, norm_sums(a, share, gates, separate, zero)
    copy_sum(of_share(a.dln_ih_bias, share, count, zero), sums.x_bias, count, zero)
    copy_sum(of_share(a.db_ih, share, count, zero), sums.x_bias, count, zero)
    copy_sum(of_share(a.dln_hh_bias, share, count, zero), sums.h_bias, count, zero)
    copy_sum(of_share(a.db_hh, share, count, zero), sums.h_bias, count, zero)


@inlined
def add_to(sums, at, v, zero, count):
    """Adds v to sums, if there are any."""
    if sums != 0:
        add_part(sums + at, v, zero, count)


@inlined
def add_product(sums, at, a, b, zero, count):
    """Adds a * b to sums, if there are any."""
    if sums != 0:
        store_part(sums + at, fma(a, b, load_part(sums + at, zero, count)), zero, count)


@inlined
def through_norm(of_normal, normal, shift, slope, over_sigma):
    """dx from da, a, mean(da) and mean(da * a)."""
    return (of_normal - fma(normal, slope, shift)) * over_sigma


@shared
def through_norm_of_c(gates, c_prev, dm, v, tanh_v, dv, weight, bias, dweight, dbias, hidden, zero):
    """tanh of the normalised c of a row, and what of dm comes back through the norm to c."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    slot = hidden * item
    for u in range(0, hidden, lanes):
        at, count = u * item, hidden - u
        i, f = load_part(gates + at, zero, count), load_part(gates + slot + at, zero, count)
        g = load_part(gates + 2 * slot + at, zero, count)
        store(v + at, f * load(c_prev + at, zero) + i * g)
    mean, over_sigma = moments(v, 1, 0, hidden, EPSILON, zero)
    sums = along = broadcast(zero)
    for u in range(0, hidden, lanes):
        at, count = u * item, hidden - u
        normal, scale = (load(v + at, zero) - mean) * over_sigma, load_part(weight + at, zero, count)
        t = tanh(fma(normal, scale, load_part(bias + at, zero, count)))
        gradient = load(dm + at, zero) * load_part(gates + 3 * slot + at, zero, count) * (1.0 - t * t)
        add_product(dweight, at, gradient, normal, zero, count)
        add_to(dbias, at, gradient, zero, count)
        of_normal = gradient * scale
        store(tanh_v + at, t)
        store(dv + at, of_normal)
        sums, along = sums + of_normal, fma(of_normal, normal, along)
    shift, slope = total(sums) * (1.0 / hidden), total(along) * (1.0 / hidden)
    for u in range(0, hidden, lanes):
        at = u * item
        normal = (load(v + at, zero) - mean) * over_sigma
        store(dv + at, through_norm(load(dv + at, zero), normal, shift, slope, over_sigma))


@shared
def norms_backward(of_x, of_h, dgx, dgh, w_x, w_h, sums, separate, count, zero):
    """The gradients of the two products of a row from those of what LayerNorm made of them, which lie at dgx and, if
    the cell has them `separate`, at dgh. Adds what the row gives to the sums."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    mean_x, over_x = moments(of_x, 1, 0, count, EPSILON, zero)
    mean_h, over_h = moments(of_h, 1, 0, count, EPSILON, zero)
    sums_x = along_x = sums_h = along_h = broadcast(zero)
    for u in range(0, count, lanes):
        at, left = u * item, count - u
        dx = load_part(dgx + at, zero, left)
        dh = load_part(dgh + at, zero, left) if separate else dx
        x = (load_part(of_x + at, zero, left) - mean_x) * over_x
        h = (load_part(of_h + at, zero, left) - mean_h) * over_h
        add_product(sums.x_weight, at, dx, x, zero, left)
        add_product(sums.h_weight, at, dh, h, zero, left)
        add_to(sums.x_bias, at, dx, zero, left)
        if separate:
            add_to(sums.h_bias, at, dh, zero, left)
        dx, dh = dx * load_part(w_x + at, zero, left), dh * load_part(w_h + at, zero, left)
        sums_x, along_x = sums_x + dx, fma(dx, x, along_x)
        sums_h, along_h = sums_h + dh, fma(dh, h, along_h)
    shift_x, slope_x = total(sums_x) * (1.0 / count), total(along_x) * (1.0 / count)
    shift_h, slope_h = total(sums_h) * (1.0 / count), total(along_h) * (1.0 / count)
    for u in range(0, count, lanes):
        at, left = u * item, count - u
        dx = load_part(dgx + at, zero, left)
        dh = load_part(dgh + at, zero, left) if separate else dx
        x = (load_part(of_x + at, zero, left) - mean_x) * over_x
        h = (load_part(of_h + at, zero, left) - mean_h) * over_h
        dx, dh = dx * load_part(w_x + at, zero, left), dh * load_part(w_h + at, zero, left)
        store_part(dgx + at, through_norm(dx, x, shift_x, slope_x, over_x), zero, left)
        store_part(dgh + at, through_norm(dh, h, shift_h, slope_h, over_h), zero, left)
