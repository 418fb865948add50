"""The picture and a markdown table from what `python -m benchmarks` wrote: `python -m benchmarks.report [CSV ...]`.

A bar is torch.nn's time over rnnkern's, to the right of 1 where rnnkern is faster. The grey behind it is how far two
copies of torch.nn came out apart in the same rounds. A diamond is torch.nn's time over onnxruntime's. Every row is
drawn from its newest measurement.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.ticker
from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import results
from benchmarks.machine import ROOT
from benchmarks.results import ONNX, RNNKERN, Row
from benchmarks.rivals import CELLS
from benchmarks.timing import geometric_mean

COLOURS = dict(zip(CELLS, ("#0072b2", "#e69f00", "#009e73"), strict=True))  # told apart by the colour-blind
NOISE = "#c8c8c8"
BAR = 0.27  # height; a shape has a bar for each cell and a gap
WIDEST = (1 / 16, 64)  # what lies outside is cut; its number still stands at the panel's edge

Place = tuple[int, str, str]  # threads, cell, mode


def by_place(rows: Sequence[Row]) -> dict[Place, dict[str, Row]]:
    """Rows by threads, cell and mode, then by the shape's name."""
    places: dict[Place, dict[str, Row]] = {}
    for row in rows:
        places.setdefault(results.place(row[RNNKERN]), {})[row[RNNKERN].shape] = row
    return places


def shape_families(rows: Sequence[Row]) -> dict[str, str]:
    """Name of every shape measured -> its family, families together."""
    pairs = {row[RNNKERN].shape: row[RNNKERN].family for row in rows}
    order = list(dict.fromkeys(pairs.values()))
    return dict(sorted(pairs.items(), key=lambda pair: order.index(pair[1])))


def means(members: dict[str, Row]) -> dict[str, float]:
    """Geometric means over torch.nn by family."""
    return results.family_means((row[RNNKERN].family, results.over_torch(row)) for row in members.values())


def number(value: float) -> str:
    """Three digits of a ratio."""
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def markdown(rows: Sequence[Row]) -> str:
    """A table for each number of threads."""
    places, shapes, tables = by_place(rows), shape_families(rows), []
    for threads in sorted({place[0] for place in places}):
        columns = [place for place in places if place[0] == threads]
        lines = [
            f"torch.nn's time / rnnkern's (in brackets rnnkern's share of the ceiling), threads: {threads}\n",
            "| shape | T B I H | " + " | ".join(f"{cell} {mode}" for _, cell, mode in columns) + " |",
            "|---|---|" + "--:|" * len(columns),
        ]
        for shape in shapes:
            found = [places[place].get(shape) for place in columns]
            ours = next((row[RNNKERN] for row in found if row), None)
            if ours:
                cells = (
                    f"{number(results.over_torch(row))} ({row[RNNKERN].share:.0%})" if row else "" for row in found
                )
                sizes = f"{ours.T} {ours.B} {ours.I} {ours.H}" + (f", {ours.options}" if ours.options else "")
                lines.append(f"| {shape} | {sizes} | " + " | ".join(cells) + " |")
        overall = (number(geometric_mean(means(places[place]).values())) for place in columns)
        lines.append("| **mean over families** | | " + " | ".join(f"**{mean}**" for mean in overall) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def draw_panel(axes: Axes, panel: dict[str, dict[str, Row]], shapes: dict[str, str]) -> None:
    """One mode at one number of threads: `panel` has the rows by cell and shape."""
    for index, shape in enumerate(shapes):
        for offset, cell in enumerate(CELLS):
            row = panel.get(cell, {}).get(shape)
            if row is None:
                continue
            y, ratio, noise = index + (offset - 1) * BAR, results.over_torch(row), results.noise(row)
            axes.barh(y, noise - 1 / noise, BAR, left=1 / noise, color=NOISE, zorder=1)
            axes.barh(y, ratio - 1, BAR * 0.62, left=1, color=COLOURS[cell], zorder=2)
            if ONNX in row:
                axes.plot(
                    row[ONNX].ratio, y, "D", color="white", markeredgecolor="black", markersize=3.2, mew=0.7, zorder=4
                )
            # the number at the right edge of the panel, where no bar and no diamond hides it
            axes.text(1.01, y, number(ratio), transform=axes.get_yaxis_transform(), va="center", fontsize=6)
    names = list(shapes)
    for index in range(1, len(names)):
        if shapes[names[index]] != shapes[names[index - 1]]:
            axes.axhline(index - 0.5, color="#dddddd", linewidth=0.6, zorder=0)
    axes.axvline(1, color="black", linewidth=0.8, zorder=3)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def picture(rows: Sequence[Row], path: Path) -> None:
    """Panels side by side, a shape a line, a bar for each cell."""
    places, shapes = by_place(rows), shape_families(rows)
    panels = sorted({(threads, mode) for threads, _, mode in places})
    figure, grid = pyplot.subplots(
        1, len(panels), sharex=True, sharey=True, squeeze=False, layout="constrained",
        figsize=(1.8 + 3.6 * len(panels), 1.7 + 0.36 * len(shapes)),
    )  # fmt: skip
    for axes, (threads, mode) in zip(grid[0], panels, strict=True):
        panel = {cell: places[threads, cell, mode] for cell in CELLS if (threads, cell, mode) in places}
        draw_panel(axes, panel, shapes)
        overall = (f"{CELLS[cell]} {number(geometric_mean(means(panel[cell]).values()))}" for cell in panel)
        heading = f"{mode}, {threads} thread{'s' if threads > 1 else ''}"
        axes.set_title(f"{heading}\nmean over families: {', '.join(overall)}", fontsize=8)
    first: Axes = grid[0][0]
    first.set_xscale("log", base=2)
    low, high = first.get_xlim()
    first.set_xlim(max(min(low / 1.3, 0.7), WIDEST[0]), min(max(high * 1.3, 1.5), WIDEST[1]))
    first.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
    first.set_yticks(range(len(shapes)), list(shapes), fontsize=8)
    first.set_ylim(len(shapes) - 0.5, -0.5)
    ours = max((row[RNNKERN] for row in rows), key=lambda record: record.date)
    figure.suptitle(
        f"torch.nn's time / rnnkern's, {ours.dtype}: {ours.cpu}, {ours.cores} cores\n"
        f"torch {ours.torch}, rnnkern {ours.rnnkern} {ours.commit}, {ours.date[:10]}",
        fontsize=10,
    )
    keys: list[Artist] = [Patch(color=COLOURS[cell], label=f"rnnkern {CELLS[cell]}") for cell in CELLS]
    keys.append(Patch(color=NOISE, label="noise: torch.nn / torch.nn"))
    if any(ONNX in row for row in rows):
        diamond = Line2D(
            [], [], marker="D", linestyle="", markerfacecolor="white", markeredgecolor="black", markersize=4
        )
        diamond.set_label("onnxruntime")
        keys.append(diamond)
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(path: Path) -> list[Path]:
    """Draws a picture beside the CSV for every dtype and backend in it, prints the tables, returns the pictures."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.read(path):
        groups.setdefault((row[RNNKERN].dtype, row[RNNKERN].backend), []).append(row)
    pictures = []
    for (dtype, backend), rows in groups.items():
        marks = [mark for mark, usual in ((dtype, "float32"), (backend, "auto")) if mark != usual]
        pictures.append(path.with_name("-".join([path.stem, *marks]) + ".png"))
        picture(rows, pictures[-1])
        print(f"{rows[0][RNNKERN].cpu}, {dtype}, backend {backend}: {pictures[-1]}\n\n{markdown(rows)}\n")
    return pictures


def main(argv: Sequence[str] | None = None) -> None:
    """Reports on every file that is named, or there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Draw what was measured.")
    folder = ROOT / "benchmarks" / "results"
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="CSV", help=f"default: all in {folder.relative_to(ROOT)}"
    )
    files = parser.parse_args(argv).files or sorted(folder.glob("*.csv"))
    if not files:
        parser.error(
            f"files: expected a CSV in {folder.relative_to(ROOT)}, found none; run `python -m benchmarks` first"
        )
    for path in files:
        report(path)


if __name__ == "__main__":
    matplotlib.use("agg")
    main()
