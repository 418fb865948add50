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
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch

QUANTILES = (10, 25, 50, 75, 90)


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = perf_counter()
    call()
    return perf_counter() - start


def time_on_host(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of so many calls."""
    return [time_call(call) for _ in range(count)]


def time_on_gpu(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of so many calls, between events on the current stream: nothing waits for the GPU until all are
    queued, so that a call counts with what the GPU takes for it or with what queueing it takes, whichever is longer."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


@dataclass(frozen=True)
class Turn:
    """How many calls one implementation makes in its turn."""

    uncounted: int
    counted: int


@dataclass(frozen=True)
class Watch:
    """How calls are timed, and how many."""

    clock: Callable[[Callable[[], object], int], list[float]] = time_on_host
    settle: float = 0.010  # seconds of uncounted calls before a block
    block: float = 0.020  # seconds of counted calls of a block
    long: float = 0.100  # seconds of a call that settles within itself
    rounds: int = 5  # at least

    def plan_turn(self, seconds: float) -> Turn:
        """For a call that takes `seconds`."""
        uncounted = 0 if seconds > self.long else max(1, round(self.settle / seconds))
        return Turn(uncounted, max(1, round(self.block / seconds)))

    def estimate(self, call: Callable[[], object]) -> float:
        """Seconds of one call, of the quickest of three unless it is long."""
        (first,) = self.clock(call, 1)
        return first if first > self.long else min(first, *self.clock(call, 2))


CPU = Watch()
GPU = Watch(time_on_gpu, settle=0.003, block=0.010, long=0.020)
GLANCE = Watch(settle=0, block=0, rounds=2)  # to see that it runs


def interleave(
    calls: Mapping[str, Callable[[], object]], budget: float, watch: Watch = CPU
) -> dict[str, list[list[float]]]:
    """Seconds of every counted call, `[round][call]` by name, from about `budget` seconds of rounds, no fewer rounds
    than the watch wants."""
    turns = {name: watch.plan_turn(watch.estimate(call)) for name, call in calls.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    order = list(calls)
    end = perf_counter() + budget
    gc.collect()
    gc.disable()
    try:
        while len(samples[order[0]]) < watch.rounds or perf_counter() < end:
            for name in order:
                for _ in range(turns[name].uncounted):
                    calls[name]()
                samples[name].append(watch.clock(calls[name], turns[name].counted))
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
