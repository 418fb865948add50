"""How the extension of planned calls is built: for which torch, what is refused and in which words."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from csrc import build, calls_build
from tests.build_support import executable, python, recompiled


def test_one_without_torch_fails_with_a_sentence(tree: Path) -> None:
    """torch without headers here, first on the path of what is asked for it."""
    script = f"#!/bin/sh\nexec {sys.executable} -c 'print(\"{tree}/torch/__init__.py\")'\n"
    asked = executable(tree / "python", script)
    run = f"import sys; sys.executable = {str(asked)!r}; sys.argv[1:] = ['-q', 'build_ext', '--inplace']"
    done = python(tree, "-c", f"{run}; import runpy; runpy.run_path('setup.py')", RNNKERN_CALLS="1", RNNKERN_CUDA="0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "rnnkern: RNNKERN_CALLS=1, but the Python that installs has no torch with C++ headers: install torch first, "
        "and rnnkern by pip"
    )


@pytest.mark.parametrize("command", [["build_ext", "--inplace"], ["bdist_wheel"]], ids=" ".join)
def test_what_cannot_be_compiled_is_left_out_and_told(tree: Path, command: list[str]) -> None:
    """A g++ that is too old, say: the package is complete without."""
    executable(tree / "bin" / "g++", "#!/bin/sh\nexit 1\n")
    settings = {"PATH": f"{tree / 'bin'}{os.pathsep}{os.environ['PATH']}", "RNNKERN_CUDA": "0"}
    done = python(tree, "setup.py", "-q", *command, RNNKERN_CALLS="auto", **settings)
    assert done.returncode == 0, done.stderr
    assert "rnnkern: without calls in C++: ninja could not build _calls" in done.stderr
    if command == ["bdist_wheel"]:
        (wheel,) = (tree / "dist").iterdir()
        with zipfile.ZipFile(wheel) as archive:
            names, text = archive.namelist(), archive.read(f"rnnkern/{calls_build.RECORD}")
    else:
        names = [path.name for path in (tree / "rnnkern").iterdir()]
        text = (tree / "rnnkern" / calls_build.RECORD).read_bytes()
    record = json.loads(text)
    assert record["torch"] is None
    assert record["reason"].startswith("ninja could not build _calls")
    assert not any(name.endswith(build.module_file("_calls")) for name in names)
    done = python(tree, "setup.py", "-q", *command, RNNKERN_CALLS="1", **settings)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("RNNKERN_CALLS=0 installs the package without calls in C++")


def test_the_torch_to_compile_for_is_the_installed_one(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_build.find_torch() == (torch.__version__, Path(torch.__file__).parent)
    monkeypatch.setenv("RNNKERN_CALLS", "wheel")
    with pytest.raises(build.BuildError, match=r"^RNNKERN_CALLS: expected auto, 0 or 1, got 'wheel'$"):
        calls_build.find_torch()
    monkeypatch.setenv("RNNKERN_CALLS", "")
    (bare / "g++").unlink()
    with pytest.raises(build.BuildError, match=r"^no g\+\+ was found on PATH"):
        calls_build.find_torch()


@pytest.mark.slow
def test_calls_are_built_for_this_torch(tree: Path) -> None:
    objects = tree / "build" / f"calls-{torch.__version__}"

    def build_in_place() -> None:
        done = python(tree, "setup.py", "-q", "build_ext", "--inplace", RNNKERN_CALLS="1")
        assert done.returncode == 0, done.stdout + done.stderr

    assert recompiled(objects, build_in_place) == {"bindings.o"}
    assert recompiled(objects, build_in_place) == set()
    (tree / "csrc" / "calls" / "launch.h").touch()
    assert recompiled(objects, build_in_place) == {"bindings.o"}
    module = tree / "rnnkern" / build.module_file("_calls")
    dynamic = subprocess.run(["readelf", "--dynamic", module], capture_output=True, text=True, check=True).stdout
    assert not re.search("R(UN)?PATH", dynamic)
    record = json.loads((tree / "rnnkern" / calls_build.RECORD).read_text())
    assert record == {"torch": torch.__version__, "reason": None}
    done = python(tree, "-m", "rnnkern")
    assert "calls of numba run in C++" in done.stdout, done.stderr
