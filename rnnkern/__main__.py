"""`python -m rnnkern`: which backends this installation has, and why not the others. `--warm` compiles the CPU kernels
beforehand."""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

import rnnkern
from rnnkern.backends import AUTO, BACKENDS
from rnnkern.cells import TORCH_CELLS


def list_backends() -> None:
    print(f"rnnkern {rnnkern.__version__}, torch {torch.__version__}")
    for name, entry in BACKENDS.items():
        reason = entry.obstacle()
        devices = " and ".join(entry.devices) if entry.devices else "any device"
        default = ", ".join(device for device, backend in AUTO.items() if backend == name)
        print(f"  {name:<10} {f'{entry.version()}, {devices}' if reason is None else f'absent: {reason}'}", end="")
        print(f" (the default on {default})" if default and reason is None else "")
    if BACKENDS["numba"].obstacle() is None:
        from rnnkern import native

        reason = native.obstacle()
        print(f"  calls of numba run in {'C++' if reason is None else f'Python, which takes longer: {reason}'}")


def _variants(kind: str, options: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to make a layer with for each of its kernels, and what to call that."""
    yield "", {}
    if options:
        yield " with options", {"zoneout": 0.1, "weight_dropout": 0.1}
        if kind == "GRU":
            yield " with reset_after=False", {"reset_after": False}


def warm(cells: list[str], dtypes: list[torch.dtype], options: bool) -> None:
    """Compiles forward and backward of each cell and dtype into the kernel cache, by running them. The third call goes
    by a plan, which has kernels of its own for masks; it is large enough for several threads, which have theirs."""
    from rnnkern.backends.numba_cpu import team
    from rnnkern.backends.numba_cpu.jit import CACHE_FOLDER, address

    torch.set_num_threads(2)
    address(team.take_own, 1)  # wide layers on few sequences run on it
    modules = {"LSTM": rnnkern.LSTM, "GRU": rnnkern.GRU, "RNN": rnnkern.RNN}
    for cell in cells:
        kind, _, nonlinearity = TORCH_CELLS[cell].mode.partition("_")
        plain = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
        for dtype, (name, more) in product(dtypes, list(_variants(kind, options))):
            start = time.perf_counter()
            layer = modules[kind](32, 64, dtype=dtype, backend="numba", **plain, **more)
            for _ in range(3):
                layer(torch.zeros(32, 32, 32, dtype=dtype))[0].sum().backward()
            seconds = time.perf_counter() - start
            print(f"{cell} {str(dtype).removeprefix('torch.')}{name}: ready in {seconds:.1f} s", flush=True)
    print(
        f"kept in {CACHE_FOLDER}"
        if CACHE_FOLDER
        else "not kept: the cache folder is not writable; set RNNKERN_CACHE_DIR"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rnnkern", description=__doc__)
    parser.add_argument("--warm", action="store_true", help="compile the kernels of the numba backend into its cache")
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=list(TORCH_CELLS),
        default=list(TORCH_CELLS),
        help="which cells to warm (default: all)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "float64"],
        default=["float32"],
        help="which dtypes (default: float32)",
    )
    parser.add_argument("--options", action="store_true", help="warm what layers with options run on, too")
    options = parser.parse_args()
    if options.warm:
        warm(options.cells, [getattr(torch, name) for name in options.dtypes], options.options)
    else:
        list_backends()


if __name__ == "__main__":
    main()
