"""The shapes that are measured: what people run, not what the kernels like.

Odd sizes, single streams and ragged batches are among them. Any other is spelled out, as `T28,B64,I28,H128,packed`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

STEPWISE = "cell in a loop"  # among the options of such a shape, in words
CUSTOM = "custom"  # the family of shapes that are spelled out


@dataclass(frozen=True)
class Shape:
    """One layer or stack of layers on an input `(T, B, I)` with `H` hidden units, and how it is called.

    `ragged` says how rnnkern is told the lengths: as a PackedSequence, or as a padded input with `lengths=`.
    torch.nn gets the same PackedSequence for both. `stepwise` runs LSTMCell, GRUCell or RNNCell in a Python loop.
    """

    name: str
    family: str
    T: int
    B: int
    I: int  # noqa: E741, the name that every formula of this project uses
    H: int
    layers: int = 1
    bidirectional: bool = False
    ragged: Literal["", "packed", "lengths"] = ""
    stepwise: bool = False

    def lengths(self) -> Tensor:
        """int64 (B,): the real steps of each sequence.

        Ragged ones are quantiles of a log-normal distribution, as lengths of sentences and utterances are, in a
        shuffled order that never changes. The longest is T, and about half of the T * B padded steps are real.
        """
        if not self.ragged:
            return torch.full((self.B,), self.T)
        normal = NormalDist(sigma=0.35)
        logs = torch.tensor([normal.inv_cdf((row + 0.5) / self.B) for row in range(self.B)])
        lengths = (self.T * torch.exp(logs - logs.max())).round().long().clamp(min=1)
        return lengths[torch.randperm(self.B, generator=torch.Generator().manual_seed(0))]

    def options(self) -> str:
        """What the sizes do not say, in words."""
        said = [f"{self.layers} layers"] if self.layers > 1 else []
        said += ["bidirectional"] if self.bidirectional else []
        said += [self.ragged] if self.ragged else []
        said += [STEPWISE] if self.stepwise else []
        return ", ".join(said)


SHAPES = (
    # rows of an image as steps
    Shape("mnist", "mnist", 28, 64, 28, 128),
    Shape("mnist-small", "mnist", 28, 32, 28, 64),
    Shape("mnist-wide", "mnist", 28, 256, 28, 256),
    # classifiers over embedded text
    Shape("text-narrow", "text", 100, 64, 128, 8),
    Shape("text", "text", 200, 32, 100, 128),
    # frames of 10 ms
    Shape("speech", "speech", 200, 16, 80, 256),
    Shape("speech-long", "speech", 1000, 8, 40, 320),
    # language models, truncated backpropagation over 35 words
    Shape("word", "word", 35, 20, 650, 650),
    Shape("word-large", "word", 35, 32, 512, 1024),
    # where a matrix product dominates
    Shape("large-square", "large", 64, 64, 512, 512),
    Shape("large-batch", "large", 128, 128, 96, 192),
    # one sequence at a time
    Shape("stream", "stream", 100, 1, 64, 128),
    Shape("stream-wide", "stream", 50, 1, 80, 512),
    Shape("stream-step", "stream", 1, 1, 64, 256),
    # forecasting from one value a step
    Shape("series", "series", 48, 64, 1, 64),
    Shape("series-long", "series", 500, 32, 1, 32),
    # reinforcement learning: one step of many environments, and their rollouts
    Shape("rl-step", "rl", 1, 256, 64, 128),
    Shape("rl-rollout", "rl", 128, 16, 64, 128),
    Shape("rl-replay", "rl", 40, 64, 256, 512),
    Shape("tagger", "tagger", 60, 32, 300, 256, bidirectional=True),
    Shape("tagger-small", "tagger", 30, 16, 100, 100, bidirectional=True),
    Shape("stacked", "stacked", 50, 32, 128, 256, layers=2),
    Shape("stacked-bidirectional", "stacked", 40, 16, 64, 128, layers=2, bidirectional=True),
    Shape("packed-text", "packed", 100, 64, 128, 128, ragged="packed"),
    Shape("packed-tagger", "packed", 60, 32, 300, 256, bidirectional=True, ragged="packed"),
    Shape("packed-speech", "packed", 500, 32, 80, 256, ragged="packed"),
    Shape("lengths-text", "lengths", 100, 64, 128, 128, ragged="lengths"),
    Shape("lengths-tagger", "lengths", 60, 32, 300, 256, bidirectional=True, ragged="lengths"),
    Shape("lengths-speech", "lengths", 500, 32, 80, 256, ragged="lengths"),
    Shape("cell", "cell", 50, 32, 64, 128, stepwise=True),
    Shape("cell-single", "cell", 20, 1, 16, 64, stepwise=True),
    # where the cost of a call shows
    Shape("tiny", "tiny", 50, 8, 8, 8),
    Shape("tiny-short", "tiny", 10, 4, 5, 16),
    # the layers of the examples' catalogue that are not above, in one family: so many may not carry the mean
    Shape("rows-24", "classifier", 28, 32, 28, 24),
    Shape("rows-32", "classifier", 28, 32, 28, 32),
    Shape("rows-128", "classifier", 28, 32, 28, 128),
    Shape("rows-512", "classifier", 28, 32, 28, 512),
    Shape("rows-batch", "classifier", 28, 128, 28, 128),
    Shape("rows-loop", "classifier", 28, 128, 28, 128, stepwise=True),
    Shape("rows-second", "classifier", 28, 32, 64, 64),
    Shape("rows-second-32", "classifier", 28, 32, 64, 32),
    Shape("rows-second-512", "classifier", 28, 32, 512, 512),
    Shape("rows-both-ways", "classifier", 28, 32, 28, 64, bidirectional=True),
    Shape("rows-both-ways-second", "classifier", 28, 32, 128, 64, bidirectional=True),
    Shape("rows-both-ways-second-32", "classifier", 28, 32, 128, 32, bidirectional=True),
    Shape("maps", "classifier", 16, 32, 169, 30),
    Shape("maps-both-ways", "classifier", 16, 32, 169, 30, bidirectional=True),
    Shape("maps-small", "classifier", 16, 32, 100, 30),
    Shape("maps-wide", "classifier", 16, 32, 169, 128),
    Shape("gray", "classifier", 32, 32, 32, 128),
    Shape("reviews-onehot", "classifier", 100, 64, 300, 8),
    Shape("reviews-embedded", "classifier", 100, 64, 16, 8),
    Shape("reviews-second", "classifier", 100, 64, 8, 8),
    Shape("clips", "classifier", 16, 32, 32, 32),
    Shape("clips-both-ways", "classifier", 16, 32, 32, 32, bidirectional=True),
    Shape("clips-both-ways-second", "classifier", 16, 32, 64, 32, bidirectional=True),
    # multiples of nothing
    Shape("odd", "odd", 37, 13, 29, 97),
    Shape("odd-long", "odd", 211, 3, 17, 67),
    Shape("odd-wide", "odd", 23, 7, 131, 331),
)

FAMILIES = tuple(dict.fromkeys(shape.family for shape in SHAPES))

# A word behind the sizes of a shape that is spelled out -> what it sets
OPTIONS: dict[str, dict[str, Any]] = {
    "bidirectional": {"bidirectional": True},
    "packed": {"ragged": "packed"},
    "lengths": {"ragged": "lengths"},
    "stepwise": {"stepwise": True},
}


def spelled(text: str) -> Shape:
    """The shape that `T28,B64,I28,H128,layers=2,bidirectional` spells, which is also its name."""
    sizes = re.fullmatch(r"T([1-9]\d*),B([1-9]\d*),I([1-9]\d*),H([1-9]\d*)((?:,[^,]+)*)", text)
    if not sizes:
        raise ValueError(f"shape: expected sizes from 1 up as in T28,B64,I28,H128, then options, got {text!r}")
    options: dict[str, Any] = {}
    for word in sizes[5].split(",")[1:]:
        layers = re.fullmatch(r"layers=([1-9]\d*)", word)
        new = {"layers": int(layers[1])} if layers else OPTIONS.get(word)
        if not new or new.keys() & options.keys():
            raise ValueError(
                f"shape: expected options among layers=N, {', '.join(OPTIONS)}, "
                f"each once and one of packed and lengths, got {word!r} in {text!r}"
            )
        options |= new
    if options.keys() > {"stepwise"}:
        raise ValueError(f"shape: expected no option beside stepwise, which runs one cell in a loop, got {text!r}")
    T, B, I, H = (int(size) for size in sizes.groups()[:4])  # noqa: E741
    return Shape(text, CUSTOM, T, B, I, H, **options)


def named(name: str) -> Shape:
    """The registry's shape of that name, or the one that it spells."""
    return next((shape for shape in SHAPES if shape.name == name), None) or spelled(name)


def select(patterns: Sequence[str], registry: Sequence[Shape] = SHAPES) -> list[Shape]:
    """The shapes whose name or family matches one of the patterns (`stream`, `packed-*`), in the registry's order."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for shape in registry for name in (shape.name, shape.family)):
            raise ValueError(f"shapes: expected names or families of the registry (see --list), got {pattern!r}")
    return [
        shape
        for shape in registry
        if any(fnmatchcase(name, p) for p in patterns for name in (shape.name, shape.family))
    ]
