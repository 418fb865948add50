"""The vector nonlinearities of the Numba backend against a higher precision, and vectors at ragged ends."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from rnnkern.backends.numba_cpu.gates import sigmoid, tanh
from rnnkern.backends.numba_cpu.vector import (
    VECTOR_BYTES,
    item_bytes,
    load_part,
    positive_part,
    store_part,
    unless_negative,
    vector_lanes,
)

Array = npt.NDArray[Any]
DTYPES = [np.float32, np.float64]
ULP = 3.0  # measured: sigmoid below 2, tanh below 2.5
GUARD = -12345.0
# Below, sigmoid is too small for a full mantissa: sweeps flush it to 0.
SIGMOID_LOW = {np.float32: -87.0, np.float64: -708.0}


def _apply(which: Any, x: Any, y: Any, count: Any, zero: Any) -> None:
    lanes, item = vector_lanes(zero), item_bytes(zero)
    for i in range(0, count, lanes):
        v = load_part(x + i * item, zero, count - i)
        if which == 0:
            out = sigmoid(v)
        elif which == 1:
            out = tanh(v)
        elif which == 2:
            out = positive_part(v)
        else:
            out = unless_negative(v, v + 1.0)
        store_part(y + i * item, out, zero, count - i)


_compiled = numba.njit(_apply)
FUNCTIONS = ("sigmoid", "tanh", "positive_part", "unless_negative")


def apply(name: str, x: Array) -> Array:
    y = np.empty_like(x)
    _compiled(FUNCTIONS.index(name), x.ctypes.data, y.ctypes.data, x.size, x.dtype.type(0))
    return y


def exact(name: str, x: Array) -> Array:
    wide = x.astype(np.longdouble)
    with np.errstate(over="ignore"):
        return np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))


def error_in_ulp(name: str, x: Array) -> float:
    want = exact(name, x)
    return float(np.max(np.abs(apply(name, x) - want) / np.spacing(np.abs(want).astype(x.dtype))))


def every_magnitude(dtype: Any) -> Array:
    """Finite numbers of all signs and exponents: bit patterns an odd step apart."""
    bits: Array
    if dtype == np.float32:
        bits = np.arange(0, 2**32, 8191, dtype=np.uint64).astype(np.uint32)
    else:
        bits = np.arange(0, 2**64 - 2**45, (2**64 // 400_000) | 1, dtype=np.uint64)
    x: Array = bits.view(dtype)
    return x[np.isfinite(x)]


def in_range(name: str, x: Array) -> Array:
    return x[x > SIGMOID_LOW[x.dtype.type]] if name == "sigmoid" else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
class TestError:
    def test_every_magnitude(self, name: str, dtype: Any) -> None:
        assert error_in_ulp(name, in_range(name, every_magnitude(dtype))) <= ULP

    def test_dense_where_it_bends(self, name: str, dtype: Any) -> None:
        assert error_in_ulp(name, np.linspace(-50, 50, 400_001).astype(dtype)) <= ULP

    def test_random(self, name: str, dtype: Any) -> None:
        rng = np.random.default_rng(0)
        x = np.concatenate([rng.standard_normal(200_000) * scale for scale in (0.01, 1, 5)]).astype(dtype)
        assert error_in_ulp(name, x) <= ULP

    def test_small_arguments_keep_their_relative_accuracy(self, name: str, dtype: Any) -> None:
        x = np.array([1e-4, -1e-4, 3e-7, 1e-20, -1e-30], dtype)
        assert error_in_ulp(name, x) <= ULP
        if name == "tanh":  # 1 - 2 / (1 + exp(2x)) would lose all of it
            np.testing.assert_allclose(apply(name, x)[2:], x[2:], rtol=1e-12 if dtype == np.float64 else 3e-7)

    def test_nan_stays(self, name: str, dtype: Any) -> None:
        x = np.array([np.nan, 1, -np.nan, 0], dtype)
        assert np.isnan(apply(name, x)).tolist() == [True, False, True, False]

    def test_monotonic_ends(self, name: str, dtype: Any) -> None:
        y = apply(name, np.array([-np.inf, -1e30, -1000, -50, 50, 1000, 1e30, np.inf], dtype))
        assert (np.diff(y) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_saturates_to_exactly_one(dtype: Any) -> None:
    x = np.array([25, 1000, np.finfo(dtype).max, np.inf], dtype)
    assert apply("tanh", x).tolist() == [1.0] * 4
    assert apply("tanh", -x).tolist() == [-1.0] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_saturates_to_exactly_one_and_to_what_is_flushed(dtype: Any) -> None:
    x = np.array([60, 1000, np.finfo(dtype).max, np.inf], dtype)
    assert apply("sigmoid", x).tolist() == [1.0] * 4
    assert (apply("sigmoid", np.array([-1000, -np.finfo(dtype).max, -np.inf], dtype)) < np.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_is_exact(dtype: Any) -> None:
    zeros = np.array([0.0, -0.0], dtype)
    assert apply("tanh", zeros).tolist() == [0, 0]
    assert apply("sigmoid", zeros).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_keeps_nan_and_its_mask_does_not_pass_zero(dtype: Any) -> None:
    x = np.array([-2, -0.0, 0, 3, np.inf, -np.inf, np.nan], dtype)
    np.testing.assert_array_equal(apply("positive_part", x), np.array([0, 0, 0, 3, np.inf, 0, np.nan], dtype))
    np.testing.assert_array_equal(apply("unless_negative", x), np.array([0, 0, 0, 4, np.inf, 0, np.nan], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ragged_counts_write_no_further(name: str, dtype: Any) -> None:
    lanes = VECTOR_BYTES // np.dtype(dtype).itemsize
    x = np.linspace(-3, 3, 4 * lanes).astype(dtype)
    whole = apply(name, x)
    for count in range(2 * lanes + 2):
        y = np.full(4 * lanes, GUARD, dtype)
        _compiled(FUNCTIONS.index(name), x.ctypes.data, y[lanes:].ctypes.data, count, dtype(0))
        np.testing.assert_array_equal(y[lanes : lanes + count], whole[:count])
        assert (y[:lanes] == GUARD).all()
        assert (y[lanes + count :] == GUARD).all()
