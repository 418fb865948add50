"""What a call cannot be quicker than on a GPU: the bytes that it must move and the operations that it must do, over
what a large copy and a large matrix product reach there in the same run.

Every layer reads its input, its weights and the gradient of its output once and writes its output and its gradients
once; what backward needs of the steps is written and read once, since the operations of computing it again are not
counted. Nothing is counted for the way from step to step, and for weights that are read again at every step: that is
what kernels differ in.
"""

from typing import NamedTuple

import torch

from benchmarks.precisions import Precision, fp32_products
from benchmarks.rivals import SPECS, Problem
from benchmarks.timing import Watch

CALLS = 10


class Ceilings(NamedTuple):
    """What the device reached."""

    gflops: float  # GF/s of a matrix product
    gbs: float  # GB/s of a copy, read and written


class Floor(NamedTuple):
    """Microseconds a step, by the bytes and by the operations."""

    moving: float
    computing: float


def least_bytes(problem: Problem, mode: str) -> int:
    """What a call moves at least, as above."""
    shape, spec = problem.shape, SPECS[problem.cell]
    directions = 2 if shape.bidirectional else 1
    weights = sum(parameter.numel() for parameter in problem.module.parameters())
    inputs = shape.I + (shape.layers - 1) * directions * shape.H
    outputs = shape.layers * directions * shape.H
    saved = outputs * (len(spec.saved) + spec.has_c)
    # for each real row of a sequence, and once for the call
    row, once = inputs + outputs, weights
    if mode == "saving":
        row += saved
    if mode == "train":
        row += 2 * saved + 2 * (inputs + outputs)  # backward reads x, y and dy and writes dx
        once += 2 * weights
    return (row * int(problem.lengths.sum()) + once) * problem.x.element_size()


def floor(problem: Problem, mode: str, ceilings: Ceilings) -> Floor:
    """Of a call."""
    T = problem.shape.T
    return Floor(least_bytes(problem, mode) / ceilings.gbs / 1e3 / T, problem.flops(mode) / ceilings.gflops / 1e3 / T)


def measure(device: torch.device, precision: Precision, watch: Watch, *, product: int, copy: int) -> Ceilings:
    """The best of some calls: the product of two square matrices with `product` rows, and a copy of so many bytes."""
    a, b, out = (torch.randn(product, product, device=device).to(precision.dtype) for _ in range(3))
    with fp32_products(torch.backends.cuda.matmul, precision.tf32):
        seconds = min(watch.clock(lambda: torch.mm(a, b, out=out), CALLS))
    source, target = (torch.randint(255, (copy,), dtype=torch.uint8, device=device) for _ in range(2))
    return Ceilings(
        2 * product**3 / seconds / 1e9, 2 * copy / min(watch.clock(lambda: target.copy_(source), CALLS)) / 1e9
    )
