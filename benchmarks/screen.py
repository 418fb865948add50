"""A row of the table as it stands on the screen while it is measured, and the head above such rows."""

import math

from benchmarks import results
from benchmarks.results import AGAIN, MEMORY, ONNX, RNNKERN, TORCH, GpuRecord, Record, Row

SIZES = f"{'shape':<22}{'T':>5}{'B':>6}{'I':>4}{'H':>5}"
TIMES = (
    f"  {'torch ms':>9}{'GF/s':>6}{'%':>4}  {'rnnkern ms':>10} {'10 to 90 %':>17}{'GF/s':>6}{'%':>4}"
    f"  {'onnx ms':>8}  {'torch/rnnkern':>13} {'A/A':>5} {'onnx/rnnkern':>12}"
)
STEPS = (
    f"  {'us a step: torch':>16} {'10 to 90 %':>17}  {'rnnkern':>9} {'10 to 90 %':>17}  {'bytes':>7} {'FLOPs':>7}"
    f"  {'torch/rnnkern':>13} {'A/A':>5}  cuDNN"
)
PEAKS = f"  {'torch MB':>9} {'rnnkern MB':>10}"


def head(mode: str, on_gpu: bool) -> str:
    """The line above rows of that mode."""
    if mode == MEMORY:
        return SIZES + PEAKS
    return SIZES + (STEPS if on_gpu else TIMES)


def line(row: Row) -> str:
    """The row, under its head."""
    theirs, ours = row[TORCH], row[RNNKERN]
    text = f"{ours.shape:<22}{ours.T:>5}{ours.B:>6}{ours.I:>4}{ours.H:>5}"
    if ours.mode == MEMORY:
        text += f"  {figure(theirs.memory_mb, 1):>9} {figure(ours.memory_mb, 1):>10}"
    elif isinstance(ours, GpuRecord) and isinstance(theirs, GpuRecord):
        text += steps(row, theirs, ours)
    else:
        return text + times(row, theirs, ours)
    return text + "".join(f"  {name}: {why}" for name, why in statuses(row).items())


def times(row: Row, theirs: Record, ours: Record) -> str:
    """Milliseconds, of a CPU."""
    onnx = row.get(ONNX)
    text = f"  {theirs.ms_median:>9.3f}{theirs.gflops:>6.1f}{100 * theirs.share:>4.0f}"
    text += f"  {ours.ms_median:>10.3f} {spread(ours, 1):>17}{ours.gflops:>6.1f}{100 * ours.share:>4.0f}"
    text += f"  {onnx.ms_median:>8.3f}" if onnx else f"  {'':>8}"
    text += f"  {results.over(TORCH, row):>13.2f} {row[AGAIN].ratio:>5.2f}"
    return text + (f" {results.over(ONNX, row):>12.2f}" if onnx else "")


def steps(row: Row, theirs: GpuRecord, ours: GpuRecord) -> str:
    """Microseconds a step beside the two floors, of a GPU."""
    us = 1e3 / ours.T
    text = f"  {figure(theirs.us_step, 3):>16} {spread(theirs, us):>17}"
    text += f"  {figure(ours.us_step, 3):>9} {spread(ours, us):>17}"
    text += f"  {ours.floor_moving_us:>7.3f} {ours.floor_computing_us:>7.3f}"
    return text + (f"  {figure(results.over(TORCH, row), 2):>13} {figure(row[AGAIN].ratio, 2):>5}  {theirs.algorithm}")


def spread(record: Record, factor: float) -> str:
    """From the tenth to the ninetieth percentile, in milliseconds times the factor."""
    if math.isnan(record.ms_median):
        return ""
    return f"{record.ms_q10 * factor:.3f} to {record.ms_q90 * factor:.3f}"


def figure(value: float, digits: int) -> str:
    """A number, or nothing where there is none."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def statuses(row: Row) -> dict[str, str]:
    """What the records say beside their figures."""
    return {name: record.status for name, record in row.items() if isinstance(record, GpuRecord) and record.status}
