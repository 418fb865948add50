"""Builds rnnkern. Everything declarative is in pyproject.toml; csrc/build.py and csrc/calls_build.py
compile the extensions.

    pip install -e .                        _cuda where there is nvcc, _calls where there are g++ and torch
    python setup.py build_ext --inplace     the extensions again, what was touched only

Both say what the variables of the environment are that they hear. `python -m rnnkern` says what was built.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "rnnkern"

sys.path.insert(0, str(ROOT))  # a build front end leaves it out
from csrc import build, calls_build  # noqa: E402


class Part(NamedTuple):
    """An extension that may be built."""

    what: str
    variable: str  # of the environment
    mode: Callable[[], str]  # what it asks for
    find: Callable[[], Any]  # what to compile with; a BuildError says why there is nothing
    compile: Callable[[Any], Path]  # with what was found
    write_record: Callable[[Path, str | None], None]
    may_fail: bool = False  # to compile, where nobody insists on it


PARTS = {
    "_cuda": Part("CUDA", "RNNKERN_CUDA", build.cuda_mode, build.find_toolkit, build.build_cuda, build.write_record),
    "_calls": Part(
        "calls in C++", "RNNKERN_CALLS", calls_build.mode, calls_build.find_torch, calls_build.build_calls,
        calls_build.write_record, may_fail=True,
    ),
}  # fmt: skip


def why_not(part: Part) -> str | None:
    """Why there is nothing to compile, None if there is."""
    mode = part.mode()
    if mode == "wheel":
        return None  # this runs before pip has fetched the compiler too; if it is missing then, the build says so
    try:
        part.find()
    except build.BuildError as error:
        if mode == "1":
            raise build.BuildError(f"{part.variable}=1, but {error}") from error
        return str(error)
    return None


def record(package: Path, name: str) -> None:
    """Leaves in `package` what was done about an extension. None of an earlier build stays where none is built."""
    part, reason = PARTS[name], reasons[name]
    part.write_record(package, reason)
    if reason is not None:
        (package / build.module_file(name)).unlink(missing_ok=True)
        print(f"rnnkern: without {part.what}: {reason}", file=sys.stderr)


class BuildExtension(build_ext):
    """Compiles with ninja, in build/ of the checkout, whatever folder setuptools is given."""

    def run(self) -> None:
        """Builds, and says so beside the sources if it built there."""
        super().run()
        if self.inplace:
            for name in PARTS:
                record(PACKAGE, name)

    def build_extension(self, ext: Extension) -> None:
        """Puts the compiled module where setuptools expects it."""
        name = ext.name.rpartition(".")[2]
        part = PARTS[name]
        found = part.find()
        try:
            compiled = part.compile(found)
        except build.BuildError as error:
            if not ext.optional:
                raise build.BuildError(
                    f"{error}; {part.variable}=0 installs the package without {part.what}"
                ) from error
            reasons[name] = str(error)
            packed = Path(self.build_lib) / PACKAGE.name  # what becomes a wheel, where BuildPackage has left its record
            if packed.is_dir():
                record(packed, name)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(compiled, target)  # newer than what an earlier build has left in place, and so taken


class BuildPackage(build_py):
    """Adds the record of what was built to the package."""

    def run(self) -> None:
        """Builds the Python part."""
        super().run()
        for name, reason in reasons.items():
            if not self.editable_mode:
                record(Path(self.build_lib) / PACKAGE.name, name)
            elif reason is not None:  # else BuildExtension says so, once it has compiled
                record(PACKAGE, name)


try:
    reasons = {name: why_not(part) for name, part in PARTS.items()}
    setup(
        ext_modules=[
            Extension(f"rnnkern.{name}", sources=[], optional=part.may_fail and part.mode() == "auto")
            for name, part in PARTS.items()
            if reasons[name] is None
        ],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
        setup_requires=build.CUDA_WHEELS if build.cuda_mode() == "wheel" else [],  # for the build; pip asks for them
    )
except build.BuildError as error:
    sys.exit(f"rnnkern: {error}")
