"""What every test runs under: a fixed seed, fixed hypothesis examples, a GPU if it needs one; and what several files
take: buffers that are NaN until written, a number of threads, planned calls of either kind, a folder to build in,
Keras."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from csrc import build
from rnnkern import native
from rnnkern.backends import obstacle
from tests.build_support import build_tree, executable
from tests.numba_support import count_shares, forget_plans, plan_constants

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def same_start() -> None:
    """One seed; no call has been seen before; and one thread, the quickest for small sizes: a test of threads sets
    their number itself."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    forget_plans()


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """No TF32, which torch allows by default. By the old switch for all of cuDNN: torch.export looks at that, and finds
    one for recurrent layers alone a contradiction."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(autouse=True)
def needs_a_gpu(request: pytest.FixtureRequest) -> None:
    """A test marked gpu is skipped where the kernels cannot run on one, and says why not. Products on it are the same
    every time, on every stream."""
    if request.node.get_closest_marker("gpu") is None:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product; NaN buffers need it too
    reason = obstacle("cuda", torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"no GPU to test on: {reason}")


@pytest.fixture
def nan_buffers() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: torch fills them in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Planned calls run in Python, as where the extension _calls was not built."""
    monkeypatch.setattr(native, "calls", None)
    forget_plans()
    yield
    forget_plans()


@pytest.fixture(params=["native", "python"])
def each_way(request: pytest.FixtureRequest) -> None:
    """Planned calls run in C++, and in Python."""
    if request.param == "python":
        request.getfixturevalue("in_python")
    elif native.calls is None:
        pytest.skip(str(native.obstacle()))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and sets it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def always_split(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Even the smallest call is shared among threads; the list holds how many shares each had."""
    counts = count_shares(monkeypatch, together=False)
    with plan_constants(WORTH_A_THREAD=1, LEAST_SEQUENCES=1, ROWS_WORTH_A_SUM=1):
        yield counts


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads."""
    return build_tree(tmp_path / "tree")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with g++ but no CUDA, and a folder that is first on its PATH."""
    for name in ("RNNKERN_CUDA", "RNNKERN_CUDA_ARCHS", "RNNKERN_CALLS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "programs"
    executable(programs / "g++", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(build, "DEFAULT_HOME", tmp_path / "default")
    return programs


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Keras on torch's CPU. It reads both variables when it is imported, and writes its settings to its home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras
    assert keras.config.backend() == "torch"
    with keras.device("cpu"):
        yield keras
