"""What the tests share: the one table of tolerances, and a `Case`, one call that torch.nn and rnnkern both make."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnkern
from rnnkern.cells import CELLS, TORCH_CELLS
from tests import host


class Tolerance(NamedTuple):
    """The largest relative RMS error against float64 at default initialisation."""

    forward: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-6, 3e-6),
    torch.float16: Tolerance(1e-3, 1e-3),
    torch.bfloat16: Tolerance(1e-2, 1e-2),
}

host.register()

KERNEL_BACKENDS = ("numba", "reference", "host")


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; 0 where they are equal, NaN where either holds one."""
    assert actual.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    wanted = expected.detach().double()
    difference = (actual.detach().double() - wanted).norm()
    return 0.0 if difference == 0 else float(difference / wanted.norm())


class Outcome(NamedTuple):
    """What a call gives."""

    results: dict[str, Tensor]  # output (the rows of a packed one), h_n, c_n
    gradients: dict[str, Tensor | None]  # input, h0, c0 and every parameter

    def parts(self) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
        return dict(self.results), self.gradients


def assert_close(actual: Outcome, expected: Outcome, dtype: torch.dtype, rival: Outcome | None = None) -> None:
    """Every result and gradient within the table's tolerance for `dtype`; away from what the table is for, within three
    times the error of `rival`, torch.nn's."""
    others: tuple[dict[str, Tensor | None], ...] = ({}, {}) if rival is None else rival.parts()
    for most, ours, theirs, other in zip(TOLERANCES[dtype], actual.parts(), expected.parts(), others, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            own = ours[name]
            if tensor is None or own is None:
                assert own is tensor, f"{name}: expected {tensor}, got {own}"
                continue
            compared = other.get(name)
            limit = most if compared is None else max(most, 3 * relative_rms(compared, tensor))
            error = relative_rms(own, tensor)
            assert error <= limit, f"{name}: relative RMS error {error:.2e} over {limit:.0e}"


def layer_class(package: Any, cell: str) -> Any:
    """LSTM, GRU or RNN of torch.nn or rnnkern."""
    return getattr(package, CELLS[cell].mode.partition("_")[0])


def cell_class(package: Any, cell: str) -> Any:
    """LSTMCell, GRUCell or RNNCell of torch.nn or rnnkern."""
    return getattr(package, TORCH_CELLS[cell].mode.partition("_")[0] + "Cell")


def nonlinearity(cell: str) -> dict[str, str]:
    """The constructor's argument that tells one plain RNN from another; empty for other cells."""
    name = CELLS[cell].mode.partition("_")[2].lower()
    return {"nonlinearity": name} if name else {}


def of_everything(module: nn.Module, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """All results of a layer as a function of its input and parameters."""
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        output, states = functional_call(module, dict(zip(names, parameters, strict=True)), (x,), options)
        return output, *(states if isinstance(states, tuple) else (states,))

    return call


def loss_of(module: nn.Module) -> Callable[[Any, Tensor], Any]:
    return lambda parameters, x: functional_call(module, parameters, (x,))[0].pow(3).sum()


# torch.nn's own checks raise others; these come from code that ran into the bad argument, and say nothing of it.
ACCIDENTS = (IndexError, AttributeError)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the exception that it raises."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        return error


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("rnnkern")


@dataclass(frozen=True)
class Case:
    """One call. By default sizes are odd, so that no vector is full, and lengths in no order, from 1 to all steps."""

    cell: str = "lstm"
    T: int = 5
    B: int = 5
    I: int = 3  # noqa: E741
    H: int = 7
    dtype: torch.dtype = torch.float64
    backend: str = "numba"
    device: str = "cpu"
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    proj_size: int = 0
    dropout: float = 0.0
    training: bool = True
    hx: bool = False
    rows: str = "padded"  # or unbatched, packed, sorted (packed, already in order), lengths
    lengths: tuple[int, ...] = (3, 5, 1, 4, 4)

    @property
    def states(self) -> int:
        return TORCH_CELLS[self.cell].states

    def options(self) -> dict[str, Any]:
        """The constructor's arguments beside the sizes, dtype and backend."""
        found: dict[str, Any] = {
            "num_layers": self.layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout,
            "bidirectional": self.bidirectional,
            **nonlinearity(self.cell),
        }
        return found | ({"proj_size": self.proj_size} if self.proj_size else {})

    def torch_module(self, dtype: torch.dtype | None = None) -> Any:
        """torch.nn's module, with weights that the case's dtype can hold."""
        torch.manual_seed(1)
        module = layer_class(nn, self.cell)(self.I, self.H, dtype=self.dtype, **self.options())
        return module.to(self.device, dtype or self.dtype).train(self.training)

    def module(self, dtype: torch.dtype | None = None, backend: str | None = None) -> Any:
        """rnnkern's module, with the same weights."""
        torch.manual_seed(1)
        kind = layer_class(rnnkern, self.cell)
        module = kind(self.I, self.H, dtype=self.dtype, backend=backend or self.backend, **self.options())
        return module.to(self.device, dtype or self.dtype).train(self.training)

    def inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input and the initial states, leaves in `dtype`, of values that the case's dtype can hold."""
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, dtype=torch.float64, generator=generator)
            return values.to(self.dtype).to(self.device, dtype or self.dtype).requires_grad_()

        batch = () if self.rows == "unbatched" else (self.B,)
        leading = (*batch, self.T) if self.batch_first else (self.T, *batch)
        count = self.layers * (1 + self.bidirectional)
        units = (self.proj_size or self.H, self.H)[: self.states]
        return draw(*leading, self.I), tuple(draw(count, *batch, n) for n in units)

    def call(self, module: Any, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Any, dict[str, Tensor]]:
        """The output as it comes, and (output rows, h_n, c_n) by name. For `lengths`, torch.nn packs and pads."""
        hx = None if not self.hx else states if len(states) > 1 else states[0]
        lengths = torch.tensor(sorted(self.lengths, reverse=True) if self.rows == "sorted" else self.lengths)
        torch.manual_seed(3)
        if self.rows in ("padded", "unbatched"):
            output, finals = module(x, hx)
        elif self.rows == "lengths" and is_ours(module):
            output, finals = module(x, hx, lengths=lengths.to(x.device))
        else:
            packed = pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=self.rows == "sorted")
            output, finals = module(packed, hx)
            if self.rows == "lengths":
                output, _ = pad_packed_sequence(output, self.batch_first, total_length=self.T)
        rows = output.data if isinstance(output, PackedSequence) else output
        finals = finals if isinstance(finals, tuple) else (finals,)
        return output, dict(zip(("output", "h_n", "c_n"), (rows, *finals), strict=False))

    def run(self, module: Any) -> Outcome:
        """A call and the gradients of all that it returns, against random cotangents; on the CPU, wherever it ran."""
        dtype = next(module.parameters()).dtype
        x, states = self.inputs(dtype)
        _, results = self.call(module, x, states)
        generator = torch.Generator().manual_seed(4)
        drawn = [torch.randn(r.shape, dtype=torch.float64, generator=generator) for r in results.values()]
        cotangents = [t.to(self.dtype).to(self.device, dtype) for t in drawn]
        module.zero_grad()
        torch.autograd.backward(list(results.values()), cotangents)
        leaves = {"input": x} | (dict(zip(("h0", "c0"), states, strict=False)) if self.hx else {})
        leaves |= dict(module.named_parameters())
        gradients = {n: None if leaf.grad is None else leaf.grad.cpu() for n, leaf in leaves.items()}
        return Outcome({n: r.detach().cpu() for n, r in results.items()}, gradients)

    def by_torch(self) -> Outcome:
        """What torch.nn gives on the CPU in float64 for the weights and inputs of the case."""
        there = replace(self, device="cpu")
        return there.run(there.torch_module(torch.float64))

    def by_oracle(self) -> Outcome:
        """What rnnkern.reference gives on the CPU in float64 for the weights and inputs of the case."""
        there = replace(self, device="cpu")
        return there.run(there.module(torch.float64, "reference"))


# Each is a departure from the defaults of `Case`.
OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"backend": "reference"},
    "host": {"backend": "host"},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "layers": {"layers": 2},
    "bidirectional": {"bidirectional": True},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "hx": {"hx": True},
    "unbatched": {"rows": "unbatched"},
    "packed": {"rows": "packed"},
    "sorted": {"rows": "sorted"},
    "lengths": {"rows": "lengths"},
    "eval": {"training": False},
    "projection": {"proj_size": 3},
    "dropout": {"layers": 3, "dropout": 0.5},
}


def cases(most: int = 2) -> Iterator[tuple[str, Case]]:
    """Every cell with its defaults and with each set of up to `most` options that can go together, by name."""
    for cell in TORCH_CELLS:
        for size in range(most + 1):
            for names in combinations(OPTIONS, size):
                changes = [OPTIONS[name] for name in names]
                keys = [key for change in changes for key in change]
                if len(keys) > len(set(keys)) or ("projection" in names and cell != "lstm"):
                    continue
                merged = {key: value for change in changes for key, value in change.items()}
                yield "-".join((cell, *names)), replace(Case(cell), **merged)
