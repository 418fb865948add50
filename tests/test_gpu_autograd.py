"""On a GPU as on the CPU: derivatives of every order, torch.func, torch.compile and autocast."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from rnnkern.cells import TORCH_CELLS
from tests.gpu_support import Target, on_both, on_cuda
from tests.tables import loss_of, of_everything

# Dynamo instantiates every Function that it traces, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LENGTHS = torch.tensor([2, 4, 1])
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
with_lengths = pytest.mark.parametrize("lengths", [False, True], ids=["padded", "lengths"])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def twins(target: Target, cell: str, **options: Any) -> tuple[Any, Any]:
    """rnnkern's layer and torch.nn's on the CPU, with the same float64 weights."""
    options |= {"dtype": torch.float64}
    ours, theirs = target.layer(cell, 2, 3, **options), Target("", "cpu").torch_layer(cell, 2, 3, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@on_both
@with_lengths
@every_layout
@every_cell
def test_gradcheck_and_gradgradcheck(target: Target, cell: str, layout: str, lengths: bool) -> None:
    module, _ = twins(target, cell, **LAYOUTS[layout])
    given = {"lengths": LENGTHS.to(target.device)} if lengths else {}
    shape = (3, 4, 2) if module.batch_first else (4, 3, 2)
    inputs = (target.random(*shape, dtype=torch.float64).requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(of_everything(module, **given), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(of_everything(module, **given), inputs, fast_mode=True)


@on_both
@every_cell
def test_second_derivative_is_that_of_torch(target: Target, cell: str) -> None:
    ours, theirs = twins(target, cell, num_layers=2)
    x = torch.randn(4, 2, 2, dtype=torch.float64)

    def second(module: nn.Module, at: Tensor) -> Any:
        parameters = dict(module.named_parameters())
        return grad(lambda v: grad(lambda u: loss_of(module)(parameters, u))(v).pow(2).sum())(at)

    torch.testing.assert_close(second(ours, x.to(target.device)).cpu(), second(theirs, x))


@on_both
@every_cell
def test_per_sample_gradients(target: Target, cell: str) -> None:
    ours, theirs = twins(target, cell, bidirectional=True)
    samples = torch.randn(5, 4, 1, 2, dtype=torch.float64)
    together = vmap(grad(loss_of(ours)), in_dims=(None, 0))(dict(ours.named_parameters()), samples.to(target.device))
    apart = [grad(loss_of(theirs))(dict(theirs.named_parameters()), sample) for sample in samples]
    for name, gradients in together.items():
        torch.testing.assert_close(gradients.cpu(), torch.stack([one[name] for one in apart]))


def check_compiled(target: Target, cell: str, layout: str, lengths: bool, backend: str) -> None:
    """Compiled whole, inference and training give what eager calls give."""
    module = target.layer(cell, 3, 8, **LAYOUTS[layout])
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    given = {"lengths": LENGTHS.to(target.device)} if lengths else {}
    x = target.random(*((3, 5, 3) if module.batch_first else (5, 3, 3)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, **given)[0], module(x, **given)[0])
    gradients = []
    for call in (compiled, module):
        value = x.clone().requires_grad_()
        total = call(value, **given)[0].pow(2).sum()
        gradients.append(torch.autograd.grad(total, [value, *module.parameters()]))
    torch.testing.assert_close(*gradients)


@on_both
@with_lengths
@every_layout
@every_cell
def test_compile_without_a_graph_break(target: Target, cell: str, layout: str, lengths: bool) -> None:
    check_compiled(target, cell, layout, lengths, "aot_eager")


@on_cuda
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # inductor imports what torch deprecates
@pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores:UserWarning")  # inductor would like the switch on
@with_lengths
def test_compile_by_inductor(target: Target, lengths: bool) -> None:
    check_compiled(target, "lstm", "stacked", lengths, "inductor")


@on_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_cell
def test_autocast(target: Target, cell: str, dtype: torch.dtype) -> None:
    module, x = target.layer(cell, 3, 8, num_layers=2), target.random(5, 2, 3)
    with torch.autocast(target.device, dtype):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                output, states = module(x)
        assert {output.dtype, *(s.dtype for s in (states if isinstance(states, tuple) else (states,)))} == {dtype}
        module(x)[0].float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    assert torch.equal(output, module.to(dtype)(x.to(dtype))[0])
