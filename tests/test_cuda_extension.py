"""Why the CUDA kernels cannot run here: each reason is a sentence, which `python -m rnnkern` shows."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rnnkern.backends import BACKENDS, obstacle
from rnnkern.backends.cuda import extension


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    extension._build_obstacle.cache_clear()
    yield
    extension._build_obstacle.cache_clear()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension is there and can be loaded."""
    monkeypatch.setattr(extension, "find_spec", lambda name: object())
    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(CUDART_VERSION=13000))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)


def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(fields))
    monkeypatch.setattr(extension, "RECORD", path)


def test_not_built_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, monkeypatch, cuda=False, reason="RNNKERN_CUDA=0 was set for the build")
    monkeypatch.setattr(extension, "find_spec", lambda name: None)
    assert extension.obstacle() == ("the extension rnnkern._cuda was not built: RNNKERN_CUDA=0 was set for the build")


def test_not_built_and_nobody_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "RECORD", tmp_path / "none")
    monkeypatch.setattr(extension, "find_spec", lambda name: None)
    assert "install rnnkern from its sources, with nvcc" in str(extension.obstacle())


def test_built_for_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("libstdc++.so.6: version GLIBCXX_9 not found")

    monkeypatch.setattr(extension, "find_spec", lambda name: object())
    monkeypatch.setattr(extension, "load", fail)
    assert extension.obstacle() == (
        "the extension rnnkern._cuda cannot be loaded: libstdc++.so.6: version GLIBCXX_9 not found; build it again"
    )


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("torch_has_cuda", "device_is_there", "reason"),
    [
        (False, False, "this torch was built without CUDA; install one that was"),
        (True, False, "torch finds no CUDA device: is there one, with a driver new enough for this torch?"),
        (True, True, None),
    ],
)
def test_torch_or_driver(
    torch_has_cuda: bool, device_is_there: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: torch_has_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device_is_there)
    assert extension.obstacle() == reason


@pytest.mark.usefixtures("built")
def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12090, raising=False)
    assert extension.obstacle() == (
        "the extension was built with CUDA 13, and the driver knows CUDA 12: update the driver"
    )


@pytest.mark.parametrize(
    ("target", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_what_runs_where(target: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    assert all(extension.runs_on(target, capability) for capability in runs)
    assert not any(extension.runs_on(target, capability) for capability in does_not)


def test_a_gpu_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of the same machine are asked for themselves."""
    record(tmp_path, monkeypatch, cuda=True, targets=["sm_80", "sm_90a"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 0 else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    entry = BACKENDS["cuda"]._replace(obstacle=lambda: None, device_obstacle=extension.device_obstacle)
    monkeypatch.setitem(BACKENDS, "cuda", entry)
    assert obstacle("cuda", torch.device("cuda", 0)) == (
        "the kernels were compiled for sm_80, sm_90a, and Old has compute capability 7.5"
    )
    assert obstacle("cuda", torch.device("cuda", 1)) is None


def test_other_devices() -> None:
    assert obstacle("cuda", torch.device("cpu")) == "it runs on cuda, not on cpu"


def test_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, monkeypatch, cuda=True, reason=None, nvcc="13.0.88", targets=["sm_80", "compute_90"])
    assert extension.version() == "nvcc 13.0.88 for sm_80, compute_90"
    monkeypatch.setattr(extension, "RECORD", tmp_path / "none")
    assert extension.version() == "of unknown origin"
