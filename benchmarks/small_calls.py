"""Every kernel of the sweeps on small shapes, forward and backward: what compute-sanitizer watches.

python -m benchmarks.small_calls --device cuda
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from benchmarks import host
from benchmarks.precisions import PRECISIONS, fp32_products
from rnnkern.backends import select
from rnnkern.cells import TORCH_CELLS

STEPS, BATCH, INPUTS = 3, 18, 5
HIDDEN = (7, 40)  # read number by number, and by vectors
LENGTHS = [1 + b % STEPS for b in range(BATCH)]


def variants(cell: str) -> Iterator[dict[str, Any]]:
    """Options of a layer."""
    yield {}
    yield {"bidirectional": True}
    if cell == "lstm":
        yield {"proj_size": 3}


def calls(module: Any, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The outputs for padded input, for lengths, for packed input."""
    lengths = torch.tensor(LENGTHS)
    yield module(x)[0]
    yield module(x, lengths=lengths.to(x.device))[0]
    yield module(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data


def run_all(device: str, backend: str) -> int:
    """Runs them, inference and training, and gives the number of calls."""
    sweeps: Any = select(backend, torch.device(device)).forward.__self__  # type: ignore[attr-defined]
    count = 0
    for precision in PRECISIONS.values():
        for cell, spec in TORCH_CELLS.items():
            kind, _, nonlinearity = spec.mode.partition("_")
            named = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
            for options in variants(cell):
                for hidden in HIDDEN:
                    module = getattr(rnnkern, kind)(
                        INPUTS, hidden, device=device, dtype=precision.dtype, backend=backend, **options, **named
                    )
                    x = torch.randn(STEPS, BATCH, INPUTS, device=device, dtype=precision.dtype)
                    for sweeps.tile in ("small", "large"):
                        with fp32_products(torch.backends.cudnn.rnn, precision.tf32):
                            count += sum(train(output) for output in calls(module, x))
                            with torch.no_grad():
                                count += sum(1 for _ in calls(module, x))
    return count


def train(output: torch.Tensor) -> int:
    """Goes back from an output, which has to be all numbers."""
    output.sum().backward()
    if not output.isfinite().all():
        raise RuntimeError("an output is not finite")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_calls", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "host"), required=True)
    device = parser.parse_args(argv).device
    if device == "host":
        host.register()
    torch.manual_seed(0)
    print(f"{run_all('cpu' if device == 'host' else device, device)} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
