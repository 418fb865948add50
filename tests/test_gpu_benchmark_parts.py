"""The parts of the GPU's benchmark: its registry, cuDNN's rules, floors, ceilings."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import cudnn, floors, rivals, timing
from benchmarks.gpu_shapes import GPU_SHAPES, MOST_B, MOST_H, MOST_I, MOST_T, cut, cut_down
from benchmarks.precisions import ON_GPU, PRECISIONS, fp32_products
from benchmarks.shapes import Shape
from rnnkern.backends.cuda import products

H100_LIKE = cudnn.Gpu((9, 0), 132, 91500)
PLAIN = Shape("plain", "test", T=128, B=64, I=256, H=512)


def test_registry_spans_the_sizes() -> None:
    assert len({shape.name for shape in GPU_SHAPES}) == len(GPU_SHAPES)
    learning = [shape for shape in GPU_SHAPES if shape.family == "rl"]
    others = [shape for shape in GPU_SHAPES if shape.family != "rl"]

    def spans(shapes: list[Shape], size: str) -> tuple[int, int]:
        found = [getattr(shape, size) for shape in shapes]
        return min(found), max(found)

    assert [spans(others, size) for size in "TBH"] == [(28, 1024), (1, 256), (64, 2048)]
    assert [spans(learning, size) for size in "TBH"] == [(16, 128), (1024, 65536), (128, 512)]
    assert {shape.options() for shape in GPU_SHAPES} == {
        "", "bidirectional", "2 layers", "2 layers, bidirectional", "lengths", "bidirectional, lengths", "packed",
    }  # fmt: skip


def test_shapes_are_cut_down() -> None:
    for shape in GPU_SHAPES:
        small = cut(shape)
        assert (small.T, small.B, small.I, small.H) <= (MOST_T, MOST_B, MOST_I, MOST_H)
        assert min(small.T, small.B, small.I, small.H) >= 1
        assert (small.H % 2, small.B % 2) == (shape.H % 2, shape.B % 2)
        assert replace(small, T=shape.T, B=shape.B, I=shape.I, H=shape.H) == shape
    assert cut(replace(PLAIN, T=2, B=1, I=3, H=4)) == replace(PLAIN, T=2, B=1, I=3, H=4)
    few = cut_down(GPU_SHAPES)
    assert {shape.options() for shape in few} == {shape.options() for shape in GPU_SHAPES}
    assert len({replace(shape, name="", family="") for shape in few}) == len(few) < len(GPU_SHAPES) / 2
    assert few[0].name == GPU_SHAPES[0].name


@pytest.mark.parametrize(
    ("cell", "changes", "dtype", "forward", "backward"),
    [
        ("lstm", {"H": 128}, torch.float32, "small", "small"),
        ("lstm", {"H": 192}, torch.float32, "small", "standard"),
        ("gru", {"H": 193}, torch.float32, "standard", "standard"),
        ("rnn", {"H": 256}, torch.float32, "small", "small"),
        ("rnn", {"H": 384}, torch.bfloat16, "small", "standard"),
        ("rnn", {"H": 385}, torch.float32, "standard", "standard"),
        ("gru", {"H": 97, "B": 1000, "layers": 2, "bidirectional": True}, torch.float16, "small", "small"),
        ("lstm", {"H": 128}, torch.float64, "standard", "standard"),
        ("lstm", {"H": 128, "ragged": "packed"}, torch.float32, "standard", "standard"),
        ("lstm", {"ragged": "lengths"}, torch.float16, "standard", "standard"),
        ("lstm", {"H": 64, "stepwise": True}, torch.float32, "native", "native"),
        ("lstm", {}, torch.float16, "static", "static"),
        ("lstm", {"H": 1024, "B": 128}, torch.float16, "static", "static"),
        ("lstm", {"H": 1152}, torch.float16, "standard", "standard"),
        ("lstm", {"H": 500}, torch.float16, "standard", "standard"),
        ("lstm", {"I": 100}, torch.float16, "standard", "standard"),
        ("lstm", {"B": 136}, torch.float16, "standard", "standard"),
        ("lstm", {"B": 4}, torch.float16, "standard", "standard"),
        ("lstm", {"layers": 2}, torch.float16, "standard", "standard"),
        ("lstm", {"bidirectional": True}, torch.float16, "standard", "standard"),
        ("lstm", {}, torch.bfloat16, "standard", "standard"),
        ("lstm", {}, torch.float32, "standard", "standard"),
        ("gru", {}, torch.float16, "standard", "standard"),
        ("rnn", {}, torch.float16, "static", "static"),
        ("rnn", {"H": 896, "B": 88}, torch.float16, "static", "static"),
        ("rnn", {"H": 896, "B": 96}, torch.float16, "standard", "standard"),
    ],
)
def test_cudnns_algorithm(cell: str, changes: dict[str, Any], dtype: torch.dtype, forward: str, backward: str) -> None:
    shape = replace(PLAIN, **changes)
    assert cudnn.algorithm(cell, shape, dtype, H100_LIKE, forward=True) == forward
    assert cudnn.algorithm(cell, shape, dtype, H100_LIKE, forward=False) == backward
    assert cudnn.algorithms(cell, shape, dtype, H100_LIKE, "saving") == forward
    assert cudnn.algorithms(cell, shape, dtype, H100_LIKE, "train") == f"{forward} / {backward}"


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (cudnn.Gpu((8, 0), 108, 91500), "static"),
        (cudnn.Gpu((8, 0), 56, 91500), "standard"),
        (cudnn.Gpu((8, 6), 108, 91500), "standard"),
        (cudnn.Gpu((8, 9), 142, 91500), "static"),
    ],
)
def test_the_static_algorithm_wants_a_large_gpu(gpu: cudnn.Gpu, expected: str) -> None:
    assert cudnn.algorithm("lstm", PLAIN, torch.float16, gpu, forward=True) == expected


def test_bfloat16_needs_a_new_cudnn() -> None:
    old = H100_LIKE._replace(cudnn=cudnn.BFLOAT16_CUDNN - 1)
    assert cudnn.algorithm("lstm", replace(PLAIN, H=64), torch.bfloat16, old, forward=True) == "native"
    assert cudnn.algorithm("lstm", replace(PLAIN, H=64), torch.float16, old, forward=True) == "small"


SMALL = Shape("small", "test", T=5, B=3, I=4, H=6)


@pytest.mark.parametrize(
    ("cell", "mode", "expected"),
    [
        # x and y; weights; for backward the gates and c; then x, y, dy, dx, and weights and their gradients
        ("lstm", "forward", 15 * (4 + 6) + 4 * 6 * 12),
        ("lstm", "saving", 15 * (4 + 6 + 5 * 6) + 4 * 6 * 12),
        ("lstm", "train", 15 * (3 * (4 + 6) + 2 * 5 * 6) + 3 * 4 * 6 * 12),
        ("gru", "saving", 15 * (4 + 6 + 4 * 6) + 3 * 6 * 12),
        ("rnn", "train", 15 * 3 * (4 + 6) + 3 * 6 * 12),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_least_bytes(cell: str, mode: str, expected: int, dtype: torch.dtype) -> None:
    problem = rivals.make_problem(cell, SMALL, dtype)
    assert floors.least_bytes(problem, mode) == expected * dtype.itemsize


def test_least_bytes_of_layers_directions_and_real_steps() -> None:
    shape = replace(SMALL, layers=2, bidirectional=True, ragged="lengths")
    problem = rivals.make_problem("rnn", shape, torch.float32)
    weights = 2 * (6 * (4 + 6) + 12) + 2 * (6 * (12 + 6) + 12)
    assert floors.least_bytes(problem, "forward") == 4 * (int(shape.lengths().sum()) * (4 + 12 + 12 + 12) + weights)


def test_floor_is_for_a_step() -> None:
    problem = rivals.make_problem("lstm", SMALL, torch.float32)
    found = floors.floor(problem, "train", floors.Ceilings(gflops=2.0, gbs=4.0))
    assert found.computing == pytest.approx(problem.flops("train") / 2e9 * 1e6 / 5)
    assert found.moving == pytest.approx(floors.least_bytes(problem, "train") / 4e9 * 1e6 / 5)


@pytest.mark.parametrize("precision", ON_GPU)
def test_ceilings_are_the_best_of_some_calls(precision: str) -> None:
    arithmetic = []

    def clock(call: Callable[[], object], count: int) -> list[float]:
        call()
        arithmetic.append(torch.backends.cuda.matmul.fp32_precision)
        return [3.0, 1e-3, 2.0]

    found = floors.measure(rivals.CPU, PRECISIONS[precision], timing.Watch(clock), product=10, copy=1000)
    assert found == pytest.approx((2 * 10**3 / 1e-3 / 1e9, 2 * 1000 / 1e-3 / 1e9))
    assert arithmetic[0] == ("tf32" if precision == "tf32" else "ieee")


def test_switch_is_set_back_after_an_error() -> None:
    switch: Any = torch.backends.cudnn.rnn
    with fp32_products(switch, tf32=True):
        with pytest.raises(ZeroDivisionError), fp32_products(switch, tf32=False):
            _ = 1 / int(products.tf32_allowed())
        assert products.tf32_allowed()
