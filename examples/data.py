"""Image data sets as whole tensors: MNIST's IDX files, or scikit-learn's bundled digits where those cannot be had."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pooch
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

DATA_DIR_VARIABLE = "RNNKERN_DATA_DIR"
TIMEOUT = (3.0, 10.0)  # seconds to connect and between bytes: a machine without network has to find out soon
UBYTES = bytes([0, 0, 8])  # how an IDX file of unsigned bytes starts; the rank follows


@dataclass(frozen=True)
class IdxSource:
    """Four gzipped IDX files, under one name on several mirrors."""

    name: str
    mirrors: tuple[str, ...]
    md5: Mapping[str, str]  # by file name, in the order train images, train labels, test images, test labels


MNIST = IdxSource(
    name="mnist",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    md5=MappingProxyType(
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        }
    ),
)


@dataclass(frozen=True)
class ImageData:
    """Images (N, T, I) float32 in [0, 1], a row of T to a step, and their classes (N,) int64."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class NotFetchedError(Exception):
    """No mirror gave the files; the message names each with its reason."""


@dataclass(frozen=True)
class Batches:
    """Minibatches cut from whole tensors, reshuffled on every pass if asked.

    It stands where a DataLoader would: with everything in memory, one indexing a batch is all the work there is.
    """

    inputs: Tensor
    labels: Tensor
    batch_size: int
    shuffle: bool = False

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.shuffle else torch.arange(len(self.labels))
        for rows in torch.split(order, self.batch_size):
            yield self.inputs[rows], self.labels[rows]


def load_images(source: IdxSource, data_dir: Path | None = None) -> ImageData:
    """The data set from `data_dir` or $RNNKERN_DATA_DIR, else from pooch's cache or a mirror, else the bundled digits.

    Raises:
        FileNotFoundError: a folder is named that lacks the files.
        ValueError: a file is not the original one.
    """
    named = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if named:
        return read_images(source, find_folder(source, Path(named)))
    try:
        folder = fetch(source)
    except NotFetchedError as error:
        print(f"{source.name} cannot be fetched ({error}); training on scikit-learn's bundled 8x8 digits instead")
        return digits()
    return read_images(source, folder)


def find_folder(source: IdxSource, folder: Path) -> Path:
    """`folder` or its subfolder named after the source, whichever holds the files."""
    candidates = (folder, folder / source.name)
    for candidate in candidates:
        if all((candidate / file).is_file() for file in source.md5):
            return candidate
    missing = [file for file in source.md5 if not any((candidate / file).is_file() for candidate in candidates)]
    raise FileNotFoundError(
        f"data folder: expected the {len(source.md5)} files of {source.name} in {candidates[0]} or in {candidates[1]}, "
        f"missing {', '.join(missing) or 'none, but they are spread over both'}; name the folder that holds them "
        f"by --data-dir or ${DATA_DIR_VARIABLE}, or neither, to have them downloaded"
    )


def fetch(source: IdxSource) -> Path:
    """The folder in pooch's cache with all files of the source, each downloaded and checked if it is not there yet."""
    folder = Path(pooch.os_cache("rnnkern")) / source.name
    download = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    for file, md5 in source.md5.items():
        reasons = []
        for mirror in source.mirrors:
            try:
                pooch.retrieve(mirror + file, known_hash=f"md5:{md5}", fname=file, path=folder, downloader=download)
                break
            except OSError as error:  # requests' errors are OSErrors too
                reasons.append(f"{mirror}: {type(error).__name__}")
            except ValueError:  # pooch's word for it; it has removed the file
                reasons.append(f"{mirror}: wrong checksum")
        else:
            raise NotFetchedError("; ".join(reasons))
    return folder


def read_images(source: IdxSource, folder: Path) -> ImageData:
    """Checks and reads the four files in a folder."""
    for file, md5 in source.md5.items():
        found = pooch.file_hash(str(folder / file), alg="md5")
        if found != md5:
            raise ValueError(f"{folder / file}: expected md5 {md5}, got {found}; remove it and fetch it again")
    train_images, train_labels, test_images, test_labels = (read_idx(folder / file) for file in source.md5)
    return ImageData(
        source.name,
        as_pixels(train_images, white=255),
        as_classes(train_labels),
        as_pixels(test_images, white=255),
        as_classes(test_labels),
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes: 0, 0, type, rank, each dimension as big-endian uint32, then the data."""
    with gzip.open(path) as file:
        content = file.read()
    if content[:3] != UBYTES:
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes, {UBYTES.hex(' ')}, got {content[:3].hex(' ')}"
        )
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    size = len(content) - start
    if size != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} bytes of data for shape {shape}, got {size}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a fifth of them for the test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.reshape(-1, 8, 8), labels, test_size=0.2, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = parts
    return ImageData(
        "digits",
        as_pixels(train_images, white=16),
        as_classes(train_labels),
        as_pixels(test_images, white=16),
        as_classes(test_labels),
    )


def as_pixels(images: NDArray[np.generic], white: int) -> Tensor:
    """Grey values 0 to `white` as float32 in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32)) / white


def as_classes(labels: NDArray[np.generic]) -> Tensor:
    """Labels as int64, which is what the loss wants."""
    return torch.from_numpy(labels.astype(np.int64))
