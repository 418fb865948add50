"""Checks a changed copy of rnnkern: a server that forks a process for each, with torch and numba already imported.

It reads lines of JSON `[folder of the copy, name of the check, cell]` and answers each with a line: the error that
the check found, relative to the largest number compared. Sweeps are compared with the oracle one by one, so that only
the kernel in question is compiled: backward starts from what the oracle saved.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable

import numba  # noqa: F401  (for the forks)
import torch
from torch import Tensor


def forward(cell: str) -> float:
    """The forward sweep against the oracle's, also after the weights have changed in place."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import difference, layer_forms

    worst = 0.0
    for layer in layer_forms(cell):
        for _ in range(2):
            worst = max(worst, difference(numba_cpu.forward(layer, save=True), reference.forward(layer, save=True)))
            for weights in layer.weights:
                weights.weight_hh.mul_(-0.5)
    return worst


def backward(cell: str) -> float:
    """The backward sweep against the oracle's, from the activations that the oracle saved."""
    from rnnkern import reference
    from rnnkern.backends import numba_cpu
    from tests.numba_support import difference, layer_forms, random_gradients

    worst = 0.0
    for layer in layer_forms(cell):
        states = reference.forward(layer, save=True)
        saved, gradients = states.saved, random_gradients(states)
        worst = max(
            worst,
            difference(numba_cpu.backward(layer, saved, *gradients), reference.backward(layer, saved, *gradients)),
        )
    return worst


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
        results = [y, *(states if isinstance(states, tuple) else (states,))]
        weighted = [(r * torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results]
        found.append([*results, *torch.autograd.grad(torch.stack(weighted).sum(), [x_, start_, *module.parameters()])])
    (got, want) = found
    return difference(got, want)


CHECKS: dict[str, Callable[[str], float]] = {"forward": forward, "backward": backward, "layers": layers}


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
