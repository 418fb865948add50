"""Runs the CUDA sweeps of one build on the CPU and compares with the oracle: in a process of its own, since a build may
have sanitizers, or a defect. `python -m tests.cuda_run MODULE --dtypes float32` exits with 0 if all is well."""

import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import host

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("module", type=Path, help="the file of a _host module")
parser.add_argument("--most", type=int, default=1, help="how many options are put together")
parser.add_argument("--dtypes", nargs="+", default=["float64", "float32", "float16", "bfloat16"])
parser.add_argument("--schedules", nargs="+", type=int, default=[0])
parser.add_argument("--full", action="store_true", help="every call in every dtype, tile and schedule, not one of them")
parser.add_argument("--tiles", nargs="+", default=["small", "large"])

# More than a tile of sequences and units, more chunks than are under way, read by vectors.
WIDE: dict[str, Any] = {"T": 3, "B": 24, "H": 72, "lengths": tuple(1 + b % 3 for b in range(24))}


def main() -> int:
    """Runs the command and returns its exit status: 1 where a result is wrong."""
    chosen = parser.parse_args()
    extension = host.load_from(chosen.module, "_host")
    setattr(host, "extension", lambda: extension)  # noqa: B010
    from tests.host_backend import backend
    from tests.tables import TOLERANCES, Case, Tolerance, assert_close, cases

    for dtype in (torch.float16, torch.bfloat16):  # how close these are is for other tests to say
        TOLERANCES[dtype] = Tolerance(0.1, 0.1)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills buffers with NaN
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    named = {n: c for n, c in cases(chosen.most) if c.backend == "numba" and c.dtype == torch.float64}
    named |= {f"{name}-wide": replace(case, **WIDE) for name, case in named.items() if case == Case(case.cell)}
    ways = list(product(chosen.dtypes, chosen.tiles, chosen.schedules))
    calls = list(product(named, ways))
    if not chosen.full:
        calls = [(name, ways[i % len(ways)]) for i, name in enumerate(named)]
    wrong = 0
    for name, (dtype, tile, seed) in calls:
        case = replace(named[name], backend="host", dtype=getattr(torch, dtype))
        backend.tile = tile
        extension.set_schedule(seed)
        try:
            assert_close(case.run(case.module()), case.by_oracle(), case.dtype)
        except (AssertionError, RuntimeError) as error:
            wrong += 1
            print(f"WRONG {name} {dtype}, {tile} tile, schedule {seed}: {error}", flush=True)
    print(f"{len(calls)} calls, {wrong} wrong results")
    return 1 if wrong or not calls else 0


if __name__ == "__main__":
    sys.exit(main())
