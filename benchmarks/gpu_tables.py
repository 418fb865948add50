"""The table of a GPU's report, in markdown: microseconds a step beside their floor, and what cuDNN ran."""

from collections.abc import Iterable, Iterator

from benchmarks.results import RNNKERN, TORCH, GpuRecord, Row, by_place, noise, over
from benchmarks.screen import figure, statuses
from benchmarks.tables import number, table, timed

HEAD = (
    "shape", "T B I H", "options", "torch.nn us", "rnnkern us", "torch.nn / rnnkern", "A/A", "floor us", "by",
    "rnnkern / floor", "cuDNN", "remarks",
)  # fmt: skip


def step_tables(rows: Iterable[Row]) -> Iterator[str]:
    """For each cell and mode a line for every shape."""
    for (_, cell, mode), members in by_place(timed(rows)).items():
        body = [cells(row) for row in members.values()]
        yield f"{cell} {mode}, microseconds a step\n\n{table(HEAD, body)}"


def cells(row: Row) -> list[str]:
    """A line of the table."""
    ours, theirs = row[RNNKERN], row[TORCH]
    if not (isinstance(ours, GpuRecord) and isinstance(theirs, GpuRecord)):
        raise TypeError(f"rows: expected records of a GPU, got {type(ours).__name__} and {type(theirs).__name__}")
    return [
        ours.shape,
        f"{ours.T} {ours.B} {ours.I} {ours.H}",
        ours.options,
        figure(theirs.us_step, 2),
        figure(ours.us_step, 2),
        number(over(TORCH, row)),
        number(noise(row)),
        figure(ours.floor_us, 2),
        "bytes" if ours.floor_moving_us > ours.floor_computing_us else "FLOPs",
        number(ours.us_step / ours.floor_us),
        theirs.algorithm,
        "; ".join(f"{name}: {why}" for name, why in statuses(row).items()),
    ]
