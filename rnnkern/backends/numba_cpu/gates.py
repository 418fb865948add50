"""The nonlinearities on vectors, both by one power of two and one polynomial: no table, no branch, and NaN travels
through.

    exp(-x)    = 2^n exp(-r)             n = -x / ln2 rounded, r = x + n ln2, |r| <= ln2 / 2
    exp(-r)    = 1 - r + r^2 q(r)        q interpolates, or is the series

    sigmoid(x) = 1 / (1 + exp(-x))
    tanh(x)    = u / (2 - u)             u = 1 - exp(-2x) = 2^n (r - r^2 q(r)) + (1 - 2^n), n and r those of 2x

u keeps small x exact, where 2 / (1 + exp(-2x)) - 1 would lose all of it. q ends where its error falls under the dtype's
rounding: tests/test_numba_gates.py has that of the whole in ulp. tanh saturates to exactly +-1, sigmoid to exactly 1,
and below to numbers too small for a full mantissa, which sweeps flush to 0.
"""

import math
from typing import NamedTuple

import numba
from numba.core import types
from numba.core.extending import overload
from numpy.polynomial import Chebyshev, Polynomial

from rnnkern.backends.numba_cpu.vector import clamp, fma, nearest_power, reciprocal

_LOG2_E = 1.0 / math.log(2.0)
_SERIES = [(-1.0) ** k / math.factorial(k) for k in range(2, 21)]  # of q, the lowest first


def _interpolated(degree):
    """q with fewer terms than the series needs: for float32, whose rounding hides that of this computation."""
    bound = math.log(2.0) / 2
    return Chebyshev.interpolate(Polynomial(_SERIES), degree, [-bound, bound]).convert(kind=Polynomial).coef


class _Constants(NamedTuple):
    q: tuple[float, ...]  # coefficients, the highest first
    ln2: tuple[float, float]  # in two parts, the first so short that n times it is exact
    sigmoid_limit: float  # exp of it is finite, one over that too small for a full mantissa
    tanh_limit: float  # of 2x: 1 - exp of it rounds to -exp


_F32 = _Constants(tuple(map(float, _interpolated(4)[::-1])), (0.693359375, -2.12194440e-4), 88.0, 20.0)
_F64 = _Constants(tuple(_SERIES[12::-1]), (6.93145751953125e-1, 1.42860682030941723212e-6), 709.0, 42.0)


def _constants(x):
    return _F32 if x.scalar == types.float32 else _F64


def _reduce(x):
    """(2^n, r, q(r)) of the module's docstring."""


@overload(_reduce)
def _overload_reduce(x):
    constants = _constants(x)
    (first, second), rest, (ln2_high, ln2_low) = constants.q[:2], constants.q[2:], constants.ln2

    def reduce(x):
        n, power = nearest_power(x, -_LOG2_E)
        r = fma(n, ln2_low, fma(n, ln2_high, x))
        q = fma(r, first, second)
        for coefficient in numba.literal_unroll(rest):
            q = fma(q, r, coefficient)
        return power, r, q

    return reduce


def sigmoid(x):
    """1 / (1 + exp(-x)) of a vector."""


@overload(sigmoid)
def _overload_sigmoid(x):
    limit = _constants(x).sigmoid_limit

    def sigmoid(x):
        power, r, q = _reduce(clamp(x, limit))
        return reciprocal(fma(power, fma(fma(q, r, -1.0), r, 1.0), 1.0))

    return sigmoid


def tanh(x):
    """tanh of a vector."""


@overload(tanh)
def _overload_tanh(x):
    limit = _constants(x).tanh_limit

    def tanh(x):
        power, r, q = _reduce(clamp(x + x, limit))
        u = fma(power, fma(q, r * r * -1.0, r), 1.0 - power)
        return u / (2.0 - u)

    return tanh
