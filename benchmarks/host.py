"""The device called host: the CUDA sweeps' own sources, compiled by g++ and run on the CPU. `register` makes it a
backend like the others, on the same code as "cuda". It shows that what runs on a GPU runs; its speed says nothing."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from rnnkern.backends import BACKENDS, Entry

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "host"
NAME = "host"
BACKEND_MODULE = "benchmarks.host_backend"


def load_from(path: Path, name: str) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def builder() -> ModuleType:
    """csrc/build.py."""
    return load_from(ROOT / "csrc" / "build.py", "rnnkern_build")


@cache
def extension() -> ModuleType:
    """The sweeps for the host, compiled if they are not."""
    return load_from(builder().build_host(BUILD), "_host")


def register() -> None:
    """Makes backend="host" run the sweeps on CPU tensors."""
    BACKENDS[NAME] = Entry(BACKEND_MODULE, lambda: "csrc/host", lambda: None, ("cpu",))
