"""The tables, in markdown with even columns, so that a screen shows them as well as a document."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.results import (
    MEMORY,
    ONNX,
    RNNKERN,
    TORCH,
    GpuRecord,
    Row,
    by_place,
    family_means,
    mean_over,
    noise,
    over,
)
from benchmarks.rivals import CELLS
from benchmarks.shapes import CUSTOM

NAMES = {RNNKERN: "rnnkern", TORCH: "torch.nn", ONNX: "onnxruntime"}
RIVALS = (TORCH, ONNX)
COLOURS = dict(zip(CELLS, ("#0072b2", "#e69f00", "#009e73"), strict=True))  # told apart by the colour-blind
RAGGED = ("packed", "lengths")  # on a CPU


def averaged(families: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What has a line in the table of means, and the families that it is the mean of; custom shapes do not count beside
    the others."""
    registered = tuple(dict.fromkeys(family for family in families if family != CUSTOM))
    lines = {family: (family,) for family in (*registered, CUSTOM)} | {"over families": registered}
    return lines | ({"packed and lengths": RAGGED} if "packed" in registered else {})


def number(value: float) -> str:
    """Three digits of a ratio, nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [head, *body]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    rows = [
        f"| {name:<{first}} | "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        + " |"
        for name, *cells in lines
    ]
    rule = "|" + "-" * (first + 2) + "|" + "|".join("-" * (width + 1) + ":" for width in others) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def thread_count(threads: int) -> str:
    """`1 thread`, `2 threads`; 0 for a GPU."""
    if threads == 0:
        return "on the device"
    return f"{threads} thread{'s' if threads > 1 else ''}"


def timed(rows: Iterable[Row]) -> list[Row]:
    """Those that are not about memory."""
    return [row for row in rows if row[RNNKERN].mode != MEMORY]


def origin(rows: Iterable[Row]) -> str:
    """What the rows were measured with, when, and under which ceiling."""
    ours = [row[RNNKERN] for row in rows]

    def distinct(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    def extent(values: Iterable[float]) -> str:
        found = sorted({f"{value:.0f}" for value in values}, key=float)
        return " to ".join(dict.fromkeys((found[0], found[-1])))

    gpu = [record for record in ours if isinstance(record, GpuRecord)]
    others = f"CUDA {distinct(r.cuda for r in gpu)}; cuDNN {distinct(str(r.cudnn) for r in gpu)}" if gpu else (
        f"numba {distinct(record.numba for record in ours)}"
    )  # fmt: skip
    ceilings = f"{extent(record.ceiling_gflops for record in ours)} GF/s"
    return (
        f"torch {distinct(record.torch for record in ours)}; {others}; "
        f"rnnkern {distinct(f'{record.rnnkern} {record.commit}'.strip() for record in ours)}; "
        f"{distinct(record.date[:10] for record in ours)}; "
        + (
            f"ceilings {ceilings}, {extent(r.ceiling_gbs for r in gpu)} GB/s"
            if gpu
            else f"ceiling of one core {ceilings}"
        )
    )


def picture_link(picture: Path, folder: Path) -> str:
    """The picture in a document that lies in `folder`."""
    return f"![{picture.stem}]({Path(os.path.relpath(picture, folder)).as_posix()})"


def shape_tables(rows: Iterable[Row]) -> Iterator[str]:
    """For each number of threads the ratio to torch.nn of every shape, and rnnkern's share of the ceiling."""
    places = by_place(timed(rows))
    for threads in sorted({place[0] for place in places}):
        columns = {place: places[place] for place in places if place[0] == threads}
        shapes = {name: row[RNNKERN] for members in columns.values() for name, row in members.items()}
        body = []
        for name, ours in shapes.items():
            found = (members.get(name) for members in columns.values())
            cells = (f"{number(over(TORCH, row))} ({row[RNNKERN].share:.0%})" if row else "" for row in found)
            body.append([name, " ".join(map(str, (ours.T, ours.B, ours.I, ours.H))), ours.options, *cells])
        yield (
            f"torch.nn's time / rnnkern's (in brackets rnnkern's share of the ceiling), {thread_count(threads)}\n\n"
            + table(["shape", "T B I H", "options", *(f"{cell} {mode}" for _, cell, mode in columns)], body)
        )


def family_tables(rows: Iterable[Row]) -> Iterator[str]:
    """For each number of threads and each rival the geometric means of families, and over them."""
    places = by_place(timed(rows))
    for threads in sorted({place[0] for place in places}):
        for rival in RIVALS:
            means = {
                place: found
                for place, members in places.items()
                if place[0] == threads and (found := family_means(rival, members.values()))
            }
            if not means:
                continue
            body = [
                [label, *(number(mean_over(families, found)) for found in means.values())]
                for label, families in averaged(family for found in means.values() for family in found).items()
                if any(family in found for found in means.values() for family in families)
            ]
            if rival == TORCH:
                worst = (max(filter(math.isfinite, map(noise, places[place].values()))) for place in means)
                body.append(["A/A, the worst", *map(number, worst)])
            yield (
                f"{NAMES[rival]}'s time / rnnkern's, geometric means, {thread_count(threads)}\n\n"
                + table(["family", *(f"{cell} {mode}" for _, cell, mode in means)], body)
            )


def memory_tables(rows: Iterable[Row]) -> Iterator[str]:
    """For each number of threads the peaks of both on every shape, if memory was measured."""
    places = by_place(row for row in rows if row[RNNKERN].mode == MEMORY)
    for threads in sorted({place[0] for place in places}):
        columns = {cell: members for (count, cell, _), members in places.items() if count == threads}
        names = dict.fromkeys(name for members in columns.values() for name in members)
        found = {name: [members.get(name) for members in columns.values()] for name in names}
        body = [
            [name, *(f"{row[RNNKERN].memory_mb:.1f} / {row[TORCH].memory_mb:.1f}" if row else "" for row in cells)]
            for name, cells in found.items()
        ]
        yield (
            f"peak memory of a training step in MB, rnnkern / torch.nn, {thread_count(threads)}\n\n"
            + table(["shape", *columns], body)
        )
