"""The nonlinearities on vectors, each by a power of two and a polynomial: no table, no branch, and NaN travels through.

    sigmoid(x) = 1 / (1 + exp(-x))       exp(-x) = 2^n (1 - r + r^2 q(r)),               n = -x / ln2 rounded,
                                                                                         r = x + n ln2
    tanh(x)    = E / (E + 1)             E       = expm1(2x) / 2
                                                 = 2^n (r + r^2 p(r)) + (2^n - 1) / 2,   n = 2x / ln2 rounded,
                                                                                         r = x - n ln2 / 2

E keeps small x exact, where 1 - 2 / (1 + exp(2x)) would lose all of it. The polynomials q and p end where their error
falls under the dtype's rounding: tests/test_numba_gates.py has that of the whole in ulp. tanh saturates to exactly +-1,
sigmoid to exactly 1, and below to numbers too small for a full mantissa, which sweeps flush to 0.
"""

import math
from typing import NamedTuple

import numba
from numba.core import types
from numba.core.extending import overload
from numpy.polynomial import Chebyshev, Polynomial

from rnnkern.backends.numba_cpu.vector import clamp, fma, nearest_power, reciprocal

_LOG2_E = 1.0 / math.log(2.0)


class _Constants(NamedTuple):
    q: tuple[float, ...]  # coefficients, the highest first, with those of -r and 1 behind
    p: tuple[float, ...]
    ln2: tuple[float, float]  # in two parts, the first so short that n times it is exact
    sigmoid_limit: float  # exp of it is finite, and one over that too small for a full mantissa
    tanh_limit: float  # E of it is so large that E + 1 rounds to E


def _series(factor, degree):
    """Coefficients of (exp(factor r) - 1 - factor r) / r^2, the lowest first."""
    return [factor**k / math.factorial(k) for k in range(2, degree + 3)]


def _fit(factor, degree):
    """The same with fewer terms than the series needs, for |factor r| up to ln2 / 2: for float32, whose rounding hides
    that of this computation."""
    bound = math.log(2.0) / 2 / abs(factor)
    whole = Polynomial(_series(factor, 20))
    return Chebyshev.interpolate(whole, degree, [-bound, bound]).convert(kind=Polynomial).coef


def _with_polynomials(q, p, *others):
    return _Constants((*map(float, q[::-1]), -1.0, 1.0), tuple(float(c) / 2 for c in p[::-1]), *others)


_F32 = _with_polynomials(_fit(-1.0, 4), _fit(2.0, 4), (0.693359375, -2.12194440e-4), 88.0, 10.0)
_F64 = _with_polynomials(
    _series(-1.0, 12), _series(2.0, 12), (6.93145751953125e-1, 1.42860682030941723212e-6), 709.0, 21.0
)


def _constants(x):
    return _F32 if x.scalar == types.float32 else _F64


def sigmoid(x):
    """1 / (1 + exp(-x)) of a vector."""


@overload(sigmoid)
def _overload_sigmoid(x):
    constants = _constants(x)
    (first, second), rest, (ln2_high, ln2_low) = constants.q[:2], constants.q[2:], constants.ln2
    limit = constants.sigmoid_limit

    def sigmoid(x):
        x = clamp(x, limit)
        n, power = nearest_power(x, -_LOG2_E)
        r = fma(n, ln2_low, fma(n, ln2_high, x))
        exp = fma(r, first, second)
        for coefficient in numba.literal_unroll(rest):
            exp = fma(exp, r, coefficient)
        return reciprocal(fma(power, exp, 1.0))

    return sigmoid


def tanh(x):
    """tanh of a vector."""


@overload(tanh)
def _overload_tanh(x):
    constants = _constants(x)
    (first, second), rest, (ln2_high, ln2_low) = constants.p[:2], constants.p[2:], constants.ln2
    limit = constants.tanh_limit

    def tanh(x):
        x = clamp(x, limit)
        n, power = nearest_power(x, 2.0 * _LOG2_E)
        r = fma(n, -0.5 * ln2_low, fma(n, -0.5 * ln2_high, x))
        p = fma(r, first, second)
        for coefficient in numba.literal_unroll(rest):
            p = fma(p, r, coefficient)
        e = fma(power, fma(p, r * r, r), fma(power, 0.5, -0.5))
        return e / (e + 1.0)

    return tanh
