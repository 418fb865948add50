"""The matrix tile of every size and the packing of weights, against numpy."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from rnnkern.backends.numba_cpu.kernels import Weight, pack
from rnnkern.backends.numba_cpu.tile import MAX_ROWS, MAX_VECTORS, tile
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES

Array = npt.NDArray[Any]
DTYPES = [np.float32, np.float64]
SIZES = [(rows, vectors) for vectors in range(1, MAX_VECTORS + 1) for rows in range(1, MAX_ROWS[vectors] + 1)]
DEPTHS = [0, 1, 2, 7, 33]
GUARD = -12345.0


def _run(
    rows: Any,
    vectors: Any,
    a: Any,
    a_row: Any,
    panel: Any,
    depth: Any,
    c0: Any,
    c0_row: Any,
    c: Any,
    c_row: Any,
    zero: Any,
) -> None:
    tile(rows, vectors, a, a_row, panel, depth, c0, c0_row, c, c_row, zero)


_compiled = numba.njit(_run)


def lanes_of(dtype: Any) -> int:
    return VECTOR_BYTES // int(np.dtype(dtype).itemsize)


def run_tile(a: Array, panel: Array, c0: Array, c: Array) -> None:
    """C = C0 + A @ panel with the tile of A's rows and the panel's vectors; a C0 of one dimension is repeated."""
    rows, depth = a.shape
    c0_row = c0.strides[0] if c0.ndim == 2 else 0
    vectors, zero = panel.shape[1] // lanes_of(a.dtype), a.dtype.type(0)
    addresses = [array.ctypes.data for array in (a, panel, c0, c)]
    _compiled(
        rows,
        vectors,
        addresses[0],
        a.strides[0],
        addresses[1],
        depth,
        addresses[2],
        c0_row,
        addresses[3],
        c.strides[0],
        zero,
    )


def draw(rng: np.random.Generator, dtype: Any, *shape: int) -> Array:
    return rng.uniform(-1, 1, shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_size_of_tile(depth: int, dtype: Any) -> None:
    rng = np.random.default_rng(depth)
    for rows, vectors in SIZES:
        width = vectors * lanes_of(dtype)
        a = draw(rng, dtype, rows, depth + 3)[:, :depth]  # rows lie apart
        panel, c0 = draw(rng, dtype, depth, width), draw(rng, dtype, rows, width)
        around = np.full((rows + 2, width + 5), GUARD, dtype)
        c = around[1:-1, 2:-3]
        run_tile(a, panel, c0, c)
        want = c0.astype(np.float64) + a.astype(np.float64) @ panel.astype(np.float64)
        np.testing.assert_allclose(
            c, want, atol=(depth + 1) * np.finfo(dtype).eps, err_msg=f"{rows} rows, {vectors} vectors"
        )
        c[:] = GUARD
        assert (around == GUARD).all(), f"{rows} rows, {vectors} vectors write past C"


@pytest.mark.parametrize("dtype", DTYPES)
def test_c0_may_be_one_row_or_c_itself(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    for rows, vectors in SIZES:
        width = vectors * lanes_of(dtype)
        a, panel, bias = draw(rng, dtype, rows, 5), draw(rng, dtype, 5, width), draw(rng, dtype, width)
        spread, in_place = np.empty((rows, width), dtype), np.tile(bias, (rows, 1))
        run_tile(a, panel, bias, spread)
        run_tile(a, panel, in_place, in_place)
        np.testing.assert_allclose(spread, bias + a @ panel, atol=6 * np.finfo(dtype).eps)
        np.testing.assert_array_equal(in_place, spread)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_depends_neither_on_neighbours_nor_on_the_tile(dtype: Any) -> None:
    rng, lanes = np.random.default_rng(1), lanes_of(dtype)
    row, column, start = draw(rng, dtype, 101), draw(rng, dtype, 101, lanes), draw(rng, dtype, lanes)
    alone = np.empty((1, lanes), dtype)
    run_tile(row[None], column, start, alone)
    for rows, vectors in SIZES:
        a, panel = draw(rng, dtype, rows, 101), draw(rng, dtype, 101, vectors * lanes)
        a[-1], panel[:, -lanes:] = row, column
        c0, c = np.tile(start, (rows, vectors)), np.empty((rows, vectors * lanes), dtype)
        a[0, 0] = np.nan if rows > 1 else a[0, 0]
        run_tile(a, panel, c0, c)
        assert c[-1, -lanes:].tobytes() == alone.tobytes(), f"{rows} rows, {vectors} vectors"


def packed_by_numpy(weight: Array, per_panel: int) -> Array:
    """(gates, units, depth) as panels (depth, gates, vectors, lanes), one behind the other."""
    gates, units, depth = weight.shape
    lanes = lanes_of(weight.dtype)
    vectors = -(-units // lanes)
    padded = np.zeros((gates, vectors * lanes, depth), weight.dtype)
    padded[:, :units] = weight
    panels = [padded[:, v * lanes : min(v + per_panel, vectors) * lanes] for v in range(0, vectors, per_panel)]
    return np.concatenate([panel.transpose(2, 0, 1).ravel() for panel in panels])


def run_pack(weight: Array, per_panel: int) -> Array:
    want = packed_by_numpy(weight, per_panel)
    target = np.full(want.size + 16, GUARD, weight.dtype)
    pack(
        Weight(weight.ctypes.data, *weight.strides, *weight.shape),
        per_panel,
        target[8:].ctypes.data,
        weight.dtype.type(0),
    )
    assert (target[:8] == GUARD).all()
    assert (target[-8:] == GUARD).all()
    return target[8:-8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_panel", range(1, MAX_VECTORS + 1))
def test_pack_of_every_width(per_panel: int, dtype: Any) -> None:
    rng, lanes = np.random.default_rng(2), lanes_of(dtype)
    for units in (1, lanes - 1, lanes, lanes + 1, 4 * lanes, 5 * lanes + 3):
        for gates, depth in ((1, 1), (4, 3), (3, 7)):
            weight = draw(rng, dtype, gates, units, depth)
            np.testing.assert_array_equal(run_pack(weight, per_panel), packed_by_numpy(weight, per_panel))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_follows_any_strides(dtype: Any) -> None:
    base = draw(np.random.default_rng(3), dtype, 6, 38, 38)
    forms = {
        "transposed": base[:4].transpose(0, 2, 1),
        "sliced": base[1:5, 3:30, ::3],
        "every other unit": base[::2, ::2],
        "backwards": base[:, ::-1, ::-1],
        "expanded": np.broadcast_to(base[:1, :, :1], (4, 38, 5)),
        "one gate": base[2:3].transpose(0, 2, 1)[:, :17],
    }
    for name, weight in forms.items():
        np.testing.assert_array_equal(
            run_pack(weight, 2), packed_by_numpy(np.ascontiguousarray(weight), 2), err_msg=name
        )
