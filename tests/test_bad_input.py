"""What cannot be computed raises, with torch.nn's exception type where torch.nn raises, and names the argument.

The module is usable afterwards.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from rnnkern.cells import TORCH_CELLS
from tests.tables import (
    ACCIDENTS,
    KERNEL_BACKENDS,
    cell_class,
    layer_class,
    nonlinearity,
    outcome,
    relative_rms,
)

T, B, I, H = 5, 4, 3, 6  # noqa: E741
every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)


def states(cell: str, *shape: int, **kind: Any) -> Any:
    """hx of this shape, in the form that the cell takes."""
    given = [torch.zeros(shape, **kind) for _ in range(TORCH_CELLS[cell].states)]
    return tuple(given) if len(given) > 1 else given[0]


def check_refusal(found: Any, by_torch: Any, word: str) -> None:
    assert isinstance(found, Exception), "nothing was raised"
    assert word in str(found), f"{word!r} is not in {str(found)!r}"
    if isinstance(by_torch, Exception) and not isinstance(by_torch, ACCIDENTS):
        assert type(found) is type(by_torch), f"torch.nn raises {by_torch!r}, rnnkern {found!r}"


# Each gives (input, hx) for a cell, and the argument that the message must name.
BAD_CALLS: dict[str, tuple[Callable[[str], tuple[Any, Any]], str]] = {
    "rank 1": (lambda _: (torch.zeros(I), None), "input"),
    "rank 4": (lambda _: (torch.zeros(T, B, I, 1), None), "input"),
    "input size": (lambda _: (torch.zeros(T, B, I + 1), None), "input"),
    "input size, unbatched": (lambda _: (torch.zeros(T, I + 1), None), "input"),
    "dtype": (lambda _: (torch.zeros(T, B, I, dtype=torch.float64), None), "input"),
    "integers": (lambda _: (torch.zeros(T, B, I, dtype=torch.int64), None), "input"),
    "half": (lambda _: (torch.zeros(T, B, I, dtype=torch.float16), None), "input"),
    "device": (lambda _: (torch.zeros(T, B, I, device="meta"), None), "input"),
    "sparse": (lambda _: (torch.ones(T, B, I).to_sparse(), None), "input"),
    "hx a number": (lambda _: (torch.zeros(T, B, I), 3), "h"),
    "no step": (lambda _: (torch.zeros(0, B, I), None), "input"),
    "no step, unbatched": (lambda _: (torch.zeros(0, I), None), "input"),
    "no features": (lambda _: (torch.zeros(T, B, 0), None), "input"),
    "hx layers": (lambda cell: (torch.zeros(T, B, I), states(cell, 2, B, H)), "h0"),
    "hx batch": (lambda cell: (torch.zeros(T, B, I), states(cell, 1, B + 1, H)), "h0"),
    "hx batch of one": (lambda cell: (torch.zeros(T, B, I), states(cell, 1, 1, H)), "h0"),
    "hx units": (lambda cell: (torch.zeros(T, B, I), states(cell, 1, B, H + 1)), "h0"),
    "hx rank": (lambda cell: (torch.zeros(T, B, I), states(cell, B, H)), "h0"),
    "hx rank, unbatched": (lambda cell: (torch.zeros(T, I), states(cell, 1, B, H)), "h0"),
    "hx units, unbatched": (lambda cell: (torch.zeros(T, I), states(cell, 1, H + 1)), "h0"),
    "hx dtype": (lambda cell: (torch.zeros(T, B, I), states(cell, 1, B, H, dtype=torch.float64)), "h0"),
    "hx device": (lambda cell: (torch.zeros(T, B, I), states(cell, 1, B, H, device="meta")), "h0"),
    "packed, hx batch": (lambda cell: (pack(torch.zeros(T, B, I)), states(cell, 1, B + 1, H)), "h0"),
    "packed, hx units": (lambda cell: (pack(torch.zeros(T, B, I)), states(cell, 1, B, H + 1)), "h0"),
    "packed, hx layers": (lambda cell: (pack(torch.zeros(T, B, I)), states(cell, 3, B, H)), "h0"),
}


def pack(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor([T, 2, 3, 1]), enforce_sorted=False)


def check_usable(ours: Any, theirs: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    own, other = ours(x), theirs(x)
    while isinstance(own, tuple):
        own, other = own[0], other[0]
    assert relative_rms(own, other) < 1e-5


@every_cell
@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_bad_call(cell: str, name: str, backend: str) -> None:
    ours = layer_class(rnnkern, cell)(I, H, backend=backend, **nonlinearity(cell))
    theirs = layer_class(nn, cell)(I, H, **nonlinearity(cell))
    theirs.load_state_dict(ours.state_dict())
    make, word = BAD_CALLS[name]
    found, by_torch = (outcome(lambda m=module: m(*make(cell))) for module in (ours, theirs))  # type: ignore[misc]
    check_refusal(found, by_torch, word)
    check_usable(ours, theirs, (T, B, I))


# The second state of an LSTM, and hx that is no pair.
BAD_PAIRS: dict[str, tuple[Callable[[], Any], str]] = {
    "c0 units": (lambda: (torch.zeros(1, B, H), torch.zeros(1, B, H + 1)), "c0"),
    "c0 batch": (lambda: (torch.zeros(1, B, H), torch.zeros(1, 1, H)), "c0"),
    "c0 rank": (lambda: (torch.zeros(1, B, H), torch.zeros(B, H)), "c0"),
    "c0 dtype": (lambda: (torch.zeros(1, B, H), torch.zeros(1, B, H, dtype=torch.float64)), "c0"),
    "one": (lambda: (torch.zeros(1, B, H),), "hx"),
    "three": (lambda: (torch.zeros(1, B, H),) * 3, "hx"),
    "none of two": (lambda: (None, None), "h0"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pair_of_states(name: str) -> None:
    ours, theirs = rnnkern.LSTM(I, H), nn.LSTM(I, H)
    theirs.load_state_dict(ours.state_dict())
    make, word = BAD_PAIRS[name]
    x = torch.zeros(T, B, I)
    check_refusal(outcome(lambda: ours(x, make())), outcome(lambda: theirs(x, make())), word)
    check_usable(ours, theirs, (T, B, I))


def test_projected_state_has_its_own_size() -> None:
    ours, theirs = (package.LSTM(I, H, proj_size=2) for package in (rnnkern, nn))
    x, hx = torch.zeros(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H))
    check_refusal(outcome(lambda: ours(x, hx)), outcome(lambda: theirs(x, hx)), "h0")


@every_cell
def test_a_state_for_a_cell_without_c_is_no_pair(cell: str) -> None:
    if TORCH_CELLS[cell].has_c:
        return
    ours = layer_class(rnnkern, cell)(I, H)
    with pytest.raises((TypeError, RuntimeError, AttributeError), match="h0"):
        ours(torch.zeros(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H)))


@pytest.mark.parametrize("given", [None, 3, [[0.0]], "text"], ids=str)
def test_input_that_is_no_tensor(given: Any) -> None:
    with pytest.raises(TypeError, match="input"):
        rnnkern.LSTM(I, H)(given)


@every_cell
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_no_sequence(cell: str, backend: str, batch_first: bool) -> None:
    """B = 0 works, as in torch.nn, forward and backward."""
    options = {"bidirectional": True, "batch_first": batch_first, **nonlinearity(cell)}
    for lengths in (None, torch.zeros(0, dtype=torch.int64)):
        x = torch.zeros(*((0, T) if batch_first else (T, 0)), I, requires_grad=True)
        ours = layer_class(rnnkern, cell)(I, H, backend=backend, **options)
        output, h_n = ours(x, lengths=lengths)
        expected, expected_h_n = layer_class(nn, cell)(I, H, **options)(x)
        assert output.shape == expected.shape
        first, expected_first = (h[0] if isinstance(h, tuple) else h for h in (h_n, expected_h_n))
        assert first.shape == expected_first.shape
        output.sum().backward()
        assert x.grad is not None
        assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


BAD_LENGTHS: dict[str, tuple[Any, type[Exception]]] = {
    "zero": (torch.tensor([5, 0, 2, 1]), ValueError),
    "negative": (torch.tensor([5, -1, 2, 1]), ValueError),
    "over T": (torch.tensor([5, 6, 2, 1]), ValueError),
    "too few": (torch.tensor([5, 2, 1]), ValueError),
    "too many": (torch.tensor([5, 2, 1, 1, 1]), ValueError),
    "of rank 0": (torch.tensor(5), ValueError),
    "of rank 2": (torch.tensor([[5, 2, 1, 1]]), ValueError),
    "floats": (torch.tensor([5.0, 2, 1, 1]), TypeError),
    "bools": (torch.tensor([True, True, True, True]), TypeError),
    "a list": ([5, 2, 1, 1], TypeError),
    "a number": (5, TypeError),
}


@every_cell
@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_bad_lengths(cell: str, name: str) -> None:
    ours, theirs = (layer_class(package, cell)(I, H, **nonlinearity(cell)) for package in (rnnkern, nn))
    theirs.load_state_dict(ours.state_dict())
    lengths, kind = BAD_LENGTHS[name]
    with pytest.raises(kind, match=r"^lengths: "):
        ours(torch.zeros(T, B, I), lengths=lengths)
    check_usable(ours, theirs, (T, B, I))


@every_cell
def test_lengths_where_they_have_no_place(cell: str) -> None:
    module = layer_class(rnnkern, cell)(I, H)
    lengths = torch.tensor([5, 2, 3, 1])
    for x in (torch.zeros(T, I), pack(torch.zeros(T, B, I))):
        with pytest.raises(ValueError, match=r"^lengths: .*leave lengths out"):
            module(x, lengths=lengths)
    assert module(torch.zeros(T, B, I), lengths=lengths.int())[0].shape == (T, B, H)


# torch.nn.LSTM answers some of these and corrupts memory: nothing here is passed to it.
BAD_PACKED: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "width": (lambda: (torch.zeros(6, I + 1), torch.tensor([3, 2, 1])), "input"),
    "dtype": (lambda: (torch.zeros(6, I, dtype=torch.float64), torch.tensor([3, 2, 1])), "input"),
    "rank": (lambda: (torch.zeros(6, I, 1), torch.tensor([3, 2, 1])), "PackedSequence"),
    "rows missing": (lambda: (torch.zeros(5, I), torch.tensor([3, 2, 1])), "batch_sizes"),
    "rows left": (lambda: (torch.zeros(7, I), torch.tensor([3, 2, 1])), "batch_sizes"),
    "rising": (lambda: (torch.zeros(6, I), torch.tensor([3, 1, 2])), "batch_sizes"),
    "zero": (lambda: (torch.zeros(5, I), torch.tensor([3, 2, 0])), "batch_sizes"),
    "negative": (lambda: (torch.zeros(4, I), torch.tensor([3, 2, -1])), "batch_sizes"),
    "empty": (lambda: (torch.zeros(0, I), torch.tensor([], dtype=torch.int64)), "batch_sizes"),
    "int32": (lambda: (torch.zeros(6, I), torch.tensor([3, 2, 1], dtype=torch.int32)), "batch_sizes"),
    "floats": (lambda: (torch.zeros(6, I), torch.tensor([3.0, 2.0, 1.0])), "batch_sizes"),
    "matrix": (lambda: (torch.zeros(6, I), torch.tensor([[3, 2, 1]])), "batch_sizes"),
}


@every_cell
@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_packed_sequence(cell: str, name: str) -> None:
    ours, theirs = (layer_class(package, cell)(I, H, **nonlinearity(cell)) for package in (rnnkern, nn))
    theirs.load_state_dict(ours.state_dict())
    make, word = BAD_PACKED[name]
    for hx in (None, states(cell, 1, 3, H)):
        with pytest.raises((RuntimeError, ValueError), match=word):
            ours(PackedSequence(*make()), hx)
    check_usable(ours, theirs, (T, B, I))


BAD_MODULES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no hidden": ((I, 0), {}),
    "negative hidden": ((I, -1), {}),
    "hidden of float": ((I, 2.0), {}),
    "no input": ((0, H), {}),
    "input of float": ((2.0, H), {}),
    "no layer": ((I, H), {"num_layers": 0}),
    "bias": ((I, H), {"bias": 1}),
    "batch_first": ((I, H), {"batch_first": 1}),
    "dropout over 1": ((I, H), {"num_layers": 2, "dropout": 1.5}),
    "dropout under 0": ((I, H), {"num_layers": 2, "dropout": -0.5}),
    "dropout of bool": ((I, H), {"num_layers": 2, "dropout": True}),
    "proj_size under 0": ((I, H), {"proj_size": -1}),
    "proj_size of hidden": ((I, H), {"proj_size": H}),
    "proj_size": ((I, H), {"proj_size": 2}),
    "unknown argument": ((I, H), {"layers": 2}),
    "nothing": ((), {}),
    "dtype": ((I, H), {"dtype": torch.int64}),
}


@every_cell
@pytest.mark.parametrize("name", BAD_MODULES)
def test_bad_module(cell: str, name: str) -> None:
    args, kwargs = BAD_MODULES[name]
    kwargs = kwargs | nonlinearity(cell)
    found, by_torch = (outcome(lambda p=package: layer_class(p, cell)(*args, **kwargs)) for package in (rnnkern, nn))  # type: ignore[misc]
    if isinstance(by_torch, Exception):
        assert type(found) is type(by_torch), f"torch.nn raises {by_torch!r}, rnnkern {found!r}"
    else:
        assert not isinstance(found, Exception), found


@pytest.mark.parametrize("kind", ["RNN", "RNNCell"])
def test_unknown_nonlinearity(kind: str) -> None:
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu', got 'sin'"):
        getattr(rnnkern, kind)(I, H, nonlinearity="sin")


def test_dropout_without_a_layer_to_follow_warns_as_torch_does() -> None:
    for package in (rnnkern, nn):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            package.LSTM(I, H, dropout=0.5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("backend", ["torch", "", None, 3], ids=repr)
def test_unknown_backend(kind: str, backend: Any) -> None:
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'numba'"):
        getattr(rnnkern, kind)(I, H, backend=backend)


@every_cell
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_backend_that_cannot_run_raises(cell: str) -> None:
    module = layer_class(rnnkern, cell)(I, H, backend="cuda")
    with pytest.raises(RuntimeError, match="backend='cuda'"):
        module(torch.zeros(T, B, I))
    with pytest.raises(RuntimeError, match="backend='cuda'"):
        cell_class(rnnkern, cell)(I, H, backend="cuda")(torch.zeros(B, I))


BAD_STEPS: dict[str, tuple[Callable[[str], tuple[Any, Any]], str]] = {
    "rank 0": (lambda _: (torch.tensor(1.0), None), "input"),
    "rank 3": (lambda _: (torch.zeros(1, B, I), None), "input"),
    "input size": (lambda _: (torch.zeros(B, I + 1), None), "input"),
    "input size, unbatched": (lambda _: (torch.zeros(I + 1), None), "input"),
    "dtype": (lambda _: (torch.zeros(B, I, dtype=torch.float64), None), "dtype"),
    "device": (lambda _: (torch.zeros(B, I, device="meta"), None), "device"),
    "hx rank 0": (lambda cell: (torch.zeros(B, I), states(cell)), "h:"),
    "hx rank 3": (lambda cell: (torch.zeros(B, I), states(cell, 1, B, H)), "h:"),
    "hx units": (lambda cell: (torch.zeros(B, I), states(cell, B, H + 1)), "h:"),
    "hx batch": (lambda cell: (torch.zeros(B, I), states(cell, B + 1, H)), "h:"),
    "hx units, unbatched": (lambda cell: (torch.zeros(I), states(cell, H + 1)), "h:"),
    "hx dtype": (lambda cell: (torch.zeros(B, I), states(cell, B, H, dtype=torch.float64)), "h:"),
}


@every_cell
@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_step(cell: str, name: str) -> None:
    ours, theirs = (cell_class(package, cell)(I, H, **nonlinearity(cell)) for package in (rnnkern, nn))
    theirs.load_state_dict(ours.state_dict())
    make, word = BAD_STEPS[name]
    found, by_torch = (outcome(lambda m=module: m(*make(cell))) for module in (ours, theirs))  # type: ignore[misc]
    check_refusal(found, by_torch, word)
    check_usable(ours, theirs, (B, I))


def test_functional_with_weights_that_do_not_fit() -> None:
    x, w_ih, w_hh = torch.zeros(T, B, I), torch.zeros(4 * H, I), torch.zeros(4 * H, H)
    bad = {
        "weight_hh": [[w_ih, torch.zeros(4 * H, H + 1)]],
        "weight_ih": [[torch.zeros(3 * H, I), w_hh]],
        "bias_ih": [[w_ih, w_hh, torch.zeros(H), torch.zeros(4 * H)]],
        "bias_hh": [[w_ih, w_hh, torch.zeros(4 * H), torch.zeros(4 * H, dtype=torch.float64)]],
    }
    for name, weights in bad.items():
        with pytest.raises(RuntimeError, match=f"^{name}: "):
            rnnkern.functional.lstm(x, None, weights)
    with pytest.raises((RuntimeError, ValueError), match="weight"):
        rnnkern.functional.lstm(x, None, [[w_ih, w_hh]] * 3, bidirectional=True)
    with pytest.raises((RuntimeError, ValueError), match="weight"):
        rnnkern.functional.lstm(x, None, [])


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_only_an_lstm_projects(cell: str) -> None:
    rows = {"gru": 24, "rnn": 8}[cell]
    weights = [torch.randn(rows, 3), torch.randn(rows, 2), torch.randn(rows), torch.randn(rows), torch.randn(2, 8)]
    with pytest.raises(RuntimeError, match="weight_hr: only an LSTM can project"):
        getattr(rnnkern.functional, cell)(torch.randn(5, 3, 3), None, [weights])


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_complex_modules_raise(backend: str) -> None:
    module = rnnkern.GRU(3, 4, dtype=torch.complex64, backend=backend)
    with pytest.raises(RuntimeError, match=r"input: expected one of .*got torch.complex64"):
        module(torch.randn(5, 2, 3, dtype=torch.complex64))


def test_one_tensor_for_two_states() -> None:
    with pytest.raises(RuntimeError, match=r"LSTM: hx: expected a pair \(h0, c0\)"):
        rnnkern.LSTM(3, 4)(torch.randn(5, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(RuntimeError, match=r"LSTMCell: hx: expected a pair \(h0, c0\)"):
        rnnkern.LSTMCell(3, 4)(torch.randn(2, 3), torch.zeros(2, 4))


def test_lengths_under_another_default_device() -> None:
    module, x, lengths = rnnkern.GRU(3, 4), torch.randn(5, 2, 3), torch.tensor([2, 5])
    expected = module(x, lengths=lengths)[0]
    with torch.device("meta"):
        assert torch.equal(module(x, lengths=lengths)[0], expected)
