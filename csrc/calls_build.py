"""Compiles csrc/calls with ninja and g++ into the extension rnnkern._calls, for setup.py: for the torch that rnnkern
will run with, and for no other.

The environment says what setup.py builds:

RNNKERN_CALLS   auto, the default: the extension where there are g++ and torch; 0: none; 1: the extension or an error
RNNKERN_WERROR  1: a warning is an error, as in .ci/run
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from csrc import build

# The file beside rnnkern/__init__.py in which the last build says what it did, for `python -m rnnkern`. Its fields:
#   torch    the version that the extension is for, like "2.13.0+cpu", else null
#   reason   why it was not built, a sentence, else null
RECORD = "_calls_build.json"


class Torch(NamedTuple):
    """A torch that can be compiled for."""

    version: str
    folder: Path


def mode() -> str:
    """What RNNKERN_CALLS asks for."""
    return build.mode_of("RNNKERN_CALLS", "auto", "0", "1")


def find_torch() -> Torch:
    """The torch that rnnkern will run with; a BuildError says why there is none.

    pip builds in an environment of its own, without torch. It makes it by PYTHONPATH, which -E leaves out. torch is not
    imported: that takes seconds."""
    if mode() == "0":
        raise build.BuildError("RNNKERN_CALLS=0 was set for the build")
    build.require_gxx()
    build.python_headers()
    ask = "from importlib.util import find_spec; found = find_spec('torch'); print(found.origin if found else '')"
    done = subprocess.run([sys.executable, "-E", "-c", ask], capture_output=True, text=True, check=True)
    answer = done.stdout.strip()
    folder = Path(answer).parent
    if not answer or not (folder / "include" / "ATen" / "ATen.h").is_file():
        raise build.BuildError(
            "the Python that installs has no torch with C++ headers: install torch first, and rnnkern by pip"
        )
    version = re.search(r"(?m)^__version__ = '(.+)'", (folder / "version.py").read_text())
    if version is None:
        raise build.BuildError(f"{folder}/version.py does not say which torch that is")
    return Torch(version[1], folder)


def write_record(package: Path, reason: str | None) -> None:
    """Leaves in `package` what the build did; `reason` is why it compiled nothing, None if it compiled."""
    record = {"torch": find_torch().version if reason is None else None, "reason": reason}
    (package / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def build_calls(torch: Torch) -> Path:
    """Compiles the extension module and gives the file. Its pybind11 is the one among torch's headers."""
    include, module = torch.folder / "include", build.module_file("_calls")
    headers = (include, include / "torch" / "csrc" / "api" / "include", build.python_headers())
    includes = [flag for path in headers for flag in ("-isystem", str(path))]
    flags = [*build.CXX_FLAGS, "-std=c++20", *includes]
    bindings = build.Compilation("gxx", build.SOURCE / "calls" / "bindings.cpp", "bindings.o", flags)
    # torch has loaded its libraries before, so that the module needs no path to them
    libraries = [f"-L{torch.folder / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python", "-lpthread"]
    folder = build.ROOT / "build" / f"calls-{torch.version}"
    build.run_ninja(folder, build.ninja_file([bindings], "_calls", libraries, nvcc=None), [module])
    return folder / module
