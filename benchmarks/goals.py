"""What was measured, against what is to be reached: means over families, and every shape that falls short.

`python -m benchmarks` says it after a run and `python -m benchmarks.report` under its tables; docs/performance.md
tells how to read it.
"""

from collections.abc import Iterable, Iterator, Mapping

from benchmarks.results import MEMORY, RNNKERN, TORCH, Row, by_place, noise, over
from benchmarks.shapes import STEPWISE
from benchmarks.tables import NAMES, RIVALS, family_tables, number, thread_count

LEAST_RATIO = 0.95  # a rival's time / rnnkern's
NEAR_CEILING = 0.85  # the share of the ceiling above which torch.nn leaves little to win, and parity is enough
LEAST_SHARE = {"forward": 0.80, "train": 0.75}  # of the ceiling, for layers large enough to come near it:
LEAST_B, LEAST_H = 16, 64
MOST_MEMORY = 1.05  # rnnkern's peak / torch.nn's
MEMORY_STEP = 0.5  # MB, under which peaks cannot be told apart

Members = Mapping[str, Row]  # rows of one place by the shape's name


def summary(rows: Iterable[Row]) -> str:
    """The means of families, and for each number of threads, cell and mode what falls short of a goal."""
    rows = list(rows)
    parts = list(family_tables(rows))
    for (threads, cell, mode), members in by_place(rows).items():
        falls = memory_goals(members) if mode == MEMORY else time_goals(mode, members)
        parts.append("\n".join([f"{cell} {mode}, {thread_count(threads)}:", "", *falls]))
    return "\n\n".join(parts)


def time_goals(mode: str, members: Members) -> Iterator[str]:
    """A line for each goal that these rows can show."""
    near = {name: row for name, row in members.items() if row[TORCH].share > NEAR_CEILING}
    for rival in RIVALS:
        slow = {name: number(over(rival, row)) for name, row in members.items() if is_slow(rival, row)}
        if rival == TORCH:
            slow = {name: ratio for name, ratio in slow.items() if name not in near}
        if any(rival in row for row in members.values()):
            yield listed(f"{NAMES[rival]}'s time / rnnkern's under {LEAST_RATIO}", slow)
    if near:
        ratios = {
            name: number(over(TORCH, row)) + (f" (under {LEAST_RATIO})" if is_slow(TORCH, row) else "")
            for name, row in near.items()
        }
        yield listed(f"torch.nn above {NEAR_CEILING:.0%} of the ceiling, where parity is enough", ratios)
    large = {name: row[RNNKERN].share for name, row in members.items() if is_large(row)}
    if large and mode in LEAST_SHARE:
        least = LEAST_SHARE[mode]
        yield listed(
            f"under {least:.0%} of the ceiling",
            {name: f"{share:.1%}" for name, share in large.items() if share < least},
        )


def memory_goals(members: Members) -> Iterator[str]:
    """The shapes whose training step takes more memory than torch.nn's."""
    peaks = {name: (row[RNNKERN].memory_mb, row[TORCH].memory_mb) for name, row in members.items()}
    above = {
        name: f"{ours:.1f} MB against {theirs:.1f}"
        for name, (ours, theirs) in peaks.items()
        if ours > MOST_MEMORY * theirs and ours - theirs > MEMORY_STEP
    }
    yield listed(f"peak above torch.nn's by more than {MOST_MEMORY - 1:.0%}", above)


def is_slow(rival: str, row: Row) -> bool:
    """Whether the ratio is low by more than what the row shows as noise."""
    return over(rival, row) * noise(row) < LEAST_RATIO


def is_large(row: Row) -> bool:
    """Whether the goal for the share of the ceiling holds for the shape: it is one for CPUs."""
    ours = row[RNNKERN]
    return ours.threads > 0 and ours.B >= LEAST_B and ours.H >= LEAST_H and ours.T > 1 and STEPWISE not in ours.options


def listed(what: str, figures: Mapping[str, str]) -> str:
    """One line of the list: what is short, and every shape that is."""
    return f"- {what}: " + ("; ".join(f"{name} {figure}" for name, figure in figures.items()) or "none")
