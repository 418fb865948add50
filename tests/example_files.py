"""Small files in the original formats of the examples' data sets."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.data import Source
from examples.images import CIFAR10_ARCHIVE, CIFAR10_BATCHES, CIFAR10_FOLDER, MNIST


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path, train: int = 6, test: int = 4, image: tuple[int, int] = (3, 2)) -> Source:
    """Writes a tiny MNIST, and returns its source with the checksums of what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    hashes = {}
    for name in MNIST.hashes:
        count = train if name.startswith("train") else test
        if "images" in name:
            array = generator.integers(0, 256, (count, *image), dtype=np.uint8)
            array[0, 0, :2] = (0, 255)
        else:
            array = (np.arange(count) % 10).astype(np.uint8)
        content = gzip.compress(idx_bytes(array))
        (folder / name).write_bytes(content)
        hashes[name] = f"md5:{hashlib.md5(content).hexdigest()}"
    return replace(MNIST, hashes=hashes)


def cifar_batch(name: str) -> bytes:
    """Three images, as the original files have them: pickled by Python 2, so the keys are bytes."""
    seed = list(CIFAR10_BATCHES).index(name)
    data = np.random.default_rng(seed).integers(0, 256, (3, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": data, b"labels": [seed, 1, 9], b"filenames": []}, protocol=2)


def plain(folder: Path, name: str) -> None:
    (folder / name).write_bytes(cifar_batch(name))


def packed(folder: Path, name: str) -> None:
    (folder / f"{name}.xz").write_bytes(lzma.compress(cifar_batch(name)))


def write_batches(folder: Path, write: Callable[[Path, str], None]) -> None:
    """The six batches, each plain or packed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CIFAR10_BATCHES:
        write(folder, name)


def write_archive(folder: Path) -> None:
    """The archive as it is downloaded."""
    write_batches(folder / CIFAR10_FOLDER, plain)
    with tarfile.open(folder / CIFAR10_ARCHIVE, "w:gz") as tar:
        tar.add(folder / CIFAR10_FOLDER, CIFAR10_FOLDER)
    for name in CIFAR10_BATCHES:
        (folder / CIFAR10_FOLDER / name).unlink()


TEXTS = [[1, 5, 2], [7], [3] * 12, [4, 297, 3]]  # raw numbers of words


def write_imdb(folder: Path, **changed: NDArray[np.generic]) -> Path:
    """Keras's file with four reviews in either part, which differ in the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = np.empty(len(TEXTS), object)
    texts[:] = TEXTS
    arrays = {"x_train": texts, "y_train": np.array([0, 1, 1, 0]), "x_test": texts, "y_test": np.array([1, 0, 0, 1])}
    path = folder / "imdb.npz"
    np.savez(path, allow_pickle=True, **(arrays | changed))
    return path
