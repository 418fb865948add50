"""Random calls of random modules, good and bad: torch.nn is the judge."""

import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from rnnkern.cells import TORCH_CELLS
from tests.numba_support import bitwise_equal
from tests.tables import ACCIDENTS, cell_class, layer_class, nonlinearity, outcome, relative_rms


class Draw:
    """A random call of a random module, most of it good."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.cell = self.random.choice(list(TORCH_CELLS))
        self.step = self.chance(0.2)
        self.faults = 0

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def fault(self, p: float) -> bool:
        """Whether to do something wrong here."""
        found = self.chance(p)
        self.faults += found
        return found

    def size(self, good: int) -> int:
        return self.random.choice((good - 1, good + 1, 1, 0)) if self.fault(0.03) else good

    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = {"bias": self.chance(0.8), "dtype": torch.float64, **nonlinearity(self.cell)}
        if not self.step:
            found |= {
                "num_layers": self.size(self.random.choice((1, 2))),
                "batch_first": self.chance(0.5),
                "bidirectional": self.chance(0.5),
            }
            if self.cell == "lstm" and self.chance(0.3):
                found["proj_size"] = self.size(2)
        return found

    def tensor(self, *shape: int) -> Tensor:
        dtype = self.random.choice((torch.float32, torch.int64, torch.bfloat16)) if self.fault(0.03) else torch.float64
        sizes = [self.size(n) for n in shape]
        if self.fault(0.02):
            sizes.append(1)
        elif self.fault(0.02):
            sizes.pop()
        return torch.randn(sizes, dtype=torch.float64).to(dtype)

    def arguments(self, sizes: tuple[int, int, int, int], options: dict[str, Any]) -> tuple[Any, ...]:
        steps, batch, inputs, hidden = sizes
        batched: tuple[int, ...] = () if self.chance(0.15) else (batch,)
        leading: tuple[int, ...]
        if self.step:
            x, leading = self.tensor(*batched, inputs), batched
        else:
            x = self.tensor(*((*batched, steps) if options["batch_first"] else (steps, *batched)), inputs)
            leading = (options["num_layers"] * (1 + options["bidirectional"]), *batched)
        given: Any = x
        whole = x.dim() == 3 and 0 not in x.shape and x.shape[2] == inputs and x.dtype == torch.float64
        if not self.step and whole and self.chance(0.3):
            count, longest = (x.shape[0], x.shape[1]) if options["batch_first"] else (x.shape[1], x.shape[0])
            lengths = torch.tensor([self.random.randint(1, longest) for _ in range(count)])
            given = pack_padded_sequence(x, lengths, options["batch_first"], enforce_sorted=False)
        if self.chance(0.4):
            return (given,)
        units = (options.get("proj_size") or hidden, hidden)[: TORCH_CELLS[self.cell].states]
        if self.cell == "lstm" and isinstance(given, PackedSequence):
            # torch.nn.LSTM checks no state beside a PackedSequence, and reads past its end.
            batch = int(given.batch_sizes[0])
            hx = tuple(torch.randn(leading[0], batch, n, dtype=torch.float64) for n in units)
        else:
            hx = tuple(self.tensor(*leading, n) for n in units)
        return given, hx if len(hx) > 1 else hx[0]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in what a module returns."""
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [t for part in value for t in tensors(part)]


# torch.nn takes an h0 with rows for more sequences than are packed, and a c of another dtype: rnnkern refuses both.
STRICTER = re.compile(": [hc]0?: expected")


def check_random_call(seed: int) -> bool:
    """Whether torch.nn accepted the call; rnnkern does then too, with the same results, and else raises as it does."""
    torch.manual_seed(seed)
    draw = Draw(seed)
    sizes = (draw.random.randint(1, 5), draw.random.randint(1, 5), draw.random.randint(1, 4), draw.random.randint(3, 9))
    options = draw.options()
    kind = cell_class if draw.step else layer_class
    module_sizes = (draw.size(sizes[2]), draw.size(sizes[3]))
    modules = []
    for package in (nn, rnnkern):
        torch.manual_seed(seed)
        modules.append(outcome(lambda p=package: kind(p, draw.cell)(*module_sizes, **options)))  # type: ignore[misc]
    if not isinstance(modules[0], Exception) and not isinstance(modules[1], Exception):
        arguments = draw.arguments((*sizes[:2], *module_sizes), options)
        description = f"{draw.cell} {module_sizes} {options} {[tuple(t.shape) for t in tensors(arguments)]}"
        theirs, ours = modules
        first, _, third = (outcome(lambda: ours(*arguments)) for _ in range(3))  # the third by a plan
        modules = [outcome(lambda: theirs(*arguments)), third]
        assert type(first) is type(third), f"{description}: first {first!r}, then {third!r}"
        if not isinstance(first, Exception):
            assert bitwise_equal(tensors(first), tensors(third)), description
    else:
        description = f"{draw.cell} {module_sizes} {options}"
    expected, found = modules
    if isinstance(expected, Exception):
        types = (RuntimeError, ValueError) if draw.faults > 1 or isinstance(expected, ACCIDENTS) else ()
        same = type(found) is type(expected) or isinstance(found, types)
        assert same, f"{description}: torch.nn raises {expected!r}, rnnkern gives {found!r}"
        return False
    if isinstance(found, RuntimeError) and draw.faults and STRICTER.search(str(found)):
        return False
    assert not isinstance(found, Exception), f"{description}: torch.nn accepts, rnnkern raises {found!r}"
    for own, other in zip(tensors(found), tensors(expected), strict=True):
        assert own.dtype == other.dtype, description
        assert relative_rms(own, other) < 1e-12, description
    return True


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_calls(count: int) -> None:
    accepted = sum(check_random_call(seed) for seed in range(count))
    assert 0.3 * count < accepted < 0.9 * count
