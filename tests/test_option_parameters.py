"""Modules with options: their parameters, text and attributes, what is done to modules, and conversion."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import rnnkern
from rnnkern.options import PLAIN, Options
from tests.option_modules import H, I, assert_same, make, option_cases, random, start

SINGLE = option_cases(1)
every_kind = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
every_option = pytest.mark.parametrize("name", SINGLE)


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
    with pytest.raises(AttributeError, match="peephole: weights hang on it; make a new LSTM with peephole=True"):
        module.peephole = True
    with pytest.raises(ValueError, match="zoneout of c: expected a probability"):
        module.zoneout = (0.5, 2)
    with pytest.raises(ValueError, match="reset_after: only a GRU"):
        module.reset_after = False
    assert rnnkern.LSTM(I, H, zoneout=(0, 0)).options == PLAIN


@every_kind
def test_an_option_is_seen_after_many_plain_calls(kind: str) -> None:
    """Plain ones go by a plan by then."""
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
