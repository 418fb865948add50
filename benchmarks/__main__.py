"""Times rnnkern against torch.nn, and onnxruntime where it is installed.

    python -m benchmarks                                         every shape on one thread
    python -m benchmarks --threads 1 2 --shapes mnist 'packed-*' --cells lstm --modes train
    python -m benchmarks --shape T28,B64,I28,H128 --shape T50,B7,I9,H99,layers=2,packed     shapes of your own
    python -m benchmarks --only-memory                           peaks of training steps, no times
    python -m benchmarks --device cuda                           on a GPU, against cuDNN, peak memory too
    python -m benchmarks --device host                           the same on the CPU, to see that it runs

Before a row is timed, the outputs and gradients of all implementations are checked to agree with torch.nn's. A row
on which they do not is reported as an error and not timed, and the exit status is 1. The column A/A is torch.nn's
time over that of a second copy of torch.nn in the same rounds: how far it is from 1 is the noise.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine, measure, results, screen
from benchmarks.goals import summary
from benchmarks.measure import Run
from benchmarks.platforms import PLATFORMS
from benchmarks.precisions import PRECISIONS
from benchmarks.results import MEMORY, ONNX, Row
from benchmarks.rivals import CELLS, MODES, Disagreement
from benchmarks.shapes import Shape, select, spelled
from benchmarks.tables import thread_count


def listing(shapes: Sequence[Shape]) -> str:
    """A registry as text."""
    return "\n".join(
        f"{s.family:<13} {s.name:<22} T {s.T:<5} B {s.B:<6} I {s.I:<4} H {s.H:<5} {s.options()}".rstrip()
        for s in shapes
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `platform` and `shapes` looked up, and memory among `modes` if it is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time rnnkern against torch.nn and onnxruntime."
    )
    parser.add_argument(
        "--device", choices=tuple(PLATFORMS), default="cpu",
        help="cpu (default); cuda: a GPU; host: the GPU's kernels on the CPU, on small shapes, for tests",
    )  # fmt: skip
    parser.add_argument("--cells", nargs="+", choices=tuple(CELLS), default=list(CELLS))
    parser.add_argument("--modes", nargs="+", choices=MODES, help="forward is inference (default: the device's)")
    parser.add_argument("--shapes", nargs="+", metavar="PATTERN", help="names or families, as in a shell")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="SIZES",
        help="a shape of your own, T28,B64,I28,H128 with ,layers=N ,bidirectional ,packed ,lengths or ,stepwise behind",
    )  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, help="torch's number of threads (default: 1), for cpu")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(PRECISIONS),
        help="precisions (default: float32; on a GPU all that it takes)",
    )
    parser.add_argument("--backend", help="rnnkern's backend (default: the device's)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of timing for a row (default: 1; on a GPU 0.2)"
    )
    parser.add_argument(
        "--memory", action="store_true",
        help="peak memory of training steps too: on a CPU each in a fresh process; on a GPU one of the usual modes",
    )  # fmt: skip
    parser.add_argument("--only-memory", action="store_true", help="peak memory and no times")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the CSV; with host, none is written without it")
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    parser.add_argument("--list", action="store_true", help="list the shapes and leave")
    chosen = parser.parse_args(argv)
    try:
        complete(chosen)
    except ValueError as error:
        parser.error(str(error))
    return chosen


def complete(chosen: argparse.Namespace) -> None:
    """What the command line leaves to the device, and what it names, looked up."""
    platform = chosen.platform = PLATFORMS[chosen.device]()
    own = [spelled(text) for text in chosen.shape]
    chosen.shapes = platform.fitted(select(chosen.shapes or ([] if own else ["*"]), platform.shapes)) + own
    chosen.dtype = chosen.dtype or platform.usual_precisions
    for name in chosen.dtype:
        if name not in platform.precisions:
            raise ValueError(
                f"dtype: expected {', '.join(platform.precisions)} with --device {chosen.device}, got {name}"
            )
    if chosen.threads and platform.threads == (0,):
        raise ValueError(f"threads: expected none with --device {chosen.device}, which computes on no CPU's")
    chosen.threads = chosen.threads or platform.threads
    chosen.backend = chosen.backend or platform.backend
    chosen.budget = platform.budget if chosen.budget is None else chosen.budget
    memory = chosen.memory or chosen.only_memory or (platform.measures_memory and not chosen.modes)
    chosen.modes = [] if chosen.only_memory else list(chosen.modes or platform.modes)
    chosen.modes += [MEMORY] if memory else []
    chosen.save = not chosen.no_save and (platform.kept or chosen.output is not None)
    chosen.output = chosen.output or results.FOLDER


def measured(run: Run, chosen: argparse.Namespace, path: Path | None) -> tuple[list[Row], list[str]]:
    """Every row of one precision, on the screen and in the file, and what went wrong."""
    rows, errors = [], []
    for threads in chosen.threads:
        for cell in chosen.cells:
            for mode in chosen.modes:
                where = thread_count(threads) if threads else run.dtype
                print(f"\n{cell} {mode}, {where}\n{screen.head(mode, on_gpu=not threads)}")
                for shape in chosen.shapes:
                    try:
                        row = measure.measure(run, cell, mode, shape, threads)
                    except Disagreement as error:
                        where = f"{threads} threads" if threads else run.dtype
                        errors.append(f"ERROR {cell} {mode} {shape.name}, {where}: {error}")
                        print(errors[-1], file=sys.stderr, flush=True)
                        continue
                    rows.append(row)
                    print(screen.line(row), flush=True)
                    if path is not None:
                        results.append(path, row)
    return rows, errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    chosen = arguments(argv)
    if chosen.list:
        print(listing(chosen.platform.fitted(chosen.platform.shapes)))
        return 0
    reason = chosen.platform.obstacle(chosen.backend)
    if reason is not None:
        print(f"--device {chosen.device}: {reason}", file=sys.stderr)
        return 2
    rows, errors = [], []
    for dtype in chosen.dtype:
        run = measure.start(chosen.platform, dtype, chosen.backend, chosen.budget)
        path = chosen.output / f"{machine.slug(run.machine)}.csv"
        print(measure.heading(run))
        if ONNX in run.implementations:
            print(f"onnxruntime {run.machine.onnxruntime}: inference only, its threads do not spin")
        elif chosen.device == "cpu":
            print("onnxruntime is left out: it takes float32 and needs `pip install onnx onnxruntime`")
        found = measured(run, chosen, path if chosen.save else None)
        if found[0]:
            print(f"\n{summary(found[0])}\n")
        rows += found[0]
        errors += found[1]
    if rows and chosen.save:
        print(f"{len(rows)} rows added to {path}; `python -m benchmarks.report` draws them")
    if not chosen.platform.kept:
        print(f"{len(rows)} rows ran and agree with torch.nn. Their times mean nothing.")
    if errors:
        print(f"\n{len(errors)} rows with a wrong result:", *errors, sep="\n", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
