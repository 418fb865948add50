"""rnnkern's modules are handled as torch.nn's are: weights, copies, files, dtypes, devices; without torch's kernels."""

import copy
import io
import pickle
import warnings
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern.cells import TORCH_CELLS
from tests.tables import Case, assert_close, cell_class, layer_class, nonlinearity, relative_rms

every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)
MODULES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"num_layers": 2, "dropout": 0.25},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "no_bias": {"bias": False},
    "float64": {"dtype": torch.float64},
}
FULL = {
    cell: Case(cell, layers=2, bidirectional=True, hx=True, proj_size=3 if cell == "lstm" else 0)
    for cell in TORCH_CELLS
}


@every_cell
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_same_seed_same_weights(cell: str, name: str) -> None:
    torch.manual_seed(7)
    ours = layer_class(rnnkern, cell)(3, 6, **CONSTRUCTORS[name], **nonlinearity(cell))
    drawn = torch.rand(1)
    torch.manual_seed(7)
    theirs = layer_class(nn, cell)(3, 6, **CONSTRUCTORS[name], **nonlinearity(cell))
    assert torch.equal(drawn, torch.rand(1))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)
    assert repr(ours) == repr(theirs)


@every_cell
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.float64}], ids=str)
def test_same_seed_same_weights_of_cells(cell: str, options: dict[str, Any]) -> None:
    torch.manual_seed(7)
    ours = cell_class(rnnkern, cell)(3, 6, **options, **nonlinearity(cell))
    torch.manual_seed(7)
    theirs = cell_class(nn, cell)(3, 6, **options, **nonlinearity(cell))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))


@every_cell
def test_state_dict_both_ways(cell: str) -> None:
    case = FULL[cell]
    ours, theirs = case.module(), case.torch_module()
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p.uniform_(-0.5, 0.5)
    for to, source in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for p in source.parameters():
                p.uniform_(-0.5, 0.5)
        to.load_state_dict(source.state_dict(), strict=True)
        assert_close(case.run(ours), case.run(theirs), case.dtype)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


@every_cell
def test_kinds(cell: str) -> None:
    layer = layer_class(rnnkern, cell)(3, 6)
    assert isinstance(layer, nn.RNNBase)
    assert not isinstance(layer, layer_class(nn, cell))
    assert layer.mode == TORCH_CELLS["rnn_tanh" if cell.startswith("rnn") else cell].mode
    layer.flatten_parameters()


def test_repr_names_a_chosen_backend() -> None:
    assert repr(rnnkern.LSTM(3, 6, backend="reference")) == "LSTM(3, 6, backend='reference')"


def _pickled(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _saved_weights(module: nn.Module) -> nn.Module:
    """A state_dict through a file, into a module of other weights."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@every_cell
@pytest.mark.parametrize("way", [copy.deepcopy, _pickled, _saved, _saved_weights])
def test_copies(cell: str, way: Any) -> None:
    case = FULL[cell]
    module = case.module()
    expected = case.run(module)
    other = way(module)
    assert other is not module
    assert other.backend == module.backend
    found = case.run(other)
    assert all(torch.equal(found.results[n], expected.results[n]) for n in expected.results)
    with torch.no_grad():
        other.weight_ih_l0.zero_()
    assert torch.equal(case.run(module).results["output"], expected.results["output"])


@every_cell
def test_copies_of_cells(cell: str) -> None:
    module = cell_class(rnnkern, cell)(3, 6, backend="reference", **nonlinearity(cell))
    x = torch.randn(2, 3)
    for way in (copy.deepcopy, _pickled, _saved):
        other = way(module)
        assert other.backend == "reference"
        for own, copied in zip(torch.atleast_1d(*module(x)), torch.atleast_1d(*other(x)), strict=True):
            assert torch.equal(own, copied)


@pytest.mark.parametrize("name", MODULES)
def test_pickles_of_an_earlier_version(name: str) -> None:
    """Options that a module was pickled without have their defaults."""
    module = getattr(rnnkern, name)(3, 6)
    del module.__dict__["backend"]
    for way in (_pickled, copy.deepcopy):
        loaded = way(module)
        assert loaded.backend == "auto"
        loaded(torch.randn(2, 4, 3) if isinstance(loaded, nn.RNNBase) else torch.randn(2, 3))


@every_cell
def test_changes_of_dtype(cell: str) -> None:
    case = FULL[cell]
    expected = case.by_torch()
    single = replace(case, dtype=torch.float32)
    module = single.module()
    assert_close(single.run(module), single.by_torch(), torch.float32)
    assert_close(single.run(module.double()), single.by_torch(), torch.float32)
    double = case.module()
    assert_close(case.run(double.to(torch.float64)), expected, torch.float64)
    low = double.to(torch.bfloat16)
    assert low.weight_hh_l0.dtype == torch.bfloat16
    assert low(torch.randn(4, 2, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@every_cell
def test_meta_device(cell: str) -> None:
    """Built without memory, given some, initialised: as if built at once."""
    case = FULL[cell]
    kind = layer_class(rnnkern, cell)
    module = kind(case.I, case.H, device="meta", dtype=case.dtype, backend="numba", **case.options())
    assert module.weight_ih_l0.is_meta
    module.to_empty(device="cpu")
    torch.manual_seed(1)
    module.reset_parameters()
    assert_close(case.run(module), case.by_torch(), case.dtype)


@every_cell
def test_meta_input(cell: str) -> None:
    """Shapes without numbers."""
    module = layer_class(rnnkern, cell)(3, 6, device="meta", bidirectional=True, **nonlinearity(cell))
    output, _ = module(torch.empty(5, 2, 3, device="meta"))
    assert output.is_meta
    assert output.shape == (5, 2, 12)


@pytest.fixture
def no_vf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recurrent function of torch raises."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a recurrent function of torch was called")

    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
        monkeypatch.setattr(torch._VF, name, refuse, raising=False)
        monkeypatch.setattr(torch, name, refuse)


@every_cell
@pytest.mark.usefixtures("no_vf")
def test_no_delegation(cell: str) -> None:
    for rows in ("padded", "packed", "lengths", "unbatched"):
        for dtype in (torch.float32, torch.bfloat16):
            case = replace(FULL[cell], rows=rows, dtype=dtype, backend="auto")
            case.run(case.module())
            with torch.no_grad():
                case.call(case.module().eval(), *case.inputs())
    found = cell_class(rnnkern, cell)(3, 6, **nonlinearity(cell))(torch.randn(2, 3))
    (found[0] if isinstance(found, tuple) else found).sum().backward()
    with pytest.raises(AssertionError, match="recurrent function of torch"):
        layer_class(nn, cell)(3, 6, **nonlinearity(cell))(torch.randn(2, 2, 3))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_script_names_the_way_out(name: str) -> None:
    module = getattr(rnnkern, name)(3, 6)
    for model in (module, nn.Sequential(module)):
        with pytest.raises(RuntimeError, match=rf"rnnkern\.{name}.*to_torch"):
            torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs quantized kernels")
def test_quantize_dynamic_leaves_the_modules_alone() -> None:
    model = nn.ModuleDict({"rnn": rnnkern.LSTM(3, 6), "cell": rnnkern.GRUCell(3, 6), "head": nn.Linear(6, 2)})
    x = torch.randn(4, 2, 3)
    expected = model["rnn"](x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of several kinds, on its way
        quantized = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantized["rnn"]) is rnnkern.LSTM
    assert type(quantized["cell"]) is rnnkern.GRUCell
    assert type(quantized["head"]) is not nn.Linear
    assert torch.equal(quantized["rnn"](x)[0], expected)


@every_cell
def test_an_optimizer_sees_no_difference(cell: str) -> None:
    """Ten steps of training, packed, from the same weights: the same losses."""
    case = replace(FULL[cell], rows="packed")
    losses: list[list[float]] = []
    for module in (case.module(), case.torch_module()):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        x, states = case.inputs()
        hx = states if len(states) > 1 else states[0]
        packed = pack_padded_sequence(x.detach(), torch.tensor(case.lengths), enforce_sorted=False)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = ((module(packed, hx)[0].data - 0.3) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert relative_rms(*map(torch.tensor, losses)) < 1e-10
    assert losses[0][-1] < losses[0][0]
