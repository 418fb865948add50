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
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why the sweeps cannot run on this one device, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        oldest, own = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
        name = torch.cuda.get_device_name(device)
        return f"the kernels need a GPU of compute capability {oldest} or newer, and {name} has {own}"
    return None
