"""Times rnnkern against torch.nn, and onnxruntime where it is installed.

    python -m benchmarks                                         every shape on one thread
    python -m benchmarks --threads 1 2 --shapes mnist 'packed-*' --cells lstm --modes train

Before a row is timed, the outputs and gradients of all implementations are checked to agree with torch.nn's. A row
on which they do not is reported as an error and not timed, and the exit status is 1. The column A/A is torch.nn's
time over that of a second copy of torch.nn in the same rounds: how far it is from 1 is the noise.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import machine, memory, results, timing
from benchmarks.results import AGAIN, ONNX, RNNKERN, TORCH, Record, Row
from benchmarks.rivals import (
    CELLS,
    MODES,
    TOLERANCE,
    Problem,
    Rival,
    differences,
    make_problem,
    rnnkern_rival,
    torch_rival,
)
from benchmarks.shapes import FAMILIES, SHAPES, Shape, select

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
HEADER = (
    f"{'shape':<22}{'T':>5}{'B':>4}{'I':>4}{'H':>5}  {'torch ms':>9}{'GF/s':>6}{'%':>4}"
    f"  {'rnnkern ms':>10} {'10 to 90 %':>17}{'GF/s':>6}{'%':>4}"
    f"  {'onnx ms':>8}  {'torch/rnnkern':>13} {'A/A':>5} {'onnx/rnnkern':>12}"
)


@dataclass(frozen=True)
class Run:
    """What holds for every row of one run."""

    machine: machine.Machine
    dtype: str
    backend: str
    budget: float
    memory: bool
    onnx: bool
    ceiling: float  # GF/s of one core


class Disagreement(Exception):
    """An implementation's result is not torch.nn's."""


def make_rivals(run: Run, problem: Problem, mode: str, threads: int) -> dict[str, Rival]:
    """The implementations of a row."""
    rivals = {TORCH: torch_rival(problem, mode), AGAIN: torch_rival(problem, mode)}
    rivals[RNNKERN] = rnnkern_rival(problem, mode, run.backend)
    if run.onnx and mode == "forward" and not problem.shape.stepwise:
        from benchmarks.onnx_rival import OnnxRival

        rivals[ONNX] = OnnxRival(problem, threads)
    return rivals


def check(rivals: dict[str, Rival], dtype: torch.dtype) -> None:
    """Raises Disagreement unless all give torch.nn's results."""
    expected, limit = rivals[TORCH].results(), TOLERANCE[dtype]
    for name, rival in rivals.items():
        for tensor, error in differences(expected, rival.results()).items():
            if not error <= limit:
                raise Disagreement(
                    f"{name}: {tensor} is {error:.1e} from torch.nn's (relative RMS), expected at most {limit:.0e}"
                )


def measure(run: Run, cell: str, mode: str, shape: Shape, threads: int) -> Row:
    """One row: check, time in turn, and with --memory the peak of a training step."""
    torch.set_num_threads(threads)
    problem = make_problem(cell, shape, DTYPES[run.dtype])
    rivals = make_rivals(run, problem, mode, threads)
    with torch.inference_mode(mode == "forward"):
        check(rivals, DTYPES[run.dtype])
        samples = timing.interleave(rivals, run.budget)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = {}
    for name, rounds in samples.items():
        milliseconds = {q: seconds * 1e3 for q, seconds in timing.quantiles(rounds).items()}
        peak = math.nan
        if run.memory and mode == "train" and name in (TORCH, RNNKERN):
            peak = memory.measure(name, cell, shape, run.dtype, threads, run.backend)
        row[name] = Record(
            **asdict(run.machine), date=date,
            dtype=run.dtype, backend=run.backend, threads=threads, cell=cell, mode=mode,
            family=shape.family, shape=shape.name, T=shape.T, B=shape.B, I=shape.I, H=shape.H, options=shape.options(),
            real_steps=int(problem.lengths.sum()), implementation=name, rounds=len(rounds), calls=sum(map(len, rounds)),
            ms_q10=milliseconds[10], ms_q25=milliseconds[25], ms_median=milliseconds[50], ms_q75=milliseconds[75],
            ms_q90=milliseconds[90], ratio=timing.ratio(samples[TORCH], rounds),
            gflops=problem.flops(mode) / milliseconds[50] / 1e6, ceiling_gflops=run.ceiling, memory_mb=peak,
        )  # fmt: skip
    return row


def line(row: Row) -> str:
    """The row as it stands on the screen, under HEADER."""
    theirs, ours, onnx = row[TORCH], row[RNNKERN], row.get(ONNX)
    spread = f"{ours.ms_q10:.3f} to {ours.ms_q90:.3f}"
    text = f"{ours.shape:<22}{ours.T:>5}{ours.B:>4}{ours.I:>4}{ours.H:>5}"
    text += f"  {theirs.ms_median:>9.3f}{theirs.gflops:>6.1f}{100 * theirs.share:>4.0f}"
    text += f"  {ours.ms_median:>10.3f} {spread:>17}{ours.gflops:>6.1f}{100 * ours.share:>4.0f}"
    text += f"  {onnx.ms_median:>8.3f}" if onnx else f"  {'':>8}"
    text += f"  {results.over_torch(row):>13.2f} {row[AGAIN].ratio:>5.2f}"
    text += f" {results.over_onnx(row):>12.2f}" if onnx else ""
    if not math.isnan(ours.memory_mb):
        text += f"  peak MB: torch {theirs.memory_mb:.1f}, rnnkern {ours.memory_mb:.1f}"
    return text


def summary(rows: Sequence[Row]) -> str:
    """Geometric means per family and over families, a column for each threads, cell and mode, against each rival."""
    places: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        places.setdefault(results.place(row[RNNKERN]), []).append(row)
    parts = []
    for rival, of in ((TORCH, results.over_torch), (ONNX, results.over_onnx)):
        means = {
            place: results.family_means((row[RNNKERN].family, of(row)) for row in members)
            for place, members in places.items()
        }
        columns = [place for place in means if means[place]]
        if not columns:
            continue
        heads = [f"{cell} {mode} {threads}t" for threads, cell, mode in columns]
        table = [f"geometric means of {rival} / rnnkern"]
        table.append(f"{'':<16}" + "".join(f"{head:>18}" for head in heads))
        for family in FAMILIES:
            if any(family in means[place] for place in columns):
                cells = (f"{means[place][family]:.2f}" if family in means[place] else "" for place in columns)
                table.append(f"{family:<16}" + "".join(f"{cell:>18}" for cell in cells))
        overall = (f"{timing.geometric_mean(means[place].values()):.2f}" for place in columns)
        table.append(f"{'over families':<16}" + "".join(f"{cell:>18}" for cell in overall))
        if rival == TORCH:
            worst = (f"{max(map(results.noise, places[place])):.2f}" for place in columns)
            table.append(f"{'A/A, the worst':<16}" + "".join(f"{cell:>18}" for cell in worst))
        parts.append("\n".join(table))
    return "\n\n".join(parts)


def listing() -> str:
    """The registry as text."""
    return "\n".join(
        f"{s.family:<8} {s.name:<22} T {s.T:<5} B {s.B:<4} I {s.I:<4} H {s.H:<5} {s.options()}".rstrip() for s in SHAPES
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, `shapes` already looked up."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time rnnkern against torch.nn and onnxruntime."
    )
    parser.add_argument("--cells", nargs="+", choices=tuple(CELLS), default=list(CELLS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--shapes", nargs="+", default=["*"], metavar="PATTERN", help="names or families, as in a shell"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="torch's number of threads (default: 1)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--backend", default="auto", help="rnnkern's backend")
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="of timing for a row (default: 1)")
    parser.add_argument(
        "--memory", action="store_true", help="peak memory of training steps too, each in a fresh process"
    )
    parser.add_argument("--output", type=Path, default=machine.ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    parser.add_argument("--list", action="store_true", help="list the shapes and leave")
    chosen = parser.parse_args(argv)
    try:
        chosen.shapes = select(chosen.shapes)
    except ValueError as error:
        parser.error(str(error))
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    chosen = arguments(argv)
    if chosen.list:
        print(listing())
        return 0
    here = machine.describe()
    onnx = bool(here.onnxruntime and machine.installed("onnx")) and chosen.dtype == "float32"
    ceiling = machine.ceiling(DTYPES[chosen.dtype])
    run = Run(here, chosen.dtype, chosen.backend, chosen.budget, chosen.memory, onnx, ceiling)
    path = chosen.output / f"{machine.slug(here)}.csv"
    print(
        f"{here.cpu}, {here.cores} cores; "
        f"torch {here.torch}, numba {here.numba}, rnnkern {here.rnnkern} at {here.commit or 'no commit'}\n"
        f"{chosen.dtype}, backend {chosen.backend}; the ceiling of one core is {ceiling:.1f} GF/s, "
        f"the load average was {os.getloadavg()[0]:.1f} at the start"
    )
    if onnx:
        print(f"onnxruntime {here.onnxruntime}: inference only, its threads do not spin")
    else:
        print("onnxruntime is left out: it takes float32 and needs `pip install onnx onnxruntime`")
    rows, errors = [], []
    for threads in chosen.threads:
        for cell in chosen.cells:
            for mode in chosen.modes:
                print(f"\n{cell} {mode}, {threads} thread{'s' if threads > 1 else ''}\n{HEADER}")
                for shape in chosen.shapes:
                    try:
                        row = measure(run, cell, mode, shape, threads)
                    except Disagreement as error:
                        errors.append(f"ERROR {cell} {mode} {shape.name}, {threads} threads: {error}")
                        print(errors[-1], file=sys.stderr, flush=True)
                        continue
                    rows.append(row)
                    print(line(row), flush=True)
                    if not chosen.no_save:
                        results.append(path, row)
    if rows:
        print(f"\n{summary(rows)}")
    if rows and not chosen.no_save:
        print(f"\n{len(rows)} rows added to {path}; `python -m benchmarks.report` draws them")
    if errors:
        print(f"\n{len(errors)} rows with a wrong result:", *errors, sep="\n", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
