"""The contract of a backend, and the registry of those that this installation has.

A backend computes one layer, both directions in one call, forward and backward. It does not know autograd, autocast or
the order of a user's dimensions: `rnnkern/layer.py` brings every call into the form of `Layer`.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rnnkern import forks  # noqa: F401, from now on forks are noted
from rnnkern.backends.cuda import extension
from rnnkern.cells import CellSpec, Weights

if TYPE_CHECKING:
    from rnnkern.shortcut import Form, Plan


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a layer of `dtype` is computed in, and its activations are saved in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_rows(x: Tensor, shape: tuple[int, ...], batch_major: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Empty rows of `shape`, one for each of x: (T, B, *shape), in memory (B, T, ...) if asked or (N, *shape)."""
    if not batch_major:
        return x.new_empty(*x.shape[:-1], *shape, dtype=dtype)
    steps, batch = x.shape[:2]
    row = math.prod(shape)  # strided, not transposed: autograd refuses to change a Function's view in place
    inner = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return x.new_empty_strided((steps, batch, *shape), (row, steps * row, *inner), dtype=dtype)


def is_readable(tensor: Tensor) -> bool:
    """Whether kernels can read the tensor as it is: the numbers of a row adjacent, none of them to be negated. A tensor
    without numbers can be read with any strides: `contiguous` leaves them as they are."""
    return not tensor.is_neg() and (tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 or tensor.numel() == 0)


def readable(tensor: Tensor) -> Tensor:
    """The tensor as kernels can read it."""
    return tensor if is_readable(tensor) else tensor.resolve_neg().contiguous()


class Extras(NamedTuple):
    """What a layer call asks for beyond the plain cell; each as it is here where nobody asks. Masks and resets go by
    the sequences of x, in the order of its rows."""

    input_mask: Tensor | None = None  # (D, B, I): factors of x, the same at every step
    recurrent_mask: Tensor | None = None  # (D, B, P): factors of h where it meets W_hh
    zoneout_mask_h: Tensor | None = None  # bool, (T, B, D*P) or packed (N, D*P): where h keeps its old value
    zoneout_mask_c: Tensor | None = None  # bool, (T, B, D*H) or (N, D*H): where c does
    # bool, (T, B), of one direction: where the states are replaced before the step, by zeros or by
    reset: Tensor | None = None
    reset_h: Tensor | None = None  # (B, P), or one for each step (T, B, P)
    reset_c: Tensor | None = None  # (B, H), or (T, B, H)
    zoneout_h: float = 0.0  # where there is no mask: the share of the old value in the new one
    zoneout_c: float = 0.0
    recompute: bool = False  # activations are not saved; backward computes them anew
    states: bool = False  # c of every step is a result: `cells` in the rows of y, saved or not

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its first fields."""
        return self[:7]

    @property
    def zones(self) -> bool:
        """Whether h is under zoneout."""
        return self.zoneout_mask_h is not None or self.zoneout_h != 0

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return any(t is not None for t in self.tensors()) or any(self[7:])


class Layer(NamedTuple):
    """One layer's call. T steps, B sequences, I inputs, H units, P outputs a direction (H, or proj_size), D directions,
    N real steps of all sequences."""

    cell: CellSpec
    x: Tensor  # (T, B, I) of any strides; or packed rows (N, I)
    h0: Tensor  # (D, B, P)
    c0: Tensor | None  # (D, B, H) where the cell has it
    weights: tuple[Weights, ...]  # one for each direction
    # (T,) int64 on the CPU, falling: how many sequences have each step, where not all have all; x is packed, the
    # longest sequence first, or padded where `order` is given
    batch_sizes: Tensor | None
    order: Tensor | None  # (B,) int64 on the CPU: the sequences of a padded call, longest first
    batch_major: bool  # (T, B, ...) results are laid out in memory as (B, T, ...), as the input is
    # (B,) int64, unchecked: of a padded call, in the place of batch_sizes and order (see `Backend.as_given`)
    lengths: Tensor | None = None
    extras: Extras = Extras()

    @property
    def plain(self) -> bool:
        """Whether the cell's equations are all there is: torch.nn's, but for the cells that it lacks."""
        weights = self.weights[0]
        return not self.extras and weights.weight_ch is None and weights.ln_ih_weight is None and self.cell.in_torch

    @property
    def kept(self) -> int:
        """How many blocks of H a forward step keeps for backward, beside y and c."""
        if self.extras.recompute:
            return 0
        return self.cell.kept(self.extras.zones, self.weights[0].ln_ih_weight is not None)

    @property
    def hidden(self) -> int:
        return self.weights[0].weight_hh.shape[0] // len(self.cell.gates)

    @property
    def outputs(self) -> int:
        return self.weights[0].weight_hh.shape[1]

    @property
    def batch_major_rows(self) -> bool:
        """Whether `rows` lays buffers out as (B, T, ...)."""
        return self.batch_major and self.batch_sizes is None and self.lengths is None

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer with a row of `shape` for each row of x: (T, B, *shape), or (N, *shape) when packed. Uninitialised,
        but zero where only the device knows the lengths; with `order`, a sweep clears the rows behind a sequence."""
        if self.lengths is not None:
            return self.x.new_zeros(*self.x.shape[:2], *shape, dtype=dtype)
        return empty_rows(self.x, shape, self.batch_major_rows, dtype)

    def saved_rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer with a row of `shape` for each step that may be real: (T, B, *shape), or (N, *shape) where sequences
        differ in length, N = T*B where only the device knows how much, and then zero. Else uninitialised."""
        if self.lengths is not None:  # operators give these rows away: they must not differ from run to run
            return self.x.new_zeros(self.x.shape[0] * self.x.shape[1], *shape, dtype=dtype)
        if self.order is not None and self.batch_sizes is not None:
            return self.x.new_empty(int(self.batch_sizes.sum()), *shape, dtype=dtype)
        return self.rows(*shape, dtype=dtype)

    def cell_rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer for c of every step: saved rows, or rows like those of y where it is a result."""
        rows = self.rows if self.extras.states else self.saved_rows
        return rows(len(self.weights), self.hidden, dtype=dtype)


class Needs(NamedTuple):
    """Which gradients a backward sweep is asked for."""

    x: bool
    h0: bool
    c0: bool
    reset_h: bool
    reset_c: bool
    weights: tuple[Weights, ...]  # for each direction a truth value in the place of each weight


class Saved(NamedTuple):
    """What a backward sweep reads of the forward one. Not the final states: callers may change those in place."""

    y: Tensor  # (T, B, D*P), or packed (N, D*P)
    gates: Tensor | None  # (T, B, D, kept*H), or where lengths differ (N, D, kept*H), activated (`Layer.kept`)
    cells: Tensor | None  # (T, B, D, H) or (N, D, H), as `Layer.cell_rows` lays them out


class Cotangents(NamedTuple):
    """The gradients of what a layer gives; None for zero."""

    y: Tensor | None  # (T, B, D*P) or (N, D*P)
    h_n: Tensor | None  # (D, B, P)
    c_n: Tensor | None = None  # (D, B, H)
    cells: Tensor | None = None  # (T, B, D, H) or (N, D, H), where they are a result (`Extras.states`)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Cotangents":
        """The same, each that is there put through `change`."""
        return Cotangents(*(None if g is None else change(g) for g in self))


class States(NamedTuple):
    """What a forward sweep gives. Gates and cells are None in inference, but for cells that are a result, and where
    nothing of the kind is kept."""

    y: Tensor  # (T, B, D*P) or (N, D*P)
    h_n: Tensor  # (D, B, P): the state after each sequence's own last step
    c_n: Tensor | None  # (D, B, H)
    gates: Tensor | None
    cells: Tensor | None

    @property
    def saved(self) -> Saved:
        """What backward needs of these."""
        return Saved(self.y, self.gates, self.cells)


class Given(NamedTuple):
    """The tensors of one layer's call as the caller has them: x, states and gradients of any of them in the caller's
    shapes (`Form.rows` and `Form.state` make those of a `Layer` of them), extras in a layer's."""

    x: Any
    states: Sequence[Any]  # none where they are zero
    weights: Sequence[Any]
    extras: Extras = Extras()

    def flat(self) -> tuple[Any, ...]:
        """Those that there are, in this order."""
        return self.x, *self.states, *self.weights, *(t for t in self.extras.tensors() if t is not None)


class LayerPlan(Protocol):
    """One layer as a caller knows it, laid out ahead. `tensors` are what `Given.flat` gives."""

    form: "Form"
    y_shape: tuple[int, ...]
    h_shape: tuple[int, ...]
    c_shape: tuple[int, ...]
    # The caller's notes of what tensors kept for backward look like.
    looks: list[object] | None
    guard: Callable[..., bool] | None

    def split(self, tensors: Sequence[Any]) -> Given:
        """`Given.flat` undone, of the tensors or of something for each of them."""

    def forward(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(y, h_n, c_n), with `Extras.states` also cells, of a step (h, c); and what backward needs beside the
        tensors."""

    def backward(
        self, tensors: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of `tensors` that are needed, from those of what `forward` gave."""

    def native(self, again: Callable[..., list[Tensor | None]]) -> Callable[..., tuple[Tensor, ...]] | None:
        """`forward` without what backward needs, and with gradients, as one function in C++, where it can be had. Those
        that `backward` is not for `again` finds: (tensors, saved, grads, needs) -> gradients."""

    def kept(self, saved: Sequence[Tensor], otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, gates and cells of what `forward` kept; `otherwise` for one that backward does not read."""

    def of_results(self, grads: Sequence[Tensor | None]) -> Cotangents:
        """The gradients of what `forward` gave by name, in their shapes."""


class Backend(Protocol):
    """What each backend module has."""

    # Whether it takes operands in the call's own dtype, and lengths where they are. Others get compute_dtype, and
    # lengths checked, sorted and counted on the CPU.
    as_given: bool

    def forward(self, layer: Layer, save: bool) -> States:
        """Runs the layer; `save` keeps what backward needs."""

    def backward(self, layer: Layer, saved: Saved, grads: Cotangents, needs: Needs) -> list[Tensor | None]:
        """The gradients of x, h0, c0, reset_h, reset_c and of all `Weights` of each direction in turn, None where
        nobody asks."""

    def choose(self, draws: Tensor, shape: tuple[int, ...], last: int, scale: float | None, like: Tensor) -> Tensor:
        """Masks from random words: rnnkern.masks.choose, whose results are these bit for bit."""

    def inference_plan(
        self, form: "Form", x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> "Plan | None":
        """What runs calls without gradients that look like this one, checked before, in every way (shortcut.py); None
        where the backend has nothing quicker than `forward`."""

    def layer_plan(self, form: "Form", given: Given, graded: bool) -> "LayerPlan | None":
        """The same for one layer, with options or gradients or both."""


class Entry(NamedTuple):
    """A backend by name: the module, loaded at its first use, and why it cannot be used here (None: it can)."""

    module: str
    version: Callable[[], str]
    obstacle: Callable[[], str | None]
    devices: tuple[str, ...] | None  # None: every device
    device_obstacle: Callable[[torch.device], str | None] = lambda device: None  # the same of one device


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
        "rnnkern.backends.cuda.backend",
        extension.version,
        cache(extension.obstacle),  # a call asks more than once
        ("cuda",),
        cache(extension.device_obstacle),
    ),
    "reference": Entry("rnnkern.backends.reference", lambda: f"torch {torch.__version__}", lambda: None, None),
}


def backend_names() -> tuple[str, ...]:
    """What a `backend` argument may be."""
    return ("auto", *BACKENDS)


# What "auto" takes on each device type, and the fallback elsewhere.
AUTO = {"cpu": "numba", "cuda": "cuda"}
FALLBACK = "reference"


def obstacle(name: str, device: torch.device) -> str | None:
    """Why the backend cannot run a layer on `device`, or None."""
    entry = BACKENDS[name]
    if entry.devices is not None and device.type not in entry.devices:
        return f"it runs on {' and '.join(entry.devices)}, not on {device.type}"
    return entry.obstacle() or entry.device_obstacle(device)


@cache
def _warn_fallback(device_type: str, reason: str) -> None:
    import warnings

    warnings.warn(
        f"rnnkern: backend='auto' takes the slow '{FALLBACK}' backend on {device_type}: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def torch_serves(name: str, device: torch.device) -> bool:
    """Whether a layer is left to torch.nn's own kernels: for "auto" on a GPU that rnnkern's cannot run on. Says so
    once."""
    return name == "auto" and device.type == "cuda" and _left_to_torch(device.index)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _left_to_torch(index: int | None) -> bool:
    """In one piece and out of traced code's sight: it looks for files, and may warn."""
    reason = obstacle("cuda", torch.device("cuda" if index is None else f"cuda:{index}"))
    if reason is not None:
        _warn_torch_serves(reason)
    return reason is not None


@cache
def _warn_torch_serves(reason: str) -> None:
    import warnings

    warnings.warn(
        f"rnnkern: backend='auto' takes torch.nn's own kernels on cuda: {reason}", RuntimeWarning, stacklevel=2
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
