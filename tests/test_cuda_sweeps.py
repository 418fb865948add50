"""The CUDA sweeps, their sources run on the CPU (tests/host.py): every kernel, precision and cell, forward and
backward, through the backend that runs them on a GPU."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.backends.cuda import products
from rnnkern.cells import TORCH_CELLS
from rnnkern.layer import Settings, plain_operands
from tests import host
from tests.tables import TOLERANCES, Case, Outcome, Tolerance, assert_close, cases, layer_class, nonlinearity

TILES = ("small", "large")
SCHEDULES = (0, 1, 2)  # in order and late copies, shuffled and late, shuffled and early
TF32 = Tolerance(1e-3, 1e-3)

every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)
both_tiles = pytest.mark.parametrize("tile", TILES)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@pytest.fixture
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tile that every sweep takes."""
    from tests.host_backend import backend

    monkeypatch.setattr(backend, "tile", request.param)
    return str(request.param)


@pytest.fixture
def schedule(request: pytest.FixtureRequest) -> Iterator[int]:
    """The order in which threads run."""
    host.extension().set_schedule(request.param)
    yield request.param
    host.extension().set_schedule(0)


def of_host(most: int) -> dict[str, Case]:
    return {name: replace(case, backend="host") for name, case in cases(most) if case.backend == "numba"}


def check(case: Case) -> Outcome:
    found = case.run(case.module())
    assert_close(found, case.by_oracle(), case.dtype)
    return found


SINGLES, PAIRS = of_host(1), of_host(2)


@pytest.mark.usefixtures("nan_buffers", "tile", "schedule")
@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.parametrize("schedule", SCHEDULES, indirect=True)
@pytest.mark.parametrize("case", SINGLES.values(), ids=SINGLES)
def test_options_alone(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("nan_buffers", "tile")
@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.parametrize("name", sorted(PAIRS.keys() - SINGLES.keys()))
def test_options_in_pairs(name: str) -> None:
    check(PAIRS[name])


# Sizes around those of tiles (16, 32, 64 rows; 16 to 64 units) and chunks (16, 32 or 64 numbers), read by vectors (H a
# multiple of 8) or number by number, and with more steps than chunks are on their way.
SIZES = {
    "one of each": {"T": 1, "B": 1, "I": 1, "H": 1},
    "one unit": {"T": 3, "B": 2, "H": 1},
    "no sequence": {"B": 0},
    "vectors": {"T": 2, "B": 3, "H": 8},
    "a whole tile": {"T": 2, "B": 16, "H": 64},
    "more than a tile of sequences": {"T": 2, "B": 65, "H": 9},
    "more than a tile of units": {"T": 2, "B": 3, "H": 65},
    "many chunks": {"T": 2, "B": 2, "H": 200},
    "many steps": {"T": 40, "B": 2, "H": 5},
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.usefixtures("nan_buffers", "tile")
@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_cell
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes: dict[str, int], cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(cell, backend="host", dtype=dtype, bidirectional=True, hx=True, **sizes)  # type: ignore[arg-type]
    rival = None
    if dtype.itemsize == 2:
        rival = case.run(case.torch_module())  # a single unit may be off by more than the table says of many
        if cell == "rnn_relu":  # a sum on the other side of zero has the other gradient, in torch.nn too
            monkeypatch.setitem(TOLERANCES, dtype, TOLERANCES[dtype]._replace(gradient=0.1))
    assert_close(case.run(case.module()), case.by_oracle(), dtype, rival)


@pytest.mark.usefixtures("nan_buffers", "tile")
@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.parametrize("rows", ["packed", "lengths"])
@every_cell
def test_lengths_over_several_tiles(cell: str, rows: str) -> None:
    lengths = tuple(1 + (7 * b) % 6 for b in range(70))
    check(Case(cell, backend="host", T=6, B=70, H=5, rows=rows, lengths=lengths, bidirectional=True, hx=True))


@pytest.mark.usefixtures("tile", "schedule")
@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.parametrize("schedule", SCHEDULES, indirect=True)
@pytest.mark.parametrize("sizes", [{}, {"B": 20, "H": 40}, {"proj_size": 3}], ids=["odd", "tiles", "projection"])
@every_cell
def test_tf32(cell: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if "proj_size" in sizes and cell != "lstm":
        sizes = {}
    switch: Any = torch.backends.cudnn.rnn
    switch.fp32_precision = "tf32"
    case = Case(cell, backend="host", dtype=torch.float32, bidirectional=True, hx=True, **sizes)  # type: ignore[arg-type]
    exact = case.by_oracle()
    found = case.run(case.module())
    with pytest.raises(AssertionError):  # it is another precision indeed
        assert_close(found, exact, torch.float32)
    monkeypatch.setitem(TOLERANCES, torch.float32, TF32)
    assert_close(found, exact, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_cell
def test_bitwise_the_same_in_every_schedule(cell: str, dtype: torch.dtype) -> None:
    case = Case(cell, backend="host", B=20, H=33, dtype=dtype, bidirectional=True, hx=True)
    outcomes = []
    for seed in SCHEDULES:
        host.extension().set_schedule(seed)
        outcomes.append(case.run(case.module()))
    host.extension().set_schedule(0)
    for other in outcomes[1:]:
        for first, second in zip(outcomes[0].parts(), other.parts(), strict=True):
            for name, tensor in first.items():
                assert tensor is None or torch.equal(tensor, second[name]), name  # type: ignore[arg-type]


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_off_the_alignment_of_vectors(dtype: torch.dtype) -> None:
    """Sizes that could be read by vectors, at addresses that could not."""
    case = Case(backend="host", B=3, H=16, dtype=dtype, hx=True)
    module, expected = case.module(), case.by_oracle()
    for name, parameter in list(module.named_parameters()):
        storage = torch.empty(parameter.numel() + 1, dtype=dtype)[1:]
        assert storage.data_ptr() % 16 != 0
        setattr(module, name, torch.nn.Parameter(storage.view_as(parameter).copy_(parameter.detach())))
    assert_close(case.run(module), expected, dtype)


def test_states_off_the_alignment_of_vectors() -> None:
    case = Case(backend="host", B=3, H=16, dtype=torch.float32, hx=True)
    module = case.module()
    x, states = case.inputs()
    shifted = tuple(torch.empty(s.numel() + 1)[1:].view_as(s).copy_(s.detach()) for s in states)
    with torch.no_grad():
        for found, expected in zip(module(x, shifted)[1], module(x, states)[1], strict=True):
            assert torch.equal(found, expected)


@pytest.fixture
def lengths_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, lengths are not looked at."""
    from tests.host_backend import backend

    monkeypatch.setattr(backend, "in_sight", lambda lengths: False)


@pytest.mark.usefixtures("lengths_out_of_sight")
@every_cell
def test_lengths_out_of_range_on_a_device(cell: str) -> None:
    """Outputs and states of that sequence are NaN, all others as ever."""
    options: dict[str, Any] = nonlinearity(cell)
    module = layer_class(rnnkern, cell)(3, 7, bidirectional=True, dtype=torch.float64, backend="host", **options)
    x, lengths = torch.randn(5, 6, 3, dtype=torch.float64), torch.tensor([3, 0, 5, -2, 6, 1])
    good = torch.tensor([True, False, True, False, False, True])
    y, finals = module(x, lengths=lengths)
    expected, expected_finals = module(x[:, good], lengths=lengths[good])
    torch.testing.assert_close(y[:, good], expected)
    assert y[:, ~good].isnan().all()
    pairs = zip(finals, expected_finals, strict=True) if cell == "lstm" else [(finals, expected_finals)]
    for final, wanted in pairs:
        torch.testing.assert_close(final[:, good], wanted)
        assert final[:, ~good].isnan().all()


@pytest.mark.usefixtures("lengths_out_of_sight")
@every_cell
def test_gradients_with_lengths_on_a_device(cell: str) -> None:
    check(Case(cell, backend="host", rows="lengths", bidirectional=True, hx=True))


@every_cell
def test_gradients_are_asked_for_one_by_one(cell: str) -> None:
    """Each operand alone gets the gradient that it gets together with all others."""
    options: dict[str, Any] = nonlinearity(cell)
    module = layer_class(rnnkern, cell)(3, 7, dtype=torch.float64, backend="host", **options)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves: list[Tensor] = [x, *module.parameters()]

    def gradients(wanted: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x)[0].pow(2).sum(), wanted)

    together = gradients(leaves)
    for leaf, expected in zip(leaves, together, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        assert torch.equal(gradients([leaf])[0], expected)
    for leaf in leaves:
        leaf.requires_grad_()


@every_cell
def test_nothing_is_saved_without_gradients(cell: str) -> None:
    options: dict[str, Any] = nonlinearity(cell)
    module = layer_class(rnnkern, cell)(3, 7, backend="host", **options)
    with torch.no_grad():
        operands = plain_operands(torch.randn(4, 2, 3), *_zero_states(cell), tuple(module.parameters()))
        saved = torch.ops.rnnkern.layer(*Settings(cell, "host", False), *operands, False)[3:]
    assert all(part.numel() == 0 for part in saved)


def _zero_states(cell: str) -> tuple[Tensor, Tensor | None]:
    state = torch.zeros(1, 2, 7)
    return state, state if TORCH_CELLS[cell].has_c else None


def test_a_failed_launch_says_which_and_why() -> None:
    """More sequences than a grid can have."""
    extension = host.extension()
    counts = torch.tensor([2**45])
    addresses = dict.fromkeys(("lengths", "order", "h0", "h_n", "c", "unprojected"), 0)
    layouts = dict.fromkeys(("gx", "gates", "cells", "y"), (0, 0, 0, 0))
    of_directions = {name: [0] for name in ("weight_hh", "weight_hr", "bias_ih", "bias_hh")}
    arguments = {**addresses, **layouts, **of_directions}
    call = extension.Call("gru", "float32", "small", 0, 0)
    with pytest.raises(RuntimeError, match=r"forward_step \(general tier, gru, float32, small tile\) failed after 0"):
        extension.forward(call, sizes=(1, 2**45, 4, 4, 1), counts=counts.data_ptr(), **arguments)


@pytest.mark.parametrize(
    ("rnn", "cudnn", "everywhere", "allowed"),
    [
        ("ieee", "tf32", "tf32", False),
        ("tf32", "ieee", "ieee", True),
        ("none", "tf32", "ieee", True),
        ("none", "none", "tf32", True),
        ("none", "none", "none", False),
    ],
)
def test_the_nearest_of_the_switches_counts(
    rnn: str, cudnn: str, everywhere: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Switch:
        fp32_precision = everywhere

        class cudnn:
            fp32_precision = cudnn

            class rnn:
                fp32_precision = rnn

    monkeypatch.setattr(torch, "backends", Switch)
    assert products.tf32_allowed() is allowed
    assert products.precision(torch.float32) == ("tf32" if allowed else "float32")
    assert products.precision(torch.bfloat16) == "bfloat16"


def test_more_steps_than_a_grid_has_rows() -> None:
    """Over 65,535."""
    steps = 66_000
    module = rnnkern.RNN(1, 1, dtype=torch.float64, backend="host")
    x = torch.randn(steps, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        found, expected = module(x)[0], rnnkern.to_torch(copy.deepcopy(module))(x)[0]
    torch.testing.assert_close(found, expected)


def test_offsets_beyond_32_bits() -> None:
    """Rows of gx, y and c that lie more than 2^31 numbers apart, in memory of which little is ever touched."""
    apart = 2**31 + 8
    gx, y = torch.empty(apart + 1), torch.empty(apart + 1)
    gx[0], gx[apart] = 0.5, -0.25
    weight, h0, h_n = torch.full((1, 1), 2.0), torch.full((1,), 0.1), torch.zeros(1)
    host.extension().forward(
        host.extension().Call("rnn_tanh", "float32", "small", 0, 0),
        sizes=(2, 1, 1, 1, 1),
        **dict.fromkeys(("lengths", "order", "counts", "c", "unprojected"), 0),
        gx=(gx.data_ptr(), apart, 1, 1),
        y=(y.data_ptr(), apart, 1, 1),
        **dict.fromkeys(("gates", "cells"), (0, 0, 0, 0)),
        weight_hh=[weight.data_ptr()],
        **{name: [0] for name in ("weight_hr", "bias_ih", "bias_hh")},
        h0=h0.data_ptr(),
        h_n=h_n.data_ptr(),
    )
    first = torch.tanh(0.5 + 2 * h0)
    torch.testing.assert_close(y[:1], first)
    torch.testing.assert_close(y[apart:], torch.tanh(-0.25 + 2 * first))
    assert torch.equal(h_n, y[apart:])


def test_no_such_cell() -> None:
    call = host.extension().Call("ltsm", "float32", "small", 0, 0)
    names = ("lengths", "order", "counts", "h0", "h_n", "c", "unprojected")
    with pytest.raises(RuntimeError, match=r"kernel of no such cell \(general tier, ltsm"):
        host.extension().forward(
            call,
            sizes=(1, 1, 1, 1, 1),
            **dict.fromkeys(names, 0),
            **dict.fromkeys(("gx", "gates", "cells", "y"), (0, 0, 0, 0)),
            **{name: [0] for name in ("weight_hh", "weight_hr", "bias_ih", "bias_hh")},
        )
