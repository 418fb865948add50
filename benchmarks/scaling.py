"""How the time of packed training grows with T: `python -m benchmarks.scaling`.

Forward and backward of LSTM and GRU on a PackedSequence of 32 sequences, about half of whose padded steps are real,
by rnnkern, and by torch.nn up to the T that `--torch-until` names: its packed backward grows with the square of T.
Where both run they are checked to agree. Rows go into a CSV beside the other results, `...-scaling.csv`, and the
picture of all that is in it beside that.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import machine, measure, results
from benchmarks.platforms import OnCpu
from benchmarks.results import RNNKERN, TORCH, Record, Row
from benchmarks.shapes import Shape
from benchmarks.tables import COLOURS, NAMES, origin, picture_link, table, thread_count

SUFFIX = "-scaling"
CELLS = ("lstm", "gru")
SHAPES = tuple(
    Shape(f"scaling-{T}", "scaling", T, 32, 80, 256, ragged="packed") for T in (50, 100, 200, 500, 1000, 2000, 4000)
)
STYLES = {RNNKERN: "o-", TORCH: "s--"}

Curves = dict[tuple[str, str], dict[int, Record]]  # by cell and implementation, then by T


def thread_counts(rows: Sequence[Row]) -> list[int]:
    """The numbers of threads that were measured."""
    return sorted({row[RNNKERN].threads for row in rows})


def curves(rows: Sequence[Row], threads: int) -> Curves:
    """What was measured on so many threads, T rising."""
    found: Curves = {}
    for row in sorted(rows, key=lambda row: row[RNNKERN].T):
        for record in row.values():
            if record.threads == threads:
                found.setdefault((record.cell, record.implementation), {})[record.T] = record
    return found


def figures(record: Record) -> str:
    """Its time, whole and for one real step of one sequence."""
    return f"{record.ms_median:.1f} ms, {record.ms_median * 1e3 / record.real_steps:.2f} us"


def scaling_table(rows: Sequence[Row], threads: int) -> str:
    """A line for each T, a column for each cell and implementation."""
    columns = curves(rows, threads)
    real = {record.T: record.real_steps for curve in columns.values() for record in curve.values()}
    body = [
        [str(T), str(real[T]), *(figures(curve[T]) if T in curve else "" for curve in columns.values())]
        for T in sorted(real)
    ]
    head = ["T", "real rows", *(f"{cell} {NAMES[name]}" for cell, name in columns)]
    return f"packed forward and backward, in all and for each real row, {thread_count(threads)}\n\n{table(head, body)}"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds over T, both in powers of ten, a panel for each number of threads."""
    counts = thread_counts(rows)
    figure = Figure(figsize=(1 + 4.5 * len(counts), 4.5), layout="constrained")
    steps = sorted({row[RNNKERN].T for row in rows})
    low = min(row[RNNKERN].ms_median for row in rows) / 2
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, threads in zip(panels, counts, strict=True):
        for (cell, name), curve in curves(rows, threads).items():
            times = [record.ms_median for record in curve.values()]
            axes.loglog(list(curve), times, STYLES[name], color=COLOURS[cell], label=f"{NAMES[name]} {cell.upper()}")
        axes.loglog(steps, [low * T / steps[0] for T in steps], ":", color="grey", label="linear in T")
        axes.set(xlabel="T", title=thread_count(threads))
        axes.set_xticks(steps, list(map(str, steps)))
        axes.set_xticks([], minor=True)
        axes.grid(color="#eeeeee")
    panels[0].set_ylabel("ms, forward and backward")
    panels[0].legend(fontsize=8, frameon=False)
    ours = rows[0][RNNKERN]
    figure.suptitle(f"packed, B {ours.B}, I {ours.I}, H {ours.H}: {ours.cpu}\n{origin(rows)}", fontsize=8)
    figure.savefig(path, dpi=150)


def section(path: Path, folder: Path) -> str:
    """Draws the picture beside the CSV and returns it and the tables as markdown for a document in `folder`."""
    rows = results.read(path)
    picture(rows, path.with_suffix(".png"))
    parts = [f"### {rows[0][RNNKERN].cpu}: time over T", origin(rows), picture_link(path.with_suffix(".png"), folder)]
    return "\n\n".join([*parts, *(scaling_table(rows, threads) for threads in thread_counts(rows))])


def measured(run: measure.Run, threads: int, torch_until: int) -> Iterator[Row]:
    """A row for each cell and T."""
    for cell in CELLS:
        for shape in SHAPES:
            both = torch_until >= shape.T
            yield measure.times(
                replace(run, implementations=(TORCH, RNNKERN) if both else (RNNKERN,)), cell, "train", shape, threads
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description="Time packed training as T grows."
    )
    parser.add_argument(
        "--torch-until", type=int, default=500, metavar="T", help="the largest T for torch.nn (default: 500)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="torch's number of threads (default: 1)")
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="of timing for a row (default: 1)")
    parser.add_argument("--output", type=Path, default=results.FOLDER, metavar="DIR")
    chosen = parser.parse_args(argv)
    run = measure.start(OnCpu(), "float32", "auto", chosen.budget)
    path = chosen.output / f"{machine.slug(run.machine)}{SUFFIX}.csv"
    print(measure.heading(run))
    for threads in chosen.threads:
        print(thread_count(threads))
        for row in measured(run, threads, chosen.torch_until):
            ours = row[RNNKERN]
            text = "; ".join(f"{NAMES[name]} {figures(row[name])}" for name in (RNNKERN, TORCH) if name in row)
            print(f"{ours.cell:<5} T {ours.T:<5} {ours.real_steps:>6} real rows: {text}", flush=True)
            results.append(path, row)
    print(f"\n{section(path, Path.cwd())}")


if __name__ == "__main__":
    main()
