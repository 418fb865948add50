"""The CUDA sweeps on the CPU under sanitizers: no access outside of buffers and shared memory, and none that no barrier
orders. And defects put into a copy of the sources: each is caught by the check that is there for it."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from shutil import copytree
from typing import NamedTuple

import pytest

from tests.host import BUILD, ROOT, builder
from tests.mutations import changed

LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
REPORTS = {"address": "AddressSanitizer|runtime error", "thread": "ThreadSanitizer: (data race|SEGV)"}


def library(name: str) -> str:
    """A sanitizer's run-time library, which has to be in the process before Python."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(module: Path, sanitizer: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if sanitizer is not None:
        environment["LD_PRELOAD"] = library(LIBRARIES[sanitizer])
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's own
        environment["TSAN_OPTIONS"] = "halt_on_error=1"
    command = [sys.executable, "-m", "tests.cuda_run", str(module), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3000)


PAIRS, OPTIONS = ("--most", "2"), ("--options",)
SCHEDULES = ("--schedules", "0", "1", "2")
# Calls that torch.nn has too, alone and in pairs; and with everything that it lacks.
QUICK = {"torch": PAIRS, "options": (*OPTIONS, "--most", "0")}
LONG = {"torch in full": (*PAIRS, "--full"), "options in full": (*OPTIONS, *PAIRS, "--full")}


class Defect(NamedTuple):
    """Text of a source replaced by another, and the check that has to notice."""

    file: str
    old: str
    new: str
    check: str  # "results", or a sanitizer
    arguments: Sequence[str] = ()


LATE = ("--schedules", "1")  # copies land when they are waited for
DEFECTS = {
    "no barrier before a chunk is read": Defect(
        "product.cuh", "__syncthreads();  // the chunk is there", "// the chunk is there", "thread"
    ),
    "no barrier behind the table of rows": Defect(
        "product.cuh", "        __syncthreads();\n        const int64_t count", "        const int64_t count", "thread"
    ),
    "one stage too few": Defect("product.cuh", "chunk % kStages", "chunk % (kStages - 1)", "thread"),
    "no wait for copies": Defect("product.cuh", "copy_async_wait<kStages - 2>();", "", "results", LATE),
    "a wait that leaves one group too many": Defect(
        "product.cuh", "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>", "results", LATE
    ),
    "shared memory too small": Defect("product.cuh", "kTableBytes + kStages *", "kStages *", "address"),
    "no leave for much shared memory": Defect(
        "launch.cuh", "MaxDynamicSharedMemorySize, shared_bytes", "MaxDynamicSharedMemorySize, 0", "results"
    ),
    "vectors where numbers are not aligned": Defect(
        "launch.cuh", "depth * size % kVectorBytes == 0;", "true;", "results"
    ),
    "rows read past their end": Defect("product.cuh", "row != nullptr && k + v < depth", "row != nullptr", "address"),
    "two gates swapped": Defect("cells.cuh", "saved[0] = i;", "saved[0] = f;", "results"),
    "the reset gate before the product": Defect("cells.cuh", "gx[2] + r * gh[2]", "r * (gx[2] + gh[2])", "results"),
    "a sign": Defect("cells.cuh", "around.h_prev - n)", "n - around.h_prev)", "results"),
    "c0 for every sequence": Defect(
        "backward_unit.cuh", "c_before = place.has(after, position)", "c_before = false", "results"
    ),
    "sequences that have ended": Defect(
        "launch.cuh", "moment.index < sequences.lengths[sequence(position)]", "true", "results"
    ),
    "sequences in no order": Defect(
        "launch.cuh", "position : sequences.order[position]", "position : position", "results"
    ),
    "what goes past W_hh": Defect(
        "backward_unit.cuh", "if (sweep.direct != nullptr) dh +=", "if (false) dh +=", "results"
    ),
    "no barrier before sums take the place of chunks": Defect(
        "product.cuh", "__syncthreads();  // nobody reads the last chunk", "// nobody reads the last chunk", "thread"
    ),
    "a mask that is not scaled": Defect(
        "states.cuh",
        "h * to_real(place.state(mask, sequence, place.sizes.outputs)[unit])",
        "to_real(place.state(mask, sequence, place.sizes.outputs)[unit]) == 0 ? 0 : h",
        "results",
        OPTIONS,
    ),
    "a gradient that leaks over a reset": Defect("backward_unit.cuh", "            dh = 0;\n", "", "results", OPTIONS),
    "a gradient of c that does": Defect("backward_unit.cuh", "                dc = 0;\n", "", "results", OPTIONS),
    "old and new swapped in zoneout": Defect(
        "cells.cuh", "if (keeps) return old;", "if (!keeps) return old;", "results", OPTIONS
    ),
    "zoneout of the gradient dropped": Defect("cells.cuh", "if (keeps) return gradient;", "", "results", OPTIONS),
    "statistics over one gate": Defect(
        "layer_norm.cuh",
        "of_gh(of_warps, raw, Policy::kGates * hidden)",
        "of_gh(of_warps, raw, hidden)",
        "results",
        OPTIONS,
    ),
    "statistics over the wrong gate in backward": Defect(
        "layer_norm.cuh", "of_gh(of_warps, raw, width)", "of_gh(of_warps, raw, sweep.sizes.hidden)", "results", OPTIONS
    ),
    "no barrier between sums of a block": Defect(
        "layer_norm.cuh", "__syncthreads();  // the sums before", "// the sums before", "thread", OPTIONS
    ),
    "the peephole of o at the c before": Defect(
        "cells.cuh", "peepholes.of(2, c)", "peepholes.of(2, around.c_prev)", "results", OPTIONS
    ),
    "u in the half that is read": Defect(
        "forward_unit.cuh", "(step.number + 1) % 2", "step.number % 2", "results", OPTIONS
    ),
    "a range that forgets what is carried": Defect(
        "steps.h", "if (n == begin) step.before[d].count = 0;", "", "results", OPTIONS
    ),
    "r u past the mask": Defect(
        "reset_before.cu", "masked<Precision>(place, sweep.extras, sequence, u, du)", "du", "results", OPTIONS
    ),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a copy of the sources and its builds."""
    return tmp_path_factory.mktemp("csrc")


def build(workshop: Path, sanitizer: str | None, defect: Defect | None) -> Path:
    """The sweeps in float32, with a defect. ninja compiles again what the defect, or its end, touches."""
    source = workshop / "csrc"
    copied = copytree(ROOT / "csrc", workshop / "new", dirs_exist_ok=True)
    if defect is not None:
        file = copied / defect.file
        file.write_text(changed(file.read_text(), defect.file, defect.old, defect.new))
    for path in copied.rglob("*"):
        place = source / path.relative_to(copied)
        if path.is_file() and not (place.is_file() and place.read_bytes() == path.read_bytes()):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    module: Path = builder().build_host(workshop / "build", sanitizer, source, ["float32"])
    return module


ARGUMENTS = ("--dtypes", "float32", "--full")


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        # one in every run of the tests
        pair if pair == ("options", "address") else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in product(QUICK, LIBRARIES)
    ],
)
def test_nothing_is_found(name: str, sanitizer: str, workshop: Path) -> None:
    """Each call in one tile and schedule, in float32."""
    nothing_found(build(workshop, sanitizer, None), sanitizer, "--dtypes", "float32", *QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", LIBRARIES)
@pytest.mark.parametrize("name", LONG)
def test_nothing_is_found_in_any_dtype(name: str, sanitizer: str) -> None:
    """Each call in all dtypes, tiles and schedules."""
    nothing_found(builder().build_host(BUILD, sanitizer), sanitizer, *LONG[name])


def nothing_found(module: Path, sanitizer: str, *arguments: str) -> None:
    done = run(module, sanitizer, *SCHEDULES, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 wrong results" in done.stdout


# Some in every run of the tests; those that have everything compiled again take minutes.
ALWAYS = ("two gates swapped", "a mask that is not scaled", "statistics over one gate")
CHOSEN = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in DEFECTS]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_defect_is_caught(name: str, workshop: Path) -> None:
    defect = DEFECTS[name]
    sanitizer = defect.check if defect.check in LIBRARIES else None
    done = run(build(workshop, sanitizer, defect), sanitizer, *ARGUMENTS, *defect.arguments)
    assert done.returncode != 0, "nothing was noticed"
    if sanitizer is None:
        assert "WRONG" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    else:
        assert re.search(REPORTS[sanitizer], done.stderr), done.stdout[-2000:] + done.stderr[-2000:]


def test_without_a_defect_nothing_is_caught(workshop: Path) -> None:
    done = run(build(workshop, None, None), None, *ARGUMENTS, *SCHEDULES)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
