"""The contract of a backend, and the registry of those that this installation has.

A backend computes the recurrence of one layer, both directions in one call, forward and backward. It does not know
autograd, autocast or the order of a user's dimensions: `rnnkern/layer.py` brings every call into the form of `Layer`,
and turns `Gradients` into the gradients of input and weights by matrix products that all backends share.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rnnkern.cells import CellSpec, Weights


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a layer of `dtype` is computed and its activations are saved in: operands are converted to it,
    results back."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_rows(x: Tensor, shape: tuple[int, ...], batch_major: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Empty rows of `shape`, one for each of x: (T, B, *shape), in memory (B, T, ...) if asked or (N, *shape)."""
    if not batch_major:
        return x.new_empty(*x.shape[:-1], *shape, dtype=dtype)
    steps, batch = x.shape[:2]
    row = math.prod(shape)  # strided, not transposed: autograd refuses to change a Function's view in place
    inner = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return x.new_empty_strided((steps, batch, *shape), (row, steps * row, *inner), dtype=dtype)


@dataclass(frozen=True)
class Layer:
    """One layer's call. T steps, B sequences, I inputs, H units, P outputs a direction (H, or proj_size), D
    directions."""

    cell: CellSpec
    x: Tensor  # (T, B, I) of any strides; or, with batch_sizes, packed rows (N, I)
    h0: Tensor  # (D, B, P)
    c0: Tensor | None  # (D, B, H) where the cell has it
    weights: tuple[Weights, ...]  # one for each direction
    batch_sizes: (
        Tensor | None
    )  # (T,) int64 on the CPU, falling: how many rows each step has; the longest sequence is row 0
    batch_major: bool  # (T, B, ...) results are laid out in memory as (B, T, ...), as the input is

    @property
    def hidden(self) -> int:
        return self.weights[0].weight_hh.shape[0] // len(self.cell.gates)

    @property
    def outputs(self) -> int:
        return self.weights[0].weight_hh.shape[1]

    def rows(self, *shape: int) -> Tensor:
        """An uninitialised buffer with a row of `shape` for each step and sequence: (T, B, *shape), or (N, *shape) when
        packed."""
        return empty_rows(self.x, shape, self.batch_major and self.batch_sizes is None)


class Saved(NamedTuple):
    """What a backward sweep reads of the forward one. Not the final states: callers may change those in place."""

    y: Tensor  # (T, B, D*P) or (N, D*P)
    gates: Tensor | None  # (T, B, D, saved*H) or (N, D, saved*H), activated
    cells: Tensor | None  # (T, B, D, H) or (N, D, H)


class States(NamedTuple):
    """What a forward sweep gives; gates and cells are None in inference and for cells that save nothing."""

    y: Tensor  # (T, B, D*P) or (N, D*P)
    h_n: Tensor  # (D, B, P): the state after each sequence's own last step
    c_n: Tensor | None  # (D, B, H)
    gates: Tensor | None
    cells: Tensor | None

    @property
    def saved(self) -> Saved:
        """What backward needs of these."""
        return Saved(self.y, self.gates, self.cells)


class Gradients(NamedTuple):
    """What a backward sweep gives, rows as in the input."""

    dgx: Tensor  # (..., D, G*H): of the input pre-activation W_ih x + b_ih
    dgh: Tensor  # (..., D, G*H): of the recurrent pre-activation W_hh h + b_hh; dgx itself where it is the same
    dp: Tensor | None  # (..., D, P): of the projected state, with proj_size
    dh0: Tensor  # (D, B, P)
    dc0: Tensor | None  # (D, B, H)


class Backend(Protocol):
    """The functions that each backend module has."""

    def forward(self, layer: Layer, save: bool) -> States:
        """Runs the sweep; `save` keeps what backward needs."""

    def backward(
        self, layer: Layer, saved: Saved, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None
    ) -> Gradients:
        """Runs the sweep back from the gradients of the results (None: zero)."""


class Entry(NamedTuple):
    """A backend by name: the module, loaded at its first use, and why it cannot be used here (None: it can)."""

    module: str
    version: Callable[[], str]
    obstacle: Callable[[], str | None]
    devices: tuple[str, ...] | None  # None: every device


def _numba_version() -> str:
    import numba

    return f"numba {numba.__version__}"


@cache
def _numba_obstacle() -> str | None:
    try:
        import numba
    except ImportError as error:
        return f"numba cannot be imported: {error}"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set, and the kernels exist only compiled"
    return None


BACKENDS: dict[str, Entry] = {
    "numba": Entry("rnnkern.backends.numba_cpu", _numba_version, _numba_obstacle, ("cpu",)),
    "cuda": Entry(
        "rnnkern.backends.cuda", lambda: "none", lambda: "this version of rnnkern has no CUDA kernels yet", ("cuda",)
    ),
    "reference": Entry("rnnkern.backends.reference", lambda: f"torch {torch.__version__}", lambda: None, None),
}

# What "auto" takes on each device type, and the fallback elsewhere.
AUTO = {"cpu": "numba", "cuda": "cuda"}
FALLBACK = "reference"


def obstacle(name: str, device: torch.device) -> str | None:
    """Why the backend cannot run a layer on `device`, or None."""
    entry = BACKENDS[name]
    if entry.devices is not None and device.type not in entry.devices:
        return f"it runs on {' and '.join(entry.devices)}, not on {device.type}"
    return entry.obstacle()


@cache
def _warn_fallback(device_type: str, reason: str) -> None:
    import warnings

    warnings.warn(
        f"rnnkern: backend='auto' takes the slow '{FALLBACK}' backend on {device_type}: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _load(name: str) -> Backend:
    module: Backend = import_module(BACKENDS[name].module)
    return module


def select(name: str, device: torch.device) -> Backend:
    """The backend called `name` for tensors on `device`: it, or an error; "auto" says once where it must take a slower
    way."""
    if name == "auto":
        name = AUTO.get(device.type, FALLBACK)
        reason = obstacle(name, device)
        if reason is not None or device.type not in AUTO:
            _warn_fallback(device.type, reason or "no faster backend runs there")
            name = FALLBACK
    reason = obstacle(name, device)
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} cannot run this layer: {reason}; "
            "use backend='auto' or one that `python -m rnnkern` lists"
        )
    return _load(name)
