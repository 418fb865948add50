"""One row of the table: the implementations checked against each other and timed in turn, or their peak memory."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from benchmarks import machine, memory, timing
from benchmarks.results import AGAIN, MEMORY, ONNX, RNNKERN, TORCH, Record, Row
from benchmarks.rivals import TOLERANCE, Problem, Rival, check, make_problem, rnnkern_rival, torch_rival
from benchmarks.shapes import Shape

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


@dataclass(frozen=True)
class Run:
    """What holds for every row of one run."""

    machine: machine.Machine
    dtype: str
    backend: str
    budget: float
    ceiling: float  # GF/s of one core
    implementations: tuple[str, ...]


def start(dtype: str, backend: str, budget: float) -> Run:
    """A run on this machine against all that is installed; measures the ceiling."""
    here = machine.describe()
    onnx = here.onnxruntime and machine.installed("onnx") and dtype == "float32"
    rivals = (TORCH, AGAIN, RNNKERN, ONNX) if onnx else (TORCH, AGAIN, RNNKERN)
    return Run(here, dtype, backend, budget, machine.ceiling(DTYPES[dtype]), rivals)


def heading(run: Run) -> str:
    """What the run measures, on what."""
    here = run.machine
    return (
        f"{here.cpu}, {here.cores} cores; "
        f"torch {here.torch}, numba {here.numba}, rnnkern {here.rnnkern} at {here.commit or 'no commit'}\n"
        f"{run.dtype}, backend {run.backend}; the ceiling of one core is {run.ceiling:.1f} GF/s, "
        f"the load average was {os.getloadavg()[0]:.1f} at the start"
    )


def make_rival(name: str, run: Run, problem: Problem, mode: str, threads: int) -> Rival:
    """An implementation by its name."""
    if name == ONNX:
        from benchmarks.onnx_rival import OnnxRival

        return OnnxRival(problem, threads)
    return rnnkern_rival(problem, mode, run.backend) if name == RNNKERN else torch_rival(problem, mode)


def measure(run: Run, cell: str, mode: str, shape: Shape, threads: int) -> Row:
    """One row."""
    return peaks(run, cell, shape, threads) if mode == MEMORY else times(run, cell, mode, shape, threads)


def times(run: Run, cell: str, mode: str, shape: Shape, threads: int) -> Row:
    """Checks that the run's implementations agree with torch.nn, if it is among them, and times them in turn."""
    torch.set_num_threads(threads)
    problem = make_problem(cell, shape, DTYPES[run.dtype])
    names = [name for name in run.implementations if name != ONNX or (mode == "forward" and not shape.stepwise)]
    rivals = {name: make_rival(name, run, problem, mode, threads) for name in names}
    with torch.inference_mode(mode == "forward"):
        if TORCH in rivals:
            check(rivals, DTYPES[run.dtype])
        samples = timing.interleave(rivals, run.budget)
    figures: dict[str, dict[str, Any]] = {}
    for name, rounds in samples.items():
        quantiles = {f"ms_q{q}": seconds * 1e3 for q, seconds in timing.quantiles(rounds).items()}
        median = quantiles["ms_median"] = quantiles.pop("ms_q50")
        figures[name] = quantiles | {
            "rounds": len(rounds), "calls": sum(map(len, rounds)), "gflops": problem.flops(mode) / median / 1e6
        }  # fmt: skip
        if TORCH in samples:
            figures[name]["ratio"] = timing.ratio(samples[TORCH], rounds)
    return make_row(run, cell, mode, shape, threads, figures)


def peaks(run: Run, cell: str, shape: Shape, threads: int) -> Row:
    """Peak memory of a training step of torch.nn and rnnkern."""
    figures = {
        name: {"memory_mb": memory.measure(name, cell, shape, run.dtype, threads, run.backend)}
        for name in (TORCH, RNNKERN)
    }
    return make_row(run, cell, MEMORY, shape, threads, figures)


def make_row(
    run: Run, cell: str, mode: str, shape: Shape, threads: int, figures: Mapping[str, Mapping[str, Any]]
) -> Row:
    """Records of what was measured, `figures` by implementation and column, with all that tells where it belongs."""
    common: dict[str, Any] = asdict(run.machine) | {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dtype": run.dtype, "backend": run.backend, "threads": threads, "cell": cell, "mode": mode,
        "family": shape.family, "shape": shape.name, "T": shape.T, "B": shape.B, "I": shape.I, "H": shape.H,
        "options": shape.options(), "real_steps": int(shape.lengths().sum()), "ceiling_gflops": run.ceiling,
    }  # fmt: skip
    return {name: Record(**common, implementation=name, **measured) for name, measured in figures.items()}
