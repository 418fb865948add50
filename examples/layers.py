"""The layers that the catalogue's models are written in, and the modules made of them.

A layer knows the shape of what it gives for one example, so that a model can be described before it is built; sizes of
inputs follow from the layers before. Sequences are (B, T, I), images (B, channels, rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, one_hot

import rnnkern

Shape = tuple[int, ...]  # of one example, without the batch
Cell = Literal["lstm", "gru", "rnn"]
TORCH = "torch"  # the backend that is torch.nn's own layers
KERNEL, POOL = 3, 2


class Layer(Protocol):
    """What a model is put together from."""

    def shape(self, given: Shape) -> Shape:
        """What comes out, for what goes in."""

    def make(self, given: Shape, backend: str) -> nn.Module:
        """The module, for what goes in."""


@dataclass(frozen=True)
class Recurrent:
    """A layer of rnnkern's over (T, I). It gives the last state, of both directions one behind the other, or with
    `steps` the output of every step. `dropout` and `recurrent_dropout` are Keras's."""

    cell: Cell
    units: int
    bidirectional: bool = False
    steps: bool = False
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    reset_after: bool = True

    def shape(self, given: Shape) -> Shape:
        """(T, directions * units), or that of one step."""
        width = (1 + self.bidirectional) * self.units
        return (given[0], width) if self.steps else (width,)

    def make(self, given: Shape, backend: str) -> nn.Module:
        """The layer in a module that picks what it gives."""
        rnn = getattr(rnnkern, self.cell.upper())(
            given[1],
            self.units,
            batch_first=True,
            bidirectional=self.bidirectional,
            backend="auto" if backend == TORCH else backend,
            input_dropout=self.dropout,
            recurrent_dropout=self.recurrent_dropout,
            reset_after=self.reset_after,
        )
        return Steps(rnn) if self.steps else Last(rnn)

    def __str__(self) -> str:
        options = [", steps"] * self.steps + [", reset before"] * (not self.reset_after)
        options += [f", dropout {self.dropout}"] * (self.dropout > 0)
        options += [f", recurrent dropout {self.recurrent_dropout}"] * (self.recurrent_dropout > 0)
        return f"{'Bi-' * self.bidirectional}{self.cell.upper()}({self.units}{''.join(options)})"


@dataclass(frozen=True)
class StepLoop:
    """A cell module in a Python loop over the steps, from a state of zeros; it gives the last h."""

    cell: Cell
    units: int

    def shape(self, given: Shape) -> Shape:
        """(units,)."""
        return (self.units,)

    def make(self, given: Shape, backend: str) -> nn.Module:
        """The cell in its loop."""
        kind = getattr(rnnkern, f"{self.cell.upper()}Cell")
        return Loop(kind(given[1], self.units, backend="auto" if backend == TORCH else backend))

    def __str__(self) -> str:
        return f"{self.cell.upper()}Cell({self.units}) in a loop"


@dataclass(frozen=True)
class Dense:
    """A linear layer, with relu if asked for; `normal`: weights and bias drawn from the normal distribution (0, 1)."""

    units: int
    relu: bool = False
    normal: bool = False

    def shape(self, given: Shape) -> Shape:
        """The last size changed."""
        return (*given[:-1], self.units)

    def make(self, given: Shape, backend: str) -> nn.Module:
        """torch's Linear."""
        linear = nn.Linear(given[-1], self.units)
        return nn.Sequential(linear, nn.ReLU()) if self.relu else linear

    def __str__(self) -> str:
        return f"Dense({self.units}{', relu' * self.relu})"


@dataclass(frozen=True)
class Flatten:
    """All sizes of an example as one."""

    def shape(self, given: Shape) -> Shape:
        """Their product."""
        return (math.prod(given),)

    def make(self, given: Shape, backend: str) -> nn.Module:
        """torch's Flatten."""
        return nn.Flatten()

    def __str__(self) -> str:
        return "Flatten"


@dataclass(frozen=True)
class Embed:
    """Each of `words` numbers as a learned vector."""

    words: int
    size: int

    def shape(self, given: Shape) -> Shape:
        """(T, size)."""
        return (*given, self.size)

    def make(self, given: Shape, backend: str) -> nn.Module:
        """torch's Embedding."""
        return nn.Embedding(self.words, self.size)

    def __str__(self) -> str:
        return f"Embedding({self.words}, {self.size})"


@dataclass(frozen=True)
class OneHot:
    """Each of `words` numbers as a vector with a single 1."""

    words: int

    def shape(self, given: Shape) -> Shape:
        """(T, words)."""
        return (*given, self.words)

    def make(self, given: Shape, backend: str) -> nn.Module:
        """Nothing to learn."""
        return OneHotVectors(self.words)

    def __str__(self) -> str:
        return f"One-hot({self.words})"


@dataclass(frozen=True)
class Conv:
    """A 3 x 3 convolution without padding, and relu."""

    filters: int

    def shape(self, given: Shape) -> Shape:
        """(filters, rows, columns), two fewer of both."""
        return (self.filters, *(size - KERNEL + 1 for size in given[1:]))

    def make(self, given: Shape, backend: str) -> nn.Module:
        """torch's convolution."""
        return nn.Sequential(nn.Conv2d(given[0], self.filters, KERNEL), nn.ReLU())

    def __str__(self) -> str:
        return f"Conv({self.filters}, 3x3, relu)"


@dataclass(frozen=True)
class MaxPool:
    """The largest of 2 x 2."""

    def shape(self, given: Shape) -> Shape:
        """Half of the rows and columns, rounded down."""
        return (given[0], *(size // POOL for size in given[1:]))

    def make(self, given: Shape, backend: str) -> nn.Module:
        """torch's pooling."""
        return nn.MaxPool2d(POOL)

    def __str__(self) -> str:
        return "Max pool(2)"


@dataclass(frozen=True)
class MapsAsSteps:
    """Maps (C, rows, columns) as C steps of rows * columns values. With `channels_last` the values are first put in the
    order rows, columns, channels, as a Keras model has them, and then cut into C steps: those are not the maps."""

    channels_last: bool

    def shape(self, given: Shape) -> Shape:
        """(C, rows * columns)."""
        return (given[0], math.prod(given[1:]))

    def make(self, given: Shape, backend: str) -> nn.Module:
        """Nothing to learn."""
        return Reorder(self.channels_last)

    def __str__(self) -> str:
        return "Reshape, channels last" if self.channels_last else "Reshape, a map a step"


@dataclass(frozen=True)
class Gray:
    """The mean of an image's channels, whose rows are then steps."""

    def shape(self, given: Shape) -> Shape:
        """(rows, columns)."""
        return given[1:]

    def make(self, given: Shape, backend: str) -> nn.Module:
        """Nothing to learn."""
        return MeanOfChannels()

    def __str__(self) -> str:
        return "Gray"


@dataclass(frozen=True)
class PerFrame:
    """The same layers over every frame of a clip (T, C, rows, columns)."""

    layers: tuple[Layer, ...]

    def shape(self, given: Shape) -> Shape:
        """T of what the layers give."""
        *_, (_, _, shape) = walk(self.layers, given[1:])
        return (given[0], *shape)

    def make(self, given: Shape, backend: str) -> nn.Module:
        """The layers, and the frames as a batch before them."""
        return Frames(nn.Sequential(*(layer.make(shape, backend) for layer, shape, _ in walk(self.layers, given[1:]))))

    def __str__(self) -> str:
        return f"Each frame: {', '.join(map(str, self.layers))}"


def walk(layers: Iterable[Layer], given: Shape) -> Iterator[tuple[Layer, Shape, Shape]]:
    """Each layer with the shapes that go in and come out."""
    for layer in layers:
        gives = layer.shape(given)
        yield layer, given, gives
        given = gives


class Steps(nn.Module):
    """The outputs (B, T, width) of a recurrent layer.

    torch.nn's have no dropout of the input; for them it is here, `masked`, one mask for all steps.
    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.masked = 0.0

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs and h_n (directions, B, units)."""
        if self.masked:
            x = x * dropout(torch.ones_like(x[:, :1]), self.masked, self.training)
        y, state = self.rnn(x)
        return y, state[0] if isinstance(state, tuple) else state

    def forward(self, x: Tensor) -> Tensor:
        """The outputs for (B, T, I)."""
        return self.run(x)[0]


class Last(Steps):
    """The last states (B, width) of a recurrent layer's directions."""

    def forward(self, x: Tensor) -> Tensor:
        """The states for (B, T, I)."""
        return self.run(x)[1].transpose(0, 1).flatten(1)


class Loop(nn.Module):
    """The last h of a cell run step by step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        """h (B, units) for (B, T, I)."""
        first, *others = x.unbind(1)
        state = self.cell(first)  # from zeros
        for step in others:
            state = self.cell(step, state)
        h: Tensor = state[0] if isinstance(state, tuple) else state
        return h


class OneHotVectors(nn.Module):
    """Numbers below `words` as vectors of float32."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, words) for (B, T)."""
        return one_hot(x, self.words).float()


class Reorder(nn.Module):
    """(B, C, rows, columns) as (B, C, rows * columns)."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """The values as they are, or channels last."""
        return (x.permute(0, 2, 3, 1) if self.channels_last else x).reshape(*x.shape[:2], -1)


class MeanOfChannels(nn.Module):
    """(B, C, rows, columns) to (B, rows, columns)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over C."""
        return x.mean(1)


class Frames(nn.Module):
    """A module over each frame of clips (B, T, ...)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, ...) again."""
        found: Tensor = self.module(x.flatten(0, 1))
        return found.view(*x.shape[:2], *found.shape[1:])
