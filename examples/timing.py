"""Seconds: of training steps by rnnkern and by torch.nn in turn, and of the test of a clip."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import cycle, islice

import torch
from torch import nn

from examples.catalogue import Entry, Recipe
from examples.classifier import loss_of, make_optimizer
from examples.data import Batches, Dataset, Examples
from examples.models import build, torch_has

ROUNDS, STEPS = 5, 20  # a round is so many steps of the one, then as many of the other
CLIPS = 50


class Stepper:
    """A model in training, some steps at a time."""

    def __init__(self, model: nn.Module, recipe: Recipe, batches: Iterator[Examples]) -> None:
        self.model, self.batches = model.train(), batches
        self.optimizer = make_optimizer(recipe, model.parameters())

    def seconds(self, steps: int) -> float:
        """What so many steps take."""
        chosen = list(islice(self.batches, steps))
        start = time.perf_counter()
        for batch in chosen:
            self.optimizer.zero_grad()
            loss_of(self.model(batch.inputs), batch.labels).backward()
            self.optimizer.step()
        return time.perf_counter() - start


def both_ways(entry: Entry, data: Dataset, seed: int) -> dict[str, float]:
    """Seconds of an epoch's steps, forward, backward and optimizer, on the CPU: by rnnkern and by torch.nn, in turn, so
    that whatever else the machine does falls on both. Medians of the rounds. Without torch.nn's where it lacks what the
    model has."""
    recipe = entry.family.recipe
    training = data.train if recipe.holdout is None else recipe.holdout.split(data.train)[0]
    batches = Batches(training, recipe.batch, drop_last=recipe.drop_last)
    steppers = {}
    rivals = [("rnnkern", "auto")] + [("torch", "torch")] * torch_has(entry.layers)
    for name, backend in rivals:
        torch.manual_seed(seed)
        model = build(entry.layers, tuple(data.train.inputs.shape[1:]), backend)
        steppers[name] = Stepper(model, recipe, iter(cycle(batches)))
    for stepper in steppers.values():
        stepper.seconds(2)  # compiles kernels
    rounds = [{name: stepper.seconds(STEPS) for name, stepper in steppers.items()} for _ in range(ROUNDS)]
    return {
        name: round(statistics.median(taken[name] for taken in rounds) / STEPS * len(batches), 3) for name in steppers
    }


@torch.no_grad()
def seconds_a_frame(model: nn.Module, data: Dataset) -> dict[str, float]:
    """The median over clips tested one by one; nothing for other data."""
    clips = data.test.inputs[:CLIPS]
    if clips.dim() != 5:
        return {}
    model.eval()
    device, taken = next(model.parameters()).device, []
    for clip in clips.to(device).split(1):
        start = time.perf_counter()
        model(clip).cpu()  # waits for a GPU
        taken.append((time.perf_counter() - start) / clip.shape[1])
    return {"seconds_a_frame": round(statistics.median(taken), 6)}
