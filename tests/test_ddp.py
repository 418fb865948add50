"""Two processes of DistributedDataParallel, each with half of the batch, have the gradients of one with all of it, and
train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

import rnnkern
from rnnkern.cells import TORCH_CELLS
from tests import ddp_run
from tests.tables import layer_class, nonlinearity, relative_rms

PROCESSES = 2
SIZES = {"T": 6, "B": 4, "I": 3, "H": 9}


def build() -> nn.ModuleDict:
    """A bidirectional layer of every cell, the same in each process."""
    torch.manual_seed(1)
    I, H = SIZES["I"], SIZES["H"]  # noqa: E741
    options: dict[str, Any] = {"bidirectional": True, "dtype": torch.float64}
    return nn.ModuleDict(
        {cell: layer_class(rnnkern, cell)(I, H, **options, **nonlinearity(cell)) for cell in TORCH_CELLS}
    )


class Sum(nn.Module):
    """The mean square of all that the layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(layer(x)[0] ** 2).mean() for layer in self.layers.values()]).sum()


def inputs() -> torch.Tensor:
    T, B, I, _ = SIZES.values()  # noqa: E741
    return torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int, folder: str) -> None:
    """One process: gradients over its share of the batch, left in a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    model = nn.parallel.DistributedDataParallel(Sum())
    model(inputs().chunk(PROCESSES, 1)[rank]).backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    del model  # where it is the last to hold the group, torch frees that with the GIL held, and may wait for ever
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spawn(work, (str(tmp_path),), nprocs=PROCESSES)
    alone = Sum()
    alone(inputs()).backward()
    expected = gradients(alone)
    assert expected.keys() == dict(alone.named_parameters()).keys()
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_rms(found[name], gradient) < 1e-12, name


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_lightning_trains_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """An entry of the examples' catalogue, with the same batches over all: the same losses and measures."""
    command = [sys.executable, "-m", "tests.ddp_run", str(tmp_path / "two"), str(PROCESSES)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parent.parent
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("test accuracy") == 1
    ddp_run.run(tmp_path / "one", 1)
    one, two = (json.loads((tmp_path / n / "mnist-lstm" / "result.json").read_text()) for n in ("one", "two"))
    for alone, together in zip(one["history"], two["history"], strict=True):
        assert alone["train_loss"] == pytest.approx(together["train_loss"], rel=1e-4)
    assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-4)
    tested = [sum(map(sum, result["confusion"])) for result in (one, two)]
    assert tested in ([360, 360], [10_000, 10_000])  # all of the digits', or of MNIST's
