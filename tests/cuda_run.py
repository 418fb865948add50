"""Runs the CUDA sweeps of one build on the CPU and compares with the oracle: in a process of its own, since a build may
have sanitizers, or a defect. `python -m tests.cuda_run MODULE --dtypes float32` exits with 0 if all is well."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import host

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("module", type=Path, help="the file of a _host module")
parser.add_argument("--options", action="store_true", help="calls with what torch.nn lacks, not with what it has")
parser.add_argument("--most", type=int, default=1, help="how many options are put together")
parser.add_argument("--dtypes", nargs="+", default=["float64", "float32", "float16", "bfloat16"])
parser.add_argument("--schedules", nargs="+", type=int, default=[0])
parser.add_argument("--full", action="store_true", help="every call in every dtype, tile and schedule, not one of them")
parser.add_argument("--tiles", nargs="+", default=["small", "large"])

# More than a tile of sequences and units, more chunks than are under way, read by vectors.
WIDE: dict[str, Any] = {"T": 3, "B": 24, "H": 72}

Calls = dict[str, Callable[[torch.dtype], None]]  # each compares with the oracle


def of_torch(most: int) -> Calls:
    """Calls that torch.nn has too, through the modules."""
    from tests.tables import Case, assert_close, cases

    def check(case: Case, dtype: torch.dtype) -> None:
        case = replace(case, backend="host", dtype=dtype)
        assert_close(case.run(case.module()), case.by_oracle(), case.dtype)

    named = {n: c for n, c in cases(most) if c.backend == "numba" and c.dtype == torch.float64}
    lengths = tuple(1 + b % WIDE["T"] for b in range(WIDE["B"]))
    named |= {f"{n}-wide": replace(c, **WIDE, lengths=lengths) for n, c in named.items() if c == Case(c.cell)}
    return {name: partial(check, case) for name, case in named.items()}


def of_options(most: int) -> Calls:
    """Calls that it has not: options together, and everything at once."""
    from tests import cuda_options
    from tests.option_layers import FULL, Optional, optional_cases
    from tests.tables import TOLERANCES

    def check(case: Optional, dtype: torch.dtype) -> None:
        cuda_options.check(replace(case, dtype=dtype, seed=1).layer(), TOLERANCES[dtype])

    named = dict(optional_cases(most)) | FULL
    named |= {f"{name}-wide": replace(case, **WIDE) for name, case in FULL.items() if case.zoneout == "masks"}
    return {name: partial(check, case) for name, case in named.items()}


def main() -> int:
    """Runs the command and returns its exit status: 1 where a result is wrong."""
    chosen = parser.parse_args()
    extension = host.load_from(chosen.module, "_host")
    setattr(host, "extension", lambda: extension)  # noqa: B010
    from tests.host_backend import backend
    from tests.tables import TOLERANCES, Tolerance

    for dtype in (torch.float16, torch.bfloat16):  # how close these are is for other tests to say
        TOLERANCES[dtype] = Tolerance(0.1, 0.1)
    if chosen.options:  # LayerNorm amplifies rounding, now more and now less: tests/test_cuda_options.py judges
        TOLERANCES[torch.float32] = Tolerance(1e-4, 1e-4)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills buffers with NaN
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    named = (of_options if chosen.options else of_torch)(chosen.most)
    ways = list(product(chosen.dtypes, chosen.tiles, chosen.schedules))
    calls = list(product(named, ways))
    if not chosen.full:
        calls = [(name, ways[i % len(ways)]) for i, name in enumerate(named)]
    wrong = 0
    for name, (dtype, tile, seed) in calls:
        backend.tile = tile
        extension.set_schedule(seed)
        try:
            named[name](getattr(torch, dtype))
        except (AssertionError, RuntimeError) as error:
            wrong += 1
            print(f"WRONG {name} {dtype}, {tile} tile, schedule {seed}: {error}", flush=True)
    print(f"{len(calls)} calls, {wrong} wrong results")
    return 1 if wrong or not calls else 0


if __name__ == "__main__":
    sys.exit(main())
