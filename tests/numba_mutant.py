"""Checks a changed copy of rnnkern: a server that forks a process for each, with torch and numba already imported.

It reads lines of JSON `[folder of the copy, name of the check, cell]` and answers each with a line: the error that
the check found, relative to the largest number compared. Sweeps are compared with the oracle one by one, so that only
the kernel in question is compiled: backward starts from what the oracle saved.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numba
import torch
from torch import Tensor


# Blocks of few sequences and chunks of few steps, and the ones that there are.
CUTS: tuple[dict[str, int], ...] = ({}, {"MOST_SEQUENCES": 2, "CHUNK_ROWS": 4, "BACKWARD_CHUNK_ROWS": 5})


@contextmanager
def mode_is_kept() -> Iterator[None]:
    """Raises unless the processor's way with denormals is afterwards as it was."""
    from rnnkern.backends.numba_cpu.vector import flush_denormals, restore_mode

    @numba.njit  # type: ignore[untyped-decorator]
    def mode():  # type: ignore[no-untyped-def]
        before = flush_denormals()
        restore_mode(before)
        return before

    before = mode()
    yield
    assert mode() == before, "the mode of the processor has changed"


def forward(cell: str) -> float:
    """The forward sweep against the oracle's, also after the weights have changed in place."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import difference, layer_forms, plan_constants

    worst = 0.0
    for layer in layer_forms(cell):
        for constants in CUTS:
            with plan_constants(**constants), mode_is_kept():
                found = numba_cpu.forward(layer, save=True)
            worst = max(worst, difference(found, reference.forward(layer, save=True)))
            for weights in layer.weights:
                weights.weight_hh.mul_(-0.5)
            found = numba_cpu.forward(layer, save=True)
            worst = max(worst, difference(found, reference.forward(layer, save=True)))
    return worst


def backward(cell: str) -> float:
    """The backward sweep against the oracle's, from the activations that the oracle saved."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import all_needs, difference, layer_forms, plan_constants, random_gradients

    worst = 0.0
    for layer in layer_forms(cell):
        states = reference.forward(layer, save=True)
        given = (layer, states.saved, *random_gradients(states), all_needs(layer))
        for constants in CUTS:
            with plan_constants(**constants), mode_is_kept():
                found = numba_cpu.backward(*given)
            worst = max(worst, difference(found, reference.backward(*given)))
    return worst


def flushed(cell: str) -> float:
    """Whether a state that decays is taken for zero once it is denormal: what is left of it after the forward sweep."""
    from rnnkern.backends import numba_cpu
    from rnnkern.cells import Weights
    from tests.numba_support import random_layer

    layer = random_layer(cell, steps=3, inputs=1, hidden=4, directions=1)
    weights = Weights(torch.zeros(4, 1, dtype=torch.float64), torch.eye(4, dtype=torch.float64) / 4)
    small = torch.full_like(layer.h0, torch.finfo(torch.float64).tiny)
    y = numba_cpu.forward(layer._replace(x=layer.x * 0, h0=small, weights=(weights,)), save=False).y
    return float(y.count_nonzero())


def shares(cell: str) -> float:
    """Both sweeps, each direction's batch divided among three threads."""
    from tests.numba_support import difference, layer_forms, oracle, plan_constants, random_layer, sweeps

    with mock.patch.object(torch, "get_num_threads", lambda: 6), plan_constants(WORTH_A_THREAD=1):
        forms = [*layer_forms(cell), random_layer(cell, batch=13, directions=1)]
        return max(difference(sweeps(layer), oracle(layer)) for layer in forms)


def repeated(cell: str) -> float:
    """Calls of modules that go by a plan against the first ones, with and without gradients."""
    import rnnkern
    from tests.numba_support import difference

    kind, step = getattr(rnnkern, cell), getattr(rnnkern, f"{cell}Cell")(3, 5, dtype=torch.float64)
    stack = kind(3, 5, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    worst = 0.0
    for module, shape, leading in ((stack, (4, 6, 3), (4, 4)), (step, (4, 3), (4,))):
        x = torch.randn(shape, dtype=torch.float64)
        states = [torch.randn(*leading, 5, dtype=torch.float64) for _ in range(2 if cell == "LSTM" else 1)]
        for with_states in (False, True):
            first: list[Tensor] = []
            for _ in range(3):
                leaves = [t.clone().requires_grad_() for t in (x, *states)]
                hx = (tuple(leaves[1:]) if len(states) > 1 else leaves[1]) if with_states else None
                found = _flat(module(leaves[0], hx))
                with torch.no_grad():
                    inference = _flat(module(leaves[0], hx))
                wanted = leaves[: 1 + len(states) * with_states] + list(module.parameters())
                gradients = torch.autograd.grad(_weighted(found), wanted)
                first = first or [*found, *inference, *gradients]
            worst = max(worst, difference([*found, *inference, *gradients], first))
    return worst


def _flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in _flat(part)]


def _weighted(results: list[Tensor]) -> Tensor:
    """A sum in which every number has another weight."""
    return torch.stack(
        [(r * torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results]
    ).sum()


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
        found.append([*results, *torch.autograd.grad(_weighted(results), [x_, start_, *module.parameters()])])
    (got, want) = found
    return difference(got, want)


CHECKS: dict[str, Callable[[str], float]] = {
    function.__name__: function for function in (forward, backward, flushed, shares, repeated, layers)
}


def _check(folder: str, name: str, cell: str) -> float:
    sys.path.insert(0, folder)
    package = importlib.import_module("rnnkern")
    assert str(package.__file__).startswith(folder), f"{package.__file__} is not the copy in {folder}"
    torch.manual_seed(0)
    return CHECKS[name](cell)


def serve() -> None:
    torch.set_num_threads(1)  # torch's OpenMP pool would not survive the forks
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
