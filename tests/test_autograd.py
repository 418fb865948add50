"""Derivatives of every order, and torch.func, through every module."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern.cells import TORCH_CELLS
from tests.tables import KERNEL_BACKENDS, cell_class, layer_class, loss_of, nonlinearity, of_everything

LENGTHS = torch.tensor([2, 4, 1])
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no_bias": {"bias": False},
}


def twins(cell: str, **options: Any) -> tuple[Any, Any]:
    """rnnkern's layer and torch.nn's with the same float64 weights."""
    options |= {"dtype": torch.float64, **nonlinearity(cell)}
    ours, theirs = layer_class(rnnkern, cell)(2, 3, **options), layer_class(nn, cell)(2, 3, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_gradcheck_and_gradgradcheck(cell: str, layout: str) -> None:
    module, _ = twins(cell, **LAYOUTS[layout])
    inputs = (random(3, 2, 2).requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(of_everything(module), inputs, fast_mode=layout == "stacked")
    assert torch.autograd.gradgradcheck(of_everything(module), inputs, fast_mode=layout == "stacked")


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_gradgradcheck_with_lengths(cell: str) -> None:
    module, _ = twins(cell, bidirectional=True)
    inputs = (random(4, 3, 2).requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(of_everything(module, lengths=LENGTHS), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(of_everything(module, lengths=LENGTHS), inputs, fast_mode=True)


def test_gradgradcheck_with_projection() -> None:
    module = rnnkern.LSTM(2, 4, proj_size=3, dtype=torch.float64)
    inputs = (random(3, 2, 2).requires_grad_(), *module.parameters())
    assert torch.autograd.gradgradcheck(of_everything(module), inputs)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_gradgradcheck_of_cells_and_states(cell: str) -> None:
    module = cell_class(rnnkern, cell)(2, 3, dtype=torch.float64, **nonlinearity(cell))
    states = [random(2, 3).requires_grad_() for _ in range(TORCH_CELLS[cell].states)]

    def call(x: Tensor, *hx: Tensor) -> Any:
        return module(x, hx if len(hx) > 1 else hx[0])

    assert torch.autograd.gradcheck(call, (random(2, 2).requires_grad_(), *states))
    assert torch.autograd.gradgradcheck(call, (random(2, 2).requires_grad_(), *states))


def test_third_derivative() -> None:
    ours, theirs = twins("gru")
    x = random(3, 1, 2)
    for module in (ours, theirs):
        module.requires_grad_(False)

    def third(module: nn.Module) -> Tensor:
        value = x.clone().requires_grad_()
        result: Tensor = module(value)[0].pow(3).sum()
        for _ in range(3):
            (result,) = torch.autograd.grad(result.sum(), value, create_graph=True)
        return result

    torch.testing.assert_close(third(ours), third(theirs))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_only_what_is_needed_is_computed(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    whole = rnnkern.layer.backward

    def spy(settings: Any, operands: Any, results: Any, grads: Any, needs: Any) -> list[Tensor]:
        found = whole(settings, operands, results, grads, needs)
        asked.append((tuple(needs), len(found)))
        return found

    monkeypatch.setattr(rnnkern.layer, "backward", spy)
    module, _ = twins(cell)
    module.requires_grad_(False)
    module(random(3, 2, 2).requires_grad_())[0].sum().backward()
    module.weight_hh_l0.requires_grad_(True)
    module(random(3, 2, 2))[0].sum().backward()
    assert asked[0] == ((True, *(False,) * 8), 1)
    assert asked[1] == ((*(False,) * 6, True, False, False), 1)


def test_graph_kept_and_run_again() -> None:
    module, _ = twins("lstm")
    x = random(3, 2, 2).requires_grad_()
    total = module(x)[0].pow(2).sum()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(total, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_func_grad_and_grad_of_grad(cell: str) -> None:
    ours, theirs = twins(cell, num_layers=2)
    x, parameters = random(4, 2, 2), dict(ours.named_parameters())

    def second(module: nn.Module) -> Any:
        return grad(lambda v: grad(lambda u: loss_of(module)(parameters, u))(v).pow(2).sum())(x)

    torch.testing.assert_close(grad(loss_of(ours))(parameters, x), grad(loss_of(theirs))(parameters, x))
    torch.testing.assert_close(second(ours), second(theirs))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_per_sample_gradients(cell: str) -> None:
    ours, theirs = twins(cell, bidirectional=True)
    samples, parameters = random(5, 4, 1, 2), dict(ours.named_parameters())
    together = vmap(grad(loss_of(ours)), in_dims=(None, 0))(parameters, samples)
    apart = [grad(loss_of(theirs))(parameters, sample) for sample in samples]
    for name, gradients in together.items():
        torch.testing.assert_close(gradients, torch.stack([one[name] for one in apart]))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_vmap_over_weights_and_input(cell: str) -> None:
    """An ensemble: each member with weights of its own, batched along another dimension than the input."""
    members = [twins(cell)[0] for _ in range(3)]
    stacked = {
        name: torch.stack([dict(m.named_parameters())[name] for m in members], 1)
        for name in dict(members[0].named_parameters())
    }
    xs = random(3, 4, 2, 2)
    outputs = vmap(lambda p, x: functional_call(members[0], p, (x,))[0], in_dims=(1, 0))(stacked, xs)
    torch.testing.assert_close(outputs, torch.stack([m(x)[0] for m, x in zip(members, xs, strict=True)]))


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_vmap_over_lengths(backend: str) -> None:
    """Each element with lengths of its own, and so with another number of saved rows."""
    module = rnnkern.LSTM(2, 3, bidirectional=True, dtype=torch.float64, backend=backend)
    xs, lengths = random(2, 4, 3, 2), torch.tensor([[2, 4, 1], [1, 1, 3]])

    def gradient(x: Tensor, given: Tensor) -> Any:
        return grad(lambda v: module(v, lengths=given)[0].pow(2).sum())(x)

    together = vmap(gradient)(xs, lengths)
    torch.testing.assert_close(together, torch.stack([gradient(x, n) for x, n in zip(xs, lengths, strict=True)]))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_maml(cell: str) -> None:
    """The gradient of a loss after a step of gradient descent."""
    ours, theirs = twins(cell)
    x, parameters = random(4, 2, 2), dict(ours.named_parameters())

    def after_a_step(module: nn.Module) -> Callable[[dict[str, Tensor]], Any]:
        def outer(start: dict[str, Tensor]) -> Any:
            slope = grad(lambda p: loss_of(module)(p, x))(start)
            return loss_of(module)({name: start[name] - 0.1 * slope[name] for name in start}, x)

        return outer

    torch.testing.assert_close(grad(after_a_step(ours))(parameters), grad(after_a_step(theirs))(parameters))


def test_jacobian_and_hessian() -> None:
    ours, theirs = twins("lstm")
    x = random(3, 1, 2)
    torch.testing.assert_close(jacrev(lambda v: ours(v)[0])(x), jacrev(lambda v: theirs(v)[0])(x))
    hessians = [torch.autograd.functional.hessian(lambda v, m=m: m(v)[0].pow(2).sum(), x) for m in (ours, theirs)]
    torch.testing.assert_close(*hessians)


def test_functional_call_uses_the_weights_given() -> None:
    ours, theirs = twins("gru")
    x, other = random(3, 2, 2), {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    torch.testing.assert_close(functional_call(ours, other, (x,))[0], functional_call(theirs, other, (x,))[0])


def forward_modes(module: nn.Module) -> Iterator[Callable[[], object]]:
    x = random(3, 2, 2)

    def dual() -> object:
        with forward_ad.dual_level():
            return module(forward_ad.make_dual(x, torch.ones_like(x)))

    def dual_without_gradients() -> object:
        with torch.no_grad():
            return dual()

    yield dual
    yield dual_without_gradients
    yield lambda: jvp(lambda v: module(v)[0], (x,), (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in its forward mode
def test_forward_mode_says_that_there_is_none() -> None:
    module, _ = twins("lstm")
    for call in forward_modes(module):
        with pytest.raises(NotImplementedError, match=r"rnnkern has no forward-mode derivatives.*to_torch"):
            call()
    with forward_ad.dual_level():
        module(random(3, 2, 2))  # no tangent, no complaint


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_redraws_the_same_dropout(use_reentrant: bool) -> None:
    module = rnnkern.LSTM(2, 3, num_layers=3, dropout=0.5)
    x = torch.randn(4, 2, 2, requires_grad=True)

    def gradient(call: Callable[[], Any]) -> Any:
        torch.manual_seed(3)
        x.grad = None
        call()[0].sum().backward()
        return x.grad

    expected = gradient(lambda: module(x))
    assert torch.equal(gradient(lambda: checkpoint(module, x, use_reentrant=use_reentrant)), expected)


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
def test_results_may_be_changed_in_place(cell: str, options: dict[str, bool]) -> None:
    """Final states before backward, as an episode's reset does; the output only where no backward follows."""
    ours, theirs = twins(cell, **options)
    x = random(3, 3, 2)
    gradients = []
    for module in (ours, theirs):
        h, total = None, torch.zeros((), dtype=torch.float64)
        for _ in range(3):
            y, h = module(x, h)
            for state in h if isinstance(h, tuple) else (h,):
                state[:, 1] = 0
            total = total + y.pow(2).sum()
        gradients.append(torch.autograd.grad(total, list(module.parameters())))
        with torch.no_grad():
            module(x)[0].relu_()
        module.eval()(x)[0].clamp_(min=0)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_output_changed_in_place_before_backward_raises(cell: str) -> None:
    module, _ = twins(cell)
    y, _ = module(random(3, 2, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.mul_(2).sum().backward()


def test_batched_gradients_say_what_to_use() -> None:
    module, _ = twins("gru")
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.autograd.functional.jacobian(lambda v: module(v)[0], random(2, 1, 2), vectorize=True)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_backward_inside_autocast(backend: str) -> None:
    module = rnnkern.LSTM(3, 8, backend=backend)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        total = module(x)[0].float().pow(2).sum()
        inside = torch.autograd.grad(total, list(module.parameters()), retain_graph=True)
    outside = torch.autograd.grad(total, list(module.parameters()))
    for own, other in zip(inside, outside, strict=True):
        assert torch.equal(own, other)
