"""Builds rnnkern. Everything declarative is in pyproject.toml; csrc/build.py compiles the CUDA extension.

    pip install -e .                        with CUDA where there is nvcc, else the pure package
    python setup.py build_ext --inplace     the extension again, what was touched only

csrc/build.py says what RNNKERN_CUDA, CUDA_HOME and RNNKERN_CUDA_ARCHS are. `python -m rnnkern` says what was built.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "rnnkern"

sys.path.insert(0, str(ROOT))  # a build front end leaves it out
from csrc import build  # noqa: E402


def why_pure() -> str | None:
    """Why there is nothing to compile, None if there is."""
    mode = build.cuda_mode()
    if mode == "wheel":
        return None  # this runs before pip has fetched the compiler too; if it is missing then, the build says so
    try:
        build.find_toolkit()
    except build.BuildError as error:
        if mode == "1":
            raise build.BuildError(f"RNNKERN_CUDA=1, but {error}") from error
        return str(error)
    return None


def record(package: Path, reason: str | None) -> None:
    """Leaves in `package` what was built. A pure package in place keeps no extension of an earlier build."""
    build.write_record(package, reason)
    if reason is not None:
        (package / build.module_file("_cuda")).unlink(missing_ok=True)
        print(f"rnnkern: without CUDA: {reason}", file=sys.stderr)


class BuildExtension(build_ext):
    """Compiles with ninja, in build/ of the checkout, whatever folder setuptools is given."""

    def run(self) -> None:
        """Builds, and says so beside the sources if it built there."""
        super().run()
        if self.inplace:
            record(PACKAGE, reason)

    def build_extension(self, ext: Extension) -> None:
        """Puts the compiled module where setuptools expects it."""
        toolkit = build.find_toolkit()
        try:
            compiled = build.build_cuda(build.cuda_folder(toolkit), toolkit)
        except build.BuildError as error:
            raise build.BuildError(f"{error}; RNNKERN_CUDA=0 installs the package without CUDA") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(compiled, target)


class BuildPackage(build_py):
    """Adds the record of what was built to the package."""

    def run(self) -> None:
        """Builds the Python part."""
        super().run()
        if not self.editable_mode:
            record(Path(self.build_lib) / PACKAGE.name, reason)
        elif reason is not None:  # else BuildExtension says so, once it has compiled
            record(PACKAGE, reason)


try:
    reason = why_pure()
    setup(
        ext_modules=[Extension("rnnkern._cuda", sources=[])] if reason is None else [],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
        setup_requires=build.CUDA_WHEELS if build.cuda_mode() == "wheel" else [],  # for the build; pip asks for them
    )
except build.BuildError as error:
    sys.exit(f"rnnkern: {error}")
