"""The short way of a call that looks like earlier ones gives what the ordinary way gives, and is taken only where it
may be."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern import shortcut
from rnnkern.cells import TORCH_CELLS
from tests.option_modules import flat
from tests.tables import Case, assert_close, cell_class, layer_class, nonlinearity, relative_rms

pytestmark = pytest.mark.usefixtures("each_way")
every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    shortcut.forget()
    yield
    shortcut.forget()


def plans() -> int:
    """How many descriptions have a plan by now."""
    return sum(map(bool, shortcut._plans.values()))


def settled(call: Callable[[], Any]) -> Any:
    """What a call gives once it goes the short way."""
    for _ in range(2):
        call()
    before = plans()
    assert before, "no plan was made"
    found = call()
    assert plans() == before
    return found


FORMS = [
    Case(rows=rows, layers=layers, bidirectional=bidirectional, batch_first=batch_first, hx=hx, bias=bias)
    for rows, layers, bidirectional, batch_first, hx in product(
        ("padded", "unbatched"), (1, 2), (False, True), (False, True), (False, True)
    )
    for bias in (True, layers == 2)
][:48]


@every_cell
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_calls_with_gradients(cell: str, form: Case) -> None:
    case = replace(form, cell=cell)
    module = case.module()
    assert_close(settled(lambda: case.run(module)), case.by_torch(), case.dtype)


@every_cell
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_calls_without_gradients(cell: str, form: Case) -> None:
    case = replace(form, cell=cell, training=False)
    module, twin, inputs = case.module(), case.torch_module(), case.inputs()
    with torch.no_grad():
        first, ours = case.call(module, *inputs), settled(lambda: case.call(module, *inputs))
        theirs = case.call(twin, *inputs)
    assert ours[0].stride() == first[0].stride()
    for name, result in theirs[1].items():
        assert relative_rms(ours[1][name], result) <= 1e-12, name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS[:16], ids=repr)
def test_projection(form: Case, training: bool) -> None:
    case = replace(form, cell="lstm", proj_size=3)
    module = case.module()
    assert_close(settled(lambda: case.run(module)), case.by_torch(), case.dtype)


@every_cell
@pytest.mark.parametrize("shape", [(5, 3), (3,)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cells(cell: str, shape: tuple[int, ...], given: bool, bias: bool) -> None:
    options = {"bias": bias, "dtype": torch.float64, **nonlinearity(cell)}
    theirs = cell_class(nn, cell)(3, 7, **options)
    ours = cell_class(rnnkern, cell)(3, 7, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    start = tuple(torch.randn(*shape[:-1], 7, dtype=torch.float64) for _ in range(TORCH_CELLS[cell].states))

    def run(module: nn.Module, graded: bool) -> list[Tensor]:
        module.zero_grad()
        leaves = [t.clone().requires_grad_(graded) for t in (x, *start)]
        hx = None if not given else tuple(leaves[1:]) if len(start) == 2 else leaves[1]
        with torch.set_grad_enabled(graded):
            states = flat(module(leaves[0], hx))
        if not graded:
            return states
        sum((s * (k + 1)).sin().sum() for k, s in enumerate(states)).backward()  # type: ignore[union-attr]
        gradients = [leaf.grad for leaf in leaves[: 1 + len(start) * given]]
        return [*states, *(g for g in (*gradients, *(p.grad for p in module.parameters())) if g is not None)]

    for graded in (True, False):
        for own, other in zip(settled(lambda g=graded: run(ours, g)), run(theirs, graded), strict=True):  # type: ignore[misc]
            assert relative_rms(own, other) <= 1e-12


@every_cell
@pytest.mark.parametrize("wanted", ["x", "h0", "weights", "one weight", "x and h0"])
def test_some_gradients(cell: str, wanted: str) -> None:
    ours, theirs = twins(cell)
    x, h = torch.randn(5, 3, 3, dtype=torch.float64), torch.randn(1, 3, 7, dtype=torch.float64)
    hx = (h, h) if TORCH_CELLS[cell].has_c else h
    for module in (ours, theirs):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(wanted == "weights" or (wanted == "one weight" and name == "weight_hh_l0"))

    def run(module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        leaf, state = x.clone().requires_grad_("x" in wanted), h.clone().requires_grad_("h0" in wanted)
        y, _ = module(leaf, (state, h) if isinstance(hx, tuple) else state)
        y.sum().backward()
        return [t.grad for t in (leaf, state, *module.parameters()) if t.grad is not None]

    mine, other = settled(lambda: run(ours)), run(theirs)
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other, strict=True):
        assert relative_rms(a, b) <= 1e-12


def twins(cell: str = "lstm", inputs: int = 3, hidden: int = 7, **options: Any) -> tuple[Any, Any]:
    """rnnkern's layer and torch.nn's, with the same weights."""
    options = {"dtype": torch.float64, **nonlinearity(cell), **options}
    theirs = layer_class(nn, cell)(inputs, hidden, **options)
    ours = layer_class(rnnkern, cell)(inputs, hidden, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("graded", [False, True])
def test_wrong_calls_still_raise(graded: bool) -> None:
    ours, _ = twins()
    x, h = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(1, 2, 7, dtype=torch.float64)
    bad: list[tuple[Any, ...]] = [
        (x[..., :2],), (x.float(),), (x[:0],), ("x",), (x, 3),
        (x, (h, h[:, :1])), (x, (h,)), (x, h), (x, (h.float(), h)),
    ]  # fmt: skip
    with torch.set_grad_enabled(graded):
        settled(lambda: ours(x, (h, h)))
        for arguments in bad * 3:
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                ours(*arguments)
    assert plans() == 1


def test_weights_of_a_wrong_shape_still_raise() -> None:
    ours, _ = twins()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        settled(lambda: ours(x))
        ours.weight_hh_l0.data = ours.weight_hh_l0.data[:, :5]
        for _ in range(3):
            with pytest.raises(RuntimeError, match="weight_hh"):
                ours(x)


def dispatch_mode() -> AbstractContextManager[Any]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    return Watch()


@pytest.mark.parametrize(
    "mode", [dispatch_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("cpu")]
)
def test_modes_go_the_ordinary_way(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    ours, _ = twins(dtype=torch.float32)
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        expected = settled(lambda: ours(x))[0]
        before = len(shortcut._plans)
        with mode():
            found = ours(x)[0]
    assert len(shortcut._plans) == before
    assert relative_rms(found, expected) < 1e-2


def test_transforms_and_packed_input_go_the_ordinary_way() -> None:
    ours, theirs = twins()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    settled(lambda: ours(x))
    per_sample = torch.func.vmap(lambda row: ours(row)[0])(x.transpose(0, 1))
    assert relative_rms(per_sample.transpose(0, 1), theirs(x)[0]) <= 1e-12
    gradient = torch.func.grad(lambda v: ours(v)[0].sum())(x)
    leaf = x.clone().requires_grad_()
    theirs(leaf)[0].sum().backward()
    assert leaf.grad is not None
    assert relative_rms(gradient, leaf.grad) <= 1e-12
    packed = pack_padded_sequence(x, torch.tensor([4, 2]))
    for _ in range(3):
        assert relative_rms(ours(packed)[0].data, theirs(packed)[0].data) <= 1e-12


@every_cell
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}])
def test_second_derivatives(cell: str, options: dict[str, Any]) -> None:
    ours, _ = twins(cell, 1, 2, **options)
    x, weights = torch.randn(3, 2, 1, dtype=torch.float64, requires_grad=True), tuple(ours.parameters())
    settled(lambda: ours(x))

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return ours(x)[0]  # type: ignore[no-any-return]

    quick = len(weights) > 4  # looks at one direction only, where there are so many that it would take a minute
    assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=quick)
    assert torch.autograd.gradgradcheck(call, (x, *weights), fast_mode=quick)


@every_cell
@pytest.mark.parametrize("shape", [(2, 2), (2,)])
def test_second_derivatives_of_a_step(cell: str, shape: tuple[int, ...]) -> None:
    ours = cell_class(rnnkern, cell)(2, 3, dtype=torch.float64, **nonlinearity(cell))
    leaves = [torch.randn(*shape[:-1], n, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3)]
    count = TORCH_CELLS[cell].states

    def call(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(ours(x, (h, c) if count == 2 else h))) + (c.sum(),) * (count == 1)

    settled(lambda: call(*leaves))
    assert torch.autograd.gradcheck(call, (*leaves, *ours.parameters()))
    assert torch.autograd.gradgradcheck(call, (*leaves, *ours.parameters()))


@every_cell
def test_how_backward_is_called(cell: str) -> None:
    """Twice, with expanded or strided gradients, of the final state alone, after the final states were changed."""
    ours, theirs = twins(cell)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    settled(lambda: ours(x))

    def gradients(module: nn.Module, how: str) -> list[Tensor]:
        module.zero_grad()
        y, states = module(x)
        h = flat(states)
        if how == "final state":
            h[0].sin().sum().backward()
        elif how == "twice":
            y.sum().backward(retain_graph=True)
            y.sin().sum().backward()
        elif how == "strided":
            y.backward(
                torch.randn(4, 5, 14, dtype=torch.float64, generator=torch.manual_seed(0)).transpose(0, 1)[..., ::2]
            )
        else:
            y.sum().backward() if how == "expanded" else (h[0].mul_(2.0).sum() + y.sum()).backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    for how in ("final state", "twice", "strided", "expanded", "changed"):
        for own, other in zip(gradients(ours, how), gradients(theirs, how), strict=True):
            assert relative_rms(own, other) <= 1e-12, how


def test_a_changed_output_is_noticed() -> None:
    ours, _ = twins("gru")
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    settled(lambda: ours(x))
    y, _ = ours(x)
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("warm", range(4))
def test_checkpoint_sees_the_same_at_its_second_run(warm: int) -> None:
    """Whether or not a plan has come between, in a stack of equal layers and in a loop over a cell."""
    layers = [twins(inputs=7)[0] for _ in range(3)]
    cell = rnnkern.LSTMCell(7, 7, dtype=torch.float64)
    x = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)

    def loop(y: Tensor) -> Tensor:
        state = None
        for row in y:
            state = cell(row, state)
        assert state is not None
        last: Tensor = state[0]
        return last

    def gradient(run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Tensor:
        y: Tensor = x
        for layer in layers:
            y = run(lambda t, layer=layer: layer(t)[0], y)  # type: ignore[misc]
        return torch.autograd.grad(run(loop, y).sum(), x)[0]

    for _ in range(warm):
        layers[0](x)
    found = gradient(lambda part, t: checkpoint(part, t, use_reentrant=False))
    assert relative_rms(found, gradient(lambda part, t: part(t))) <= 1e-12


def test_dropout_is_drawn_anew() -> None:
    ours, _ = twins(num_layers=2, dropout=0.5)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    found = [ours(x)[0] for _ in range(4)]
    assert all(not torch.equal(a, b) for a, b in pairwise(found))
    assert plans() == 1
    ours.eval()
    assert torch.equal(*(settled(lambda: ours(x))[0] for _ in range(2)))


def test_modules_carry_nothing_of_it() -> None:
    """A copy, and what a module keeps: a plan belongs to a shape, not to a module."""
    ours, _ = twins()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    before = set(vars(ours))
    with torch.no_grad():
        expected = settled(lambda: ours(x))[0]
        twin = copy.deepcopy(ours)
        assert torch.equal(twin(x)[0], expected)
    assert set(vars(ours)) == before


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "MOST_PLANS", 4)
    ours, theirs = twins()
    with torch.no_grad():
        for steps in [*range(1, 9)] * 3:
            x = torch.randn(steps, 2, 3, dtype=torch.float64)
            assert relative_rms(ours(x)[0], theirs(x)[0]) <= 1e-12
            assert len(shortcut._plans) <= 4
