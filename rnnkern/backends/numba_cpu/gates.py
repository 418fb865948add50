"""The nonlinearities on vectors, from one range reduction: no table, no branch, one division each, and NaN travels
through.

x = n ln2 + r with |r| <= ln2 / 2, so exp(x) = 2^n exp(r), and expm1(x) = 2^n expm1(r) + (2^n - 1) which keeps small x
exact:

    sigmoid(x) = 1 / (1 + exp(-x))              tanh(x) = expm1(2x) / (expm1(2x) + 2)

expm1(r) is its Taylor polynomial, cut where the next term falls under the dtype's rounding: error in ulp in
tests/test_numba_gates.py. tanh saturates to exactly +-1, sigmoid to exactly 1, and to 0 where exp(-x)
overflows.
"""

import math

import numba
from numba.core import types
from numba.core.extending import overload

from rnnkern.backends.numba_cpu.vector import clamp, fma, nearest_power, overflow

_LOG2_E = 1.0 / math.log(2.0)
# 1/k! for k = 2 up to the last term, ln2 in two parts (the first short enough that n times it is exact), and where to
# saturate: exp(EXP_LIMIT) is finite, and expm1(TANH_LIMIT) + 2 rounds to expm1(TANH_LIMIT).
_F32 = (tuple(1.0 / math.factorial(k) for k in range(7, 1, -1)), 0.693359375, -2.12194440e-4, 87.0, 20.0)
_F64 = (
    tuple(1.0 / math.factorial(k) for k in range(14, 1, -1)),
    6.93145751953125e-1,
    1.42860682030941723212e-6,
    708.0,
    42.0,
)


def _constants(x):
    return _F32 if x.scalar == types.float32 else _F64


def _reduce(x):
    """(2^n, expm1(r)) of the module's docstring."""


@overload(_reduce)
def _overload_reduce(x):
    coefficients, ln2_high, ln2_low, _, _ = _constants(x)
    (first, second), rest = coefficients[:2], coefficients[2:]

    def reduce(x):
        n, power = nearest_power(x, _LOG2_E)
        r = fma(n, -ln2_low, fma(n, -ln2_high, x))
        polynomial = fma(r, first, second)
        for coefficient in numba.literal_unroll(rest):
            polynomial = fma(polynomial, r, coefficient)
        return power, fma(polynomial, r * r, r)

    return reduce


def sigmoid(x):
    """1 / (1 + exp(-x)) of a vector."""


@overload(sigmoid)
def _overload_sigmoid(x):
    limit = _constants(x)[3]

    def sigmoid(x):
        negated = x * -1.0
        power, m = _reduce(clamp(negated, limit))
        return 1.0 / (overflow(negated, limit, fma(power, m, power)) + 1.0)

    return sigmoid


def tanh(x):
    """tanh of a vector."""


@overload(tanh)
def _overload_tanh(x):
    limit = _constants(x)[4]

    def tanh(x):
        power, m = _reduce(clamp(x + x, limit))
        e = fma(power, m, power - 1.0)
        return e / (e + 2.0)

    return tanh
