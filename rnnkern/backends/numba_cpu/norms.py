"""LayerNorm of the rows of a step: of the two products before the cell, and of c before its tanh; and back.

y = a * weight + bias with a = (x - mean) / sigma, sigma^2 = variance + EPSILON, mean and variance of a row
da = dy * weight        dx = (da - mean(da) - a * mean(da * a)) / sigma
"""

from rnnkern.backends.numba_cpu.gates import tanh
from rnnkern.backends.numba_cpu.jit import inlined, shared
from rnnkern.backends.numba_cpu.lanes import over_root, row_squares, row_sum, total
from rnnkern.backends.numba_cpu.optional_cells import add_part
from rnnkern.backends.numba_cpu.sweep import padded_bytes
from rnnkern.backends.numba_cpu.vector import (
    broadcast,
    item_bytes,
    load,
    load_part,
    store,
    store_part,
    vector_lanes,
)

EPSILON = 1e-5


@shared
def normalise(row, more, weight, bias, kept, gates, hidden, zero):
    """row (G, W) = LN(row) * weight + bias (+ more, where it is not 0); what the row was goes to `kept` (G, H)."""
    lanes, item, gate_row = vector_lanes(zero), item_bytes(zero), padded_bytes(hidden, zero)
    over_count = 1.0 / (gates * hidden)
    mean = row_sum(row, gates, gate_row, hidden, zero) * over_count
    over_sigma = over_root(row_squares(row, gates, gate_row, hidden, mean, zero) * over_count, EPSILON)
    for gate in range(gates):
        for u in range(0, hidden, lanes):
            at = gate * gate_row + u * item
            before = load(row + at, zero)
            if kept != 0:
                store_part(kept + (gate * hidden + u) * item, before, zero, hidden - u)
            after = (before - mean) * over_sigma * load(weight + at, zero) + load(bias + at, zero)
            if more != 0:
                after = after + load(more + at, zero)
            store(row + at, after)


@shared
def normalised_outputs(beside, v, o, out, hidden, zero):
    """out = o * tanh(LN(v)), an LSTM's."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    mean = row_sum(v, 1, 0, hidden, zero) * (1.0 / hidden)
    over_sigma = over_root(row_squares(v, 1, 0, hidden, mean, zero) * (1.0 / hidden), EPSILON)
    for u in range(0, hidden, lanes):
        at, count = u * item, hidden - u
        weight, bias = load_part(beside.ln_c_weight + at, zero, count), load_part(beside.ln_c_bias + at, zero, count)
        c = (load(v + at, zero) - mean) * over_sigma * weight + bias
        store(out + at, load(o + at, zero) * tanh(c))


@shared
def norm_backward(x, dy, dx, weight, dweight, dbias, extra, count, zero):
    """dx of y = LN(x) * weight + bias, rows of `count` numbers, and adds what the row gives to the sums of the weight's
    gradient, the bias's, and another of the bias's kind; addresses are 0 where nobody asks. dx may be dy."""
    lanes, item = vector_lanes(zero), item_bytes(zero)
    mean = row_sum(x, 1, 0, count, zero) * (1.0 / count)
    over_sigma = over_root(row_squares(x, 1, 0, count, mean, zero) * (1.0 / count), EPSILON)
    sums, along = broadcast(zero), broadcast(zero)
    for u in range(0, count, lanes):
        at, left = u * item, count - u
        normal, gradient = (load_part(x + at, zero, left) - mean) * over_sigma, load_part(dy + at, zero, left)
        if dweight != 0:
            add_part(dweight + at, gradient * normal, zero, left)
        if dbias != 0:
            add_part(dbias + at, gradient, zero, left)
        if extra != 0:
            add_part(extra + at, gradient, zero, left)
        of_normal = gradient * load_part(weight + at, zero, left)
        sums, along = sums + of_normal, along + of_normal * normal
    shift, slope = total(sums) * (1.0 / count), total(along) * (1.0 / count)
    for u in range(0, count, lanes):
        at, left = u * item, count - u
        normal = (load_part(x + at, zero, left) - mean) * over_sigma
        of_normal = load_part(dy + at, zero, left) * load_part(weight + at, zero, left)
        store_part(dx + at, (of_normal - shift - normal * slope) * over_sigma, zero, left)


@inlined
def through_norm_of_c(a, gates, c_prev, dm, share, space, zero):
    """tanh of the normalised c of a row, and what of dm comes back through the norm to c."""
    lanes, item, hidden = vector_lanes(zero), item_bytes(zero), a.sizes.hidden
    slot, v, tanh_v, dv = hidden * item, space + a.step.v, space + a.tanh_v, space + a.dv
    for u in range(0, hidden, lanes):
        at, count = u * item, hidden - u
        i, f = load_part(gates + at, zero, count), load_part(gates + slot + at, zero, count)
        g = load_part(gates + 2 * slot + at, zero, count)
        store(v + at, f * load(c_prev + at, zero) + i * g)
    mean = row_sum(v, 1, 0, hidden, zero) * (1.0 / hidden)
    over_sigma = over_root(row_squares(v, 1, 0, hidden, mean, zero) * (1.0 / hidden), EPSILON)
    for u in range(0, hidden, lanes):
        at, count = u * item, hidden - u
        weight = load_part(a.beside.ln_c_weight + at, zero, count)
        bias = load_part(a.beside.ln_c_bias + at, zero, count)
        t = tanh((load(v + at, zero) - mean) * over_sigma * weight + bias)
        store(tanh_v + at, t)
        store(dv + at, load(dm + at, zero) * load_part(gates + 3 * slot + at, zero, count) * (1.0 - t * t))
    of_weight = a.dln_c_weight + share * slot if a.dln_c_weight != 0 else 0
    of_bias = a.dln_c_bias + share * slot if a.dln_c_bias != 0 else 0
    norm_backward(v, dv, dv, a.beside.ln_c_weight, of_weight, of_bias, 0, hidden, zero)


@inlined
def of_share(address, share, count, zero):
    """Where a share's sum of `count` numbers is, 0 where nobody asks for it."""
    return address + share * count * item_bytes(zero) if address != 0 else 0


@inlined
def norms_backward(a, dgx, dgh, kept, share, gates, separate, zero):
    """The gradients of the two products of a row from those of what LayerNorm made of them."""
    count = gates * a.sizes.hidden
    of_x, of_h = kept, kept + count * item_bytes(zero)
    before = dgh if separate else dgx
    norm_backward(
        of_h, before, dgh, a.beside.ln_hh_weight, of_share(a.dln_hh_weight, share, count, zero),
        of_share(a.dln_hh_bias, share, count, zero), of_share(a.db_hh, share, count, zero), count, zero,
    )  # fmt: skip
    norm_backward(
        of_x, dgx, dgx, a.beside.ln_ih_weight, of_share(a.dln_ih_weight, share, count, zero),
        of_share(a.dln_ih_bias, share, count, zero), of_share(a.db_ih, share, count, zero), count, zero,
    )  # fmt: skip
