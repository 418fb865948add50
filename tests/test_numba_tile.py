"""The matrix tile of every size, both ways of walking A, against numpy."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from rnnkern.backends.numba_cpu.tile import MAX_ROWS, MAX_VECTORS, outer_tile, tile
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES

Array = npt.NDArray[Any]
DTYPES = [np.float32, np.float64]
SIZES = [(rows, vectors) for vectors in range(1, MAX_VECTORS + 1) for rows in range(1, MAX_ROWS[vectors] + 1)]
DEPTHS = [0, 1, 2, 7, 33]
GUARD = -12345.0


@numba.njit
def _tile(rows, vectors, a, a_row, panel, panel_row, depth, ahead, c0, c0_row, c0_column, c, c_row, c_column, zero):  # type: ignore[no-untyped-def]
    tile(rows, vectors, a, a_row, panel, panel_row, depth, ahead, c0, c0_row, c0_column, c, c_row, c_column, zero)


@numba.njit
def _outer_tile(vectors, a, a_k, panel, panel_row, depth, c0, c0_row, c, c_row, zero):  # type: ignore[no-untyped-def]
    outer_tile(vectors, a, a_k, panel, panel_row, depth, c0, c0_row, c, c_row, zero)


def lanes_of(dtype: Any) -> int:
    return VECTOR_BYTES // int(np.dtype(dtype).itemsize)


def run_tile(a: Array, panel: Array, c0: Array, c: Array) -> None:
    """C = C0 + A @ panel with the tile of A's rows and the panel's vectors. C0 and C are (rows, vectors, lanes), their
    vectors wherever strides say; a C0 (vectors, lanes) is repeated."""
    rows, depth = a.shape
    c0_row = c0.strides[0] if c0.ndim == 3 else 0
    dtype, ahead = a.dtype.type, 0  # no page of memory lies there
    _tile(
        rows, panel.shape[1] // lanes_of(a.dtype), a.ctypes.data, a.strides[0], panel.ctypes.data, panel.strides[0],
        depth, ahead, c0.ctypes.data, c0_row, c0.strides[-2], c.ctypes.data, c.strides[0], c.strides[1], dtype(0),
    )  # fmt: skip


def run_outer_tile(a: Array, panel: Array, c0: Array, c: Array) -> None:
    """C (MAX_ROWS, vectors*lanes) = A^T @ panel + C0 for A (depth, MAX_ROWS); a C0 (vectors*lanes) is repeated."""
    vectors = panel.shape[1] // lanes_of(a.dtype)
    _outer_tile(
        vectors, a.ctypes.data, a.strides[0], panel.ctypes.data, panel.strides[0], len(a), c0.ctypes.data,
        c0.strides[0] if c0.ndim == 2 else 0, c.ctypes.data, c.strides[0], a.dtype.type(0),
    )  # fmt: skip


def draw(rng: np.random.Generator, dtype: Any, *shape: int) -> Array:
    return rng.uniform(-1, 1, shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_size_of_tile(depth: int, dtype: Any) -> None:
    rng, lanes = np.random.default_rng(depth), lanes_of(dtype)
    for rows, vectors in SIZES:
        a = draw(rng, dtype, rows, depth + 3)[:, :depth]  # rows lie apart
        panel = draw(rng, dtype, depth, vectors * lanes + 2)[:, : vectors * lanes]
        c0 = draw(rng, dtype, rows, vectors + 1, lanes + 1)[:, 1:, 1:]  # and so do vectors
        around = np.full((rows + 2, vectors + 2, lanes + 5), GUARD, dtype)
        c = around[1:-1, 1:-1, 2:-3]
        run_tile(a, panel, c0, c)
        product = (a.astype(np.float64) @ panel.astype(np.float64)).reshape(c.shape)
        np.testing.assert_allclose(
            c, c0 + product, atol=(depth + 1) * np.finfo(dtype).eps, err_msg=f"{rows} rows, {vectors} vectors"
        )
        c[:] = GUARD
        assert (around == GUARD).all(), f"{rows} rows, {vectors} vectors write past C"


@pytest.mark.parametrize("dtype", DTYPES)
def test_c0_may_be_one_row_or_c_itself(dtype: Any) -> None:
    rng, lanes = np.random.default_rng(0), lanes_of(dtype)
    for rows, vectors in SIZES:
        a, panel = draw(rng, dtype, rows, 5), draw(rng, dtype, 5, vectors * lanes)
        bias = draw(rng, dtype, vectors, lanes)
        spread, in_place = np.empty((rows, vectors, lanes), dtype), np.tile(bias, (rows, 1, 1))
        run_tile(a, panel, bias, spread)
        run_tile(a, panel, in_place, in_place)
        np.testing.assert_allclose(spread, bias + (a @ panel).reshape(spread.shape), atol=6 * np.finfo(dtype).eps)
        np.testing.assert_array_equal(in_place, spread)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_depends_neither_on_neighbours_nor_on_the_tile(dtype: Any) -> None:
    rng, lanes = np.random.default_rng(1), lanes_of(dtype)
    row, column, start = draw(rng, dtype, 101), draw(rng, dtype, 101, lanes), draw(rng, dtype, lanes)
    alone = np.empty((1, 1, lanes), dtype)
    run_tile(row[None], column, start[None], alone)
    for rows, vectors in SIZES:
        a, panel = draw(rng, dtype, rows, 101), draw(rng, dtype, 101, vectors * lanes)
        a[-1], panel[:, -lanes:] = row, column
        c0, c = np.tile(start, (rows, vectors, 1)), np.empty((rows, vectors, lanes), dtype)
        a[0, 0] = np.nan if rows > 1 else a[0, 0]
        run_tile(a, panel, c0, c)
        assert c[-1, -1].tobytes() == alone.tobytes(), f"{rows} rows, {vectors} vectors"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_outer_products_of_every_width(depth: int, dtype: Any) -> None:
    rng = np.random.default_rng(depth)
    for vectors in range(1, MAX_VECTORS + 1):
        width, rows = vectors * lanes_of(dtype), MAX_ROWS[vectors]
        a = draw(rng, dtype, depth, rows + 3)[:, :rows]
        panel, c0 = draw(rng, dtype, depth, width + 2)[:, :width], draw(rng, dtype, width)
        around = np.full((rows + 2, width + 5), GUARD, dtype)
        c = around[1:-1, 2:-3]
        run_outer_tile(a, panel, c0, c)
        want = c0 + a.astype(np.float64).T @ panel.astype(np.float64)
        np.testing.assert_allclose(c, want, atol=(depth + 1) * np.finfo(dtype).eps, err_msg=f"{vectors} vectors")
        c[:] = GUARD
        assert (around == GUARD).all(), f"{vectors} vectors write past C"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_outer_product_on_top_of_others(dtype: Any) -> None:
    """C0 is C itself, rows of a wider matrix, and is added to the sum when that is complete."""
    rng = np.random.default_rng(2)
    for vectors in range(1, MAX_VECTORS + 1):
        width, rows = vectors * lanes_of(dtype), MAX_ROWS[vectors]
        a, panel, zeros = draw(rng, dtype, 9, rows), draw(rng, dtype, 9, width), np.zeros(width, dtype)
        alone, others = np.empty((rows, width), dtype), draw(rng, dtype, rows, width + 3)
        run_outer_tile(a, panel, zeros, alone)
        want = others[:, 1:-2] + alone
        run_outer_tile(a, panel, others[:, 1:-2], others[:, 1:-2])
        np.testing.assert_array_equal(others[:, 1:-2], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_outer_product_depends_neither_on_neighbours_nor_on_the_tile(dtype: Any) -> None:
    """Rows past the last gate may hold anything."""
    rng, lanes = np.random.default_rng(1), lanes_of(dtype)
    gate, column, start = draw(rng, dtype, 101), draw(rng, dtype, 101, lanes), draw(rng, dtype, lanes)
    alone: set[bytes] = set()
    for vectors in range(1, MAX_VECTORS + 1):
        rows = MAX_ROWS[vectors]
        for index in range(rows):
            a, panel = np.full((101, rows), np.nan, dtype), draw(rng, dtype, 101, vectors * lanes)
            a[:, index], panel[:, -lanes:] = gate, column
            c = np.empty((rows, vectors * lanes), dtype)
            run_outer_tile(a, panel, np.tile(start, vectors), c)
            assert np.isnan(c[[r for r in range(rows) if r != index]]).all()
            alone.add(c[index, -lanes:].tobytes())
    assert len(alone) == 1
