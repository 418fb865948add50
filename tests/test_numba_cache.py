"""How kernels are compiled, kept and found again. Each test runs fresh processes, with a cache folder apart."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import rnnkern
from rnnkern.backends.numba_cpu import jit
from rnnkern.backends.numba_cpu.vector import host_features
from tests.mutations import changed

ROOT = Path(rnnkern.__file__).parents[1]
# Compiles one kernel, the cheapest, and prints a number that its cell determines, of weights in place and of packed.
ONE_KERNEL = """
import torch, rnnkern
m = rnnkern.RNN(2, 3, backend="numba")
with torch.no_grad():
    for p in m.parameters():
        p.fill_(0.5)
    print("value", *(f"{float(m(torch.ones(steps, 1, 2))[0][0, 0, 0]):.4f}" for steps in (1, 40)))
"""
ALL_SWEEPS = """
import torch
from rnnkern.backends.numba_cpu import vector
from tests.numba_support import LIMIT, ODD, difference, layer_forms, oracle, random_layer, sweeps
print("bytes", vector.VECTOR_BYTES)
for cell, name in {calls}:
    dtype = getattr(torch, name)
    for layer in (*layer_forms(cell, dtype), random_layer(cell, **ODD, dtype=dtype)):
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[dtype], (cell, name)
print("right")
"""
SLOW_FROM = "from rnnkern.backends.numba_cpu import jit\njit.SLOW_COMPILE_SECONDS = {}\n"
WITHOUT_JIT = """
import torch, rnnkern
try:
    rnnkern.RNN(2, 3, backend="numba")(torch.ones(1, 1, 2))
except RuntimeError as error:
    print("error", error)
rnnkern.RNN(2, 3)(torch.ones(1, 1, 2))
"""
TANH_OF_2 = "0.9640 0.9640"  # what it prints: 0.5 + 0.5 from the input, 0.5 + 0.5 from the biases


# A machine without AVX, which is also what an ARM machine gets: 16 bytes a vector. The quickest to compile for.
NO_AVX = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


def python(code: str, folder: Path, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process against the rnnkern in `folder`; returns what it said."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    settings = {"RNNKERN_CACHE_DIR": str(cache), "PYTHONPATH": paths, **NO_AVX, **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=kept | settings, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def value(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.split("value ")[1].strip()


def kernel_files(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.nb[ci]")}


class Warm(NamedTuple):
    """A copy of rnnkern, its cache, and what the process said that filled it, told to call every compilation slow."""

    package: Path
    cache: Path
    said: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Warm:
    package, cache = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("cache")
    shutil.copytree(ROOT / "rnnkern", package / "rnnkern", ignore=shutil.ignore_patterns("__pycache__"))
    return Warm(package, cache, python(SLOW_FROM.format(0.0) + ONE_KERNEL, package, cache))


def test_a_slow_compile_is_told_in_one_line(warm: Warm) -> None:
    (line,) = [line for line in warm.said.stderr.splitlines() if "rnn_tanh_forward" in line]
    assert "for float32 in" in line
    assert str(warm.cache) in line


def test_a_damaged_cache_is_told_and_computes(warm: Warm, tmp_path: Path) -> None:
    cache = shutil.copytree(warm.cache, tmp_path / "cache")
    indices = list(cache.rglob("*.nbi"))
    assert indices
    for index in indices:
        index.write_bytes(b"")
    again = python(ONE_KERNEL, warm.package, cache)
    assert "the kernel cache" in again.stderr
    assert value(again) == TANH_OF_2


def test_a_thread_that_outlives_the_main_one(warm: Warm) -> None:
    code = """
import threading, time
import torch, rnnkern
torch.set_num_threads(2)
m = rnnkern.RNN(8, 32)
x = torch.randn(100, 32, 8)
def work():
    time.sleep(1)
    with torch.no_grad():
        print("done", m(x)[0].shape[0])
threading.Thread(target=work).start()
"""
    assert "done 100" in python(code, warm.package, warm.cache).stdout


def test_a_second_process_compiles_nothing(warm: Warm) -> None:
    files = kernel_files(warm.cache)
    assert files
    # a slow machine may take a second to load one
    again = python(SLOW_FROM.format(5.0) + ONE_KERNEL, warm.package, warm.cache)
    assert again.stderr == ""
    assert value(again) == value(warm.said) == TANH_OF_2
    assert kernel_files(warm.cache) == files


class Edit(NamedTuple):
    file: str
    old: str
    new: str


# Each changes the number.
EDITS = [
    Edit("cells.py", "return tanh(load(gh, zero))", "return tanh(load(gh, zero) * 2.0)"),
    Edit("gates.py", "return u / (2.0 - u)", "return 0.5 * u / (2.0 - u)"),
    Edit("vector.py", "builder.fsub(a, b)", "builder.fadd(a, b)"),
    Edit("tile.py", "vector, element, weight, sums", "vector, element, element, sums"),
    Edit("blocks.py", "vector, value, factor, builder.load", "vector, value, value, builder.load"),
    Edit("sweep.py", "outer_row(sizes, rows, step, first + b), units", "0, units"),
    Edit("forward.py", "store_part(place + at, out, zero", "store_part(place + at, out + out, zero"),
    Edit("kernels.py", "getattr(cells, forward)", 'getattr(cells, forward.replace("tanh", "relu"))'),
]


@pytest.mark.parametrize("edit", [EDITS[0], *(pytest.param(edit, marks=pytest.mark.slow) for edit in EDITS[1:])])
def test_an_edit_is_never_answered_from_the_old_cache(edit: Edit, warm: Warm) -> None:
    path = warm.package / "rnnkern" / "backends" / "numba_cpu" / edit.file
    source, stamp = path.read_text(), path.stat()
    try:
        path.write_text(changed(source, *edit))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # an edit must tell by what it says, not by its date
        assert value(python(ONE_KERNEL, warm.package, warm.cache)) != value(warm.said)
    finally:
        path.write_text(source)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize("edit", EDITS)
def test_the_edits_fit_the_source(edit: Edit) -> None:
    """Those that do not always run are at least always possible."""
    changed((Path(jit.__file__).parent / edit.file).read_text(), *edit)


def test_every_file_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An edit to any of them means another folder."""
    folder = shutil.copytree(Path(jit.__file__).parent, tmp_path / "numba_cpu")
    monkeypatch.setattr(jit, "__file__", str(folder / "jit.py"))
    hashes = [jit._source_hash()]
    for path in sorted(folder.glob("*.py")):
        path.write_text(path.read_text() + "# edited\n")
        hashes.append(jit._source_hash())
    assert len(set(hashes)) == len(hashes) > 10


def test_an_unwritable_cache_folder_is_told_once_and_computes(warm: Warm) -> None:
    # A path below a file: permissions would not stop root.
    done = python(ONE_KERNEL, warm.package, Path(__file__) / "cache")
    assert value(done) == TANH_OF_2
    assert done.stderr.count("is not writable") == 1
    assert "RNNKERN_CACHE_DIR" in done.stderr


def test_a_disabled_jit_is_named_as_the_reason(warm: Warm) -> None:
    said = python(WITHOUT_JIT, warm.package, warm.cache, NUMBA_DISABLE_JIT="1")
    assert said.stdout.startswith("error ")
    assert "NUMBA_DISABLE_JIT" in said.stdout
    assert said.stderr.count("NUMBA_DISABLE_JIT") == 1  # what "auto" warns of when it takes the reference


# Other machines with less than this one.
NO_AVX512 = {
    "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma",
}
NO_FMA = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx"}


@pytest.mark.parametrize(
    ("features", "width", "calls"),
    [
        (NO_AVX, 16, [("rnn_tanh", "float32")]),
        pytest.param(
            NO_AVX,
            16,
            [("lstm", "float32"), ("lstm", "float64"), ("gru", "float32"), ("gru", "float64"), ("rnn_relu", "float32")],
            marks=pytest.mark.slow,
        ),
        pytest.param(NO_AVX512, 32, [("gru", "float64"), ("lstm", "float32")], marks=pytest.mark.slow),
        pytest.param(NO_FMA, 32, [("lstm", "float64"), ("gru", "float32")], marks=pytest.mark.slow),
    ],
    ids=["without-avx", "without-avx-all", "without-avx512", "without-fma"],
)
def test_on_a_lesser_machine(features: dict[str, str], width: int, calls: list[tuple[str, str]], warm: Warm) -> None:
    wanted = {name[1:] for name in features["NUMBA_CPU_FEATURES"].split(",") if name}
    if not wanted <= host_features():
        pytest.skip(f"this machine lacks {', '.join(sorted(wanted - host_features()))}")
    said = python(ALL_SWEEPS.format(calls=calls), warm.package, warm.cache, **features).stdout.split()
    assert said == ["bytes", str(width), "right"]
