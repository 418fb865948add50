"""Peak memory of one training step, in a process of its own: `python -m benchmarks.memory rnnkern lstm mnist`.

The number is how far resident memory rises during the step above where it stood before. The process has then already
run steps with the same B, I and H over two time steps, so that libraries, compiled kernels and thread pools are there.
Buffers that an implementation keeps from one step to the next count, unless they do not grow with T.
"""

import argparse
import gc
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.machine import ROOT
from benchmarks.precisions import ON_CPU
from benchmarks.results import RNNKERN, TORCH
from benchmarks.rivals import CELLS, CPU, Rival, make_problem, rnnkern_rival, torch_rival
from benchmarks.shapes import Shape, named

RECOMPUTE = "recompute"  # rnnkern, which then keeps less
WARM_STEPS = 3  # at the second rnnkern lays a plan for such calls, from the third on it is used
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc gives a freed block of this size back at once, instead of keeping it where the next step would hide in it
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class ShortShape(Shape):
    """A shape cut to two steps."""

    def lengths(self) -> torch.Tensor:
        """The lengths of the whole shape, cut too."""
        return super().lengths().clamp(max=2)


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (highest since the last reset) in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def warm_step(
    implementation: str, cell: str, shape: Shape, dtype: torch.dtype, backend: str, device: torch.device = CPU
) -> Rival:
    """A training step that has not run, where a short one has."""

    def rival(of: Shape) -> Rival:
        problem = make_problem(cell, of, dtype, device)
        if implementation == TORCH:
            return torch_rival(problem, "train")
        options = {"recompute": True} if implementation == RECOMPUTE else {}  # cells do not have it
        return rnnkern_rival(problem, "train", backend, **options)

    short = rival(ShortShape(**vars(replace(shape, T=min(shape.T, 2)))))
    for _ in range(WARM_STEPS):
        short()
    return rival(shape)


def resident_growth(step: Rival) -> float:
    """MB by which resident memory rises during the step."""
    gc.collect()
    CLEAR.write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def peak_growth(implementation: str, cell: str, shape: Shape, dtype: torch.dtype, backend: str) -> float:
    """MB, measured in this process: call it once in a fresh one."""
    return resident_growth(warm_step(implementation, cell, shape, dtype, backend))


def measure(implementation: str, cell: str, shape: Shape, dtype: str, threads: int, backend: str) -> float:
    """peak_growth in a fresh process."""
    if not CLEAR.exists():
        raise RuntimeError("--memory: expected Linux's /proc/self/clear_refs, which is not here")
    words = [implementation, cell, shape.name, "--dtype", dtype, "--threads", str(threads), "--backend", backend]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words],
        cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return float(process.stdout.splitlines()[-1])


def main() -> None:
    """Prints the number: `measure` reads it in the process that started this one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Peak memory of a training step in MB."
    )
    parser.add_argument("implementation", choices=(TORCH, RNNKERN, RECOMPUTE))
    parser.add_argument("cell", choices=tuple(CELLS))
    parser.add_argument("shape", help="a name of the registry, or sizes as T28,B64,I28,H128")
    parser.add_argument("--dtype", default="float32", choices=ON_CPU)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(
        peak_growth(
            chosen.implementation, chosen.cell, named(chosen.shape), getattr(torch, chosen.dtype), chosen.backend
        )
    )


if __name__ == "__main__":
    main()
