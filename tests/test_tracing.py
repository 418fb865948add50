"""torch.compile, torch.export, opcheck, FakeTensor, jit.trace, make_fx and autocast."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern.cells import TORCH_CELLS
from rnnkern.layer import Settings, plain_operands
from tests.tables import cell_class, layer_class, nonlinearity

# Dynamo instantiates every Function that it traces, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LENGTHS = torch.tensor([2, 5])
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


def layer(cell: str, **options: Any) -> Any:
    return layer_class(rnnkern, cell)(3, 8, **options, **nonlinearity(cell))


def batch(module: Any, steps: int, size: int) -> Tensor:
    return torch.randn(size, steps, 3) if module.batch_first else torch.randn(steps, size, 3)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("given", [{}, {"lengths": LENGTHS}], ids=["padded", "lengths"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_compile_without_a_graph_break(cell: str, layout: str, given: dict[str, Tensor]) -> None:
    module = layer(cell, **LAYOUTS[layout])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = batch(module, 5, 2)
    with torch.no_grad():
        assert torch.equal(compiled(x, **given)[0], module(x, **given)[0])
    gradients = []
    for call in (compiled, module):
        value = x.clone().requires_grad_()
        total = call(value, **given)[0].pow(2).sum()
        gradients.append(torch.autograd.grad(total, [value, *module.parameters()]))
    for own, other in zip(*gradients, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("backend", ["reference", "host"])
def test_compile_with_lengths_on_another_backend(backend: str) -> None:
    """The operator gives more saved rows than there are steps."""
    module = layer("lstm", backend=backend, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = batch(module, 5, 2)
    gradients = [
        torch.autograd.grad(call(x, lengths=LENGTHS)[0].pow(2).sum(), list(module.parameters()))
        for call in (compiled, module)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # inductor imports what torch deprecates
def test_compile_by_inductor() -> None:
    module = layer("lstm", **LAYOUTS["stacked"])
    compiled = torch.compile(module, fullgraph=True)
    x = batch(module, 5, 2)
    for given in ({}, {"lengths": LENGTHS}):
        gradients = [
            torch.autograd.grad(call(x, **given)[0].pow(2).sum(), list(module.parameters()))
            for call in (compiled, module)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changing_size_recompiles_once(layout: str, gradients: bool) -> None:
    module = layer("lstm", **LAYOUTS[layout])
    compilations = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(
        module, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=lambda graph, _: graph)
    )
    seen = []
    with torch.set_grad_enabled(gradients):
        for steps, size in ((5, 4), (6, 4), (9, 4), (20, 4), (20, 5), (20, 7), (8, 9)):
            x = batch(module, steps, size)
            assert torch.equal(compiled(x)[0], module(x)[0])
            seen.append(compilations)
    assert seen == [1, 2, 2, 2, 3, 3, 3]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's own look
def test_packed_sequences_compile_with_a_graph_break() -> None:
    module = layer("gru")
    packed = pack_padded_sequence(torch.randn(5, 2, 3), LENGTHS, enforce_sorted=False)
    compiled = torch.compile(module, backend="eager")
    assert torch.equal(compiled(packed)[0].data, module(packed)[0].data)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_lengths_out_of_range_raise_when_compiled(cell: str) -> None:
    module = layer(cell)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(5, 2, 3), lengths=LENGTHS)
    with pytest.raises(ValueError, match="lengths: expected 1 <= length <= T = 5, got 6 at index 1"):
        compiled(torch.randn(5, 2, 3), lengths=torch.tensor([1, 6]))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_export(cell: str) -> None:
    module = layer(cell, **LAYOUTS["stacked"]).eval()
    sizes = {0: torch.export.Dim("B", min=2), 1: torch.export.Dim("T", min=2)}
    program = torch.export.export(module, (batch(module, 5, 2),), dynamic_shapes={"input": sizes})
    x = batch(module, 7, 3)
    assert torch.equal(program.module()(x)[0], module(x)[0])


def test_export_with_lengths() -> None:
    module = layer("lstm")
    program = torch.export.export(module, (torch.randn(5, 2, 3),), {"lengths": LENGTHS})
    x, lengths = torch.randn(5, 2, 3), torch.tensor([4, 1])
    assert torch.equal(program.module()(x, lengths=lengths)[0], module(x, lengths=lengths)[0])


def samples(cell: str, backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of rnnkern::layer, but for `save`: plain, bidirectional, lengths, batch-major, packed, projected."""
    spec, hidden = TORCH_CELLS[cell], 4
    for directions, projection, lengths, batch_major, packed in (
        (1, 0, False, False, False),
        (2, 0, False, True, False),
        (2, 2 if cell == "lstm" else 0, True, False, False),
        (1, 0, True, True, False),
        (2, 0, False, False, True),
    ):
        outputs, rows = projection or hidden, len(spec.gates) * hidden
        x = torch.randn(3, 5, 2).transpose(0, 1) if batch_major else torch.randn(5, 3, 2)
        one = [torch.randn(rows, 2), torch.randn(rows, outputs), torch.randn(rows), torch.randn(rows)]
        weights = [
            w.clone() for _ in range(directions) for w in one + [torch.randn(outputs, hidden)] * bool(projection)
        ]
        operands = plain_operands(
            torch.randn(7, 2) if packed else x,
            torch.randn(directions, 3, outputs),
            torch.randn(directions, 3, hidden) if spec.has_c else None,
            tuple(weights),
            torch.tensor([2, 5, 1]) if lengths else None,
            torch.tensor([3, 2, 2]) if packed else None,
        )
        yield *Settings(cell, backend, batch_major), *operands


@pytest.mark.parametrize("backend", ["numba", "host"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_opcheck(cell: str, backend: str) -> None:
    for sample in samples(cell, backend):
        for save in (False, True):
            torch.library.opcheck(torch.ops.rnnkern.layer.default, (*sample, save))
        results = torch.ops.rnnkern.layer(*sample, True)
        *_, c0, _, _, weights = sample
        everything = [True, True, c0 is not None, False, False, *(True for _ in weights)]
        states_only = [False, True, *(False for _ in everything[2:])]
        dy, dh_n, dc_n = (
            torch.randn_like(results[0]),
            torch.randn_like(results[1]),
            None if c0 is None else torch.randn_like(c0),
        )
        for grads, needs in (((dy, None, dc_n, None), everything), ((None, dh_n, None, None), states_only)):
            torch.library.opcheck(
                torch.ops.rnnkern.layer_backward.default, (*sample, results[0], *results[3:], *grads, needs)
            )


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("gradients", [False, True])
def test_fake_tensors_and_meta(cell: str, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        output, _ = layer(cell, **LAYOUTS["stacked"], device="meta")(torch.randn(2, 5, 3, device="meta"))
        assert output.is_meta
        assert output.shape == (2, 5, 16)
        with FakeTensorMode():
            module = layer(cell, **LAYOUTS["stacked"])
            for given in ({}, {"lengths": torch.tensor([2, 5])}):
                output, _ = module(torch.randn(2, 5, 3), **given)
                assert output.shape == (2, 5, 16)
                if gradients:
                    output.sum().backward()
                    assert all(p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes of the checks become constants, as torch says
def test_jit_trace(cell: str) -> None:
    module = layer(cell, num_layers=2)
    traced = torch.jit.trace(module, (torch.randn(5, 2, 3),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = torch.randn(5, 2, 3)
    for other in (traced, torch.jit.load(file)):
        assert torch.equal(other(x)[0], module(x)[0])


@pytest.mark.parametrize("gradients", [False, True])
def test_make_fx(gradients: bool) -> None:
    module = layer("gru")
    with torch.set_grad_enabled(gradients):
        graph = make_fx(lambda v: module(v)[0])(torch.randn(5, 2, 3))
        x = torch.randn(5, 2, 3)
        assert torch.equal(graph(x), module(x)[0])


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_autocast(cell: str) -> None:
    module = layer(cell, num_layers=2)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                output, states = module(x)
        assert {output.dtype, *(s.dtype for s in (states if isinstance(states, tuple) else (states,)))} == {
            torch.bfloat16
        }
        module(x)[0].float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    expected = module.to(torch.bfloat16)(x.bfloat16())[0]
    assert torch.equal(output, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(cell).double()(x.double())[0].dtype == torch.float64


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_autocast_of_cells_has_the_dtypes_of_torch(
    cell: str, input_dtype: torch.dtype, state: torch.dtype | None
) -> None:
    dtypes = []
    for package in (rnnkern, nn):
        module = cell_class(package, cell)(3, 8, **nonlinearity(cell))
        h = None if state is None else torch.zeros(2, 8, dtype=state)
        hx = h if h is None or not TORCH_CELLS[cell].has_c else (h, h)
        with torch.autocast("cpu", torch.bfloat16):
            states = module(torch.randn(2, 3, dtype=input_dtype), hx)
        dtypes.append([s.dtype for s in (states if isinstance(states, tuple) else (states,))])
    assert dtypes[0] == dtypes[1]
