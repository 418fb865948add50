"""rnnkern.convert, rnnkern.to_torch, and the way through to_torch to ONNX."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import rnnkern
from rnnkern.cells import TORCH_CELLS
from rnnkern.conversion import COUNTERPARTS
from tests.tables import layer_class, nonlinearity


class Model(nn.Module):
    """Every kind of recurrent module, one of them twice, within other modules."""

    def __init__(self, package: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleDict(
            {"lstm": package.LSTM(4, 5, num_layers=2, bidirectional=True, dropout=0.5, proj_size=2)}
        )
        self.stack = nn.Sequential(package.GRUCell(4, 4), nn.Tanh())
        self.gru = package.GRU(4, 4, bias=False, batch_first=True)
        self.rnn = package.RNN(4, 4, nonlinearity="relu")
        self.same = self.rnn
        self.step = package.LSTMCell(4, 4)
        self.plain = package.RNNCell(4, 4, nonlinearity="relu")

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        h, _ = self.layers["lstm"](x)
        x = self.gru(x)[0] + self.same(self.rnn(x)[0])[0] + h
        one = self.stack(x[0])
        return x.sum(0) + one + self.step(x[0])[0] + self.plain(x[1])


def classes(model: nn.Module) -> set[type[nn.Module]]:
    return {type(m) for m in model.modules()}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # of torch.nn's
def test_convert_and_back() -> None:
    model = Model(nn).eval()
    x, before = torch.randn(5, 2, 3), copy.deepcopy(model)
    parameters, generator = dict(model.named_parameters()), torch.get_rng_state()
    assert rnnkern.convert(model) is model
    assert torch.equal(torch.get_rng_state(), generator)
    assert classes(model).isdisjoint(COUNTERPARTS)
    assert set(COUNTERPARTS.values()) <= classes(model)
    assert model.same is model.rnn
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not any(m.training for m in model.modules())
    torch.testing.assert_close(model(x), before(x))
    model.to(torch.float64)
    torch.testing.assert_close(model(x.double()), before.double()(x.double()))
    rnnkern.to_torch(model)
    assert classes(model) == classes(before)
    assert repr(model) == repr(before)
    torch.testing.assert_close(model(x.double()), before(x.double()))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_a_root_becomes_a_new_module(cell: str) -> None:
    theirs = layer_class(nn, cell)(3, 4, **nonlinearity(cell))
    ours: Any = rnnkern.convert(theirs)
    assert type(ours) is layer_class(rnnkern, cell)
    assert ours.backend == "auto"
    assert repr(ours) == repr(theirs)
    back = rnnkern.to_torch(ours)
    assert type(back) is type(theirs)
    assert "backend" not in back.__dict__
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(back(x)[0], ours(x)[0])


def test_hooks_frozen_parameters_and_optimizer_go_on() -> None:
    model: Any = nn.Sequential(nn.GRU(3, 4))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].weight_hh_l0.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rnnkern.convert(model)
    before = model[0].weight_ih_l0.detach().clone()
    model(torch.randn(5, 2, 3))[0].sum().backward()
    optimizer.step()
    assert calls == ["forward"]
    assert not torch.equal(before, model[0].weight_ih_l0)
    assert model[0].weight_hh_l0.grad is None
    assert not model[0].weight_hh_l0.requires_grad


def test_convert_leaves_rnnkern_modules_alone() -> None:
    model = nn.Sequential(rnnkern.LSTM(3, 4, backend="reference"), nn.Linear(4, 4))
    inside = model[0]
    rnnkern.convert(model)
    assert model[0] is inside
    assert inside.backend == "reference"


class Foreign(nn.LSTM):
    pass


class OwnSubclass(rnnkern.LSTM):
    pass


def parametrised() -> Any:
    return parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")


def pruned() -> nn.Module:
    module = nn.RNN(3, 4)
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    return module


def weight_normed() -> Any:
    return nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # the old one, which torch deprecates
@pytest.mark.parametrize(
    ("make", "error"),
    [(lambda: Foreign(3, 4), TypeError), (parametrised, ValueError), (pruned, ValueError), (weight_normed, ValueError)],
    ids=["foreign", "parametrised", "pruned", "weight_norm"],
)
def test_what_cannot_be_converted_is_named_and_nothing_changes(make: Any, error: type[Exception]) -> None:
    model = nn.ModuleDict({"good": nn.LSTM(3, 4), "odd": make()})
    inside = dict(model.named_modules())
    with pytest.raises(error, match=r"^odd: .*Nothing was changed"):
        rnnkern.convert(model)
    assert dict(model.named_modules()) == inside


def test_to_torch_refuses_subclasses_and_parametrised() -> None:
    model = nn.ModuleDict({"good": rnnkern.GRU(3, 4), "odd": OwnSubclass(3, 4)})
    with pytest.raises(TypeError, match=r"^odd: .*Nothing was changed"):
        rnnkern.to_torch(model)
    model["odd"] = parametrizations.weight_norm(rnnkern.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"^odd: .*Nothing was changed"):
        rnnkern.to_torch(model)
    assert type(model["good"]) is rnnkern.GRU


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.onnx says that its older exporter will go
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch.nn's checks of sizes become constants
@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1:UserWarning")
def test_to_torch_then_onnx(cell: str, tmp_path: Any) -> None:
    model = layer_class(rnnkern, cell)(3, 4, num_layers=2, bidirectional=True, **nonlinearity(cell)).eval()
    x = torch.randn(5, 2, 3)
    expected = model(x)[0]
    path = tmp_path / "model.onnx"
    torch.onnx.export(rnnkern.to_torch(model), (x,), path, dynamo=False, input_names=["x"])
    (output, *_) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected.detach(), atol=1e-5, rtol=1e-5)


def test_command_line_lists_the_backends_and_warms() -> None:
    listing = subprocess.run([sys.executable, "-m", "rnnkern"], capture_output=True, text=True, check=True).stdout
    assert f"rnnkern {rnnkern.__version__}" in listing
    assert "numba" in listing
    assert "cuda       absent: " in listing
    command = [sys.executable, "-m", "rnnkern", "--warm", "--cells", "rnn_relu", "--dtypes", "float64", "--options"]
    two_threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=two_threads).stdout
    assert "rnn_relu float64: ready in" in said
    assert "rnn_relu float64 with options: ready in" in said
    (folder,) = re.findall("kept in (.*)", said)
    kept = {path.name.split("-")[0] for path in Path(folder).rglob("*.nbi")}
    kernels = {"backward.rnn_relu_backward", "optional_backward.rnn_relu_optional_backward", "kernels.add_shares"}
    assert kept >= kernels | {"team.take_shares", "choice.bools_of_words", "choice.factors_of_words"}


def test_import_does_not_load_numba() -> None:
    code = "import sys, rnnkern; assert not {'numba', 'llvmlite'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
