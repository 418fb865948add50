"""Times every option that torch.nn lacks: what it costs over a plain layer, and against a step loop in torch.

    python -m benchmarks.options                                        all options, cells and shapes on one thread
    python -m benchmarks.options --options zoneout 'reset*' --shapes mnist stream --cells lstm --modes train
    python -m benchmarks.options --modes memory                         peaks of long training steps with recompute
    python -m benchmarks.options_report --write                         the tables into docs/performance-options.md

Before a case is timed, outputs, states and gradients of rnnkern and the loop are checked to agree, masks being the same
for both. A case on which they do not is reported as an error and not timed, and the exit status is 1. Cost is time with
the option / time without. The column A/A is plain rnnkern's time over that of a second copy of it in the same rounds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import machine, measure, memory, results, timing
from benchmarks.measure import Run
from benchmarks.option_rivals import make_rivals
from benchmarks.option_table import OPTIONS, SHAPES, SUFFIX, Case, cases, chosen_options
from benchmarks.option_tables import head, line, summary
from benchmarks.platforms import OnCpu
from benchmarks.precisions import PRECISIONS
from benchmarks.results import MEMORY, PLAIN, RNNKERN, TORCH, Row
from benchmarks.rivals import CELLS, Disagreement, check, make_problem
from benchmarks.shapes import select, spelled
from benchmarks.tables import thread_count

MODES = ("forward", "train", MEMORY)
# Shorter turns than for layers: there are some 450 cases, and no other's threads to wait for
WATCH = timing.Watch(settle=0.005, block=0.010, long=0.030)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description="Time what torch.nn lacks.")
    parser.add_argument(
        "--options", nargs="+", metavar="PATTERN",
        help=f"among {', '.join(OPTIONS)} (default: all, but few on the dearest shapes)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", metavar="PATTERN", help=f"names or families among {', '.join(s.name for s in SHAPES)}"
    )
    parser.add_argument("--cells", nargs="+", choices=tuple(CELLS), default=list(CELLS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="forward is inference")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="torch's number of threads (default: 1)")
    parser.add_argument(
        "--budget", type=float, default=0.2, metavar="SECONDS", help="of timing for a case (default: 0.2)"
    )
    parser.add_argument("--output", type=Path, default=results.FOLDER, metavar="DIR", help="of the CSV")
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    chosen = parser.parse_args(argv)
    try:
        chosen_options(chosen.options or ["*"])
        select(chosen.shapes or ["*"], SHAPES)
    except ValueError as error:
        parser.error(str(error))
    return chosen


def times(run: Run, cell: str, mode: str, case: Case, threads: int) -> Row:
    """Checks that the option and its loop agree, and times them and the plain layer in turn; without a loop the plain
    layer is what the option has to agree with."""
    with run.platform.computing(run.dtype, threads):
        problem = make_problem(cell, case, PRECISIONS[run.dtype].dtype)
        rivals = make_rivals(problem, case, mode, run.backend)
        with torch.inference_mode(mode == "forward"):
            found = {name: rival.results() for name, rival in rivals.items()}
            other, words = (TORCH, "the loop") if TORCH in found else (PLAIN, "the plain layer")
            check(f"rnnkern's {case.option.name}", found[other], found[RNNKERN], PRECISIONS[run.dtype].tolerance, words)
            samples = timing.interleave(rivals, run.budget, WATCH)
    figures = {
        name: measure.time_columns(rounds, problem.flops(mode)) | {"ratio": timing.ratio(samples[PLAIN], rounds)}
        for name, rounds in samples.items()
    }
    return measure.make_row(run, cell, mode, case, threads, figures)


def peaks(run: Run, cell: str, case: Case, threads: int) -> Row:
    """Peak memory of a training step without and with recompute."""
    shape = spelled(f"T{case.T},B{case.B},I{case.I},H{case.H}")
    figures = {
        name: {"memory_mb": memory.measure(implementation, cell, shape, run.dtype, threads, run.backend)}
        for name, implementation in ((PLAIN, RNNKERN), (RNNKERN, memory.RECOMPUTE))
    }
    return measure.make_row(run, cell, MEMORY, case, threads, figures)


def measured(run: Run, chosen: argparse.Namespace, path: Path | None) -> tuple[list[Row], list[str]]:
    """Every row, on the screen and in the file, and what went wrong."""
    rows, errors = [], []
    for threads in chosen.threads:
        for cell in chosen.cells:
            for mode in chosen.modes:
                found = cases(cell, mode, chosen.shapes, chosen.options)
                if found:
                    print(f"\n{cell} {mode}, {thread_count(threads)}\n{head(mode)}")
                for case in found:
                    try:
                        row = (
                            peaks(run, cell, case, threads) if mode == MEMORY else times(run, cell, mode, case, threads)
                        )
                    except Disagreement as error:
                        errors.append(f"ERROR {cell} {mode} {case.name}, {thread_count(threads)}: {error}")
                        print(errors[-1], file=sys.stderr, flush=True)
                        continue
                    rows.append(row)
                    print(line(row), flush=True)
                    if path is not None:
                        results.append(path, row)
    return rows, errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    chosen = arguments(argv)
    run = measure.start(OnCpu(), "float32", "auto", chosen.budget)
    path = None if chosen.no_save else chosen.output / f"{machine.slug(run.machine)}{SUFFIX}.csv"
    print(measure.heading(run))
    rows, errors = measured(run, chosen, path)
    if rows:
        print(f"\n{summary(rows)}\n")
    if rows and path is not None:
        print(f"{len(rows)} rows added to {path}; `python -m benchmarks.options_report` shows them")
    if errors:
        print(f"\n{len(errors)} cases with a wrong result:", *errors, sep="\n", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
