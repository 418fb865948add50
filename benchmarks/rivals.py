"""The implementations that are compared: how each is built, what is timed, and what it is checked by."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from benchmarks.shapes import Shape
from rnnkern.cells import TORCH_CELLS as KINDS

# cell -> name of the layer, and with "Cell" behind it of the cell, in torch.nn and in rnnkern
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
SPECS = {"lstm": KINDS["lstm"], "gru": KINDS["gru"], "rnn": KINDS["rnn_tanh"]}
MODES = ("forward", "saving", "train")  # inference; a forward pass that keeps what backward needs; both passes


class Rival(Protocol):
    """One implementation on one problem, in one mode."""

    def __call__(self) -> object:
        """What is timed: a forward pass, or forward and backward with all gradients."""
        ...

    def results(self) -> dict[str, Tensor]:
        """What a call computes, by name, in a layout that is the same for all rivals."""
        ...


@dataclass(frozen=True)
class Problem:
    """What all rivals of a row are given, drawn with a fixed seed: weights, an input and a gradient of the output."""

    shape: Shape
    cell: str
    module: nn.Module  # torch.nn's
    x: Tensor  # (T, B, I), random at the padded steps too
    dy: Tensor  # (T, B, D*H), zero at the padded steps
    lengths: Tensor  # (B,)

    def pack(self, padded: Tensor) -> PackedSequence:
        """A padded tensor of this problem, packed."""
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False)

    def real(self, padded: Tensor) -> Tensor:
        """What rivals are compared on: the real steps of a padded tensor, in the order that PackedSequence has them."""
        return self.pack(padded).data if self.shape.ragged else padded

    def flops(self, mode: str) -> float:
        """Operations of the matrix products: a weight meets each real step once, in backward twice more (dx and dW)."""
        weights = sum(parameter.numel() for parameter in self.module.parameters() if parameter.dim() == 2)
        return 2.0 * weights * int(self.lengths.sum()) * (3 if mode == "train" else 1)


def build(library: Any, cell: str, shape: Shape, dtype: torch.dtype, **options: Any) -> nn.Module:
    """The layer (or the cell, for a stepwise shape) of torch.nn or of rnnkern."""
    if shape.stepwise:
        module: nn.Module = getattr(library, CELLS[cell] + "Cell")(shape.I, shape.H, dtype=dtype, **options)
    else:
        module = getattr(library, CELLS[cell])(
            shape.I, shape.H, num_layers=shape.layers, bidirectional=shape.bidirectional, dtype=dtype, **options
        )
    return module


CPU = torch.device("cpu")


def make_problem(cell: str, shape: Shape, dtype: torch.dtype, device: torch.device = CPU) -> Problem:
    """The same numbers at every call, drawn where they are needed."""
    with torch.random.fork_rng(devices=[] if device == CPU else [torch.cuda.current_device()]):
        torch.manual_seed(0)
        module = build(nn, cell, shape, dtype).to(device)
        x = torch.randn(shape.T, shape.B, shape.I, device=device).to(dtype)
        dy = torch.randn(shape.T, shape.B, shape.H * (2 if shape.bidirectional else 1), device=device).to(dtype)
    lengths = shape.lengths()
    dy[(torch.arange(shape.T)[:, None] >= lengths).to(device)] = 0
    return Problem(shape, cell, module, x, dy, lengths)


def run_steps(cell: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    """A cell over the steps of x as users write it: (T, B, H), last state."""
    state, outputs = None, []
    for x_t in x.unbind(0):
        state = cell(x_t, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs), state


class ModuleRival:
    """A module of torch.nn or rnnkern on the problem's input: packed or padded, in any mode."""

    def __init__(self, module: nn.Module, problem: Problem, mode: str, *, packed: bool) -> None:
        self.problem, self.mode, self.packed = problem, mode, packed
        self.module = module.train(mode != "forward")
        packing = problem.pack(problem.x) if packed else None
        self.x = (packing.data if packing else problem.x).detach().clone().requires_grad_(mode != "forward")
        self.dy = problem.pack(problem.dy).data if packed else problem.dy
        self.input = packing._replace(data=self.x) if packing else self.x
        padded = problem.shape.ragged and not packed
        self.options: dict[str, Any] = {"lengths": problem.lengths.to(self.x.device)} if padded else {}

    def forward(self) -> tuple[Tensor, Any]:
        """Output, packed if the input is, and final states."""
        if self.problem.shape.stepwise:
            return run_steps(self.module, self.x)
        output, states = self.module(self.input, **self.options)
        return output.data if self.packed else output, states

    def __call__(self) -> tuple[Tensor, Any]:
        """Output and final states; after it, in training, the gradients lie in `.grad`."""
        if self.mode != "train":
            return self.forward()
        self.module.zero_grad()
        self.x.grad = None
        output, states = self.forward()
        torch.autograd.backward(output, self.dy)
        return output.detach(), states

    def results(self) -> dict[str, Tensor]:
        """Output, final states and, in training, every gradient."""
        output, states = self()
        real: Callable[[Tensor], Tensor] = (lambda data: data) if self.packed else self.problem.real
        found = {"output": real(output)} | named_states(states)
        if self.mode == "train":
            gradients = {"input": self.x} | dict(self.module.named_parameters())
            for name, tensor in gradients.items():
                if tensor.grad is None:
                    raise RuntimeError(f"{type(self.module).__module__}: backward left no gradient of {name}")
                found[f"gradient of {name}"] = real(tensor.grad) if name == "input" else tensor.grad
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def named_states(states: Any) -> dict[str, Tensor]:
    """h_n or (h_n, c_n) by name; what has names keeps them."""
    if isinstance(states, dict):
        return states
    return dict(zip(("h_n", "c_n"), states if isinstance(states, tuple) else (states,), strict=False))


def torch_rival(problem: Problem, mode: str) -> Rival:
    """A copy of torch.nn's module of its own."""
    module = deepcopy(problem.module)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()  # copies of weights lie apart, and cuDNN would gather them at every call
    return ModuleRival(module, problem, mode, packed=bool(problem.shape.ragged))


def rnnkern_rival(problem: Problem, mode: str, backend: str, **options: Any) -> Rival:
    """rnnkern's module with the same weights, and options that need no others."""
    module = build(rnnkern, problem.cell, problem.shape, problem.x.dtype, backend=backend, **options)
    module = module.to(problem.x.device)
    module.load_state_dict(problem.module.state_dict())
    return ModuleRival(module, problem, mode, packed=problem.shape.ragged == "packed")


def relative_rms(expected: Tensor, found: Tensor) -> float:
    """How far `found` is off, over the size of `expected`."""
    if expected.shape != found.shape:
        raise ValueError(f"results: expected a tensor of shape {tuple(expected.shape)}, got {tuple(found.shape)}")

    def norm(tensor: Tensor) -> float:  # with no copy in float64, for which a GPU may not have the memory
        return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))

    return norm(found - expected) / max(norm(expected), torch.finfo(torch.float64).tiny)


class Disagreement(Exception):
    """An implementation's result is not what it is compared with."""


def check(
    name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], limit: float, rival: str = "torch.nn"
) -> None:
    """Raises Disagreement unless what the implementation of that name found is the rival's result, NaN nowhere."""
    if expected.keys() != found.keys():
        raise ValueError(f"results: expected {sorted(expected)}, got {sorted(found)}")
    for tensor in expected:
        error = relative_rms(expected[tensor], found[tensor])
        if not error <= limit:
            raise Disagreement(
                f"{name}: {tensor} is {error:.1e} from {rival}'s (relative RMS), expected at most {limit:.0e}"
            )
