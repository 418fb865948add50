"""Squares of vectors against numpy: weights packed into panels, and dot products with weights that stay in place."""

import sys
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from rnnkern.backends.numba_cpu import blocks
from rnnkern.backends.numba_cpu.operands import Matrix
from rnnkern.backends.numba_cpu.tile import MAX_VECTORS
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES
from tests.numba_support import before_a_forbidden_page

Array = npt.NDArray[Any]
DTYPES = [np.float32, np.float64]
GUARD = -12345.0


@numba.njit
def _transpose_block(source, source_row, units, depth, target, target_row, zero):  # type: ignore[no-untyped-def]
    blocks.transpose_block(source, source_row, units, depth, target, target_row, zero)


@numba.njit
def _dot_units(rows, w, w_row, units, a, a_row, depth, target, target_row, zero):  # type: ignore[no-untyped-def]
    blocks.dot_units(rows, w, w_row, units, a, a_row, depth, target, target_row, target, target_row, zero)


@numba.njit
def _pack_units(weight, gates, units, depth, per_panel, part, parts, zero):  # type: ignore[no-untyped-def]
    blocks.pack_units(weight, gates, units, depth, per_panel, part, parts, zero)


@numba.njit
def _pack_depth(weight, depth, units, per_panel, part, parts, zero):  # type: ignore[no-untyped-def]
    blocks.pack_depth(weight, depth, units, per_panel, part, parts, zero)


def lanes_of(dtype: Any) -> int:
    return VECTOR_BYTES // int(np.dtype(dtype).itemsize)


def edges(lanes: int) -> tuple[int, ...]:
    """Sizes on both sides of a vector and of two."""
    return tuple(sorted({1, 2, lanes - 1, lanes, lanes + 1, 2 * lanes - 1, 2 * lanes, 2 * lanes + 3} - {0}))


def draw(dtype: Any, *shape: int) -> Array:
    return np.random.default_rng(sum(shape)).uniform(-1, 1, shape).astype(dtype)


def matrices(values: Array) -> Iterator[Array]:
    """The matrix in one block at the very end of what may be read, where the system can say so, and with rows apart
    and NaN around."""
    rows, columns = values.shape
    apart = np.full((rows + 2, columns + 5), np.nan, values.dtype)
    apart[1:-1, 2:-3] = values
    yield apart[1:-1, 2:-3]
    if sys.platform.startswith("linux"):
        yield protected(values)


def protected(values: Array) -> Array:
    """A copy that ends where a forbidden page begins."""
    memory, offset = before_a_forbidden_page(values.nbytes)
    copy = np.frombuffer(memory, values.dtype, values.size, offset).reshape(values.shape)
    copy[:] = values
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
def test_transpose_block(dtype: Any) -> None:
    """Every height, more units than fit too, and every depth; missing units are zeros, and nothing else is written."""
    lanes = lanes_of(dtype)
    for units in (*range(1, lanes + 1), 2 * lanes):
        for depth in range(1, lanes + 1):
            for source in matrices(draw(dtype, units, depth)):
                around = np.full((depth + 2, lanes + 5), GUARD, dtype)
                target = around[1:-1, 2:-3]
                _transpose_block(
                    source.ctypes.data, source.strides[0], units, depth, target.ctypes.data, target.strides[0], dtype(0)
                )
                want = np.zeros((depth, lanes), dtype)
                want[:, :units] = source[:lanes].T
                np.testing.assert_array_equal(target, want, err_msg=f"{units} units, depth {depth}")
                target[:] = GUARD
                assert (around == GUARD).all(), f"{units} units, depth {depth}: writes past the target"


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_units(dtype: Any) -> None:
    """Of every number of units and rows, and depths with every rest."""
    lanes = lanes_of(dtype)
    for units in (*range(1, lanes + 1), 3 * lanes):
        for depth in (*range(1, 2 * lanes + 2), 101):
            rows = (units + depth) % 7 + 1
            a = draw(dtype, rows, depth)
            for w, factors in zip(matrices(draw(dtype, units, depth)), matrices(a), strict=True):
                around = np.full((rows + 2, lanes + 8), GUARD, dtype)
                target = around[1:-1, 4:-4]
                target[:] = 1
                _dot_units(
                    rows, w.ctypes.data, w.strides[0], units, factors.ctypes.data, factors.strides[0], depth,
                    target.ctypes.data, target.strides[0], dtype(0),
                )  # fmt: skip
                want = 1 + a.astype(np.float64) @ w[:lanes].astype(np.float64).T
                tolerance = (depth + 2) * np.finfo(dtype).eps
                np.testing.assert_allclose(
                    target[:, :units], want, atol=tolerance, err_msg=f"{rows} rows, {units} units, depth {depth}"
                )
                target[:] = GUARD
                assert (around == GUARD).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_units_adds_in_an_order_of_its_own(dtype: Any) -> None:
    """A unit's sum depends neither on the others, nor on how many there are, nor on the number of rows."""
    lanes = lanes_of(dtype)
    unit, a = draw(dtype, 67), draw(dtype, 1, 67)
    found = set()
    for units in range(1, lanes + 1):
        w = np.full((units, 67), np.nan, dtype)
        w[units // 2] = unit
        for rows in range(1, 8):
            several, target = np.repeat(a, rows, 0), np.zeros((rows, lanes), dtype)
            _dot_units(
                rows, w.ctypes.data, w.strides[0], units, several.ctypes.data, several.strides[0], 67,
                target.ctypes.data, target.strides[0], dtype(0),
            )  # fmt: skip
            found |= {number.tobytes() for number in target[:, units // 2]}
    assert len(found) == 1


# Packing


def packed_units(weight: Array, per_panel: int) -> Array:
    """(gates, units, depth) as panels (depth, gates, vectors, lanes), one behind the other."""
    gates, units, depth = weight.shape
    lanes = lanes_of(weight.dtype)
    vectors = -(-units // lanes)
    padded = np.zeros((gates, vectors * lanes, depth), weight.dtype)
    padded[:, :units] = weight
    panels = [padded[:, v * lanes : min(v + per_panel, vectors) * lanes] for v in range(0, vectors, per_panel)]
    return np.concatenate([panel.transpose(2, 0, 1).ravel() for panel in panels])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("per_panel", range(1, MAX_VECTORS + 1))
def test_pack_units(per_panel: int, parts: int, dtype: Any) -> None:
    lanes = lanes_of(dtype)
    for units in (*edges(lanes), 5 * lanes + 3):
        for gates, depth in ((1, 1), (4, 3), (3, lanes), (1, 2 * lanes + 1)):
            values = draw(dtype, gates * units, depth)
            want = packed_units(values.reshape(gates, units, depth), per_panel)
            for weight in matrices(values):
                around = np.full(want.size + 16, GUARD, dtype)
                matrix = Matrix(weight.ctypes.data, weight.strides[0], around[8:].ctypes.data)
                for part in range(parts):
                    _pack_units(matrix, gates, units, depth, per_panel, part, parts, dtype(0))
                np.testing.assert_array_equal(around[8:-8], want)
                assert (around[:8] == GUARD).all()
                assert (around[-8:] == GUARD).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("per_panel", range(1, MAX_VECTORS + 1))
def test_pack_depth(per_panel: int, parts: int, dtype: Any) -> None:
    """(depth, units) as panels (depth, vectors, lanes): the packing of the transposed weight."""
    lanes = lanes_of(dtype)
    for units in (*edges(lanes), 5 * lanes + 3):
        for depth in (1, 3, lanes, 2 * lanes + 1):
            values = draw(dtype, depth, units)
            want = packed_units(values.T[None], per_panel)
            for weight in matrices(values):
                around = np.full(want.size + 16, GUARD, dtype)
                matrix = Matrix(weight.ctypes.data, weight.strides[0], around[8:].ctypes.data)
                for part in range(parts):
                    _pack_depth(matrix, depth, units, per_panel, part, parts, dtype(0))
                np.testing.assert_array_equal(around[8:-8], want)
                assert (around[:8] == GUARD).all()
                assert (around[-8:] == GUARD).all()
