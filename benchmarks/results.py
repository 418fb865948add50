"""A line of the CSV, reading and writing it, ratios, and means over shapes and families."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, GpuMachine, Machine
from benchmarks.timing import geometric_mean

FOLDER = ROOT / "benchmarks" / "results"
TORCH, AGAIN, RNNKERN, ONNX = "torch", "torch again", "rnnkern", "onnxruntime"
# where options are measured: rnnkern without the option; RNNKERN has it, TORCH is a step loop in torch
PLAIN, PLAIN_AGAIN = "plain", "plain again"
MEMORY = "memory"  # the mode of a row that holds the peak of a training step and no time


@dataclass(frozen=True, kw_only=True)
class Record(Machine):
    """One implementation on one row of the table. NaN, empty in the file, is what was not measured."""

    date: str  # UTC, the same for all implementations of a row
    dtype: str
    backend: str  # rnnkern's
    threads: int  # of the CPU; 0 where a GPU computes
    cell: str
    mode: str
    family: str
    shape: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    options: str
    real_steps: int  # over all sequences
    implementation: str
    rounds: int = 0
    calls: int = 0
    ms_q10: float = math.nan  # milliseconds of a call
    ms_q25: float = math.nan
    ms_median: float = math.nan
    ms_q75: float = math.nan
    ms_q90: float = math.nan
    ratio: float = math.nan  # the first implementation's time / this one's, round by round
    gflops: float = math.nan
    ceiling_gflops: float  # of one core, or of the GPU
    memory_mb: float = math.nan  # peak of a training step

    @property
    def share(self) -> float:
        """Of the ceiling of the cores in use: two threads have twice that of one, if there are two cores."""
        return self.gflops / (self.ceiling_gflops * min(max(self.threads, 1), self.cores))


@dataclass(frozen=True, kw_only=True)
class GpuRecord(Record, GpuMachine):
    """The same on a GPU."""

    ceiling_gbs: float
    floor_moving_us: float = math.nan  # least microseconds a step by the bytes (floors.py)
    floor_computing_us: float = math.nan  # and by the operations
    algorithm: str = ""  # cuDNN's, of torch.nn (cudnn.py)
    status: str = ""  # why there is no time, or what else is to be known of it

    @property
    def us_step(self) -> float:
        """Microseconds a step."""
        return self.ms_median * 1e3 / self.T

    @property
    def floor_us(self) -> float:
        """Microseconds that a step takes at least."""
        return max(self.floor_moving_us, self.floor_computing_us)


# One row of the table: its records by implementation
Row = Mapping[str, Record]

Place = tuple[int, str, str]  # threads, cell and mode: what a mean is taken over

_PARSE: dict[Any, Callable[[str], Any]] = {int: int, float: lambda text: float(text or "nan"), str: str}


def append(path: Path, row: Row) -> None:
    """Adds the row's records to the CSV, which is made if it is not there."""
    (kind,) = {type(record) for record in row.values()}
    columns = [field.name for field in fields(kind)]
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != columns:
            raise ValueError(
                f"{path}: expected the columns {columns}, got {header}; move the file away to begin a new one"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for record in row.values():
            writer.writerow({name: written(value) for name, value in asdict(record).items()})


def written(value: float | int | str) -> str:
    """A value as it stands in the file."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def read(path: Path) -> list[Row]:
    """The newest measurement of every row in the file, in the order in which they first appear."""
    rows: dict[tuple[object, ...], dict[str, Record]] = {}
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        kind = GpuRecord if "gpu" in (lines.fieldnames or ()) else Record
        for line in lines:
            record = kind(**{field.name: _PARSE[field.type](line[field.name]) for field in fields(kind)})
            row = rows.setdefault((record.dtype, record.backend, *place(record), record.shape, record.options), {})
            if any(other.date != record.date for other in row.values()):
                row.clear()
            row[record.implementation] = record
    return list(rows.values())


def place(record: Record) -> Place:
    """Where a record belongs."""
    return record.threads, record.cell, record.mode


def by_place(rows: Iterable[Row]) -> dict[Place, dict[str, Row]]:
    """Rows by place, then by the shape's name."""
    places: dict[Place, dict[str, Row]] = {}
    for row in rows:
        places.setdefault(place(row[RNNKERN]), {})[row[RNNKERN].shape] = row
    return places


def over(rival: str, row: Row) -> float:
    """The rival's time / rnnkern's, NaN where the rival was not measured."""
    return row[RNNKERN].ratio / row[rival].ratio if rival in row else math.nan


def noise(row: Row, copy: str = AGAIN) -> float:
    """How far two copies of the same, torch.nn or `copy`, came out apart, 1 at best."""
    again = row[copy].ratio
    return max(again, 1 / again)


def family_means(rival: str, rows: Iterable[Row]) -> dict[str, float]:
    """Geometric mean of the rows' ratios to the rival per family; rows without the rival are left out."""
    families: dict[str, list[float]] = {}
    for row in rows:
        if not math.isnan(over(rival, row)):
            families.setdefault(row[RNNKERN].family, []).append(over(rival, row))
    return {family: geometric_mean(ratios) for family, ratios in families.items()}


def mean_over(families: Iterable[str], means: Mapping[str, float]) -> float:
    """Geometric mean over those of the families that `means` has, NaN if it has none."""
    found = [means[family] for family in families if family in means]
    return geometric_mean(found) if found else math.nan
