"""What surrounds the CUDA sweeps: torch's products, and the switch for their precision; operands that have to be
copied; numbers that must not meet others."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.backends.cuda import products
from rnnkern.cells import TORCH_CELLS
from tests.tables import layer_class, nonlinearity

every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)
ON_A_GPU: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
matmul: Any = torch.backends.cuda.matmul
everything: Any = torch.backends
recurrent: Any = torch.backends.cudnn.rnn


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Switches are torch's defaults again afterwards."""
    yield
    everything.fp32_precision = matmul.fp32_precision = "none"


def layer(cell: str, **options: Any) -> Any:
    return layer_class(rnnkern, cell)(3, 7, dtype=torch.float64, **options, **nonlinearity(cell))


@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("of_all", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
def test_products_have_the_precision_of_the_sweeps(own: str, of_all: str, wanted: str) -> None:
    recurrent.fp32_precision, everything.fp32_precision, matmul.fp32_precision = wanted, of_all, own
    before = matmul.fp32_precision
    with products.ProductSwitch().as_in_sweeps(ON_A_GPU):
        assert matmul.fp32_precision == wanted or (wanted == "ieee" and matmul.fp32_precision == "none")
    assert matmul.fp32_precision == before
    if own == "none":
        everything.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee", "the switch for everything is not heard any more"


def test_torchs_defaults_are_left_alone_for_float32() -> None:
    recurrent.fp32_precision = "ieee"
    with products.ProductSwitch().as_in_sweeps(ON_A_GPU):
        assert matmul.fp32_precision == "none"


def test_other_tensors_do_not_touch_the_switch() -> None:
    recurrent.fp32_precision = "tf32"
    for x in (torch.zeros(1), SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)):
        with products.ProductSwitch().as_in_sweeps(x):  # type: ignore[arg-type]
            assert matmul.fp32_precision == "none"


def test_the_last_of_several_threads_puts_the_switch_back() -> None:
    """Those that want the same are inside together; one that wants another waits."""
    recurrent.fp32_precision = "tf32"
    switch, inside, seen = products.ProductSwitch(), threading.Barrier(2, timeout=60), []

    def same() -> None:
        with switch.as_in_sweeps(ON_A_GPU):
            inside.wait()
            seen.append(matmul.fp32_precision)
            inside.wait()

    threads = [threading.Thread(target=same) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["tf32", "tf32"]
    assert matmul.fp32_precision == "none"
    assert switch.users == 0


@every_cell
def test_saved_tensors_that_hooks_lay_out_anew(cell: str) -> None:
    """Backward copies them, and the copies live until they are read."""
    module, x = layer(cell, backend="host", bidirectional=True), torch.randn(5, 4, 3, dtype=torch.float64)

    def gradients(call: Callable[[], Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call()[0].pow(2).sum(), list(module.parameters()))

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0] if t.is_floating_point() else t

    def call() -> Any:
        return module(x, lengths=torch.tensor([2, 5, 1, 3]))

    expected = gradients(call)
    for change in (strided, lambda t: torch._neg_view(-t) if t.is_floating_point() else t):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
            assert all(torch.equal(own, wanted) for own, wanted in zip(gradients(call), expected, strict=True))


@pytest.mark.parametrize("backend", ["host", "numba", "reference"])
@every_cell
def test_nan_past_a_length_is_not_read(cell: str, backend: str) -> None:
    module, lengths = layer(cell, backend=backend, bidirectional=True), torch.tensor([2, 5, 1, 3])
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    padded = x.clone()
    padded[torch.arange(5)[:, None] >= lengths] = torch.nan

    def gradients(given: Tensor) -> tuple[Tensor, ...]:
        given = given.requires_grad_()
        return torch.autograd.grad(module(given, lengths=lengths)[0].sum(), [given, *module.parameters()])

    for own, wanted in zip(gradients(padded), gradients(x), strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("sizes", [(5, 7), (5, 40), (1, 3), (6, 6)])
def test_projections_to_more_outputs_than_units(sizes: tuple[int, int]) -> None:
    """torch.nn refuses them, rnnkern.functional does not."""
    hidden, outputs = sizes
    torch.manual_seed(1)
    shapes = [(4 * hidden, 3), (4 * hidden, outputs), (4 * hidden,), (4 * hidden,), (outputs, hidden)]
    weights = [[torch.randn(shape, dtype=torch.float64).mul(0.3).requires_grad_() for shape in shapes] for _ in "01"]
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    found = []
    for backend in ("host", "reference"):
        y, (h, c) = rnnkern.functional.lstm(x, None, weights, bidirectional=True, backend=backend)
        found.append(torch.autograd.grad(y.pow(2).sum() + h.sum() + c.sum(), [w for one in weights for w in one]))
    torch.testing.assert_close(*found)


def test_lengths_that_are_to_be_negated() -> None:
    module, x, lengths = (
        layer("lstm", backend="host"),
        torch.randn(5, 3, 3, dtype=torch.float64),
        torch.tensor([2, 5, 1]),
    )
    assert torch.equal(module(x, lengths=torch._neg_view(-lengths))[0], module(x, lengths=lengths)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_cell
def test_traced_and_exported_with_gradients_on(cell: str) -> None:
    """The operators' bodies run under torch's own graph there."""
    module, x = layer(cell, backend="host"), torch.randn(4, 2, 3, dtype=torch.float64)
    expected = module(x)[0]
    assert torch.equal(torch.jit.trace(module, (x,))(x)[0], expected)
    assert torch.equal(torch.export.export(module, (x,)).module()(x)[0], expected)
