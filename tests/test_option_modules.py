"""What a module can be asked for beyond torch.nn: its meaning and its masks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkern
from rnnkern import stack
from rnnkern.backends.numba_cpu.choice import choose
from rnnkern.masks import Masks, chance, draw_one, factors
from rnnkern.options import Options
from tests.option_layers import OPTION_BACKENDS
from tests.option_modules import (
    ARGUMENTS,
    H,
    I,
    assert_same,
    flat,
    gradients,
    loop,
    make,
    option_cases,
    random,
    start,
    what_is_drawn,
)

CASES = option_cases(2)
SINGLE = option_cases(1)
DROPS = ("input_dropout", "recurrent_dropout", "weight_dropout", "zoneout")
every_backend = pytest.mark.parametrize("backend", OPTION_BACKENDS)
every_kind = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
every_case = pytest.mark.parametrize("name", CASES)
every_option = pytest.mark.parametrize("name", SINGLE)


@every_backend
@every_case
@pytest.mark.parametrize("training", [True, False])
def test_against_a_loop(name: str, backend: str, training: bool) -> None:
    """Values and gradients are those of the equations, with the masks that were drawn."""
    kind, arguments = CASES[name]
    module = make(kind, backend, **arguments).train(training)
    outputs = module.proj_size or H
    x, hx = random(6, 4, I).requires_grad_(), start(kind, 1, 4, units=(outputs, H))
    leaves = [x, *(s.requires_grad_() for s in flat(hx)), *module.parameters()]
    with what_is_drawn() as drawn:
        found = module(x, hx)
    known = drawn[0] if drawn else Masks()
    assert training or known == Masks()
    own = gradients(found, leaves)
    plain, weight = copy.copy(module), module.weight_hh_l0
    if known.weights and known.weights[0] is not None:
        plain._parameters = {**module._parameters, "weight_hh_l0": weight * known.weights[0]}
    expected = loop(plain, x, hx, known)
    assert_same(found, expected)
    assert_same(own, gradients(expected, leaves))


@every_backend
def test_recurrent_dropout_is_a_loop_over_cells_with_one_mask(backend: str) -> None:
    module, cell = make("LSTM", backend, recurrent_dropout=0.5), nn.LSTMCell(I, H, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in module.state_dict().items()})
    x = random(6, 4, I)
    with what_is_drawn() as drawn:
        y, _ = module(x)
    (mask,) = drawn[0].recurrent  # type: ignore[misc]
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    h, c = x.new_zeros(4, H), x.new_zeros(4, H)
    for x_t, y_t in zip(x, y, strict=True):
        h, c = cell(x_t, (h * mask, c))
        assert_same(y_t, h)


def turned(rows: Any, d: int) -> Any:
    """The steps of a direction in its order."""
    return rows.flip(0) if d and rows is not None else rows


@every_backend
@every_kind
def test_two_layers_and_directions_are_single_ones(kind: str, backend: str) -> None:
    """Each layer and direction draws for itself; dropout between layers comes on top."""
    arguments: dict[str, Any] = {"input_dropout": 0.4, "recurrent_dropout": 0.3, "zoneout": 0.2, "layer_norm": True}
    module = make(kind, backend, num_layers=2, bidirectional=True, batch_first=True, **arguments)
    x = random(4, 6, I)
    with what_is_drawn() as drawn:
        y, _ = module(x)
    assert len(drawn) == 2
    rows = x.transpose(0, 1)
    for k in range(2):
        sides = []
        for d, suffix in enumerate(("", "_reverse")):
            one = make(kind, backend, **arguments)
            weights = {
                f"{n.rpartition('_l')[0]}_l0": w for n, w in module.named_parameters() if n.endswith(f"_l{k}{suffix}")
            }
            one._parameters = weights
            known = drawn[k]
            zone_h, zone_c = (None if m is None else m.chunk(2, -1)[d] for m in (known.zoneout_h, known.zoneout_c))
            own = Masks(known.input[d : d + 1], known.recurrent[d : d + 1], (), zone_h, zone_c)  # type: ignore[index]
            own = own._replace(zoneout_h=turned(zone_h, d), zoneout_c=turned(zone_c, d))
            zeros = torch.zeros(1, 4, H, dtype=torch.float64)
            hx = (zeros, zeros) if kind == "LSTM" else zeros
            sides.append(turned(loop(one, turned(rows, d), hx, own)[0], d))
        rows = torch.cat(sides, -1)
    assert_same(y.transpose(0, 1), rows)


@every_option
@every_backend
@pytest.mark.parametrize("lengths", [(3, 5, 1, 5), (4, 2)])
def test_packed_and_lengths_are_sequences_alone(name: str, backend: str, lengths: tuple[int, ...]) -> None:
    kind, arguments = SINGLE[name]
    module = make(kind, backend, bidirectional=True, **arguments).eval()
    x = random(5, len(lengths), I)
    padded, finals = module(x, lengths=torch.tensor(lengths))
    packed, others = module(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
    assert_same((pad_packed_sequence(packed, total_length=5)[0], others), (padded, finals))
    for b, length in enumerate(lengths):
        y, alone = module(x[:length, b])
        assert_same(padded[:length, b], y)
        assert not padded[length:, b].any()
        assert_same([s[:, b] for s in flat(finals)], flat(alone))


@every_backend
@every_kind
@pytest.mark.parametrize("rows", ["packed", "lengths"])
def test_masks_of_sequences_of_different_length(kind: str, rows: str, backend: str) -> None:
    """They go by the sequences in the order of the rows."""
    arguments: dict[str, Any] = {"input_dropout": 0.4, "recurrent_dropout": 0.4, "zoneout": 0.3}
    module, x, lengths = make(kind, backend, **arguments), random(5, 4, I), torch.tensor([3, 5, 1, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with what_is_drawn() as drawn:
        y, finals = module(packed) if rows == "packed" else module(x, lengths=lengths)
    (known,) = drawn
    starts = packed.batch_sizes.cumsum(0) - packed.batch_sizes
    for b, length in enumerate(lengths.tolist()):
        at = b if packed.unsorted_indices is None or rows == "lengths" else int(packed.unsorted_indices[b])
        own: Any = starts[:length] + at if rows == "packed" else (slice(length), b)
        assert known.input is not None
        assert known.recurrent is not None
        zone_h, zone_c = (None if m is None else m[own].unsqueeze(1) for m in (known.zoneout_h, known.zoneout_c))
        mine = Masks(known.input[:, at, None], known.recurrent[:, at, None], (), zone_h, zone_c)
        zeros = torch.zeros(1, 1, H, dtype=torch.float64)
        expected, last = loop(module, x[:length, b, None], (zeros, zeros) if kind == "LSTM" else zeros, mine)
        assert_same((y.data if rows == "packed" else y)[own], expected[:, 0])
        assert_same([s[:, b] for s in flat(finals)], [s[:, 0] for s in flat(last)])


@every_kind
def test_masks_of_a_call(kind: str) -> None:
    module = make(kind, num_layers=2, bidirectional=True, input_dropout=0.25, recurrent_dropout=0.5, zoneout=0.75)
    module.weight_dropout = 0.25
    size = 300
    with what_is_drawn() as drawn:
        module(random(4, size, I))
    for k, of_layer in enumerate(drawn):
        inputs = I if k == 0 else 2 * H
        assert of_layer.input is not None
        assert of_layer.recurrent is not None
        assert of_layer.zoneout_h is not None
        assert of_layer.input.shape == (2, size, inputs)
        assert of_layer.recurrent.shape == (2, size, H)
        assert set(of_layer.input.unique().tolist()) == {0.0, 1 / 0.75}
        assert set(of_layer.recurrent.unique().tolist()) == {0.0, 2.0}
        assert of_layer.zoneout_h.shape == (4, size, 2 * H)
        assert of_layer.zoneout_h.dtype == torch.bool
        assert (of_layer.zoneout_c is not None) == (kind == "LSTM")
        for mask, mean in ((of_layer.input, 1.0), (of_layer.recurrent, 1.0), (of_layer.zoneout_h.double(), 0.75)):
            deviation = float(mask.double().std()) / mask.numel() ** 0.5
            assert abs(float(mask.mean()) - mean) < 5 * deviation
        assert [w is not None and w.shape for w in of_layer.weights] == [module.weight_hh_l0.shape] * 2
        assert set(torch.cat(of_layer.weights).unique().tolist()) == {0.0, 1 / 0.75}  # type: ignore[arg-type]
        assert torch.cat(of_layer.weights).mean() > 0.7  # type: ignore[arg-type]
        pairs: list[Any] = [of_layer.input, of_layer.recurrent, of_layer.weights, of_layer.zoneout_h.chunk(2, -1)]
        assert not any(torch.equal(*pair) for pair in pairs)
        steps = of_layer.zoneout_h
        assert all(not torch.equal(steps[t], steps[t + 1]) for t in range(3))
    assert not torch.equal(drawn[0].recurrent, drawn[1].recurrent)  # type: ignore[arg-type]
    if kind == "LSTM":
        assert not torch.equal(drawn[0].zoneout_h, drawn[0].zoneout_c)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.999])
def test_every_element_has_the_same_chance_for_itself(p: float) -> None:
    """Also those that come from one draw; any number of them."""
    wanted = chance(p, (50000, 4))
    assert wanted is not None
    found = draw_one(wanted, torch.empty(0))
    deviation = (p * (1 - p) / 50000) ** 0.5
    assert (found.double().mean(0) - p).abs().max() < 5 * deviation
    if p in (0.3, 0.5):
        assert (found.T.double().corrcoef() - torch.eye(4)).abs().max() < 5 / 50000**0.5
    for count in range(9):
        some = draw_one(wanted._replace(shape=(count, 1)), torch.empty(0))
        assert some.shape == (count, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", [chance, factors])
@pytest.mark.parametrize("shape", [(1, 3, 5), (9, 8, 12), (7,), (0, 4), (3, 0)])
def test_masks_by_the_backend_are_those_by_torch(kind: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit, so that a plan draws what the ordinary way draws."""
    for p in (2**-16, 0.3, 1 - 2**-16, 1.0):
        wanted, like = kind(p, shape), torch.empty(0, dtype=dtype)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            expected = draw_one(wanted, like)
            torch.manual_seed(3)
            found = draw_one(wanted, like, True, choose)
        assert expected.shape == shape
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_backend
def test_one_mask_for_all_steps(backend: str) -> None:
    """A relu that copies its input, or its state, shows the mask at every step."""
    x = torch.ones(6, 40, H, dtype=torch.float64)
    module = rnnkern.RNN(H, H, bias=False, nonlinearity="relu", dtype=torch.float64, backend=backend, input_dropout=0.5)
    one, none = torch.eye(H), torch.zeros(H, H)
    module.load_state_dict({"weight_ih_l0": one, "weight_hh_l0": none})
    y, _ = module(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert all(torch.equal(y_t, y[0]) for y_t in y)
    module.input_dropout, module.recurrent_dropout = 0.0, 0.5
    module.load_state_dict({"weight_ih_l0": none, "weight_hh_l0": one})
    y, _ = module(x, x[:1])
    assert set(y[1].unique().tolist()) == {0.0, 4.0}
    assert all(torch.equal(y[t], y[0] * 2**t) for t in range(6))


@pytest.mark.parametrize("option", DROPS)
@every_kind
def test_a_seed_settles_what_is_drawn(kind: str, option: str) -> None:
    module, x = make(kind, **{"num_layers": 2, option: 0.5}), random(5, 4, I)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(module(x)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("option", DROPS)
@every_backend
@every_kind
def test_nothing_is_drawn_without_need(kind: str, backend: str, option: str) -> None:
    x = random(5, 4, I)
    module = make(kind, backend, **{option: 0.5}).eval()
    state = torch.get_rng_state()
    first = module(x)[0]
    assert torch.equal(first, module(x)[0])
    module.train()
    setattr(module, option, 0)
    plain = getattr(nn, kind)(I, H, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    state = torch.get_rng_state()
    assert_same(module(x)[0], plain(x)[0])
    assert torch.equal(torch.get_rng_state(), state)
    if option != "zoneout":
        assert_same(first, plain(x)[0])


@pytest.mark.parametrize("option", DROPS)
@every_backend
@every_kind
def test_a_probability_of_one_drops_everything(kind: str, backend: str, option: str) -> None:
    module, plain = make(kind, backend, **{option: 1}), getattr(nn, kind)(I, H, dtype=torch.float64)
    x, hx = random(5, 4, I).requires_grad_(), start(kind, 1, 4)
    y, _ = module(x, hx)
    state = {name: w.clone() for name, w in module.state_dict().items()}
    if option == "zoneout":
        expected = (hx[0] if kind == "LSTM" else hx).expand(5, 4, H)
    else:
        state["weight_ih_l0" if option == "input_dropout" else "weight_hh_l0"].zero_()
        plain.load_state_dict(state)
        expected = plain(x, hx)[0]
    assert_same(y, expected)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *module.parameters()))


@every_backend
@every_option
def test_no_sequence(name: str, backend: str) -> None:
    kind, arguments = SINGLE[name]
    module = make(kind, backend, num_layers=2, **arguments)
    for training in (True, False):
        x = random(5, 0, I).requires_grad_()
        y, h = module.train(training)(x, reset=torch.zeros(5, 0, dtype=torch.bool))
        assert y.shape == (5, 0, module.proj_size or H)
        torch.autograd.backward([y.sum(), *(s.sum() for s in flat(h))])
        assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@every_option
def test_functions_do_what_modules_do(name: str) -> None:
    kind, arguments = SINGLE[name]
    module = make(kind, num_layers=2, bidirectional=True, **arguments)
    x = random(5, 4, I)
    function = getattr(rnnkern.functional, kind.lower())
    given = {k: v for k, v in arguments.items() if k != "proj_size"}
    for training in (True, False):
        torch.manual_seed(5)
        expected = module.train(training)(x)
        torch.manual_seed(5)
        found = function(
            x, None, module.all_weights, bidirectional=True, training=training, backend="reference", **given
        )
        assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))


@every_backend
def test_examples_of_the_documentation(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rnnkern.backends.AUTO, "cpu", backend)
    text = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
    names: dict[str, Any] = {}
    for code in text.split("```python\n")[1:]:
        exec(code.partition("```")[0], names)
    assert names["first"].grad.any()
    assert names["features"].shape == (64, 16, 128)
    assert all(p.grad.any() for p in names["lstm"].parameters())


def test_every_option_has_an_argument() -> None:
    assert {k for arguments in ARGUMENTS.values() for k in arguments} - {"proj_size"} == set(Options._fields)


@pytest.mark.parametrize("name", SINGLE)
@every_backend
def test_autocast(name: str, backend: str) -> None:
    kind, arguments = SINGLE[name]
    module = make(kind, backend, torch.float32, num_layers=2, **arguments)
    x, reset = torch.randn(5, 4, I), torch.rand(5, 4) < 0.3
    hx = tuple(s.float() for s in flat(start(kind, 2, 4, units=(module.proj_size or H, H))))
    given = hx if kind == "LSTM" else hx[0]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        y, states = module(x, reset=reset, reset_to=given)
    assert {t.dtype for t in (y, *flat(states))} == {torch.bfloat16}
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    rounded = copy.deepcopy(module).bfloat16()
    torch.manual_seed(1)
    as_bfloat16 = tuple(s.bfloat16() for s in hx)
    expected = rounded(x.bfloat16(), reset=reset, reset_to=as_bfloat16 if kind == "LSTM" else as_bfloat16[0])
    assert torch.equal(y, expected[0])


def test_an_option_that_is_not_at_work_leaves_a_plain_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in evaluation and recompute without gradients go the short way, as calls without options do."""
    module = rnnkern.LSTM(3, 7, input_dropout=0.5, recurrent_dropout=0.5, weight_dropout=0.5, recompute=True).eval()
    plain = rnnkern.LSTM(3, 7)
    plain.load_state_dict(module.state_dict())
    x, whole = torch.randn(5, 4, 3), stack.ordinary
    ways: list[stack.Call] = []

    def spy(*args: Any) -> tuple[Any, ...]:
        ways.append(args[-1])
        return whole(*args)

    monkeypatch.setattr(stack, "ordinary", spy)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(module(x)[0], plain(x)[0])
    assert len(ways) == 2
    module(x)[0].sum().backward()
    assert ways[-1].options.recompute
