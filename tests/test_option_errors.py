"""What cannot be asked for raises, names the argument, and says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from tests.option_modules import H, I
from tests.tables import outcome

T, B, L = 5, 4, 2
KINDS = ("LSTM", "GRU", "RNN")
every_kind = pytest.mark.parametrize("kind", KINDS)
PROBABILITIES = ("input_dropout", "recurrent_dropout", "weight_dropout", "zoneout")


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), True, False, None, "0.5", 1j], ids=repr)
@pytest.mark.parametrize("name", PROBABILITIES)
@every_kind
def test_no_probability(kind: str, name: str, value: Any) -> None:
    message = f"^{name}: expected a probability, a number from 0 to 1, got "
    with pytest.raises(ValueError, match=message):
        getattr(rnnkern, kind)(I, H, **{name: value})
    module = getattr(rnnkern, kind)(I, H)
    with pytest.raises(ValueError, match=message):
        setattr(module, name, value)
    function = getattr(rnnkern.functional, kind.lower())
    if value is not False:  # which is the 0 of a default
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(T, B, I), None, module.all_weights, **{name: value})
    assert module.options == rnnkern.options.PLAIN


# (kind, arguments, type and text of the error)
BAD_MODULES: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    **{
        f"{name} of {kind}": (kind, {name: value}, ValueError, f"^{name}: .* for {kind}; leave {name} out")
        for name, value, kinds in (
            ("peephole", True, ("GRU", "RNN")),
            ("reset_after", False, ("LSTM", "RNN")),
            ("recompute", True, ("RNN",)),
        )
        for kind in kinds
    },
    **{
        f"zoneout pair of {kind}": (kind, {"zoneout": (0.1, 0.2)}, ValueError, f"^zoneout: .* a number for {kind}, got")
        for kind in ("GRU", "RNN")
    },
    **{
        f"{name} of {value!r}": ("GRU", {name: value}, TypeError, f"^{name}: expected True or False, got {value!r}")
        for name in ("layer_norm", "peephole", "reset_after", "recompute")
        for value in (1, None, "yes")
    },
    "zoneout of three": ("LSTM", {"zoneout": (0.1, 0.2, 0.3)}, ValueError, "^zoneout: expected a number, or a pair"),
    "zoneout of h": ("LSTM", {"zoneout": (1.1, 0.2)}, ValueError, r"^zoneout of h: .* got 1\.1"),
    "zoneout of c": ("LSTM", {"zoneout": [0.1, True]}, ValueError, "^zoneout of c: .* got True"),
    "layer_norm and reset_after": (
        "GRU",
        {"layer_norm": True, "reset_after": False},
        ValueError,
        "^layer_norm: .* not defined with reset_after=False",
    ),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_bad_module(name: str) -> None:
    kind, arguments, error, message = BAD_MODULES[name]
    with pytest.raises(error, match=message):
        getattr(rnnkern, kind)(I, H, **arguments)


@pytest.mark.parametrize("name", [name for name in BAD_MODULES if "peephole" not in name and "after of" not in name])
def test_bad_function(name: str) -> None:
    kind, arguments, error, message = BAD_MODULES[name]
    weights = getattr(rnnkern, kind)(I, H).all_weights
    with pytest.raises(error, match=message):
        getattr(rnnkern.functional, kind.lower())(torch.zeros(T, B, I), None, weights, **arguments)


def states(kind: str, *shape: int, **how: Any) -> Any:
    h = torch.zeros(*shape, H, **how)
    return (h, h) if kind == "LSTM" else h


def no_reset(*shape: int) -> Tensor:
    return torch.zeros(shape or (T, B), dtype=torch.bool)


# {name: (arguments of a call from the kind of module, type and text of the error)}
BAD_CALLS: dict[str, tuple[Callable[[str], dict[str, Any]], Any, str]] = {
    "float reset": (
        lambda _: {"reset": torch.zeros(T, B)},
        TypeError,
        r"reset: expected dtype bool, got .*reset\.bool\(\)",
    ),
    "integer reset": (
        lambda _: {"reset": no_reset().long()},
        TypeError,
        r"reset: expected dtype bool.*reset\.bool\(\)",
    ),
    "byte reset": (lambda _: {"reset": no_reset().byte()}, TypeError, r"reset: expected dtype bool.*reset\.bool\(\)"),
    "reset of lists": (lambda _: {"reset": [[True]]}, TypeError, "reset: expected a bool tensor of shape .*got list"),
    "reset of (B, T)": (
        lambda _: {"reset": no_reset(B, T)},
        ValueError,
        r"reset: expected shape \(5, 4\).*got \(4, 5\)",
    ),
    "reset of (T,)": (lambda _: {"reset": no_reset(T)}, ValueError, r"reset: expected shape \(5, 4\).*got \(5,\)"),
    "reset of (T, 1)": (lambda _: {"reset": no_reset(T, 1)}, ValueError, "reset: expected shape"),
    "reset elsewhere": (lambda _: {"reset": no_reset().to("meta")}, RuntimeError, "reset: expected device cpu"),
    "reset_to alone": (
        lambda k: {"reset_to": states(k, L, B)},
        ValueError,
        "^reset_to: .* there is no reset; give reset too",
    ),
    **{
        f"reset_to of {shape}": (
            lambda k, shape=shape: {"reset": no_reset(), "reset_to": states(k, *shape)},  # type: ignore[misc]
            RuntimeError,
            r"reset_to h: expected one of the shapes .*\(2, 1, 5\), \(2, 4, 5\), \(5, 2, 4, 5\), got",
        )
        for shape in (
            (),
            (L,),
            (1, B),
            (L, 2),
            (B, L),
            (T, L),
            (L, B, 1),
            (T, B, L),
            (T, L, 1),
            (1, L, B),
            (1, T, L, B),
        )
    },
    "reset_to of another size": (
        lambda k: {
            "reset": no_reset(),
            "reset_to": (torch.zeros(L, B, H + 1),) * 2 if k == "LSTM" else torch.zeros(L, B, 1),
        },
        RuntimeError,
        "reset_to h: expected one of the shapes",
    ),
    "reset_to of another dtype": (
        lambda k: {"reset": no_reset(), "reset_to": states(k, L, B, dtype=torch.float64)},
        RuntimeError,
        "reset_to h: expected dtype torch.float32",
    ),
    "reset_to elsewhere": (
        lambda k: {"reset": no_reset(), "reset_to": states(k, L, B, device="meta")},
        RuntimeError,
        "reset_to h: expected device cpu",
    ),
    "one of reset_to too many": (
        lambda k: {"reset": no_reset(), "reset_to": (torch.zeros(L, B, H),) * (3 if k == "LSTM" else 2)},
        (RuntimeError, TypeError),
        "reset_to",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@every_kind
def test_bad_call(kind: str, name: str) -> None:
    module, x = getattr(rnnkern, kind)(I, H, num_layers=L, backend="reference"), torch.randn(T, B, I)
    expected = module(x)[0]
    make, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        module(x, **make(kind))
    function = getattr(rnnkern.functional, kind.lower())
    with pytest.raises(error, match=message):
        function(x, None, module.all_weights, backend="reference", return_states=True, **make(kind))
    assert torch.equal(module(x)[0], expected)


@every_kind
def test_calls_of_other_forms(kind: str) -> None:
    module, x = getattr(rnnkern, kind)(I, H, num_layers=L, batch_first=True), torch.zeros(B, T, I)
    with pytest.raises(ValueError, match=rf"{kind}: reset: expected shape \(4, 5\)"):
        module(x, reset=no_reset())
    with pytest.raises(ValueError, match=r"reset: expected shape \(5,\)"):
        module(x[0], reset=no_reset())
    with pytest.raises(RuntimeError, match=r"reset_to h: .* \(2, 5\), \(5, 2, 5\), got \(2, 1, 5\)"):
        module(x[0], reset=no_reset(T), reset_to=states(kind, L, 1))
    packed = pack_padded_sequence(x, torch.tensor([5, 2, 3, 1]), batch_first=True, enforce_sorted=False)
    with pytest.raises(ValueError, match=r"^reset: a PackedSequence .*give lengths$"):
        module(packed, reset=no_reset(B, T))
    with pytest.raises(ValueError, match=r"^reset_to: a PackedSequence .*give lengths$"):
        module(packed, reset_to=states(kind, L, 1))
    both = getattr(rnnkern, kind)(I, H, bidirectional=True)
    with pytest.raises(ValueError, match=f"{kind}: reset: a bidirectional layer"):
        both(x.transpose(0, 1), reset=no_reset())


def test_a_pair_of_reset_states() -> None:
    module, x = rnnkern.LSTM(I, H, num_layers=L, proj_size=2), torch.zeros(T, B, I)
    h, c = torch.zeros(L, B, 2), torch.zeros(L, B, H)
    module(x, reset=no_reset(), reset_to=(h, c))
    for given, message in (
        (h, r"LSTM: reset_to: expected a pair \(h, c\), got one tensor"),
        ((h,), r"LSTM: reset_to: expected a pair \(h, c\), got 1 of them"),
        ((c, c), "reset_to h: expected one of the shapes"),
        ((h, h), "reset_to c: expected one of the shapes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            module(x, reset=no_reset(), reset_to=given)
    with pytest.raises(TypeError, match="reset_to c: expected a tensor, got NoneType"):
        module(x, reset=no_reset(), reset_to=(h, None))
    with pytest.raises(TypeError, match=r"reset_to: expected a pair \(h, c\), got int"):
        module(x, reset=no_reset(), reset_to=3)


@pytest.mark.parametrize("given", [torch.zeros(2, L, 1, H), (1, 2), 3], ids=["tensor", "numbers", "number"])
def test_autocast_does_not_hide_what_states_are_not(given: Any) -> None:
    module, x = rnnkern.LSTM(I, H, num_layers=L), torch.zeros(T, B, I)
    ordinary = outcome(lambda: module(x, reset=no_reset(), reset_to=given))
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(lambda: module(x, reset=no_reset(), reset_to=given))
        of_hx = outcome(lambda: module(x, torch.zeros(2, L, B, H)))
    assert isinstance(found, (RuntimeError, TypeError))
    assert str(found) == str(ordinary)
    assert "hx: expected a pair (h0, c0)" in str(of_hx)


@every_kind
def test_lists_of_weights(kind: str) -> None:
    function, x = getattr(rnnkern.functional, kind.lower()), torch.zeros(T, B, I)
    plain = getattr(rnnkern, kind)(I, H).all_weights
    normed = getattr(rnnkern, kind)(I, H, layer_norm=True).all_weights
    options: dict[str, Any] = {"layer_norm": True}
    with pytest.raises(ValueError, match=r"weights\[0\]: .*ln_ih_weight, .* at the end"):
        function(x, None, plain, **options)
    with pytest.raises(ValueError, match=r"weights\[0\]: .*others only with peephole or layer_norm"):
        function(x, None, normed)
    swapped = [[*normed[0][:-1], normed[0][0]]]
    last = "ln_c_bias" if kind == "LSTM" else "ln_hh_bias"
    with pytest.raises(RuntimeError, match=f"^{last}: expected "):
        function(x, None, swapped, **options)
    other = [[*normed[0][:-1], normed[0][-1].double()]]
    with pytest.raises(RuntimeError, match=f"^{last}: expected dtype torch.float32"):
        function(x, None, other, **options)
    if kind == "LSTM":
        seen = rnnkern.LSTM(I, H, peephole=True).all_weights
        with pytest.raises(
            ValueError, match=r"peephole=False the one at 4 is weight_hr, expected \(P, H\), got \(15,\)"
        ):
            function(x, None, seen)
        with pytest.raises(
            ValueError, match=r"peephole=True the one at 2 is weight_hr, expected \(P, H\), got \(20,\)"
        ):
            function(x, None, plain, peephole=True)
        with pytest.raises(RuntimeError, match=r"^weight_ch: expected \(15,\)"):
            function(x, None, [[*plain[0], plain[0][2]]], peephole=True)


@pytest.mark.parametrize(
    "options", [{"zoneout": torch.tensor([0.1, 0.2])}, {"zoneout": False}, {"layer_norm": 0}], ids=str
)
def test_functions_check_what_looks_like_a_default(options: dict[str, Any]) -> None:
    weights = rnnkern.LSTM(I, H).all_weights
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(options))}: expected "):
        rnnkern.functional.lstm(torch.zeros(T, B, I), None, weights, **options)


@pytest.mark.parametrize(("function", "argument"), [("gru", "peephole"), ("rnn", "peephole"), ("rnn", "reset_after")])
def test_arguments_that_functions_lack(function: str, argument: str) -> None:
    found = outcome(lambda: getattr(rnnkern.functional, function)(torch.zeros(T, B, I), None, [[]], **{argument: True}))
    assert isinstance(found, TypeError)
