"""What the tests of the kernels on a GPU share. Each takes a `Target`: those for "cuda" are marked gpu, and some run
for "host" too, on any machine, so that the tests themselves have run before the first GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

import rnnkern
from rnnkern.backends import BACKENDS
from rnnkern.backends.cuda.sweeps import SweepBackend
from tests import host
from tests.tables import Case, Outcome, Tolerance, layer_class, nonlinearity

host.register()

TF32 = Tolerance(1e-3, 1e-3)


class Target(NamedTuple):
    """Which backend runs, on tensors of which device."""

    backend: str
    device: str

    def of(self, case: Case) -> Case:
        """The case here; one for the reference stays one."""
        backend = case.backend if case.backend == "reference" else self.backend
        return replace(case, backend=backend, device=self.device)

    def layer(self, cell: str, inputs: int, hidden: int, **options: Any) -> Any:
        """rnnkern's module here."""
        return self._layer(rnnkern, cell, inputs, hidden, backend=self.backend, **options)

    def torch_layer(self, cell: str, inputs: int, hidden: int, **options: Any) -> Any:
        """torch.nn's module here."""
        return self._layer(nn, cell, inputs, hidden, **options)

    def _layer(self, package: Any, cell: str, *sizes: int, **options: Any) -> Any:
        options |= {"device": self.device, **nonlinearity(cell)}
        return layer_class(package, cell)(*sizes, **options)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normally distributed, drawn on the CPU, so the same on every device."""
        return torch.randn(*shape, dtype=dtype).to(self.device)

    @property
    def sweeps(self) -> SweepBackend:
        """The backend itself."""
        found: SweepBackend = import_module(BACKENDS[self.backend].module).forward.__self__
        return found


CUDA = pytest.param(Target("cuda", "cuda"), marks=pytest.mark.gpu, id="cuda")
HOST = pytest.param(Target("host", "cpu"), id="host")
on_cuda = pytest.mark.parametrize("target", [CUDA])
on_both = pytest.mark.parametrize("target", [CUDA, HOST])


@contextmanager
def fp32_precision(name: str) -> Iterator[None]:
    """torch's switch for recurrent layers: ieee or tf32."""
    switch: Any = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    switch.fp32_precision = name
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def tile_of(target: Target, tile: str) -> Iterator[None]:
    """Every sweep takes that tile."""
    backend = target.sweeps
    before = backend.tile
    backend.tile = tile
    try:
        yield
    finally:
        backend.tile = before


def drop_as_on_the_cpu(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout with the mask that the CPU draws for a seed: a GPU draws others."""
    return x * dropout(torch.ones(x.shape, dtype=x.dtype), p, training).to(x.device)


def assert_same_bits(first: Outcome, second: Outcome) -> None:
    """Every result and gradient equal to the bit."""
    for ours, theirs in zip(first.parts(), second.parts(), strict=True):
        for name, tensor in theirs.items():
            own = ours[name]
            assert own is not None
            assert tensor is not None
            assert torch.equal(own, tensor), name


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers at an address that no vector load can take."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor)
    assert moved.data_ptr() % 16 != 0
    return moved.copy_(tensor.detach())


def misalign_parameters(module: nn.Module) -> None:
    """Moves every parameter of the module itself to such an address."""
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(misaligned(parameter)))
