"""Times rnnkern against torch.nn, and onnxruntime where it is installed.

    python -m benchmarks                                         every shape on one thread
    python -m benchmarks --threads 1 2 --shapes mnist 'packed-*' --cells lstm --modes train
    python -m benchmarks --shape T28,B64,I28,H128 --shape T50,B7,I9,H99,layers=2,packed     shapes of your own
    python -m benchmarks --only-memory                           peaks of training steps, no times

Before a row is timed, the outputs and gradients of all implementations are checked to agree with torch.nn's. A row
on which they do not is reported as an error and not timed, and the exit status is 1. The column A/A is torch.nn's
time over that of a second copy of torch.nn in the same rounds: how far it is from 1 is the noise.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine, measure, results
from benchmarks.goals import summary
from benchmarks.results import AGAIN, MEMORY, ONNX, RNNKERN, TORCH, Row
from benchmarks.rivals import CELLS, MODES, Disagreement
from benchmarks.shapes import SHAPES, Shape, select, spelled
from benchmarks.tables import thread_count

SIZES = f"{'shape':<22}{'T':>5}{'B':>4}{'I':>4}{'H':>5}"
TIMES = (
    f"  {'torch ms':>9}{'GF/s':>6}{'%':>4}  {'rnnkern ms':>10} {'10 to 90 %':>17}{'GF/s':>6}{'%':>4}"
    f"  {'onnx ms':>8}  {'torch/rnnkern':>13} {'A/A':>5} {'onnx/rnnkern':>12}"
)
PEAKS = f"  {'torch MB':>9} {'rnnkern MB':>10}"


def line(row: Row) -> str:
    """The row as it stands on the screen, under SIZES and TIMES or PEAKS."""
    theirs, ours, onnx = row[TORCH], row[RNNKERN], row.get(ONNX)
    text = f"{ours.shape:<22}{ours.T:>5}{ours.B:>4}{ours.I:>4}{ours.H:>5}"
    if ours.mode == MEMORY:
        return text + f"  {theirs.memory_mb:>9.1f} {ours.memory_mb:>10.1f}"
    spread = f"{ours.ms_q10:.3f} to {ours.ms_q90:.3f}"
    text += f"  {theirs.ms_median:>9.3f}{theirs.gflops:>6.1f}{100 * theirs.share:>4.0f}"
    text += f"  {ours.ms_median:>10.3f} {spread:>17}{ours.gflops:>6.1f}{100 * ours.share:>4.0f}"
    text += f"  {onnx.ms_median:>8.3f}" if onnx else f"  {'':>8}"
    text += f"  {results.over(TORCH, row):>13.2f} {row[AGAIN].ratio:>5.2f}"
    return text + (f" {results.over(ONNX, row):>12.2f}" if onnx else "")


def listing() -> str:
    """The registry as text."""
    return "\n".join(
        f"{s.family:<8} {s.name:<22} T {s.T:<5} B {s.B:<4} I {s.I:<4} H {s.H:<5} {s.options()}".rstrip() for s in SHAPES
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, `shapes` already looked up and `modes` with memory if it is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time rnnkern against torch.nn and onnxruntime."
    )
    parser.add_argument("--cells", nargs="+", choices=tuple(CELLS), default=list(CELLS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--shapes", nargs="+", metavar="PATTERN", help="names or families, as in a shell")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="SIZES",
        help="a shape of your own, T28,B64,I28,H128 with ,layers=N ,bidirectional ,packed ,lengths or ,stepwise behind",
    )  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="torch's number of threads (default: 1)")
    parser.add_argument("--dtype", choices=tuple(measure.DTYPES), default="float32")
    parser.add_argument("--backend", default="auto", help="rnnkern's backend")
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="of timing for a row (default: 1)")
    parser.add_argument(
        "--memory", action="store_true", help="peak memory of training steps too, each in a fresh process"
    )
    parser.add_argument("--only-memory", action="store_true", help="peak memory and no times")
    parser.add_argument("--output", type=Path, default=results.FOLDER, metavar="DIR")
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    parser.add_argument("--list", action="store_true", help="list the shapes and leave")
    chosen = parser.parse_args(argv)
    try:
        own: list[Shape] = [spelled(text) for text in chosen.shape]
        chosen.shapes = select(chosen.shapes or ([] if own else ["*"])) + own
    except ValueError as error:
        parser.error(str(error))
    chosen.modes = [] if chosen.only_memory else chosen.modes
    chosen.modes += [MEMORY] if chosen.memory or chosen.only_memory else []
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    chosen = arguments(argv)
    if chosen.list:
        print(listing())
        return 0
    run = measure.start(chosen.dtype, chosen.backend, chosen.budget)
    path = chosen.output / f"{machine.slug(run.machine)}.csv"
    print(measure.heading(run))
    if ONNX in run.implementations:
        print(f"onnxruntime {run.machine.onnxruntime}: inference only, its threads do not spin")
    else:
        print("onnxruntime is left out: it takes float32 and needs `pip install onnx onnxruntime`")
    rows, errors = [], []
    for threads in chosen.threads:
        for cell in chosen.cells:
            for mode in chosen.modes:
                print(f"\n{cell} {mode}, {thread_count(threads)}\n{SIZES}{PEAKS if mode == MEMORY else TIMES}")
                for shape in chosen.shapes:
                    try:
                        row = measure.measure(run, cell, mode, shape, threads)
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
