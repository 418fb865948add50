"""What every data set has in common: whole tensors, batches of them, and the files they are read from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pooch
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, distributed

DATA_DIR_VARIABLE = "RNNKERN_DATA_DIR"
TIMEOUT = (3.0, 10.0)  # seconds to connect and between bytes: a machine without network has to find out soon


class Examples(NamedTuple):
    """Inputs (N, ...) and their classes (N,) int64."""

    inputs: Tensor
    labels: Tensor

    def take(self, rows: Tensor | slice) -> Examples:
        """Some of them."""
        return Examples(self.inputs[rows], self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and to test with, and what their classes are called."""

    name: str
    train: Examples
    test: Examples
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Holdout:
    """What is held out of the training for validation: the last share, as Keras's validation_split takes it, or with a
    seed what scikit-learn's train_test_split draws, stratified by class or not."""

    share: float = 0.2
    seed: int | None = None
    stratified: bool = False

    def split(self, examples: Examples) -> tuple[Examples, Examples]:
        """Those to train on, and those held out."""
        count = len(examples.labels)
        if self.seed is None:
            border = int(count * (1 - self.share))
            return examples.take(slice(border)), examples.take(slice(border, None))
        parts = train_test_split(
            range(count),
            test_size=self.share,
            random_state=self.seed,
            stratify=examples.labels.numpy() if self.stratified else None,
        )
        training, held_out = (examples.take(torch.tensor(part)) for part in parts)
        return training, held_out


@dataclass(frozen=True)
class Batches:
    """Minibatches cut from whole tensors; with a generator, drawn in another order on every pass.

    It stands where a DataLoader would: with everything in memory, one indexing a batch is all the work there is. Under
    torch.distributed each process gets its share of every batch, so the batch size is that of all of them together.
    """

    examples: Examples
    batch_size: int
    generator: torch.Generator | None = None
    drop_last: bool = False

    def __len__(self) -> int:
        whole, rest = divmod(len(self.examples.labels), self.batch_size)
        least = 1 if self.generator is None else processes()[1]
        return whole + (rest >= least and not self.drop_last)

    def __iter__(self) -> Iterator[Examples]:
        count = len(self.examples.labels)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        for rows in order.split(self.batch_size)[: len(self)]:
            yield self.examples.take(self._share(rows))

    def _share(self, rows: Tensor) -> Tensor:
        """Those of this process. In training shares are equal, or the mean of their gradients would not be that of the
        batch: of a last batch that does not divide, the rest is left out."""
        rank, count = processes()
        if self.generator is not None:
            rows = rows[: len(rows) // count * count]
        return rows[rank::count]


def processes() -> tuple[int, int]:
    """This process's number among those that train together, and how many there are."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@dataclass(frozen=True)
class Source:
    """Files under one name on several mirrors, each with its hash, as `md5:...`."""

    name: str
    mirrors: tuple[str, ...]
    hashes: Mapping[str, str]


class NotFetchedError(Exception):
    """No mirror gave the files; the message names each with its reason."""


def named_folder(data_dir: Path | None) -> Path | None:
    """The folder that --data-dir or the environment names, if either does."""
    named = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    return Path(named) if named else None


def find_folder(name: str, folder: Path, files: Iterable[str], inner: str = "", packed: str = "") -> Path:
    """Whichever holds all the files: `folder`, its subfolder of that name, or the folder `inner` in either. A file may
    have the ending `packed`.

    Raises:
        FileNotFoundError: none of them does; the message says what is missing.
    """
    wanted = list(files)
    candidates = list(dict.fromkeys(base / part for base in (folder, folder / name) for part in ("", inner)))

    def there(candidate: Path, file: str) -> bool:
        return any((candidate / (file + ending)).is_file() for ending in {"", packed})

    for candidate in candidates:
        if all(there(candidate, file) for file in wanted):
            return candidate
    missing = [file for file in wanted if not any(there(candidate, file) for candidate in candidates)]
    raise FileNotFoundError(
        f"data folder: expected the {len(wanted)} files of {name} in {' or in '.join(map(str, candidates))}, "
        f"missing {', '.join(missing) or 'none, but they are spread over several'}; name the folder that holds them "
        f"by --data-dir or ${DATA_DIR_VARIABLE}, or neither, to have them downloaded"
    )


def fetch(source: Source) -> Path:
    """The folder in pooch's cache with all files of the source, each downloaded and checked if it is not there yet. A
    file with another hash is not left there."""
    folder = Path(pooch.os_cache("rnnkern")) / source.name
    download = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    for file, known in source.hashes.items():
        reasons = []
        for mirror in source.mirrors:
            try:
                pooch.retrieve(mirror + file, known_hash=known, fname=file, path=folder, downloader=download)
                break
            except OSError as error:  # requests' errors are OSErrors too
                reasons.append(f"{mirror}: {type(error).__name__}")
            except ValueError:  # pooch's word for it; it has removed the file
                reasons.append(f"{mirror}: wrong checksum")
        else:
            raise NotFetchedError(
                f"{file}: no mirror has it ({'; '.join(reasons)}); download it elsewhere and name its folder by "
                f"--data-dir or ${DATA_DIR_VARIABLE}"
            )
    return folder


def check_hash(path: Path, known: str) -> None:
    """Raises ValueError if the file is not the original one; `known` is `md5:...`."""
    algorithm, _, expected = known.partition(":")
    found = pooch.file_hash(str(path), alg=algorithm)
    if found != expected:
        raise ValueError(f"{path}: expected {algorithm} {expected}, got {found}; remove it and fetch it again")
