"""The compiled extension `rnnkern._cuda`: whether it can be used here, and why not."""

import json
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "rnnkern._cuda"
RECORD = Path(__file__).parents[2] / "_cuda_build.json"  # written by csrc/build.py, which lists its fields
OLDEST_CAPABILITY = (8, 0)


def load() -> ModuleType:
    return import_module(NAME)


def record() -> dict[str, Any]:
    """What the last build said of itself; empty for none."""
    found: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    return found


def version() -> str:
    built = record()
    return f"nvcc {built['nvcc']} for {', '.join(built['targets'])}" if built.get("cuda") else "of unknown origin"


@cache
def _build_obstacle() -> str | None:
    if find_spec(NAME) is None:
        reason = record().get("reason")
        return f"the extension {NAME} was not built: {reason or 'install rnnkern from its sources, with nvcc'}"
    try:
        load()
    except ImportError as error:
        return f"the extension {NAME} cannot be loaded: {error}; build it again"
    return None


def obstacle() -> str | None:
    """Why the sweeps cannot run on this machine's GPUs, or None."""
    reason = _build_obstacle()
    if reason is not None:
        return reason
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA; install one that was"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: is there one, with a driver new enough for this torch?"
    version: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    needed, driver = load().CUDART_VERSION // 1000, version // 1000
    if driver < needed:
        return f"the extension was built with CUDA {needed}, and the driver knows CUDA {driver}: update the driver"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why the sweeps cannot run on this one device, or None."""
    capability = torch.cuda.get_device_capability(device)
    targets = record().get("targets", [])
    if any(runs_on(target, capability) for target in targets) or (not targets and capability >= OLDEST_CAPABILITY):
        return None
    own, name = ".".join(map(str, capability)), torch.cuda.get_device_name(device)
    compiled = f"for {', '.join(targets)}" if targets else "for compute capability 8.0 and newer"
    return f"the kernels were compiled {compiled}, and {name} has compute capability {own}"


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether what nvcc compiled for `target` runs on a GPU: sm_N on its own generation from N on, sm_Na on N alone,
    PTX, compute_N, on all from N on."""
    kind, _, number = target.partition("_")
    wanted = int(number.rstrip("af")) // 10, int(number.rstrip("af")) % 10
    if kind == "compute":
        return capability >= wanted
    return capability == wanted if number.endswith("a") else capability[0] == wanted[0] and capability >= wanted
