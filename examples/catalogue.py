"""The classifiers that people write with recurrent layers, in the configurations published in courses with Keras.

An entry is a model on a data set, with the recipe of its family and the test accuracy and loss that were published.
Where a configuration is silent, Keras's defaults hold: its initialisation, its Adam and RMSprop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from examples.data import Holdout
from examples.datasets import Cifar10, Clips, Data, Reviews, Rows
from examples.images import FASHION, MNIST
from examples.layers import (
    Cell,
    Conv,
    Dense,
    Embed,
    Flatten,
    Gray,
    Layer,
    MapsAsSteps,
    MaxPool,
    OneHot,
    PerFrame,
    Recurrent,
    StepLoop,
)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. With `patience`, epochs without a lower validation loss end the training, and the best
    weights are kept; else the last. `decay` lets the rate fall in a line to 0, `clip` cuts longer gradients."""

    epochs: int
    batch: int
    optimizer: Literal["adam", "rmsprop"] = "adam"
    rate: float = 1e-3
    holdout: Holdout | None = None
    patience: int | None = None
    drop_last: bool = False
    decay: bool = False
    clip: float | None = None


@dataclass(frozen=True)
class Family:
    """Entries that share data and recipe."""

    name: str
    title: str
    data: Data
    recipe: Recipe


@dataclass(frozen=True)
class Entry:
    """One model, and what was published of it: test accuracy, test loss, seconds an epoch."""

    name: str
    family: Family
    layers: tuple[Layer, ...]
    accuracy: float | None = None
    loss: float | None = None
    seconds: str | None = None
    note: str = ""
    variant: str = ""  # what a run has behind the name, where the data is not just the family's

    @property
    def cell(self) -> Cell:
        """Of its first recurrent layer."""
        return next(layer.cell for layer in self.layers if isinstance(layer, Recurrent | StepLoop))


SHORT = Recipe(epochs=5, batch=32)
MNIST_128 = Family("mnist-128", "MNIST, 128 units", Rows(MNIST), Recipe(10, 64, holdout=Holdout()))
MNIST_64 = Family("mnist-64", "MNIST, 64 units", Rows(MNIST), SHORT)
MNIST_CELL = Family("mnist-cell", "MNIST, basic cell of 128", Rows(MNIST), Recipe(30, 128, drop_last=True))
MNIST_MORE = Family("mnist-exercises", "MNIST, exercises", Rows(MNIST), SHORT)
FASHION_64 = Family("fashion", "Fashion-MNIST", Rows(FASHION), SHORT)
CIFAR = Family("cifar", "CIFAR-10", Cifar10(), SHORT)
REVIEWS = Recipe(100, 64, "rmsprop", 1e-4, Holdout(seed=42), patience=3)
STRATIFIED = replace(REVIEWS, holdout=Holdout(seed=26, stratified=True), patience=4)
IMDB_300 = Family("imdb-300", "IMDB, 300 words", Reviews(300), REVIEWS)
IMDB_500 = Family("imdb-500", "IMDB, 500 words", Reviews(500), REVIEWS)
IMDB_128 = Family("imdb-128", "IMDB, 500 words, 128 wide, stratified", Reviews(500), STRATIFIED)
CLIPS = Family("clips", "Clips of two motions", Clips(), Recipe(20, 32, holdout=Holdout()))

CELLS: tuple[Cell, ...] = ("rnn", "lstm", "gru")
HEADS: tuple[tuple[Cell, bool], ...] = (("lstm", False), ("lstm", True), ("gru", False))  # cell, both directions
DEEP: tuple[tuple[str, Cell, bool], ...] = (("rnn", "rnn", False), ("bilstm", "lstm", True))
CLASSES = Dense(10)
POSITIVE = Dense(1)  # the logit of the second of two classes


def last(*layers: Layer) -> tuple[Layer, ...]:
    """The last state to the ten classes."""
    return (*layers, CLASSES)


def every(*layers: Layer) -> tuple[Layer, ...]:
    """The outputs of all steps to the ten classes."""
    return (*layers, Flatten(), CLASSES)


def stack(cell: Cell, *units: int, steps: bool, bidirectional: bool = False, dropout: float = 0.0) -> list[Recurrent]:
    """Layers one above the other; the topmost gives all steps or the last."""
    top = len(units) - 1
    return [Recurrent(cell, n, bidirectional, steps or k < top, dropout) for k, n in enumerate(units)]


MNIST_ENTRIES = (
    Entry("mnist-128-rnn", MNIST_128, last(Recurrent("rnn", 128)), 0.9663, 0.1167),
    Entry("mnist-128-lstm", MNIST_128, last(Recurrent("lstm", 128)), 0.9810, 0.0633),
    Entry("mnist-128-gru", MNIST_128, last(Recurrent("gru", 128)), 0.9850, 0.0548),
    Entry("mnist-rnn", MNIST_64, last(Recurrent("rnn", 64)), 0.9437, 0.2004),
    Entry(
        "mnist-rnn-steps",
        MNIST_64,
        (Recurrent("rnn", 64, steps=True), Flatten(), Dense(32, relu=True), CLASSES),
        0.9772,
        0.0824,
    ),
    Entry("mnist-rnn-64-32", MNIST_64, last(*stack("rnn", 64, 32, steps=False))),
    Entry(
        "mnist-rnn-64-64-32",
        MNIST_64,
        last(*stack("rnn", 64, 64, 32, steps=False)),
        note="has the published total, 17,642; with 64 and 32 it would be 9,386",
    ),
    Entry("mnist-lstm", MNIST_64, last(Recurrent("lstm", 64)), 0.9772, 0.0730),
    Entry("mnist-lstm-steps", MNIST_64, every(Recurrent("lstm", 64, steps=True)), 0.9878, 0.0363),
    Entry("mnist-gru", MNIST_64, last(Recurrent("gru", 64)), 0.9786, 0.0679),
    Entry("mnist-gru-reset-before", MNIST_64, last(Recurrent("gru", 64, reset_after=False))),
    Entry("mnist-birnn-steps", MNIST_64, every(Recurrent("rnn", 64, True, steps=True)), 0.9718, 0.1076),
    Entry("mnist-bilstm-steps", MNIST_64, every(Recurrent("lstm", 64, True, steps=True)), 0.9873, 0.0402, "36"),
    Entry(
        "mnist-3bilstm-steps",
        MNIST_64,
        every(*stack("lstm", 64, 64, 64, steps=True, bidirectional=True)),
        0.9894,
        0.0379,
        "145 to 147",
    ),
    Entry(
        "mnist-cell-rnn",
        MNIST_CELL,
        (StepLoop("rnn", 128), Dense(10, normal=True)),
        0.9727,
        note="published training cost 0.568 to 0.060",
    ),
    Entry("mnist-cell-rnn-call", MNIST_CELL, (Recurrent("rnn", 128), Dense(10, normal=True)), 0.9727),
    Entry("mnist-cell-lstm", MNIST_CELL, (StepLoop("lstm", 128), Dense(10, normal=True))),
    Entry("mnist-cell-gru", MNIST_CELL, (StepLoop("gru", 128), Dense(10, normal=True))),
    # 64 units are mnist-rnn
    *(Entry(f"mnist-rnn-{units}", MNIST_MORE, last(Recurrent("rnn", units))) for units in (24, 32, 128)),
    *(
        Entry(
            f"mnist-deep-{name}",
            MNIST_MORE,
            (
                *stack(cell, 64, 64, 32, steps=True, bidirectional=bidirectional),
                Flatten(),
                Dense(32, relu=True),
                CLASSES,
            ),
        )
        for name, cell, bidirectional in DEEP
    ),
    *(
        Entry(
            f"mnist-3lstm-{units}{'-dropout' * bool(dropout)}",
            MNIST_MORE,
            every(*stack("lstm", units, units, units, steps=True, dropout=dropout)),
        )
        for units in (64, 512)
        for dropout in (0.0, 0.5)
    ),
    Entry("mnist-3gru-64", MNIST_MORE, every(*stack("gru", 64, 64, 64, steps=True))),
)

FASHION_ENTRIES = tuple(
    Entry(
        f"fashion-{'3' * (layers == 3)}{'bi' * bidirectional}{cell}",
        FASHION_64,
        last(*stack(cell, *[64] * layers, steps=False, bidirectional=bidirectional)),
    )
    for bidirectional in (False, True)
    for cell in CELLS
    for layers in (1, 3)
)

CNN = (Conv(32), MaxPool(), Conv(16))  # 13 x 13 x 16
AS_PUBLISHED = MapsAsSteps(channels_last=True)  # 16 steps of 169, which are not the maps
CIFAR_ENTRIES = (
    Entry("cifar-lstm", CIFAR, last(*CNN, AS_PUBLISHED, Recurrent("lstm", 30))),
    Entry("cifar-lstm-maps", CIFAR, last(*CNN, MapsAsSteps(channels_last=False), Recurrent("lstm", 30))),
    Entry("cifar-lstm-steps", CIFAR, every(*CNN, AS_PUBLISHED, Recurrent("lstm", 30, steps=True))),
    Entry("cifar-rnn", CIFAR, last(*CNN, AS_PUBLISHED, Recurrent("rnn", 30))),
    Entry("cifar-gru", CIFAR, last(*CNN, AS_PUBLISHED, Recurrent("gru", 30))),
    Entry("cifar-bilstm", CIFAR, last(*CNN, AS_PUBLISHED, Recurrent("lstm", 30, bidirectional=True))),
    Entry(
        "cifar-deep-lstm",
        CIFAR,
        last(Conv(32), Conv(32), MaxPool(), Conv(64), Conv(16), AS_PUBLISHED, Recurrent("lstm", 30)),
    ),
    Entry("cifar-lstm-128", CIFAR, last(*CNN, AS_PUBLISHED, Recurrent("lstm", 128))),
    Entry("cifar-gray-lstm", CIFAR, last(Gray(), Recurrent("lstm", 128))),
)


def review(
    name: str,
    family: Family,
    first: Layer,
    *layers: Recurrent,
    accuracy: float | None = None,
    loss: float | None = None,
) -> Entry:
    """A model of reviews: the numbers as vectors, recurrent layers, one logit."""
    return Entry(f"{family.name}-{name}", family, (first, *layers, POSITIVE), accuracy, loss)


WIDE = Embed(500, 128)
IMDB_ENTRIES = (
    review("onehot-rnn", IMDB_300, OneHot(300), Recurrent("rnn", 8)),
    review("rnn", IMDB_300, Embed(300, 16), Recurrent("rnn", 8)),
    review("lstm-dropout", IMDB_500, Embed(500, 16), Recurrent("lstm", 8, dropout=0.3)),
    review("gru", IMDB_500, Embed(500, 16), Recurrent("gru", 8)),
    review("lstm", IMDB_128, WIDE, Recurrent("lstm", 8)),
    review("lstm-dropout", IMDB_128, WIDE, Recurrent("lstm", 8, dropout=0.3)),
    review(
        "2lstm-dropout", IMDB_128, WIDE, *stack("lstm", 8, 8, steps=False, dropout=0.3), accuracy=0.8050, loss=0.4205
    ),
    review("gru-dropout", IMDB_128, WIDE, Recurrent("gru", 8, dropout=0.3)),
    review("lstm-recurrent-dropout", IMDB_128, WIDE, Recurrent("lstm", 8, recurrent_dropout=0.3)),
)

FEATURES = PerFrame((Conv(8), MaxPool(), Conv(16), MaxPool(), Flatten(), Dense(32, relu=True)))
# Published of wildfire smoke, other data with features of another CNN: precision, recall, F1, TPR, TNR in percent, and
# seconds a frame.
SMOKE = {
    "clips-lstm": (88.85, 84.08, 86.40, 84.08, 85.20, 0.143),
    "clips-2lstm": (86.41, 89.51, 87.93, 89.51, 80.26, 0.165),
    "clips-bilstm": (86.92, 88.78, 87.84, 88.78, 81.26, 0.143),
    "clips-2bilstm": (89.85, 84.32, 87.00, 84.32, 86.65, 0.155),
    "clips-gru": (87.15, 88.20, 87.67, 88.20, 81.77, 0.143),
    "clips-2gru": (87.46, 86.90, 87.18, 86.90, 82.52, 0.153),
}
CLIP_ENTRIES = tuple(
    Entry(
        f"clips-{'2' * (layers == 2)}{'bi' * bidirectional}{cell}",
        CLIPS,
        (FEATURES, *stack(cell, *[32] * layers, steps=False, bidirectional=bidirectional), POSITIVE),
    )
    for cell, bidirectional in HEADS
    for layers in (1, 2)
)

ENTRIES = (*MNIST_ENTRIES, *FASHION_ENTRIES, *CIFAR_ENTRIES, *IMDB_ENTRIES, *CLIP_ENTRIES)
CATALOGUE = {entry.name: entry for entry in ENTRIES}
FAMILIES = (MNIST_128, MNIST_64, MNIST_CELL, MNIST_MORE, FASHION_64, CIFAR, IMDB_300, IMDB_500, IMDB_128, CLIPS)
