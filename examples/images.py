"""Pictures: MNIST and Fashion-MNIST from IDX files, CIFAR-10 from its batches, scikit-learn's bundled digits."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import pickle
import tarfile
import zlib
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from examples.data import Dataset, Examples, Source, check_hash, fetch, find_folder, named_folder

DIGITS = tuple("0123456789")
CLASSES = {
    "mnist": DIGITS,
    "fashion_mnist": (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip
UBYTES = bytes([0, 0, 8])  # how an IDX file of unsigned bytes starts; the rank follows

# The files in the order training images, training labels, test images, test labels.
MNIST = Source(
    name="mnist",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    hashes=MappingProxyType(
        {
            "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
        }
    ),
)
FASHION = Source(
    name="fashion_mnist",
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
    hashes=MappingProxyType(
        {
            "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
        }
    ),
)
CIFAR10_ARCHIVE, CIFAR10_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
CIFAR10 = Source(
    name="cifar10",
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    hashes=MappingProxyType({CIFAR10_ARCHIVE: "md5:c58f30108f718f92721af3b95e74349a"}),
)
CIFAR10_BATCHES = MappingProxyType(
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    }
)  # md5 of each as it is unpacked


def load_idx(source: Source, data_dir: Path | None = None) -> Dataset:
    """Images (N, rows, columns) float32 in [0, 1] from `data_dir` or the environment's folder, else from pooch's cache
    or a mirror.

    Raises:
        FileNotFoundError: a folder is named that lacks the files.
        ValueError: a file is not the original one.
        NotFetchedError: no folder is named, and no mirror answers.
    """
    named = named_folder(data_dir)
    folder = fetch(source) if named is None else find_folder(source.name, named, source.hashes)
    for file, known in source.hashes.items():
        check_hash(folder / file, known)
    images, labels, test_images, test_labels = (read_idx(folder / file) for file in source.hashes)
    return Dataset(source.name, pictures(images, labels), pictures(test_images, test_labels), CLASSES[source.name])


def load_cifar10(data_dir: Path | None = None) -> Dataset:
    """Images (N, 3, 32, 32) float32 in [0, 1], from the archive, or from its batches, plain or as .xz; errors as for
    `load_idx`."""
    named = named_folder(data_dir)
    folder = fetch(CIFAR10) if named is None else find_cifar10(named)
    *batches, test = (read_batch(folder, name, md5) for name, md5 in CIFAR10_BATCHES.items())
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Dataset(CIFAR10.name, pictures(images, labels), pictures(*test), CLASSES[CIFAR10.name])


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes: 0, 0, type, rank, each dimension as big-endian uint32, then the data."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got {type(error).__name__}; fetch it again") from error
    if content[:3] != UBYTES or len(content) < 4:
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes, {UBYTES.hex(' ')}, got {content[:3].hex(' ')}"
        )
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    size = len(content) - start
    if size != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} bytes of data for shape {shape}, got {size}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def find_cifar10(folder: Path) -> Path:
    """Where the archive is, or else its batches."""
    for candidate in (folder, folder / CIFAR10.name):
        if (candidate / CIFAR10_ARCHIVE).is_file():
            return candidate
    return find_folder(CIFAR10.name, folder, CIFAR10_BATCHES, CIFAR10_FOLDER, ".xz")


def read_batch(folder: Path, name: str, md5: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 3, 32, 32) and classes (N,) of a batch: a pickled dict of the planes, row by row, and labels.

    It is unpickled only if its checksum is right: a pickle can run anything.
    """
    path, content = unpacked(folder, name)
    found = hashlib.md5(content).hexdigest()
    if found != md5:
        raise ValueError(f"{path}: expected md5 {md5} unpacked, got {found}; remove it and fetch it again")
    batch = pickle.loads(content, encoding="bytes")
    return batch[b"data"].reshape(-1, 3, 32, 32), np.array(batch[b"labels"])


def unpacked(folder: Path, name: str) -> tuple[Path, bytes]:
    """The file that has a batch, and the batch."""
    plain, packed, archive = folder / name, folder / f"{name}.xz", folder / CIFAR10_ARCHIVE
    path = next(path for path in (plain, packed, archive) if path.is_file())
    try:
        if path == packed:
            return path, lzma.decompress(path.read_bytes())
        if path == archive:
            with tarfile.open(path) as tar:
                member = tar.extractfile(f"{CIFAR10_FOLDER}/{name}")
                return path, b"" if member is None else member.read()
        return path, path.read_bytes()
    except (OSError, EOFError, KeyError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise ValueError(f"{path}: expected {name} whole in it, got {type(error).__name__}; fetch it again") from error


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a fifth of them for the test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.reshape(-1, 8, 8), labels, test_size=0.2, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = parts
    train, test = pictures(train_images, train_labels, 16), pictures(test_images, test_labels, 16)
    return Dataset("digits", train, test, DIGITS)


def pictures(images: NDArray[np.generic], labels: NDArray[np.generic], white: int = 255) -> Examples:
    """Values 0 to `white` as float32 in [0, 1], and classes as int64, which is what the loss wants."""
    pixels: Tensor = torch.from_numpy(images.astype(np.float32)).div_(white)
    return Examples(pixels, torch.from_numpy(labels.astype(np.int64)))
