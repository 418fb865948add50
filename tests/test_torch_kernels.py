"""backend="auto" on a GPU without compiled kernels: torch.nn's own, tried here on the CPU, where they are the same
functions."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from rnnkern import backends
from tests.tables import Case, assert_close, cases

NAMED = dict(cases(2))
CASES = {n: replace(c, backend="auto") for n, c in NAMED.items() if c.backend == "numba" and c.dtype == torch.float64}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device counts as a GPU for which nothing was compiled; what is warned of is not looked at."""
    serves = backends.torch_serves
    monkeypatch.setattr(backends, "_CUDA_IS_BUILT", False)
    monkeypatch.setattr(backends, "torch_serves", lambda name, device: serves(name, torch.device("cuda")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case: Case) -> None:
    assert_close(case.run(case.module()), case.by_oracle(), case.dtype)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_kernel_of_ours_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "select", lambda name, device: pytest.fail("a backend was selected"))
    case = Case(backend="auto")
    case.run(case.module())


def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_CUDA_IS_BUILT", False)
    monkeypatch.setattr(backends.extension, "obstacle", lambda: "it was not built: no nvcc")
    backends._warn_torch_serves.cache_clear()
    with pytest.warns(RuntimeWarning, match="torch.nn's own kernels on cuda: it was not built: no nvcc"):
        assert backends.torch_serves("auto", torch.device("cuda"))
    assert backends.torch_serves("auto", torch.device("cuda"))


@pytest.mark.parametrize(("name", "device"), [("cuda", "cuda"), ("auto", "cpu"), ("reference", "cuda")])
def test_not_where_something_else_was_asked_for(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_CUDA_IS_BUILT", False)
    assert not backends.torch_serves(name, torch.device(device))


def test_a_named_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = backends.BACKENDS["cuda"]._replace(obstacle=lambda: "the extension rnnkern._cuda was not built: no nvcc")
    monkeypatch.setitem(backends.BACKENDS, "cuda", entry)
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run this layer: .* was not built: no nvcc"):
        backends.select("cuda", torch.device("cuda"))
