"""One row of the table: the implementations checked against each other and timed in turn, or their peak memory."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from benchmarks import machine, timing
from benchmarks.platforms import OnCpu
from benchmarks.precisions import PRECISIONS
from benchmarks.results import MEMORY, ONNX, RNNKERN, TORCH, Row
from benchmarks.rivals import Problem, Rival, check, make_problem, rnnkern_rival, torch_rival
from benchmarks.shapes import Shape

Figures = dict[str, dict[str, Any]]  # columns of records by implementation

UNCHECKED = "not checked against torch.nn"


@dataclass(frozen=True)
class Run:
    """What holds for every row of one run in one precision."""

    platform: OnCpu
    machine: machine.Machine
    dtype: str  # a key of PRECISIONS
    backend: str
    budget: float
    ceilings: dict[str, float]  # columns of a record
    implementations: tuple[str, ...]


def start(platform: OnCpu, dtype: str, backend: str, budget: float) -> Run:
    """A run on this machine against all that is installed; measures the ceilings."""
    here = platform.describe()
    return Run(platform, here, dtype, backend, budget, platform.ceilings(dtype), platform.implementations(here, dtype))


def heading(run: Run) -> str:
    """What the run measures, on what."""
    here = run.machine
    return (
        f"{here.title}; torch {here.torch}, numba {here.numba}, "
        f"rnnkern {here.rnnkern} at {here.commit or 'no commit'}\n"
        f"{run.dtype}, backend {run.backend}; {run.platform.heading(run.ceilings)}"
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
    names = [name for name in run.implementations if name != ONNX or (mode == "forward" and not shape.stepwise)]
    figures: Figures = {name: {} for name in names}
    with run.platform.computing(run.dtype, threads):
        try:
            problem = make_problem(cell, shape, PRECISIONS[run.dtype].dtype, run.platform.device)
        except RuntimeError as error:
            excused = {name: {"status": run.platform.excuse(name, error)} for name in names}
            return make_row(run, cell, mode, shape, threads, excused)
        for name in names:
            figures[name] |= run.platform.columns(name, problem, mode, run.ceilings)
        rivals = agreeing(run, problem, mode, threads, figures)
        with torch.inference_mode(mode == "forward"):
            before = run.platform.ceilings_beside(run.dtype, run.ceilings)
            samples = in_turn(run, rivals, figures)
            after = run.platform.ceilings_beside(run.dtype, run.ceilings)
    for name, rounds in samples.items():
        figures[name] |= time_columns(rounds, problem.flops(mode))
        if TORCH in samples:
            figures[name]["ratio"] = timing.ratio(samples[TORCH], rounds)
    ceilings = {name: max(before[name], after[name]) for name in before}
    return make_row(run, cell, mode, shape, threads, figures, ceilings)


def time_columns(rounds: Sequence[Sequence[float]], flops: float) -> dict[str, Any]:
    """What a record says of so many seconds, `[round][call]`, for so many operations a call."""
    quantiles: dict[str, Any] = {f"ms_q{q}": seconds * 1e3 for q, seconds in timing.quantiles(rounds).items()}
    median = quantiles["ms_median"] = quantiles.pop("ms_q50")
    return quantiles | {"rounds": len(rounds), "calls": sum(map(len, rounds)), "gflops": flops / median / 1e6}


def agreeing(run: Run, problem: Problem, mode: str, threads: int, figures: Figures) -> dict[str, Rival]:
    """The implementations that run, one after the other, so that none takes another's memory; `figures` says of the
    others why they don't. Raises Disagreement if a result is not torch.nn's."""
    rivals: dict[str, Rival] = {}
    expected = None
    for name in figures:
        try:
            rival = make_rival(name, run, problem, mode, threads)
            with torch.inference_mode(mode == "forward"):
                found = rival.results()
        except RuntimeError as error:
            figures[name]["status"] = run.platform.excuse(name, error)
        else:
            rivals[name] = rival
            expected = found if name == TORCH else expected
            if expected is not None:
                check(name, expected, found, PRECISIONS[run.dtype].tolerance)
            elif TORCH in figures:
                figures[name]["status"] = UNCHECKED
        if name not in rivals:
            run.platform.tidy()  # here the error is gone, and what its traceback held
    return rivals


def in_turn(run: Run, rivals: Mapping[str, Rival], figures: Figures) -> dict[str, list[list[float]]]:
    """The seconds of each; none if they have no room together, which `figures` then says."""
    try:
        return timing.interleave(rivals, run.budget, run.platform.watch) if rivals else {}
    except RuntimeError as error:
        status = f"{run.platform.excuse(RNNKERN, error)} together"
    for name in rivals:
        figures[name]["status"] = status
    run.platform.tidy()
    return {}


def peaks(run: Run, cell: str, shape: Shape, threads: int) -> Row:
    """Peak memory of a training step of torch.nn and rnnkern."""
    figures: Figures = {}
    for name in (TORCH, RNNKERN):
        try:
            peak = run.platform.peak(name, cell, shape, run.dtype, threads, run.backend)
            figures[name] = {"memory_mb": peak}
        except RuntimeError as error:
            figures[name] = {"status": run.platform.excuse(name, error)}
        run.platform.tidy()
    return make_row(run, cell, MEMORY, shape, threads, figures)


def make_row(
    run: Run,
    cell: str,
    mode: str,
    shape: Shape,
    threads: int,
    figures: Figures,
    ceilings: Mapping[str, float] | None = None,
) -> Row:
    """Records of what was measured, with all that tells where it belongs; under the run's ceilings if no others."""
    common: dict[str, Any] = asdict(run.machine) | {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dtype": run.dtype, "backend": run.backend, "threads": threads, "cell": cell, "mode": mode,
        "family": shape.family, "shape": shape.name, "T": shape.T, "B": shape.B, "I": shape.I, "H": shape.H,
        "options": shape.options(), "real_steps": int(shape.lengths().sum()),
    } | dict(ceilings or run.ceilings)  # fmt: skip
    record = run.platform.record
    return {name: record(**common, implementation=name, **measured) for name, measured in figures.items()}
