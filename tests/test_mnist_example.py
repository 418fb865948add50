"""The MNIST example: its data files good and bad, the fallback without network, and short runs end to end."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NoReturn

import numpy as np
import pooch
import pytest
import requests
import torch
from matplotlib.image import imread
from numpy.typing import NDArray

from examples import data
from examples.data import MNIST, Batches, IdxSource, load_images, read_idx
from examples.mnist import main

RESULT_KEYS = (
    "name",
    "cell",
    "test_accuracy",
    "test_loss",
    "epochs",
    "seconds_per_epoch",
    "parameters",
    "backend",
    "torch",
    "rnnkern",
)


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_source(folder: Path) -> IdxSource:
    """Writes a tiny MNIST of 6 training and 4 test images, 3 x 2 pixels, and returns the source with its checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    md5 = {}
    for name in MNIST.md5:
        count = 6 if name.startswith("train") else 4
        if "images" in name:
            array = generator.integers(0, 256, (count, 3, 2), dtype=np.uint8)
            array[0, 0] = (0, 255)
        else:
            array = np.arange(count, dtype=np.uint8)
        content = gzip.compress(idx_bytes(array))
        (folder / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    return replace(MNIST, md5=md5)


def no_network(*_: object, **__: object) -> NoReturn:
    raise requests.exceptions.ConnectionError("no route to host")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No data folder in the environment; one thread, as torch's small parallel regions crawl beside a busy process."""
    monkeypatch.delenv(data.DATA_DIR_VARIABLE, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        (b"", "expected an IDX file of unsigned bytes, 00 00 08, got"),
        (b"\x00\x00\x0d\x01" + bytes(8), "00 00 08, got 00 00 0d"),
        (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], r"expected 6 bytes of data for shape \(2, 3\), got 5"),
        (idx_bytes(np.zeros((2, 3), np.uint8)) + b"\x00", r"expected 6 bytes of data for shape \(2, 3\), got 7"),
    ],
    ids=["empty", "floats", "short", "long"],
)
def test_refuses_what_is_not_idx(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        read_idx(path)


@pytest.mark.parametrize("subfolder", ["", "mnist"])
@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
def test_loads_a_named_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subfolder: str, by_variable: bool
) -> None:
    source = write_source(tmp_path / subfolder)
    if by_variable:
        monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(tmp_path))
    images = load_images(source, None if by_variable else tmp_path)
    assert images.name == "mnist"
    assert images.train_images.shape == (6, 3, 2)
    assert images.train_images[0, 0].tolist() == [0.0, 1.0]
    assert images.test_labels.tolist() == [0, 1, 2, 3]
    assert (images.test_images.dtype, images.test_labels.dtype) == (torch.float32, torch.int64)


def test_refuses_a_changed_file(tmp_path: Path) -> None:
    source = write_source(tmp_path)
    changed = tmp_path / "t10k-labels-idx1-ubyte.gz"
    changed.write_bytes(changed.read_bytes() + b"\x00")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz: expected md5 \w{32}, got \w{32}"):
        load_images(source, tmp_path)


def test_names_the_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SystemExit):
        main(["--data-dir", str(tmp_path)])
    message = capsys.readouterr().err
    assert "missing train-labels-idx1-ubyte.gz;" in message
    assert str(tmp_path) in message
    assert "--data-dir" in message


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """The address of a server on this machine that serves tmp_path/served."""
    handler = partial(QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_downloads_from_the_second_mirror_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: str) -> None:
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    source = replace(write_source(tmp_path / "served"), mirrors=(mirror + "absent/", mirror))
    first = load_images(source)
    for file in (tmp_path / "served").iterdir():
        file.unlink()
    second = load_images(source)
    assert first.name == second.name == "mnist"
    assert torch.equal(first.train_images, second.train_images)


def test_takes_no_changed_file_from_a_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    source = replace(write_source(tmp_path / "served"), mirrors=(mirror,))
    (tmp_path / "served" / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    assert load_images(source).name == "digits"
    assert f"{mirror}: wrong checksum" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.gz"))


@pytest.mark.usefixtures("offline")
def test_falls_back_to_digits(capsys: pytest.CaptureFixture[str]) -> None:
    images = load_images(MNIST)
    assert images.name == "digits"
    assert images.train_images.shape == (1437, 8, 8)
    assert images.test_images.shape == (360, 8, 8)
    assert images.train_images.min().item() == 0
    assert images.train_images.max().item() == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "mnist cannot be fetched" in said[0]
    assert all(mirror in said[0] for mirror in MNIST.mirrors)
    assert "bundled 8x8 digits instead" in said[0]


def test_batches_cover_everything_once() -> None:
    inputs = torch.arange(10).unsqueeze(1)
    ordered = Batches(inputs, torch.arange(10), batch_size=4)
    shuffled = Batches(inputs, torch.arange(10), batch_size=4, shuffle=True)
    assert [labels.tolist() for _, labels in ordered] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    first, second = (torch.cat([labels for _, labels in shuffled]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert len(shuffled) == len(list(shuffled)) == 3


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_short_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cell: str, backend: str
) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning's default folders would show up here
    options = ["--cell", cell, "--hidden", "8", "--epochs", "2", "--backend", backend, "--limit-steps", "3"]
    result = main(options)

    name = f"digits-{cell}-8" + ("" if backend == "auto" else f"-{backend}")
    folder = tmp_path / "runs" / name
    written = json.loads((folder / "result.json").read_text())
    assert tuple(written) == RESULT_KEYS
    assert written["name"] == name
    assert written["epochs"] == 2
    assert written["test_accuracy"] == result.test_accuracy
    assert {path.name for path in folder.iterdir()} == {"result.json", "curves.png", "predictions.png", "last.ckpt"}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"test accuracy {result.test_accuracy:.4f}; plots: ")


@pytest.mark.usefixtures("offline")
def test_pictures_show_something(tmp_path: Path) -> None:
    main(["--backend", "torch", "--hidden", "8", "--epochs", "1", "--limit-steps", "3", "--runs-dir", str(tmp_path)])
    folder = tmp_path / "digits-lstm-8-torch"
    curves, predictions = (imread(folder / name)[..., :3] for name in ("curves.png", "predictions.png"))
    red = (predictions[..., 0] > 0.7) & (predictions[..., 1:] < 0.3).all(axis=-1)  # frames round wrong ones
    dark = (predictions < 0.1).all(axis=-1)  # ink
    assert red.sum() > 1000
    assert dark.sum() > 1000
    assert len(np.unique(curves.reshape(-1, 3), axis=0)) > 50


@pytest.mark.usefixtures("offline")
def test_same_seed_same_result_and_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    options = ["--backend", "torch", "--hidden", "8", "--epochs", "3", "--limit-steps", "5", "--early-stopping", "2"]
    first, second = (main([*options, "--seed", "3", "--runs-dir", str(tmp_path / run)]) for run in "ab")
    assert first.test_loss == second.test_loss
    assert {path.name for path in (tmp_path / "a" / first.name).glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}


@pytest.mark.usefixtures("offline")
def test_learns_the_bundled_digits(tmp_path: Path) -> None:
    result = main(["--backend", "torch", "--cell", "rnn", "--epochs", "6", "--runs-dir", str(tmp_path)])
    assert result.test_accuracy > 0.8  # chance is 0.1
