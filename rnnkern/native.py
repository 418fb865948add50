"""The compiled extension `rnnkern._calls` (csrc/calls): repeated calls without Python between torch and the sweeps.
Where it was not built, shortcut.py, planned.py and the CPU backend's program.py do the same in Python, and a small call
takes longer."""

import json
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

NAME = "rnnkern._calls"
RECORD = Path(__file__).parent / "_calls_build.json"  # csrc/calls_build.py lists its fields


@cache
def obstacle() -> str | None:
    """Why calls run in Python, None if they do not."""
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if find_spec(NAME) is None:
        return f"the extension {NAME} was not built: {record.get('reason') or 'install rnnkern from its sources'}"
    if record.get("torch") != torch.__version__:  # looked at before it is loaded: torch's C++ interface is another one
        built, here = record.get("torch") or "an unknown version", torch.__version__
        return f"the extension {NAME} was built for torch {built}, and this is {here}; install rnnkern again"
    try:
        import_module(NAME)
    except ImportError as error:
        return f"the extension {NAME} cannot be loaded: {error}; install rnnkern again"
    return None


def _load() -> Any:
    """The extension, or None; says so where there is one that cannot be used."""
    reason = obstacle()
    if reason is None:
        return import_module(NAME)
    if find_spec(NAME) is not None:
        warnings.warn(f"rnnkern: calls run in Python, which takes longer: {reason}", RuntimeWarning, stacklevel=2)
    return None


calls = _load()
