"""How kernels are compiled, kept and found again. Each test runs fresh processes, with a cache folder of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rnnkern

Python = Callable[..., subprocess.CompletedProcess[str]]

# Compiles one kernel, the cheapest, and prints a number that its cell determines.
ONE_KERNEL = """
import torch, rnnkern
m = rnnkern.RNN(2, 3, backend="numba")
with torch.no_grad():
    for p in m.parameters():
        p.fill_(0.5)
    print("value", float(m(torch.ones(1, 1, 2))[0][0, 0, 0]))
"""
ALL_SWEEPS = """
import torch
from rnnkern.backends.numba_cpu import vector
from tests.test_numba_backend import oracle, sweeps
from tests.numba_support import difference, layer_forms, random_layer
print("bytes", vector.VECTOR_BYTES)
for cell, name in {calls}:
    dtype = getattr(torch, name)
    for layer in (*layer_forms(cell, dtype), random_layer(cell, steps=4, batch=13, inputs=7, hidden=19, dtype=dtype)):
        assert difference(sweeps(layer), oracle(layer)) < (1e-12 if name == "float64" else 1e-5), (cell, name)
print("right")
"""
TANH_OF_2 = "0.9640"  # what it prints: 0.5 + 0.5 from the input, 0.5 + 0.5 from the biases


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of rnnkern that a test may edit."""
    source = Path(rnnkern.__file__).parent
    shutil.copytree(source, tmp_path / "copy" / "rnnkern", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Runs code in a fresh process against the rnnkern in `folder`, by default the one under test; returns what it said."""
    root = Path(rnnkern.__file__).parents[1]

    def run(code: str, folder: Path = root, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = [str(folder), str(root)]
        settings = {"RNNKERN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(paths), **environment}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**kept, **settings}, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == expect, done.stderr
        return done

    return run


def value(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.split("value ")[1][:6]


def kernel_files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*.nb[ci]") if path.is_file()}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name}: {old!r} is found {text.count(old)} times, not once"
    path.write_text(text.replace(old, new))


def test_a_second_process_compiles_nothing(python: Python, tmp_path: Path) -> None:
    first = python(ONE_KERNEL)
    files = {path: path.stat().st_mtime_ns for path in kernel_files(tmp_path / "cache")}
    assert files
    second = python("import rnnkern.backends.numba_cpu as backend\nbackend.SLOW_COMPILE_SECONDS = 1.0\n" + ONE_KERNEL)
    assert second.stderr == ""
    assert value(second) == value(first)
    assert {path: path.stat().st_mtime_ns for path in kernel_files(tmp_path / "cache")} == files


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("cells.py", "return tanh(load(gh, zero))", "return tanh(load(gh, zero) * 2.0)"),
        pytest.param("gates.py", "return e / (e + 2.0)", "return 0.5 * e / (e + 2.0)", marks=pytest.mark.slow),
        pytest.param("vector.py", "builder.fsub(a, b)", "builder.fadd(a, b)", marks=pytest.mark.slow),
        pytest.param("tile.py", "elements[row], weights[column]", "elements[row], elements[row]", marks=pytest.mark.slow),
        pytest.param("sweep.py", "store(h_new + r * a.h.row + at, out)", "out = out + out", marks=pytest.mark.slow),
        pytest.param("kernels.py", "1, False, cells.rnn_tanh_forward", "1, False, cells.rnn_relu_forward", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if value.endswith(".py") else "",
)
def test_an_edit_is_never_answered_from_the_old_cache(file: str, old: str, new: str, python: Python, package: Path) -> None:
    """The answer after the edit is the one that a cache which has never seen the old source gives."""
    before = value(python(ONE_KERNEL, package))
    path = package / "rnnkern" / "backends" / "numba_cpu" / file
    stamp = path.stat()
    edit(path, old, new)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # an edit must tell by what it says, not by its date
    after = value(python(ONE_KERNEL, package))
    assert after == value(python(ONE_KERNEL, package, RNNKERN_CACHE_DIR=str(package.parent / "fresh")))
    assert after != before


def test_an_unwritable_cache_folder_is_told_once_and_computes(python: Python) -> None:
    # A path below a file: permissions would not stop root.
    done = python(ONE_KERNEL, RNNKERN_CACHE_DIR=str(Path(__file__) / "cache"), NUMBA_OPT="1")
    assert value(done) == TANH_OF_2
    assert done.stderr.count("is not writable") == 1
    assert "RNNKERN_CACHE_DIR" in done.stderr


def test_a_slow_compile_is_told_in_one_line(python: Python, tmp_path: Path) -> None:
    quick = "import rnnkern.backends.numba_cpu as backend\nbackend.SLOW_COMPILE_SECONDS = {}\n"
    said = python(quick.format(0.0) + ONE_KERNEL).stderr.splitlines()
    (line,) = [line for line in said if "rnn_tanh_forward" in line]
    assert "for float32 in" in line
    assert str(tmp_path / "cache") in line
    shutil.rmtree(tmp_path / "cache")
    assert python(quick.format(1000.0) + ONE_KERNEL).stderr == ""


def test_a_disabled_jit_is_named_as_the_reason(python: Python) -> None:
    code = "import torch, rnnkern\nrnnkern.RNN(2, 3, backend='numba')(torch.ones(1, 1, 2))"
    assert "NUMBA_DISABLE_JIT" in python(code, expect=1, NUMBA_DISABLE_JIT="1").stderr.splitlines()[-1]
    code = code.replace("'numba'", "'auto'")
    done = python(code, NUMBA_DISABLE_JIT="1")
    assert done.stderr.count("NUMBA_DISABLE_JIT") == 1


# Machines with less than this one. Sixteen bytes a vector is also what a machine without AVX, or an ARM one, gets.
NO_AVX = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
NO_AVX512 = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma"}
NO_FMA = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx"}


def machine() -> Any:
    from rnnkern.backends.numba_cpu.vector import host_features

    return host_features()


@pytest.mark.parametrize(
    ("features", "width", "calls"),
    [
        (NO_AVX, 16, [("lstm", "float32")]),
        pytest.param(NO_AVX, 16, [("lstm", "float64"), ("gru", "float32"), ("gru", "float64"), ("rnn_relu", "float32")], marks=pytest.mark.slow),
        pytest.param(NO_AVX512, 32, [("gru", "float64"), ("lstm", "float32")], marks=pytest.mark.slow),
        pytest.param(NO_FMA, 32, [("lstm", "float64"), ("gru", "float32")], marks=pytest.mark.slow),
    ],
    ids=["without-avx", "without-avx-all", "without-avx512", "without-fma"],
)
def test_on_a_lesser_machine(features: dict[str, str], width: int, calls: list[tuple[str, str]], python: Python) -> None:
    wanted = {name[1:] for name in features["NUMBA_CPU_FEATURES"].split(",") if name}
    if not wanted <= machine():
        pytest.skip(f"this machine lacks {', '.join(sorted(wanted - machine()))}")
    said = python(ALL_SWEEPS.format(calls=calls), **features).stdout.split()
    assert said == ["bytes", str(width), "right"]
