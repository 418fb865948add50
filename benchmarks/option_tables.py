"""What the options cost and gain, on the screen and as markdown, and what falls short of a goal."""

import math
from collections.abc import Iterable, Iterator, Mapping

from benchmarks.goals import listed
from benchmarks.option_table import DEAREST, OPTIONS, RESET_SHAPES
from benchmarks.results import (
    MEMORY,
    PLAIN,
    PLAIN_AGAIN,
    RNNKERN,
    TORCH,
    Place,
    Row,
    family_means,
    mean_over,
    noise,
    over,
    place,
)
from benchmarks.tables import number, table, thread_count

SMALL_B = 16  # up to so many sequences a loop loses most
LEAST_SPEEDUP = 5.0  # of the loop's time / rnnkern's, in the mean of families with small B
RESETS, DEAREST_RESET = ("reset", "reset_to"), 1.10  # in training on RESET_SHAPES
MOST_MEMORY = 0.45  # of a training step's peak with recompute / without

Members = Mapping[tuple[str, str], Row]  # rows of one place by option and shape


def by_place(rows: Iterable[Row]) -> dict[Place, dict[tuple[str, str], Row]]:
    """Rows by threads, cell and mode, then by option and shape."""
    places: dict[Place, dict[tuple[str, str], Row]] = {}
    for row in rows:
        ours = row[RNNKERN]
        places.setdefault(place(ours), {})[ours.options, ours.shape] = row
    return places


def cost(row: Row) -> float:
    """Time with the option / without."""
    return 1 / over(PLAIN, row)


def unrest(row: Row) -> float:
    """How far the two plain copies came out apart, 1 at best."""
    return noise(row, PLAIN_AGAIN)


def of_option(name: str, members: Members) -> list[Row]:
    """Its rows."""
    return [row for (option, _), row in members.items() if option == name]


def mean_cost(rows: Iterable[Row]) -> float:
    """Geometric, over the shapes of a family, then over families."""
    means = family_means(PLAIN, rows)
    return 1 / mean_over(means, means)


def mean_speedup(rows: Iterable[Row]) -> float:
    """The same of the loop's time / rnnkern's, of the shapes with few sequences; NaN without any."""
    means = family_means(TORCH, (row for row in rows if row[RNNKERN].B <= SMALL_B))
    return mean_over(means, means)


def options_in(members: Members) -> list[str]:
    """The options measured, in the order of the table."""
    found = {option for option, _ in members}
    return [name for name in OPTIONS if name in found]


def summary(rows: Iterable[Row]) -> str:
    """For each number of threads, cell and mode the table, and what falls short of a goal."""
    places = by_place(rows)
    parts = [
        f"mean speedup over the loop, B <= {SMALL_B}, {thread_count(threads)}\n\n{speedup_table(threads, places)}"
        for threads in dict.fromkeys(threads for threads, _, mode in places if mode != MEMORY)
    ]
    for (threads, cell, mode), members in places.items():
        said = f"{cell} {mode}, {thread_count(threads)}"
        if mode == MEMORY:
            lines, falls = memory_table(members), memory_goals(members)
            parts += [f"peak of a training step in MB, plain / recompute, {said}\n\n{lines}", "\n".join(falls)]
        else:
            parts += [f"cost / speedup, {said}\n\n{time_table(members)}", "\n".join(time_goals(mode, members))]
    return "\n\n".join(parts)


def speedup_table(threads: int, places: Mapping[Place, Members]) -> str:
    """A line for each option: the mean of each cell and mode, and over them all."""
    chosen = {f"{at[1]} {at[2]}": members for at, members in places.items() if at[0] == threads and at[2] != MEMORY}
    body = []
    for name in OPTIONS:
        means = [mean_speedup(of_option(name, members)) for members in chosen.values()]
        there = [value for value in means if not math.isnan(value)]
        if there:
            body.append([name, *map(number, means), number(math.exp(sum(map(math.log, there)) / len(there)))])
    return table(["option", *chosen, "mean"], body)


def time_table(members: Members) -> str:
    """A line for each option, `cost / speedup` for each shape, then the two means."""
    shapes = list(dict.fromkeys(shape for _, shape in members))
    body = []
    for name in options_in(members):
        found = (members.get((name, shape)) for shape in shapes)
        rows = of_option(name, members)
        body.append([name, *map(figures, found), number(mean_cost(rows)), number(mean_speedup(rows))])
    worst = (max(unrest(row) for (_, at), row in members.items() if at == shape) for shape in shapes)
    body.append(["A/A, the worst", *map(number, worst), "", ""])
    return table(["option", *shapes, "mean cost", f"mean speedup, B <= {SMALL_B}"], body)


def figures(row: Row | None) -> str:
    """Cost and speedup of a case."""
    if row is None:
        return ""
    return " / ".join(filter(None, (number(cost(row)), number(over(TORCH, row)))))


def memory_table(members: Members) -> str:
    """A line for each shape."""
    body = []
    for (_, shape), row in members.items():
        plain, ours = row[PLAIN].memory_mb, row[RNNKERN].memory_mb
        body.append([shape, f"{plain:.1f} / {ours:.1f}", number(ours / plain)])
    return table(["shape", "MB", "recompute / plain"], body)


def time_goals(mode: str, members: Members) -> Iterator[str]:
    """A line for each goal that these rows can show."""
    names, goals = options_in(members), {name: option.dearest for name, option in OPTIONS.items()}
    others = ", ".join(f"{name} {limit:.2f}" for name, limit in goals.items() if limit and limit != DEAREST)
    costs = {name: mean_cost(of_option(name, members)) for name in names}
    dear = {name: number(value) for name, value in costs.items() if value > (goals[name] or math.inf)}
    yield listed(f"mean cost above {DEAREST:.2f} ({others})", dear)
    pairs = [(option, shape.name) for option in RESETS for shape in RESET_SHAPES]
    resets = {f"{shape} {option}": members.get((option, shape)) for option, shape in pairs}
    if mode == "train" and any(resets.values()):
        slow = {
            name: number(cost(row)) for name, row in resets.items() if row and cost(row) / unrest(row) > DEAREST_RESET
        }
        yield listed(f"cost of a reset above {DEAREST_RESET:.2f}", slow)
    loops = {key: over(TORCH, row) for key, row in members.items() if TORCH in row}
    if loops:
        yield listed(
            "slower than the loop", {" ".join(key): number(value) for key, value in loops.items() if value < 1}
        )
    means = {name: mean_speedup(of_option(name, members)) for name in names}
    if not all(map(math.isnan, means.values())):
        small = {name: number(value) for name, value in means.items() if value < LEAST_SPEEDUP}
        yield listed(f"mean speedup under {LEAST_SPEEDUP:g} with B <= {SMALL_B}", small)


def memory_goals(members: Members) -> Iterator[str]:
    """The shapes on which recompute saves too little."""
    shares = {shape: row[RNNKERN].memory_mb / row[PLAIN].memory_mb for (_, shape), row in members.items()}
    above = {shape: number(share) for shape, share in shares.items() if share > MOST_MEMORY}
    yield listed(f"recompute's peak above {MOST_MEMORY:.2f} of the plain one", above)


SIZES = f"{'option':<18}{'shape':<12}{'T':>5}{'B':>4}{'I':>4}{'H':>5}"
TIMES = f"  {'plain ms':>9} {'option ms':>10} {'10 to 90 %':>19} {'loop ms':>9}  {'cost':>5} {'A/A':>5} {'speedup':>7}"
PEAKS = f"  {'plain MB':>9} {'recompute MB':>12} {'share':>6}"


def head(mode: str) -> str:
    """The line above rows of that mode."""
    return SIZES + (PEAKS if mode == MEMORY else TIMES)


def line(row: Row) -> str:
    """The row as it stands on the screen, under its head."""
    plain, ours = row[PLAIN], row[RNNKERN]
    text = f"{ours.options:<18}{ours.shape:<12}{ours.T:>5}{ours.B:>4}{ours.I:>4}{ours.H:>5}"
    if ours.mode == MEMORY:
        return text + f"  {plain.memory_mb:>9.1f} {ours.memory_mb:>12.1f} {ours.memory_mb / plain.memory_mb:>6.2f}"
    spread, loop = f"{ours.ms_q10:.3f} to {ours.ms_q90:.3f}", row.get(TORCH)
    text += f"  {plain.ms_median:>9.3f} {ours.ms_median:>10.3f} {spread:>19} "
    text += f"{loop.ms_median:>9.3f}" if loop else f"{'':>9}"
    return text + f"  {cost(row):>5.2f} {row[PLAIN_AGAIN].ratio:>5.2f} {number(over(TORCH, row)):>7}"
