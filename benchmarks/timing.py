"""Timing in turn, and the statistics of it.

All implementations of a row run in one process in rounds: A B C, then C B A, and so on, so that a clock that drifts
or a neighbour that wakes up hits all alike. In its turn each runs some calls that are not counted (until its own data
are in the caches and the OpenMP threads of the one before no longer spin), then a block of calls timed one by one.
"""

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter

import numpy as np

SETTLE_SECONDS = 0.010  # uncounted calls before a block
BLOCK_SECONDS = 0.020  # counted calls of a block
LONG_SECONDS = 0.100  # a call this long settles within itself
LEAST_ROUNDS = 5
QUANTILES = (10, 25, 50, 75, 90)


@dataclass(frozen=True)
class Turn:
    """How many calls one implementation makes in its turn."""

    uncounted: int
    counted: int


def plan_turn(seconds: float) -> Turn:
    """For a call that takes `seconds`."""
    uncounted = 0 if seconds > LONG_SECONDS else max(1, round(SETTLE_SECONDS / seconds))
    return Turn(uncounted, max(1, round(BLOCK_SECONDS / seconds)))


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = perf_counter()
    call()
    return perf_counter() - start


def estimate(call: Callable[[], object]) -> float:
    """Seconds of one call, of the quickest of three unless it is long."""
    first = time_call(call)
    return first if first > LONG_SECONDS else min(first, time_call(call), time_call(call))


def interleave(calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, list[list[float]]]:
    """Seconds of every counted call, `[round][call]` by name, from about `budget` seconds of rounds, five at least."""
    turns = {name: plan_turn(estimate(call)) for name, call in calls.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    order = list(calls)
    end = perf_counter() + budget
    gc.collect()
    gc.disable()
    try:
        while len(samples[order[0]]) < LEAST_ROUNDS or perf_counter() < end:
            for name in order:
                for _ in range(turns[name].uncounted):
                    calls[name]()
                samples[name].append([time_call(calls[name]) for _ in range(turns[name].counted)])
            order.reverse()
    finally:
        gc.enable()
    return samples


def quantiles(rounds: Iterable[Iterable[float]]) -> dict[int, float]:
    """The percentiles QUANTILES of all samples together."""
    flat = [sample for block in rounds for sample in block]
    return dict(zip(QUANTILES, np.percentile(flat, QUANTILES).tolist(), strict=True))


def ratio(above: list[list[float]], below: list[list[float]]) -> float:
    """How many times longer `above` takes than `below`: the median over rounds of the ratio of the round's two medians.

    Both sides of each ratio were measured within one round, so what slows the machine for a while cancels.
    """
    pairs = zip(above, below, strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios: of 2 and 1/2 it is 1."""
    return math.exp(statistics.fmean(math.log(value) for value in values))
