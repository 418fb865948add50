"""What tests of builds share: a tree to build in, scripts in place of compilers, and what was compiled."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from csrc import build, calls_build

BUILD_INPUTS = ("csrc", "rnnkern", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def build_tree(folder: Path) -> Path:
    """A copy of what a build reads."""
    folder.mkdir()
    for name in BUILD_INPUTS:
        source = build.ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", build.RECORD, calls_build.RECORD)
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy2(source, folder / name)
    return folder


def python(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the tree, with no CUDA and no calls in C++ unless the environment names them."""
    ours = ("RNNKERN_CUDA", "RNNKERN_CALLS", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    settings = {"CUDA_HOME": str(tree / "nowhere"), "RNNKERN_CALLS": "0", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=kept | settings, cwd=tree, capture_output=True, text=True, check=False)


def recompiled(folder: Path, run: Callable[[], object]) -> set[str]:
    """The objects in the folder that `run` makes anew."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.o")}
    run()
    return {path.name for path in folder.glob("*.o") if before.get(path.name) != path.stat().st_mtime_ns}
