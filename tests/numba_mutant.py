"""Checks rnnkern with a defect in it: a server that forks a process for each, with torch and numba already imported.

It reads lines of JSON `[file, its text, name of the check, cell]`, the file named from the package on and its text what
is run in place of what is on disk, and answers each with a line: the error that the check found, relative to the
largest number compared. Sweeps are compared with the oracle one by one, so that only the kernel in question is
compiled: backward starts from what the oracle saved.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

import numba
import torch
from torch import Tensor

INFINITE = float("inf")
ROOT = Path(__file__).parent.parent
# Blocks and chunks as they are, and of few sequences and few steps.
# Weights are read in place only in calls of few rows.
CUTS: tuple[dict[str, int], ...] = (
    {"FEW_ROWS_IN_PLACE": 16},
    {"FEW_ROWS_IN_PLACE": 16, "MOST_SEQUENCES": 2, "CHUNK_ROWS": 4, "BACKWARD_CHUNK_ROWS": 5},
)


def _mode() -> int:
    """The processor's way with denormals."""
    from rnnkern.backends.numba_cpu.vector import flush_denormals, restore_mode

    @numba.njit
    def mode():  # type: ignore[no-untyped-def]
        before = flush_denormals()
        restore_mode(before)
        return before

    return int(mode())


def forward(cell: str) -> float:
    """The forward sweep against the oracle's, also after the weights have changed in place; what it leaves behind."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import Guards, difference, layer_forms, plan_constants

    worst, mode = 0.0, _mode()
    for layer in layer_forms(cell):
        for constants in CUTS:
            with plan_constants(**constants):
                with Guards() as guards:
                    found = numba_cpu.forward(layer, save=True)
                worst = max(worst, difference(found, reference.forward(layer, save=True)))
                for weights in layer.weights:
                    weights.weight_hh.mul_(-0.5)
                found = numba_cpu.forward(layer, save=True)
                worst = max(worst, difference(found, reference.forward(layer, save=True)))
            worst = worst if guards.whole() else INFINITE
    return worst if _mode() == mode else INFINITE


def backward(cell: str) -> float:
    """The backward sweep against the oracle's, from the activations that the oracle saved; what it leaves behind."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import Guards, all_needs, difference, layer_forms, plan_constants, random_gradients

    worst, mode = 0.0, _mode()
    for layer in layer_forms(cell):
        states = reference.forward(layer, save=True)
        given = (layer, states.saved, random_gradients(states), all_needs(layer))
        for constants in CUTS:
            with plan_constants(**constants), Guards() as guards:
                found = numba_cpu.backward(*given)
            worst = max(worst, difference(found, reference.backward(*given)))
            worst = worst if guards.whole() else INFINITE
    return worst if _mode() == mode else INFINITE


def _optional_layers(cell: str) -> list[Any]:
    from tests.option_layers import FULL

    return [case.layer() for case in FULL.values() if case.cell == cell]


def optional_forward(cell: str) -> float:
    """The forward sweep with everything at once against the oracle's."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import difference

    return max(
        difference(numba_cpu.forward(layer, save=True), reference.forward(layer, save=True))
        for layer in _optional_layers(cell)
    )


def optional_backward(cell: str) -> float:
    """The backward sweep with everything at once against the oracle's, from the activations that the oracle saved."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import all_needs, difference, random_gradients

    worst = 0.0
    for layer in _optional_layers(cell):
        states = reference.forward(layer, save=True)
        given = (layer, states.saved, random_gradients(states, layer.extras.states), all_needs(layer))
        worst = max(worst, difference(numba_cpu.backward(*given), reference.backward(*given)))
    return worst


def strides(cell: str) -> float:
    """Calls of the same shapes with operands in one layout and another."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import difference, random_layer

    layer = random_layer(cell)
    wide = layer.x.repeat(1, 1, 2)[..., : layer.x.shape[-1]]
    calls = [layer, layer._replace(x=wide), layer]
    return max(difference(numba_cpu.forward(c, save=True), reference.forward(c, save=True)) for c in calls)


def flushed(cell: str) -> float:
    """How many numbers are left of denormal ones, written and read, after the forward sweep of a relu."""
    from rnnkern.backends import numba_cpu
    from rnnkern.cells import Weights
    from tests.numba_support import random_layer

    tiny = torch.finfo(torch.float64).tiny
    layer = random_layer(cell, steps=3, inputs=1, hidden=4, directions=1)
    huge, quarter = torch.full((4, 1), 1e300, dtype=torch.float64), torch.eye(4, dtype=torch.float64) / 4
    layer = layer._replace(weights=(Weights(huge, quarter),))
    written = numba_cpu.forward(layer._replace(x=layer.x * 0, h0=torch.full_like(layer.h0, tiny)), save=False)
    read = numba_cpu.forward(layer._replace(x=torch.full_like(layer.x, tiny / 8), h0=layer.h0 * 0), save=False)
    return float(written.y.count_nonzero() + read.y.count_nonzero())


def shares(cell: str) -> float:
    """Both sweeps, each direction's batch divided among three threads."""
    from tests.numba_support import difference, layer_forms, oracle, plan_constants, random_layer, sweeps

    with (
        mock.patch.object(torch, "get_num_threads", return_value=6),
        plan_constants(WORTH_A_THREAD=1, ROWS_WORTH_A_SUM=1),
    ):
        forms = [*layer_forms(cell), random_layer(cell, batch=13, directions=1)]
        return max(difference(sweeps(layer), oracle(layer)) for layer in forms)


def members(cell: str) -> float:
    """Both sweeps, each run by several threads together."""
    from tests.numba_support import difference, oracle, plan_constants, random_layer, sweeps

    sizes: dict[str, Any] = {"batch": 1, "inputs": 70, "hidden": 135, "scale": 0.3}
    forms = [random_layer(cell, directions=directions, **sizes) for directions in (1, 2)]
    with (
        mock.patch.object(torch, "get_num_threads", return_value=4),
        plan_constants(WORTH_A_THREAD=1, WORTH_A_BARRIER=0, CHUNK_ROWS=2, BACKWARD_CHUNK_ROWS=2, FEW_ROWS_IN_PLACE=0),
    ):
        return max(difference(sweeps(layer), oracle(layer)) for layer in forms)


def repeated(cell: str) -> float:
    """Calls of modules again and again, which go by a plan, in Python, on one thread and on several, against the
    reference."""
    from rnnkern import native
    from tests.numba_support import plan_constants

    worst, native.calls = 0.0, None
    for threads in (1, 6):
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch, "get_num_threads", return_value=threads))
            stack.enter_context(plan_constants(WORTH_A_THREAD=1, ROWS_WORTH_A_SUM=1))
            for step in (False, True):
                worst = max(worst, _repeated(cell, step, with_states=True), _repeated(cell, step, with_states=False))
    return worst


def _repeated(cell: str, step: bool, with_states: bool) -> float:
    import rnnkern
    from tests.numba_support import difference

    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    kind = getattr(rnnkern, f"{cell}Cell" if step else cell)
    ours, judge = (
        kind(3, 5, dtype=torch.float64, backend=b, **({} if step else options)) for b in ("numba", "reference")
    )
    shape, leading = ((7, 3), (7,)) if step else ((7, 6, 3), (4, 7))
    count, worst = 2 if cell == "LSTM" else 1, 0.0
    for index in range(8):
        judge.load_state_dict(ours.state_dict())
        x = torch.randn(*shape[:-1], 6, dtype=torch.float64)[..., :3]
        x = x if index % 2 else x.contiguous()
        states = [torch.randn(*leading, 5, dtype=torch.float64) for _ in range(count)] if with_states else []
        hx = (tuple(states) if count > 1 else states[0]) if with_states else None
        found = [_results_and_gradients(module, x, hx, turned=index % 4 > 1) for module in (ours, judge)]
        worst = max(worst, difference(*found))
        with torch.no_grad():
            worst = max(worst, difference(_flat(ours(x, hx)), _flat(judge(x, hx))))
            for p in ours.parameters():
                p.mul_(-0.9)
    return worst


def _results_and_gradients(module: torch.nn.Module, x: Tensor, hx: Any, turned: bool) -> list[Tensor]:
    x = x.detach().requires_grad_()
    results = _flat(module(x, hx))
    cotangents = [torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
    if turned:
        cotangents = [c.transpose(0, 1).contiguous().transpose(0, 1) for c in cotangents]
    return [*results, *torch.autograd.grad(results, [x, *module.parameters()], cotangents)]


def _flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in _flat(part)]


def layers(cell: str) -> float:
    """What surrounds the sweeps, on the reference backend, against torch.nn: no kernel is compiled."""
    import rnnkern

    lengths = torch.tensor([2, 5, 1, 5])
    batch_first = cell == "LSTM"  # as good a way as any to have both
    theirs = getattr(torch.nn, cell)(
        3, 4, num_layers=2, bidirectional=True, batch_first=batch_first, dtype=torch.float64
    )
    ours = getattr(rnnkern, cell)(
        3, 4, num_layers=2, bidirectional=True, batch_first=batch_first, dtype=torch.float64, backend="reference"
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5, 3, dtype=torch.float64) if batch_first else torch.randn(5, 4, 3, dtype=torch.float64)
    start = torch.randn(2 if cell == "LSTM" else 1, 4, 4, 4, dtype=torch.float64)
    return max(_modules_differ(ours, theirs, x, start, form, lengths) for form in ("padded", "packed", "lengths"))


def _modules_differ(
    ours: torch.nn.Module, theirs: torch.nn.Module, x: Tensor, start: Tensor, form: str, lengths: Tensor
) -> float:
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    from tests.numba_support import difference

    found = []
    for module in (ours, theirs):
        batch_first = bool(module.batch_first)
        x_, start_ = x.clone().requires_grad_(), start.clone().requires_grad_()
        hx = (start_[0], start_[1]) if len(start_) == 2 else start_[0]
        if form == "lengths" and module is ours:
            y, states = module(x_, hx, lengths=lengths)
        elif form == "padded":
            y, states = module(x_, hx)
        else:
            packed = pack_padded_sequence(x_, lengths, batch_first=batch_first, enforce_sorted=False)
            y, states = module(packed, hx)
            y, _ = pad_packed_sequence(y, batch_first=batch_first)
        results = _flat((y, states))
        weighted = [(r * torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results]
        found.append([*results, *torch.autograd.grad(torch.stack(weighted).sum(), [x_, start_, *module.parameters()])])
    (got, want) = found
    return difference(got, want)


def masks_of_words(_: str) -> float:
    """1 if masks of all words there are, or of cut rows, are not those that torch's operations make of them."""
    from rnnkern import masks
    from rnnkern.backends.numba_cpu.choice import choose

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.int64)
    apart = every[::541][:30].contiguous()
    like, same = torch.empty(0, dtype=torch.float64), True
    for draws, shape in ((every, (2**16,)), (apart.view(5, 6), (5, 23)), (apart.view(30, 1), (30, 1))):
        for last, scale in ((-(2**15), None), (-9, 1.5), (7, None), (2**15 - 1, 2.0)):
            expected = masks.choose(draws, shape, last, scale, like)
            same = same and torch.equal(choose(draws, shape, last, scale, like), expected)
    return float(not same)


def fails(test: str) -> float:
    """1 if a test of the suite fails."""
    import pytest

    with redirect_stdout(sys.stderr):
        return float(
            pytest.main(["-q", "-x", "-p", "no:cacheprovider", str(ROOT / test)]) == pytest.ExitCode.TESTS_FAILED
        )


CHECKS: dict[str, Callable[[str], float]] = {
    check.__name__: check
    for check in (
        forward,
        backward,
        optional_forward,
        optional_backward,
        strides,
        flushed,
        shares,
        members,
        repeated,
        layers,
        masks_of_words,
        fails,
    )
}


class Changed(SourceFileLoader):
    """Loads a module from a text that is not that of its file."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


class Finder:
    """Gives the module of one file another text. Its file stays as it is, for Numba to find its cache by."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = os.path.join("rnnkern", file), text

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or not spec.origin.endswith(self.file):
            return None
        package = spec.submodule_search_locations
        loader = Changed(name, spec.origin, self.text)
        return importlib.util.spec_from_file_location(
            name, spec.origin, loader=loader, submodule_search_locations=package
        )


def _check(file: str, text: str, name: str, cell: str) -> float:
    assert not any(module.startswith("rnnkern") for module in sys.modules)
    sys.meta_path.insert(0, Finder(file, text))
    torch.manual_seed(0)
    return CHECKS[name](cell)


def serve() -> None:
    torch.set_num_threads(1)  # torch's OpenMP pool would not survive the forks
    torch.use_deterministic_algorithms(True)  # which fills what is not written with NaN
    numba.njit(lambda number: number)(1)  # sets up for every child what Numba sets up at its first compilation
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(_check(*json.loads(line))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps(f"the check ended with status {status}"), flush=True)


if __name__ == "__main__":
    serve()
