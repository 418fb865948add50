"""Pictures and markdown tables from what `python -m benchmarks` wrote: `python -m benchmarks.report [CSV ...]`.

`--write docs/performance.md` puts them into that document.

A bar is torch.nn's time over rnnkern's, to the right of 1 where rnnkern is faster. The grey behind it is how far two
copies of torch.nn came out apart in the same rounds. A diamond is torch.nn's time over onnxruntime's. Every row is
drawn from its newest measurement.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.ticker
from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import option_table, results, scaling
from benchmarks.goals import summary
from benchmarks.gpu_tables import step_tables
from benchmarks.machine import ROOT
from benchmarks.results import ONNX, RNNKERN, TORCH, GpuRecord, Row, family_means, mean_over, over
from benchmarks.rivals import CELLS
from benchmarks.tables import (
    COLOURS,
    averaged,
    memory_tables,
    number,
    origin,
    picture_link,
    shape_tables,
    thread_count,
    timed,
)

NOISE = "#c8c8c8"
BAR = 0.27  # height; a shape has a bar for each cell and a gap
USUAL_BACKENDS = ("auto", "cuda")
WIDEST = (1 / 16, 64)  # what lies outside is cut; its number still stands at the panel's edge

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
MARKED = re.compile(f"^({BEGIN})$.*?^({END})$", re.MULTILINE | re.DOTALL)


def shape_families(rows: Sequence[Row]) -> dict[str, str]:
    """Name of every shape measured -> its family, families together."""
    pairs = {row[RNNKERN].shape: row[RNNKERN].family for row in rows}
    order = list(dict.fromkeys(pairs.values()))
    return dict(sorted(pairs.items(), key=lambda pair: order.index(pair[1])))


def overall(members: dict[str, Row]) -> str:
    """The mean over families against torch.nn."""
    means = family_means(TORCH, members.values())
    return number(mean_over(averaged(means)["over families"], means))


def draw_panel(axes: Axes, panel: dict[str, dict[str, Row]], shapes: dict[str, str]) -> None:
    """One mode at one number of threads: `panel` has the rows by cell and shape."""
    for index, shape in enumerate(shapes):
        for offset, cell in enumerate(CELLS):
            row = panel.get(cell, {}).get(shape)
            if row is None or math.isnan(over(TORCH, row)):
                continue
            y, ratio, noise = index + (offset - 1) * BAR, over(TORCH, row), results.noise(row)
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
    places, shapes = results.by_place(rows), shape_families(rows)
    panels = sorted({(threads, mode) for threads, _, mode in places})
    figure, grid = pyplot.subplots(
        1, len(panels), sharex=True, sharey=True, squeeze=False, layout="constrained",
        figsize=(1.8 + 3.6 * len(panels), 1.7 + 0.36 * len(shapes)),
    )  # fmt: skip
    for axes, (threads, mode) in zip(grid[0], panels, strict=True):
        panel = {cell: places[threads, cell, mode] for cell in CELLS if (threads, cell, mode) in places}
        draw_panel(axes, panel, shapes)
        means = ", ".join(f"{CELLS[cell]} {overall(panel[cell])}" for cell in panel)
        axes.set_title(f"{mode}, {thread_count(threads)}\nmean over families: {means}", fontsize=8)
    first: Axes = grid[0][0]
    first.set_xscale("log", base=2)
    low, high = first.get_xlim()
    first.set_xlim(max(min(low / 1.3, 0.7), WIDEST[0]), min(max(high * 1.3, 1.5), WIDEST[1]))
    first.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
    first.set_yticks(range(len(shapes)), list(shapes), fontsize=8)
    first.set_ylim(len(shapes) - 0.5, -0.5)
    ours = rows[0][RNNKERN]
    figure.suptitle(f"torch.nn's time / rnnkern's, {ours.dtype}: {ours.title}\n{origin(rows)}", fontsize=8)
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


def section(path: Path, folder: Path) -> str:
    """Draws a picture beside the CSV for every dtype and backend in it; the markdown for a document in `folder`."""
    if path.stem.endswith(scaling.SUFFIX):
        return scaling.section(path, folder)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.read(path):
        groups.setdefault((row[RNNKERN].dtype, row[RNNKERN].backend), []).append(row)
    parts = []
    for (dtype, backend), rows in groups.items():
        parts += [f"### {rows[0][RNNKERN].computer}, {dtype}, backend {backend}", origin(rows)]
        if timed(rows):
            marks = [mark for mark, usual in ((dtype, ("float32",)), (backend, USUAL_BACKENDS)) if mark not in usual]
            drawn = path.with_name("-".join([path.stem, *marks]) + ".png")
            picture(timed(rows), drawn)
            parts.append(picture_link(drawn, folder))
        tables = step_tables if isinstance(rows[0][RNNKERN], GpuRecord) else shape_tables
        parts += [summary(rows), *tables(rows), *memory_tables(rows)]
    return "\n\n".join(parts)


def insert(document: Path, text: str) -> None:
    """Puts the text between the document's two markers, in place of what is there."""
    old = document.read_text()
    new, places = MARKED.subn(lambda found: f"{found[1]}\n\n{text}\n\n{found[2]}", old)
    if places != 1:
        raise ValueError(
            f"--write: expected the lines {BEGIN} and {END} once in {document}, found {places} such places"
        )
    document.write_text(new)


def main(argv: Sequence[str] | None = None) -> None:
    """Reports on every file that is named, or there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Draw what was measured.")
    folder = results.FOLDER.relative_to(ROOT)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="CSV", help=f"default: all in {folder} but those of options"
    )
    parser.add_argument(
        "--write", type=Path, metavar="DOCUMENT", help="put it between a document's markers and not on the screen"
    )
    chosen = parser.parse_args(argv)
    there = (path for path in results.FOLDER.glob("*.csv") if not path.stem.endswith(option_table.SUFFIX))
    files = chosen.files or sorted(there, key=lambda path: path.stem)
    if not files:
        parser.error(f"files: expected a CSV in {folder}, found none; run `python -m benchmarks` first")
    text = "\n\n".join(section(path, chosen.write.parent if chosen.write else Path()) for path in files)
    if chosen.write:
        insert(chosen.write, text)
        print(f"{len(files)} file{'s' if len(files) > 1 else ''} reported in {chosen.write}")
    else:
        print(text)


if __name__ == "__main__":
    matplotlib.use("agg")
    main()
