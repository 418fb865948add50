"""What a module can be asked for beyond torch.nn: its meaning, its masks, its parameters, its text."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkern
from rnnkern.masks import Masks
from rnnkern.options import PLAIN, Options
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


@every_kind
def test_masks_of_a_call(kind: str) -> None:
    module = make(kind, num_layers=2, bidirectional=True, input_dropout=0.25, recurrent_dropout=0.5, zoneout=0.75)
    module.weight_dropout = 0.5
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
        pairs: list[Any] = [of_layer.input, of_layer.recurrent, of_layer.weights, of_layer.zoneout_h.chunk(2, -1)]
        assert not any(torch.equal(*pair) for pair in pairs)
        steps = of_layer.zoneout_h
        assert all(not torch.equal(steps[t], steps[t + 1]) for t in range(3))
    assert not torch.equal(drawn[0].recurrent, drawn[1].recurrent)  # type: ignore[arg-type]
    if kind == "LSTM":
        assert not torch.equal(drawn[0].zoneout_h, drawn[0].zoneout_c)  # type: ignore[arg-type]


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


def expected_names(kind: str, peephole: bool, layer_norm: bool) -> list[str]:
    suffixes = ["l0", "l0_reverse", "l1", "l1_reverse"]
    own = ["weight_ch"] * peephole
    if layer_norm:
        own += ["ln_ih_weight", "ln_ih_bias", "ln_hh_weight", "ln_hh_bias"]
        own += ["ln_c_weight", "ln_c_bias"] * (kind == "LSTM")
    return [f"{name}_{suffix}" for suffix in suffixes for name in own]


@pytest.mark.parametrize(
    ("kind", "peephole", "layer_norm"),
    [("LSTM", True, False), ("LSTM", True, True), *((kind, False, True) for kind in ("LSTM", "GRU", "RNN"))],
)
def test_parameters(kind: str, peephole: bool, layer_norm: bool) -> None:
    """torch.nn's own come first and are drawn alike; the others behind."""
    given: dict[str, Any] = {"layer_norm": True} if layer_norm else {}
    given |= {"peephole": True} if peephole else {}
    torch.manual_seed(3)
    module = getattr(rnnkern, kind)(I, H, num_layers=2, bidirectional=True, **given)
    torch.manual_seed(3)
    plain = getattr(nn, kind)(I, H, num_layers=2, bidirectional=True)
    names, own = [n for n, _ in module.named_parameters()], expected_names(kind, peephole, layer_norm)
    assert names == [n for n, _ in plain.named_parameters()] + own
    assert list(module.state_dict()) == names
    assert {name for layer in module._all_weights for name in layer} == set(names) == set(module._flat_weights_names)
    assert [id(w) for w in module._flat_weights] == [id(w) for layer in module.all_weights for w in layer]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for name, p in plain.named_parameters():
        assert torch.equal(p, before[name])
    for name in own:
        if name.startswith("ln_"):
            assert (before[name] == float("_weight_" in name)).all()
        else:
            assert before[name].shape == (3 * H,)
            assert 0 < before[name].abs().max() <= H**-0.5
    torch.manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7)
    module.reset_parameters()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_layer_norm_takes_nothing_from_the_generator() -> None:
    states = []
    for layer_norm in (False, True):
        torch.manual_seed(3)
        rnnkern.GRU(I, H, layer_norm=layer_norm)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_what_is_done_to_modules() -> None:
    """state_dict, pickle, deepcopy, .to, functional_call and parametrisation reach the weights that torch.nn lacks."""
    module = make("LSTM", layer_norm=True, peephole=True, num_layers=2, zoneout=(0.1, 0.2)).eval()
    x = random(5, 4, I)
    expected = module(x)[0]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = make("LSTM", layer_norm=True, peephole=True, num_layers=2, zoneout=(0.1, 0.2)).eval()
    loaded.load_state_dict(torch.load(file))
    for other in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.options == module.options
        assert torch.equal(other(x)[0], expected)
    assert module.to(torch.float32)(x.float())[0].dtype == torch.float32
    module.to(torch.float64)
    doubled = {name: p * 2 for name, p in module.named_parameters() if name.startswith(("weight_ch", "ln_c"))}
    called = torch.func.functional_call(module, doubled, (x,))[0]
    with torch.no_grad():
        for name, p in doubled.items():
            getattr(module, name).copy_(p)
    assert torch.equal(called, module(x)[0])
    assert not torch.equal(called, expected)
    parametrizations.weight_norm(module, "ln_ih_weight_l0")
    assert_same(module(x)[0], called)
    module(x)[0].sum().backward()
    module.reset_parameters()


def test_a_module_from_before_there_were_options() -> None:
    module = rnnkern.GRU(I, H)
    state = module.__getstate__()
    del state["options"]
    old = rnnkern.GRU.__new__(rnnkern.GRU)
    old.__setstate__(state)
    assert old.options == PLAIN
    x = torch.randn(5, 4, I)
    assert torch.equal(old(x)[0], module(x)[0])


@every_option
def test_text_can_be_read_back(name: str) -> None:
    kind, arguments = SINGLE[name]
    module = make(kind, batch_first=True, **arguments)
    again = eval(f"rnnkern.{module!r}")
    assert again.options == module.options
    assert repr(again) == repr(module)
    option = next(iter(arguments))
    assert f"{option}=" in repr(module)
    assert f"{option}=" not in repr(getattr(rnnkern, kind)(I, H))


def test_options_as_attributes() -> None:
    module = rnnkern.LSTM(I, H, zoneout=(0.1, 0.3), layer_norm=True)
    assert module.zoneout == (0.1, 0.3)
    assert (module.layer_norm, module.peephole, module.reset_after, module.recompute) == (True, False, True, False)
    module.zoneout, module.recurrent_dropout, module.recompute = 0.5, 1, True
    assert module.options == Options(zoneout=0.5, recurrent_dropout=1.0, layer_norm=True, recompute=True)
    module.layer_norm = True
    with pytest.raises(AttributeError, match="peephole: weights hang on it; make a new LSTM with True"):
        module.peephole = True
    with pytest.raises(ValueError, match="zoneout of c: expected a probability"):
        module.zoneout = (0.5, 2)
    with pytest.raises(ValueError, match="reset_after: only a GRU"):
        module.reset_after = False
    assert rnnkern.LSTM(I, H, zoneout=(0, 0)).options == PLAIN


@every_kind
def test_no_option_goes_the_short_way(kind: str) -> None:
    """And a call with one never does, also after many without."""
    module, x = make(kind, "numba"), random(5, 4, I)
    hx = start(kind, 1, 4)
    for _ in range(4):
        module(x, hx)
    reset = torch.ones(5, 4, dtype=torch.bool)
    first = module(x[:1], None)[0]
    module.backend = "reference"
    assert_same(module(x, hx, reset=reset)[0][0], first[0])
    assert rnnkern.shortcut._plans
    module.zoneout = 1.0
    assert_same(module(x, hx)[0][4], hx[0][0] if kind == "LSTM" else hx[0])
    with pytest.raises(ValueError, match="reset_to"):
        module(x, hx, reset_to=hx)


def test_convert_gives_defaults_and_to_torch_refuses_options() -> None:
    model: Any = nn.Sequential(nn.GRU(I, H), nn.LSTM(H, H))
    rnnkern.convert(model)
    assert [m.options for m in model] == [PLAIN, PLAIN]
    model[1].zoneout = (0.1, 0.0)
    model[1].recompute = True
    before = list(model)
    with pytest.raises(ValueError, match=r"^1: torch.nn.LSTM has no zoneout, recompute; .*Nothing was changed"):
        rnnkern.to_torch(model)
    assert list(model) == before
    model[1].zoneout, model[1].recompute = 0, False
    assert type(rnnkern.to_torch(model)[1]) is nn.LSTM  # type: ignore[index]
    assert "options" not in model[1].__dict__
    with pytest.raises(ValueError, match=r"the model itself: torch\.nn\.GRU has no layer_norm"):
        rnnkern.to_torch(rnnkern.GRU(I, H, layer_norm=True))


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
