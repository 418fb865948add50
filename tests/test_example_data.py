"""The examples' data: files good, bad and missing, mirrors, the fallback without network, and what is made of them."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import numpy as np
import pooch
import pytest
import requests
import torch

from examples import clips, data, images, mnist
from examples.__main__ import main
from examples.clips import make_clips
from examples.data import Batches, Examples, Holdout, NotFetchedError
from examples.images import CIFAR10_BATCHES, CIFAR10_FOLDER, MNIST, load_cifar10, load_idx, read_idx
from examples.reviews import load_imdb
from tests.example_files import (
    TEXTS,
    cifar_batch,
    idx_bytes,
    packed,
    plain,
    write_archive,
    write_batches,
    write_idx,
    write_imdb,
)


def no_network(*_: object, **__: object) -> NoReturn:
    raise requests.exceptions.ConnectionError("no route to host")


@pytest.fixture(autouse=True)
def no_folder_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.DATA_DIR_VARIABLE, raising=False)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooch, "retrieve", no_network)


def test_reads_idx(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx_bytes(array)))
    np.testing.assert_array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b""), "expected an IDX file of unsigned bytes, 00 00 08, got"),
        (gzip.compress(b"\x00\x00\x0d\x01" + bytes(8)), "00 00 08, got 00 00 0d"),
        (
            gzip.compress(idx_bytes(np.zeros((2, 3), np.uint8))[:-1]),
            r"expected 6 bytes of data for shape \(2, 3\), got 5",
        ),
        (
            gzip.compress(idx_bytes(np.zeros((2, 3), np.uint8)) + b"\x00"),
            r"expected 6 bytes of data for shape \(2, 3\), got 7",
        ),
        (gzip.compress(idx_bytes(np.zeros((9, 9), np.uint8)))[:-9], "expected a whole gzip file, got EOFError"),
        (b"<html>", "expected a whole gzip file, got BadGzipFile"),
    ],
    ids=["empty", "floats", "short", "long", "cut off", "a page"],
)
def test_refuses_what_is_not_idx(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


@pytest.mark.parametrize("subfolder", ["", "mnist"])
@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
def test_loads_a_named_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subfolder: str, by_variable: bool
) -> None:
    source = write_idx(tmp_path / subfolder)
    if by_variable:
        monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(tmp_path))
    found = load_idx(source, None if by_variable else tmp_path)
    assert (found.name, found.classes) == ("mnist", tuple("0123456789"))
    assert found.train.inputs.shape == (6, 3, 2)
    assert found.train.inputs[0, 0].tolist() == [0.0, 1.0]
    assert found.test.labels.tolist() == [0, 1, 2, 3]
    assert (found.test.inputs.dtype, found.test.labels.dtype) == (torch.float32, torch.int64)


def test_refuses_a_changed_file(tmp_path: Path) -> None:
    source = write_idx(tmp_path)
    changed = tmp_path / "t10k-labels-idx1-ubyte.gz"
    changed.write_bytes(changed.read_bytes() + b"\x00")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz: expected md5 \w{32}, got \w{32}"):
        load_idx(source, tmp_path)


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (mnist.main, "missing train-labels-idx1-ubyte.gz;"),
        (lambda options: main(["mnist-rnn", *options]), "missing train-labels-idx1-ubyte.gz;"),
        (lambda options: main(["cifar-rnn", *options]), "missing data_batch_1, data_batch_2,"),
        (lambda options: main(["imdb-300-rnn", *options]), "missing imdb.npz;"),
    ],
    ids=["mnist", "idx", "cifar", "imdb"],
)
def test_names_the_missing_files_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], object], missing: str
) -> None:
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SystemExit):
        command(["--data-dir", str(tmp_path)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert missing in message
    assert str(tmp_path) in message
    assert "--data-dir" in message


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server on this machine that serves tmp_path/served; pooch's cache is beside it."""
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = partial(QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=partial(server.serve_forever, poll_interval=0.02))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_downloads_from_the_second_mirror_once(tmp_path: Path, mirror: str) -> None:
    source = replace(write_idx(tmp_path / "served"), mirrors=(mirror + "absent/", mirror))
    first = load_idx(source)
    for file in (tmp_path / "served").iterdir():
        file.unlink()
    second = load_idx(source)
    assert first.name == second.name == "mnist"
    assert torch.equal(first.train.inputs, second.train.inputs)


def test_takes_no_changed_file_from_a_mirror(tmp_path: Path, mirror: str) -> None:
    source = replace(write_idx(tmp_path / "served"), mirrors=(mirror,))
    (tmp_path / "served" / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(NotFetchedError, match=f"{mirror}: wrong checksum"):
        load_idx(source)
    assert not list((tmp_path / "cache").rglob("*.gz"))


def test_a_file_that_was_spoilt_in_the_cache_is_fetched_again(tmp_path: Path, mirror: str) -> None:
    source = replace(write_idx(tmp_path / "served"), mirrors=(mirror,))
    load_idx(source)
    spoilt = tmp_path / "cache" / "mnist" / "t10k-images-idx3-ubyte.gz"
    spoilt.write_bytes(spoilt.read_bytes()[:-20])
    assert load_idx(source).test.inputs.shape == (4, 3, 2)


@pytest.mark.usefixtures("offline")
def test_the_mnist_example_falls_back_to_digits(capsys: pytest.CaptureFixture[str]) -> None:
    found = mnist.load(None)
    assert found.name == "digits"
    assert found.train.inputs.shape == (1437, 8, 8)
    assert found.test.inputs.shape == (360, 8, 8)
    assert found.train.inputs.min().item() == 0
    assert found.train.inputs.max().item() == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "mnist cannot be fetched" in said[0]
    assert all(mirror in said[0] for mirror in MNIST.mirrors)
    assert "bundled 8x8 digits instead" in said[0]


@pytest.mark.usefixtures("offline")
def test_the_catalogue_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fashion-rnn"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "error: train-images-idx3-ubyte.gz: no mirror has it (http" in message
    assert "ConnectionError); download it elsewhere and name its folder by --data-dir" in message


@pytest.fixture
def small_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = {name: hashlib.md5(cifar_batch(name)).hexdigest() for name in CIFAR10_BATCHES}
    monkeypatch.setattr(images, "CIFAR10_BATCHES", md5)


@pytest.mark.usefixtures("small_cifar10")
@pytest.mark.parametrize(
    "write",
    [
        write_archive,
        lambda folder: write_batches(folder, plain),
        lambda folder: write_batches(folder / "cifar10" / CIFAR10_FOLDER, packed),
    ],
    ids=["archive", "plain", "xz"],
)
def test_reads_cifar10(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    found = load_cifar10(tmp_path)
    assert found.train.inputs.shape == (15, 3, 32, 32)
    assert found.train.labels.tolist() == [label for batch in range(5) for label in (batch, 1, 9)]
    assert found.test.labels.tolist() == [5, 1, 9]
    first = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)[0]
    torch.testing.assert_close(found.train.inputs[0], torch.from_numpy(first) / 255)


@pytest.mark.usefixtures("small_cifar10")
def test_refuses_spoilt_batches(tmp_path: Path) -> None:
    write_batches(tmp_path, packed)
    path = tmp_path / "data_batch_3.xz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data_batch_3\.xz: expected data_batch_3 whole in it, got LZMAError"):
        load_cifar10(tmp_path)
    path.unlink()
    (tmp_path / "data_batch_3").write_bytes(cifar_batch("data_batch_2"))
    with pytest.raises(ValueError, match=r"data_batch_3: expected md5 \w{32} unpacked, got \w{32}; remove it"):
        load_cifar10(tmp_path)
    write_archive(tmp_path / "other")
    archive = tmp_path / "other" / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"tar\.gz: expected data_batch_1 whole in it, got \w+; fetch it again"):
        load_cifar10(tmp_path / "other")


@pytest.mark.parametrize("truncating", ["pre", "post"])
def test_reviews_are_keras_s(tmp_path: Path, truncating: Any) -> None:
    """Its order, start, offset and unknown words; padded in front, cut where it is said."""
    write_imdb(tmp_path)
    found = load_imdb(words=300, steps=5, truncating=truncating, data_dir=tmp_path)
    assert found.classes == ("negative", "positive")
    random = np.random.RandomState(113)
    for part, labels in ((found.train, [0, 1, 1, 0]), (found.test, [1, 0, 0, 1])):
        order = np.arange(4)
        random.shuffle(order)
        for row, index in enumerate(order):
            numbers = [1, *(word + 3 if word + 3 < 300 else 2 for word in TEXTS[index])]
            cut = numbers[-5:] if truncating == "pre" else numbers[:5]
            assert part.inputs[row].tolist() == [0] * (5 - len(cut)) + cut
            assert part.labels[row] == labels[index]
    assert 2 in found.train.inputs


class Dangerous:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_refuses_what_is_not_keras_s_file(tmp_path: Path) -> None:
    path = write_imdb(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"imdb\.npz: expected Keras's imdb\.npz, got BadZipFile: .*; remove it"):
        load_imdb(300, 5, data_dir=tmp_path)
    texts = np.empty(4, object)
    texts[:] = [Dangerous()] * 4
    write_imdb(tmp_path, x_test=texts)
    with pytest.raises(ValueError, match=r"got UnpicklingError: (posix|nt)\.system has no place in it"):
        load_imdb(300, 5, data_dir=tmp_path)
    write_imdb(tmp_path, y_test=np.array([0, 1]))
    with pytest.raises(ValueError, match=r"as many labels 0 and 1 as reviews, got shapes \(4,\) and \(2,\)"):
        load_imdb(300, 5, data_dir=tmp_path)


def test_clips_are_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (make_clips(20, 10) for _ in range(2))
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert first.train.inputs.shape == (20, clips.FRAMES, 1, clips.SIDE, clips.SIDE)
    assert first.train.labels.bincount().tolist() == [10, 10]
    assert first.test.inputs.min() >= 0
    assert first.test.inputs.max() == 1


def test_digits_of_clips_move_as_they_should() -> None:
    """Straight on, or at one distance from one point; as fast, and never beyond the border."""
    random, speed = np.random.default_rng(1), np.full(50, 2.0)
    for path in (clips.straight(random, speed), clips.circle(random, speed)):
        assert path.shape == (50, clips.FRAMES, 2)
        assert 0 <= path.min() <= path.max() <= clips.SIDE - clips.DIGIT
        steps = np.linalg.norm(np.diff(path, axis=1), axis=2)
        assert steps.max() < 2.01
        assert np.median(steps) > 1.9
    turns = np.diff(clips.circle(random, speed), n=2, axis=1)
    assert (np.abs(turns).sum(2) > 0.1).all()


def examples(count: int) -> Examples:
    return Examples(torch.arange(count).unsqueeze(1), torch.arange(count) % 2)


def test_what_is_held_out() -> None:
    everything = examples(50)
    training, held_out = Holdout(0.2).split(everything)
    assert held_out.inputs.flatten().tolist() == list(range(40, 50))
    for stratified in (False, True):
        training, held_out = Holdout(0.2, 42, stratified).split(everything)
        again = Holdout(0.2, 42, stratified).split(everything)[1]
        assert torch.equal(held_out.inputs, again.inputs)
        assert sorted(torch.cat([training.inputs, held_out.inputs]).flatten().tolist()) == list(range(50))
    assert held_out.labels.bincount().tolist() == [5, 5]


def test_batches_cover_everything_once() -> None:
    ordered = Batches(examples(10), batch_size=4)
    shuffled = Batches(examples(10), 4, torch.Generator().manual_seed(0))
    assert [batch.inputs.flatten().tolist() for batch in ordered] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    first, second = (torch.cat([inputs for inputs, _ in shuffled]).flatten().tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert len(shuffled) == len(list(shuffled)) == 3
    assert [len(batch.labels) for batch in Batches(examples(10), 4, drop_last=True)] == [4, 4]


def test_processes_share_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training in equal shares, of the same order; in a test all of it."""

    def shares(count: int, shuffled: bool) -> list[list[list[int]]]:
        found = []
        for rank in range(2):
            monkeypatch.setattr(data, "processes", lambda rank=rank: (rank, 2))
            batches = Batches(examples(count), 4, torch.Generator().manual_seed(3) if shuffled else None)
            found.append([batch.inputs.flatten().tolist() for batch in batches])
            assert len(found[-1]) == len(batches)
        return found

    whole = [b.inputs.flatten().tolist() for b in Batches(examples(11), 4, torch.Generator().manual_seed(3))]
    first, second = shares(11, shuffled=True)
    assert [a + b for a, b in zip(first, second, strict=True)] == [
        [*w[::2], *w[1::2]] for w in (*whole[:2], whole[2][:2])
    ]
    assert len(shares(9, shuffled=True)[0]) == 2
    assert shares(9, shuffled=False) == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], []]]
