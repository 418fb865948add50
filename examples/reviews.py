"""IMDB's film reviews from Keras's imdb.npz, numbered, shuffled and cut as Keras does it."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from examples.data import Dataset, Examples, Source, fetch, find_folder, named_folder

FILE = "imdb.npz"
IMDB = Source(
    name="imdb",
    mirrors=("https://storage.googleapis.com/tensorflow/tf-keras-datasets/",),
    hashes=MappingProxyType({FILE: "sha256:69664113be75683a8fe16e3ed0ab59fda8886cb3cd7ada244f7d9544e4676b9f"}),
)
CLASSES = ("negative", "positive")
SEED = 113  # Keras's, of the order
PAD, START, UNKNOWN, OFFSET = 0, 1, 2, 3  # Keras's numbers; a word's own are behind them
# What an array of lists is pickled by, and numpy's names of it old and new.
RECONSTRUCT = np.empty(0, object).__reduce__()[0]
PICKLED = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}

# What reading a file that is none raises.
DAMAGED = (
    *(OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
)

Truncating = Literal["pre", "post"]


def load_imdb(words: int, steps: int, truncating: Truncating = "pre", data_dir: Path | None = None) -> Dataset:
    """Reviews (N, steps) int64 of the `words` most frequent numbers, 0 in front of short ones; of long ones the last
    steps, or with truncating="post" the first. From `data_dir`, the environment's folder, pooch's cache or the mirror.

    Raises:
        FileNotFoundError, ValueError, NotFetchedError: the file is not there, is not what it should be, or cannot be
            downloaded.
    """
    named = named_folder(data_dir)
    path = (fetch(IMDB) if named is None else find_folder(IMDB.name, named, [FILE])) / FILE
    arrays = read_npz(path)
    random = np.random.RandomState(SEED)  # training and test in turn, as Keras draws them
    train, test = (
        reviews(arrays[f"x_{part}"], arrays[f"y_{part}"], random, words, steps, truncating)
        for part in ("train", "test")
    )
    return Dataset(IMDB.name, train, test, CLASSES)


def reviews(
    texts: NDArray[Any], labels: NDArray[Any], random: np.random.RandomState, words: int, steps: int, truncating: str
) -> Examples:
    """One part, shuffled: each review with its start, words past the most frequent unknown, cut and padded."""
    order = np.arange(len(texts))
    random.shuffle(order)
    found = np.full((len(texts), steps), PAD, np.int64)
    for row, index in enumerate(order):
        numbers = np.array([START, *(word + OFFSET for word in texts[index])])
        numbers[numbers >= words] = UNKNOWN
        numbers = numbers[-steps:] if truncating == "pre" else numbers[:steps]
        found[row, steps - len(numbers) :] = numbers
    return Examples(torch.from_numpy(found), torch.from_numpy(labels[order].astype(np.int64)))


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The four arrays of the file: x_train and x_test of lists of word numbers, y_train and y_test of 0 and 1."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as file:
            for name in ("x_train", "y_train", "x_test", "y_test"):
                with file.open(f"{name}.npy") as stream:
                    arrays[name] = read_array(stream)
    except DAMAGED as error:
        raise ValueError(
            f"{path}: expected Keras's imdb.npz, got {type(error).__name__}: {error}; remove it and fetch it again"
        ) from error
    for part in ("train", "test"):
        texts, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if texts.shape != labels.shape or texts.ndim != 1 or not set(np.unique(labels)) <= {0, 1}:
            raise ValueError(
                f"{path}: expected as many labels 0 and 1 as reviews, got shapes {texts.shape} and {labels.shape}; "
                "remove it and fetch it again"
            )
        if not all(is_review(text) for text in texts):
            raise ValueError(f"{path}: expected reviews to be lists of word numbers; remove it and fetch it again")
    return arrays


def is_review(text: object) -> bool:
    """Whether it is a list of numbers from 1 up, not empty."""
    return isinstance(text, list) and bool(text) and all(type(word) is int and word > 0 for word in text)


class Unpickler(pickle.Unpickler):
    """Reads an array of lists of integers: a pickle could run anything, so it may name nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """numpy's array and its type."""
        if (module, name) in PICKLED:
            return RECONSTRUCT
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def read_array(stream: Any) -> NDArray[Any]:
    """An array of a .npy file, from behind its head."""
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    found: NDArray[Any] = Unpickler(stream).load() if dtype.hasobject else np.frombuffer(stream.read(), dtype)
    return found.reshape(shape)
