"""What rnnkern's modules add to torch.nn's base classes. Weights are read by attribute at each call, so that
parametrisations, weight tying and torch.func.functional_call are seen."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from rnnkern import checks
from rnnkern.backends import backend_names

NO_SCRIPT = (
    "torch.jit.script cannot compile rnnkern.{}; script the model with torch.nn's own modules, "
    "rnnkern.to_torch(model), or use torch.compile or torch.export"
)


def attributes(module: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The weights of these names, by the quickest way there is."""
    parameters: dict[str, Any] = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:  # a parametrised or pruned weight is an attribute, not a parameter
        return [getattr(module, name) for name in names]


class Shared(torch.nn.Module):
    """What the layers and the cells add to torch.nn's base classes."""

    backend: str

    def _set_backend(self, backend: str) -> None:
        checks.backend_name(backend, backend_names())
        self.backend = backend

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("backend", "auto")

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(NO_SCRIPT.format(type(self).__name__))
