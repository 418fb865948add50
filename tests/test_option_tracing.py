"""Every option under torch.compile, export, opcheck, FakeTensor, jit.trace, torch.func and checkpoint; and in
derivatives of any order."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern import stack
from rnnkern.layer import Operands, Settings
from tests.option_layers import OPTION_BACKENDS
from tests.option_modules import H, I, assert_same, flat, gradients, make, option_cases, random, start
from tests.tables import of_everything

# Dynamo instantiates every Function that it traces, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

T, B, L = 4, 3, 2
SINGLE = option_cases(1)
RESETS: dict[str, tuple[str, dict[str, Any]]] = {f"{kind}-reset": (kind, {}) for kind in ("LSTM", "GRU", "RNN")}
# As much as goes together.
DROPS = {"input_dropout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.3, "zoneout": 0.3}
OF_KIND: dict[str, dict[str, Any]] = {
    "LSTM": {"peephole": True, "recompute": True, "proj_size": 2},
    "GRU": {"recompute": True},
    "RNN": {},
}
EVERYTHING: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}-everything": (kind, {"layer_norm": True, **DROPS, **more}) for kind, more in OF_KIND.items()
}
CASES = SINGLE | RESETS | EVERYTHING
# the oracle is traced by the same operators as the others: at every run it need not be, for the time it takes
every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.slow) if b == "reference" else b for b in OPTION_BACKENDS]
)
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def sample(name: str, backend: str, dtype: Any = torch.float64, layers: int = L) -> tuple[Any, dict[str, Any]]:
    """A module and the arguments of a call, with resets where they belong to the case."""
    kind, arguments = CASES[name]
    module = make(kind, backend, dtype, num_layers=layers, **arguments)
    given: dict[str, Any] = {"input": random(T, B, I).to(dtype)}
    if name.endswith(("reset", "everything")):
        states = [s.to(dtype) for s in flat(start(kind, layers, B, units=(module.proj_size or H, H)))]
        reset = torch.tensor([[True, False, False], [False, True, True], [False] * B, [False, False, True]])
        given |= {"reset": reset, "reset_to": tuple(states) if kind == "LSTM" else states[0]}
    return module, given


def seeded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(4)
    return call(*args, **kwargs)


# one backend for every case, another for all at once: what is traced is the same
COMPILED = [
    pytest.param(
        name, training, backend,
        marks=() if backend == "numba" or (backend == "host" and name in EVERYTHING) else pytest.mark.slow,
    )
    for name, training in [*((n, True) for n in CASES), *((n, False) for n in EVERYTHING)]
    for backend in OPTION_BACKENDS
]  # fmt: skip


@pytest.mark.parametrize(("name", "training", "backend"), COMPILED)
def test_compile_without_a_graph_break(name: str, training: bool, backend: str) -> None:
    module, given = sample(name, backend)
    module.train(training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(seeded(compiled, **given), seeded(module, **given))
    leaves = [given["input"].requires_grad_(), *module.parameters()]
    found = [gradients(seeded(call, **given), leaves) for call in (compiled, module)]
    assert_same(*found)


@every_backend
@pytest.mark.parametrize("name", EVERYTHING)
def test_compile_all_states_of_a_function(name: str, backend: str) -> None:
    module, given = sample(name, backend)
    arguments = {key: value for key, value in CASES[name][1].items() if key != "proj_size"} | given
    x, function = arguments.pop("input"), getattr(rnnkern.functional, CASES[name][0].lower())

    def call(x: Tensor) -> Any:
        return function(x, None, module.all_weights, training=True, return_states=True, backend=backend, **arguments)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_(), *module.parameters()]
    assert_same(*(gradients(seeded(c, x), leaves) for c in (compiled, call)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # inductor imports what torch deprecates
@every_backend
def test_compile_by_inductor(backend: str) -> None:
    """With torch's own generator it draws the very masks."""
    module, given = sample("LSTM-everything", backend, torch.float32)
    compiled = torch.compile(module, fullgraph=True)
    leaves = list(module.parameters())
    with mock.patch.object(torch._inductor.config, "fallback_random", True):
        found = [gradients(seeded(call, **given), leaves) for call in (compiled, module)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@every_backend
@every_case
def test_export(name: str, backend: str) -> None:
    module, given = sample(name, backend)
    x = given.pop("input")
    program = torch.export.export(module.eval(), (x,), given)
    other = random(T, B, I)
    assert_same(program.module()(other, **given), module(other, **given))


def calls_of_layers(module: Any, **given: Any) -> list[tuple[Settings, Operands]]:
    """The layer calls of a module's call."""
    seen: list[tuple[Settings, Operands]] = []
    apply_layer = rnnkern.autograd.apply_layer

    def spy(settings: Settings, operands: Operands) -> Any:
        seen.append((settings, operands))
        return apply_layer(settings, operands)

    with mock.patch.object(stack, "apply_layer", spy):
        module(**given)
    return seen


@every_backend
@pytest.mark.parametrize("name", [*EVERYTHING, "GRU-reset_before", "GRU-reset"])
@pytest.mark.parametrize("how", ["training", "eval", "lengths", "states"])
def test_opcheck(name: str, how: str, backend: str) -> None:
    module, given = sample(name, backend, torch.float32, layers=1)
    module.train(how != "eval").requires_grad_(False)
    if how == "lengths":
        given["lengths"] = torch.tensor([2, T, 1])
    for settings, operands in calls_of_layers(module, **given):
        full = (*settings._replace(states=how == "states"), *operands)
        for save in (False, True):
            torch.library.opcheck(torch.ops.rnnkern.layer.default, (*full, save))
        y, h_n, c_n, gates, cells = torch.ops.rnnkern.layer(*full, True)
        has_c = operands.c0 is not None
        variable = [operands.x, operands.h0, operands.c0, operands.reset_h, operands.reset_c, *operands.weights]
        dcells = torch.randn_like(cells) if how == "states" and has_c else None
        grads = (torch.randn_like(y), torch.randn_like(h_n), torch.randn_like(c_n) if has_c else None, dcells)
        needs = [t is not None for t in variable]
        torch.library.opcheck(torch.ops.rnnkern.layer_backward.default, (*full, y, gates, cells, *grads, needs))


@every_backend
@every_case
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_and_gradgradcheck(name: str, training: bool, backend: str) -> None:
    module, given = sample(name, backend, layers=1)
    module.train(training)
    states = [] if "reset_to" not in given else [s.requires_grad_() for s in flat(given["reset_to"])]
    x, parameters = given.pop("input").requires_grad_(), dict(module.named_parameters())

    def call(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        arguments = dict(given)
        if states:
            arguments["reset_to"] = others[: len(states)] if len(states) == 2 else others[0]
        named = dict(zip(parameters, others[len(states) :], strict=True))
        return tuple(flat(seeded(functional_call, module, named, (x,), arguments)))

    inputs = (x, *states, *parameters.values())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@every_backend
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradgradcheck_of_all_states(kind: str, backend: str) -> None:
    module, x = make(kind, backend, layer_norm=True), random(T, B, I).requires_grad_()
    function = getattr(rnnkern.functional, kind.lower())

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        states = function(x, None, [weights], layer_norm=True, return_states=True, backend=backend)[2]
        return tuple(flat(states))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *module.parameters()), fast_mode=True)


@every_backend
@every_case
def test_per_sample_gradients(name: str, backend: str) -> None:
    module, given = sample(name, backend, layers=1)
    module.eval()
    parameters, xs = dict(module.named_parameters()), random(3, T, B, I)
    given.pop("input")

    def loss(parameters: Any, x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, parameters, (x,), given)[0].pow(2).sum()
        return found

    found: Any = vmap(grad(loss), (None, 0))(parameters, xs)
    for index, x in enumerate(xs):
        assert_same([found[n][index] for n in parameters], list(grad(loss)(parameters, x).values()))


@every_backend
@pytest.mark.parametrize("option", ["input_dropout", "recurrent_dropout", "weight_dropout", "zoneout"])
def test_per_sample_masks(option: str, backend: str) -> None:
    """vmap draws one mask for all samples or one for each, as it is told."""
    module = make("GRU", backend, **{option: 0.5})
    xs = random(1, T, B, I).expand(3, T, B, I)
    for randomness, alike in (("same", True), ("different", False)):
        y = vmap(lambda x: module(x)[0], randomness=randomness)(xs)
        assert torch.equal(y[0], y[1]) == alike


@every_backend
@every_case
def test_checkpoint(name: str, backend: str) -> None:
    module, given = sample(name, backend)
    x, parameters = given.pop("input").requires_grad_(), list(module.parameters())
    expected = gradients(seeded(module, x, **given), [x, *parameters])
    again = seeded(checkpoint, module, x, use_reentrant=False, **given)
    assert_same(gradients(again, [x, *parameters]), expected)


@every_backend
@every_case
def test_fake_tensors_and_meta(name: str, backend: str) -> None:
    kind, arguments = CASES[name]
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            module = make(kind, backend, num_layers=L, device="meta", **arguments)
            reset = torch.zeros(T, B, dtype=torch.bool, device="meta")
            y, _ = module(torch.randn(T, B, I, device="meta", dtype=torch.float64), reset=reset)
            assert y.is_meta
            assert y.shape == (T, B, module.proj_size or H)
            with FakeTensorMode():
                module = make(kind, backend, num_layers=L, **arguments)
                y, _ = module(random(T, B, I), lengths=torch.tensor([2, 4, 1]))
                if gradient:
                    y.sum().backward()
                    assert all(p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes of the checks become constants, as torch says
@every_backend
@pytest.mark.parametrize("name", EVERYTHING)
def test_jit_trace_and_make_fx(name: str, backend: str) -> None:
    module, _ = sample(name, backend)
    module.eval()
    x, other = random(T, B, I), random(T, B, I)
    assert_same(torch.jit.trace(module, (x,))(other), module(other))
    assert_same(make_fx(lambda v: module(v)[0])(x)(other), module(other)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_backend
@pytest.mark.parametrize("name", EVERYTHING)
def test_jit_trace_in_training(name: str, backend: str) -> None:
    """Masks are drawn anew by what was recorded, the same for a seed."""
    module, _ = sample(name, backend)
    x, other = random(T, B, I), random(T, B, I)
    traced = torch.jit.trace(module.train(), (x,), check_trace=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = traced(other)
        torch.manual_seed(5)
        assert_same(found, module(other))


@pytest.mark.parametrize("name", EVERYTHING)
def test_export_in_training_with_any_batch(name: str) -> None:
    module, _ = sample(name, "numba")
    batch = torch.export.Dim("batch", min=2, max=50)
    program = torch.export.export(module.train(), (random(T, B, I),), dynamic_shapes=({1: batch},)).module()
    for count in (3, 4, 7):
        x = random(T, count, I)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            found = program(x)
            torch.manual_seed(5)
            assert_same(found, module(x))


@every_backend
@every_case
def test_third_derivative(name: str, backend: str) -> None:
    kind, arguments = CASES[name]
    module = make(kind, backend, **arguments).eval()
    x = random(3, 1, I).requires_grad_()

    def call(x: Tensor) -> Tensor:
        first: Tensor = torch.autograd.grad(module(x)[0].pow(3).sum(), x, create_graph=True)[0]
        return first.sin()

    assert torch.autograd.gradgradcheck(call, (x,), fast_mode=True)


def test_a_module_alone_is_differentiable_in_everything() -> None:
    """`of_everything` of tests.tables sees the weights that torch.nn lacks."""
    module = make("LSTM", layer_norm=True, peephole=True).eval()
    inputs = (random(3, 2, I).requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(of_everything(module), inputs, fast_mode=True)
