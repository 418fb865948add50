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
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """rnnkern's own kernels were not compiled."""
    entry = backends.BACKENDS["cuda"]._replace(obstacle=lambda: "the extension was not built: no nvcc")
    monkeypatch.setitem(backends.BACKENDS, "cuda", entry)
    backends._warn_torch_serves.cache_clear()


@pytest.fixture
def as_on_a_gpu(not_built: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device counts as a GPU; what is warned of is not looked at."""
    serves = backends.torch_serves
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


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("rows", ["padded", "lengths"])
def test_under_the_compiler(rows: str) -> None:
    """By torch.nn's functions, as they trace; packing breaks the graph."""
    case = Case(backend="auto", rows=rows)
    compiled = torch.compile(case.module(), fullgraph=rows == "padded", backend="aot_eager")
    x, states = case.inputs()
    lengths = {"lengths": torch.tensor(case.lengths)} if rows == "lengths" else {}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, states, **lengths), case.module()(x, states, **lengths))


@pytest.mark.usefixtures("not_built")
def test_it_is_said_once() -> None:
    with pytest.warns(RuntimeWarning, match="torch.nn's own kernels on cuda: the extension was not built: no nvcc"):
        assert backends.torch_serves("auto", torch.device("cuda"))
    assert backends.torch_serves("auto", torch.device("cuda"))


@pytest.mark.usefixtures("not_built")
@pytest.mark.parametrize(("name", "device"), [("cuda", "cuda"), ("auto", "cpu"), ("reference", "cuda")])
def test_not_where_something_else_was_asked_for(name: str, device: str) -> None:
    assert not backends.torch_serves(name, torch.device(device))


@pytest.mark.usefixtures("not_built")
def test_a_named_backend_raises() -> None:
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run this layer: .* was not built: no nvcc"):
        backends.select("cuda", torch.device("cuda"))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_lengths_are_checked() -> None:
    module = Case(backend="auto").module()
    with pytest.raises(ValueError, match=r"lengths: expected 1 <= length <= T = 5, got 6 at index 1"):
        module(torch.zeros(5, 2, 3, dtype=torch.float64), lengths=torch.tensor([1, 6]))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_lengths_of_no_sequence() -> None:
    output, _ = Case(backend="auto").module()(
        torch.zeros(5, 0, 3, dtype=torch.float64), lengths=torch.tensor([], dtype=torch.int64)
    )
    assert output.shape == (5, 0, 7)
