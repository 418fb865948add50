"""What a data set is to the catalogue: the shape of an example, known before anything is read, and how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from examples import clips, images, reviews
from examples.data import Dataset, Source
from examples.layers import Shape


class Data(Protocol):
    """A data set of the catalogue."""

    @property
    def shape(self) -> Shape:
        """Of one example."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names."""

    def load(self, data_dir: Path | None) -> Dataset:
        """Its tensors, from that folder or from where the loader finds them."""


@dataclass(frozen=True)
class Rows:
    """Gray images of an IDX source, row by row."""

    source: Source
    shape: Shape = (28, 28)

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the source."""
        return images.CLASSES[self.source.name]

    def load(self, data_dir: Path | None) -> Dataset:
        """Reads the four files."""
        return images.load_idx(self.source, data_dir)


@dataclass(frozen=True)
class Cifar10:
    """Colour images."""

    shape: Shape = (3, 32, 32)
    classes: tuple[str, ...] = images.CLASSES["cifar10"]

    def load(self, data_dir: Path | None) -> Dataset:
        """Reads the six batches."""
        return images.load_cifar10(data_dir)


@dataclass(frozen=True)
class Reviews:
    """IMDB's reviews as numbers of their most frequent words."""

    words: int
    steps: int = 100
    truncating: reviews.Truncating = "pre"
    classes: tuple[str, ...] = reviews.CLASSES

    @property
    def shape(self) -> Shape:
        """(T,)."""
        return (self.steps,)

    def load(self, data_dir: Path | None) -> Dataset:
        """Reads and cuts them."""
        return reviews.load_imdb(self.words, self.steps, self.truncating, data_dir)


@dataclass(frozen=True)
class Clips:
    """Generated clips."""

    shape: Shape = (clips.FRAMES, 1, clips.SIDE, clips.SIDE)
    classes: tuple[str, ...] = clips.CLASSES

    def load(self, data_dir: Path | None) -> Dataset:
        """Generates them; no file is needed."""
        return clips.make_clips()
