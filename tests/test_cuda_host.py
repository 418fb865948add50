"""The emulator that runs CUDA kernels on the CPU: every primitive against float64, the same under every schedule, and
what a kernel may do wrong is found, by the emulator itself or by the sanitizers with its help."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.cuda.library import NUMBERS, Library, build_library

Array = npt.NDArray[Any]
SEEDS = [0, 1, 2]
ROOT = Path(__file__).parents[1]
# Tensor cores cut off what they add at some bits behind the largest term; the host rounds once.
MMA_ERROR = 2.0**-21


class Host(Protocol):
    def set_schedule(self, seed: int) -> None: ...
    def selftest(self, name: str, source: int, target: int, stream: int) -> None: ...


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture(scope="session")
def library(folder: Path) -> Library:
    return Library(build_library(folder))


@pytest.fixture(scope="session")
def host(library: Library) -> Host:
    """What runs self-tests."""
    return library


class SelfTest(NamedTuple):
    """What a self-test reads, and what it has to write, within `error` of it; layouts are those of selftest.h."""

    source: Array
    expected: Array
    error: Array | float = 0.0


def rows(count: int, columns: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(0).standard_normal((count, columns)).astype(dtype)


def of_shuffles(dtype: Any) -> SelfTest:
    values = (rows(1, 32) * 1000).astype(dtype)[0]
    lane = np.arange(32)
    return SelfTest(values, values[[lane ^ 5, np.where(lane < 29, lane + 3, lane)]])


def hard_to_round(bits: int, *exponents: int) -> Array:
    """256 floats: special ones; halfway between neighbours of so many bits behind the point; beside these; others."""
    largest = float(np.finfo(np.float32).max)
    special = [np.nan, np.inf, 0.0, largest, 65504.0, 65519.0, 65520.0, 2.0**-14, 2.0**-25, 3 * 2.0**-25, 2.0**-126]
    halfway = [2.0**e * (1 + (2 * n + 1) / 2 ** (bits + 1)) for e in exponents for n in (0, 1, 2**bits - 1)]
    beside = [np.nextafter(np.float32(x), np.float32(to)) for x in halfway for to in (0, np.inf)]
    some = np.array([*special, *halfway, *beside, 2.0**-149, 3 * 2.0**-140], np.float32)
    both = np.concatenate([some, -some])
    count = 256 - both.size
    return np.concatenate([both, (rows(1, count)[0] * 2.0 ** np.linspace(-130, 120, count)).astype(np.float32)])


def as_float16(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def as_bfloat16(x: Array) -> Array:
    return torch.from_numpy(x).bfloat16().float().numpy()


def as_tf32(x: Array) -> Array:
    """Ties away from zero, 11 bits from the first on; below the normal numbers the step stays 2^-136."""
    wide = x.astype(np.float64)
    step = np.maximum(2.0 ** (np.frexp(np.where(np.isfinite(wide), wide, 1.0))[1] - 11), 2.0**-136)
    rounded = np.where(np.isfinite(wide), np.copysign(np.floor(np.abs(wide) / step + 0.5) * step, wide), wide)
    with np.errstate(over="ignore"):
        return rounded.astype(np.float32)


def of_matrices(count: int) -> SelfTest:
    numbers = np.arange(count * 64, dtype=np.uint16)
    # A lane gets a word, two numbers, of each matrix: lane 4 r + w the word w of row r.
    words = numbers.view(np.uint32).reshape(count, 32)
    return SelfTest(numbers, words.T.copy())


def of_mma(rounded: Callable[[Array], Array], depth: int, scale: float = 1.0) -> SelfTest:
    a, b, d = rows(16, depth) * np.float32(scale), rows(depth, 8)[:, ::-1], rows(16, 8)
    a_read, b_read = (rounded(np.ascontiguousarray(x)).astype(np.float64) for x in (a, b))
    source = np.concatenate([a.ravel(), b.ravel(), d.ravel()])
    error = MMA_ERROR * (np.abs(a_read) @ np.abs(b_read) + np.abs(d))
    return SelfTest(source, (d.astype(np.float64) + a_read @ b_read).astype(np.float32), error)


def of_copies() -> SelfTest:
    source = rows(32, 4)
    return SelfTest(source, np.where(np.arange(32)[:, None] % 2 == 0, source, 0))


SELFTESTS: dict[str, Callable[[], SelfTest]] = {
    "indices": lambda: SelfTest(np.zeros(1, np.uint32), np.arange(12 * 64, dtype=np.uint32)),
    "barrier": lambda: SelfTest(rows(1, 256), rows(1, 256)[:, ::-1]),
    "large_shared": lambda: SelfTest(rows(1, 256), rows(1, 256)[:, ::-1]),
    "syncwarp": lambda: SelfTest(rows(1, 32), rows(1, 32)[:, ::-1]),
    "shuffle_float": lambda: of_shuffles(np.float32),
    "shuffle_double": lambda: of_shuffles(np.float64),
    "shuffle_int": lambda: of_shuffles(np.int32),
    "bfloat16": lambda: SelfTest(x := hard_to_round(7, -100, 0, 1, 100), as_bfloat16(x)),
    "float16": lambda: SelfTest(x := hard_to_round(10, -14, 0, 1, 15), as_float16(x)),
    "to_tf32": lambda: SelfTest(x := hard_to_round(10, -100, 0, 1, 100), as_tf32(x)),
    "copy_async": of_copies,
    "copy_async_groups": lambda: SelfTest(rows(8, 128), rows(8, 128)[:, ::-1]),
    "load_matrix_x4": lambda: of_matrices(4),
    "load_matrix_x2": lambda: of_matrices(2),
    "mma_bf16": lambda: of_mma(as_bfloat16, 16),
    "mma_f16": lambda: of_mma(as_float16, 16, scale=2.0**-14),  # subnormals too
    "mma_tf32": lambda: of_mma(as_tf32, 8),
}


def run(host: Host, name: str, source: Array, expected: Array) -> Array:
    """What a self-test writes, into a buffer that is NaN before."""
    source = np.ascontiguousarray(source)
    target = np.full(expected.nbytes, 0xFF, np.uint8)
    host.selftest(name, source.ctypes.data, target.ctypes.data, 0)
    return target.view(expected.dtype).reshape(expected.shape)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SELFTESTS)
def test_a_primitive_does_what_it_should(host: Host, name: str, seed: int) -> None:
    test = SELFTESTS[name]()
    host.set_schedule(seed)
    got = run(host, name, test.source, test.expected)
    same = np.where(np.isnan(test.expected), np.isnan(got), got == test.expected)
    with np.errstate(invalid="ignore"):
        wrong = ~same & ~(np.abs(got.astype(np.float64) - test.expected) <= test.error)
    assert not wrong.any(), (got[wrong], test.expected[wrong])
    assert got[same & (got == 0)].tobytes() == test.expected[same & (got == 0)].astype(got.dtype).tobytes()  # -0 too


@pytest.mark.parametrize("name", SELFTESTS)
def test_schedules_give_the_same_bits(host: Host, name: str) -> None:
    test, written = SELFTESTS[name](), []
    for seed in SEEDS:
        host.set_schedule(seed)
        written.append(run(host, name, test.source, test.expected).tobytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("name", ["mma_bf16", "mma_f16", "mma_tf32"])
def test_nan_and_infinity_stay_in_their_row_and_column(host: Host, name: str) -> None:
    depth = 8 if name == "mma_tf32" else 16
    source = np.ones(16 * depth + depth * 8 + 16 * 8, np.float32)
    source[3 * depth + 5] = np.nan  # a[3, 5]
    source[16 * depth + 2 * 8 + 6] = np.inf  # b[2, 6]
    expected = np.full((16, 8), depth + 1, np.float32)
    expected[:, 6] = np.inf
    expected[3] = np.nan
    np.testing.assert_array_equal(run(host, name, source, expected), expected)


def test_an_unknown_self_test_is_refused(host: Host) -> None:
    with pytest.raises(RuntimeError):
        host.selftest("no_such", 0, 0, 0)


def test_launches_of_several_threads_take_turns(host: Host) -> None:
    host.set_schedule(0)

    def right(seed: int) -> bool:
        source = np.random.default_rng(seed).standard_normal(256).astype(np.float32)
        return all(np.array_equal(run(host, "barrier", source, source), source[::-1]) for _ in range(1000))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(4)))


# What each defect is refused with, under any schedule.
REPORTS = {
    "two_barriers": r"defects.cu:\d+: threads diverge: some wait in __syncthreads at .*defects.cu:\d+, another comes to"
    r" __syncthreads; thread \(\d+, 0, 0\) of block \(0, 0, 0\)",
    "early_end": r"deadlock: 1 threads have ended, 63 wait in __syncthreads at .*defects.cu:\d+ of block \(0, 0, 0\)",
    "two_shuffles": r"threads diverge: some wait in __shfl_\w+_sync at .*:\d+, another comes to __shfl_\w+_sync",
    "half_a_warp": r"deadlock: 32 threads have ended, 32 wait in __shfl_xor_sync at .*defects.cu:\d+",
    "part_of_a_mask": r"__shfl_xor_sync: the mask is 0000ffff; only whole warps \(ffffffff\) are emulated",
    "no_wait": r"defects.cu:\d+: copy_async16: the thread ends without having waited for this copy",
    "no_commit": r"copy_async16: the thread ends without having waited for this copy",
    "copy_from_misaligned": r"copy_async16: the global address 0x\w+ is not a multiple of 16",
    "copy_to_misaligned": r"copy_async16: the shared address, at offset 8, is not a multiple of 16",
    "copy_beyond_shared": r"copy_async16: 16 bytes at offset 1024 are not in the block's 1024 bytes of shared memory",
    "copy_of_8_bytes": r"copy_async16: bytes is 8, not 0 or 16",
    "matrix_misaligned": r"load_matrix_x4: the shared address, at offset \d+, is not a multiple of 16",
    "matrix_not_in_shared": r"load_matrix_x2: 16 bytes at offset -?\d+ are not in the block's 1024 bytes",
    "tf32_not_rounded": r"mma_tf32: operand 3eaaaaab is not what to_tf32 gives: its last 13 bits are not 0",
    "shared_overrun": r"a write before or behind the 1024 bytes of shared memory of block \(0, 0, 0\)",
    "too_much_shared": r"the launch asks for 49153 bytes of shared memory, and the kernel has leave for 49152",
    "too_much_allowed": r"a block has at most 232448 bytes of shared memory, not 232449",
    "too_many_threads": r"a block has 1 to 1024 threads, at most 64 along z; this one \(1025, 1, 1\)",
    "no_blocks": r"a grid has 1 to .* blocks; this one \(0, 1, 1\)",
}


def run_defect(library: Library, name: str) -> Array:
    numbers = np.arange(NUMBERS, dtype=np.float32)
    library.defect(name, numbers.ctypes.data)
    return numbers


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", REPORTS)
def test_a_defect_ends_the_launch_and_not_the_next(library: Library, name: str, seed: int) -> None:
    library.set_schedule(seed)
    with pytest.raises(RuntimeError, match=REPORTS[name]):
        run_defect(library, name)
    numbers = run_defect(library, "right")
    np.testing.assert_array_equal(numbers[128:].reshape(2, 64), numbers[:128].reshape(2, 64)[:, ::-1])


def test_what_is_copied_is_not_there_before_the_wait(library: Library) -> None:
    copied = np.tile(np.arange(0, 128, 4, dtype=np.float32), 2)
    library.set_schedule(0)
    np.testing.assert_array_equal(run_defect(library, "read_before_wait")[128:192], copied)
    library.set_schedule(1)
    assert np.isnan(run_defect(library, "read_before_wait")[128:192]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_is_nan_before_it_is_written(library: Library, seed: int) -> None:
    library.set_schedule(seed)
    assert np.isnan(run_defect(library, "no_barrier")[128:192]).any()


def test_blocks_run_in_either_order(library: Library) -> None:
    last = []
    for seed in SEEDS:
        library.set_schedule(seed)
        last.append(run_defect(library, "blocks_meet")[0])
    assert last == [1, 0, 0]


def run_sanitized(sanitizer: str, built: Path, seeds: Sequence[int], names: list[str], *options: str) -> str:
    """What a process with this sanitizer in front says on both streams."""
    runtime = {"thread": "libtsan.so", "address": "libasan.so"}[sanitizer]
    found = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True).stdout
    assert os.path.isabs(found), f"g++ comes without {runtime}"
    variable = {"thread": "TSAN_OPTIONS", "address": "ASAN_OPTIONS"}[sanitizer]
    environment = os.environ | {"LD_PRELOAD": found.strip(), variable: ":".join(options)}
    command = [sys.executable, "-m", "tests.cuda.library", str(built), "".join(map(str, seeds)), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    return done.stdout + done.stderr


REFUSED_IN_KERNEL = [name for name in REPORTS if not name.startswith(("too_", "no_blocks", "shared_overrun"))]
RACES = ["no_barrier", "shuffle_for_barrier", "copy_into_what_is_read", "copy_of_another_thread", "blocks_meet"]


@pytest.fixture(scope="session")
def thread_sanitized(folder: Path) -> Path:
    return build_library(folder, "thread")


@pytest.fixture(scope="session")
def address_sanitized(folder: Path) -> Path:
    return build_library(folder, "address")


def test_thread_sanitizer_has_nothing_against_right_kernels(thread_sanitized: Path) -> None:
    refused = [f"-{name}" for name in ("two_barriers", "early_end", "no_wait")]
    said = run_sanitized("thread", thread_sanitized, SEEDS, [*SELFTESTS, "-right", *refused, *SELFTESTS])
    assert "ThreadSanitizer" not in said, said
    assert said.count("\n") == len(refused) * len(SEEDS), said


@pytest.mark.parametrize("seed", SEEDS)
def test_thread_sanitizer_finds_races(thread_sanitized: Path, seed: int) -> None:
    names = [f"-{name}" for name in RACES]
    said = run_sanitized("thread", thread_sanitized, [seed], names, "suppress_equal_addresses=0", "exitcode=0")
    for name in RACES:
        assert re.search(rf"WARNING: ThreadSanitizer: data race(.*\n)*? +#\d {name} .*defects.cu", said), (name, said)


def test_address_sanitizer_has_nothing_against_right_kernels(address_sanitized: Path) -> None:
    refused = [f"-{name}" for name in [*REFUSED_IN_KERNEL, "copy_beyond_global"]]
    names = [*SELFTESTS, "-right", *refused, *SELFTESTS]
    said = run_sanitized("address", address_sanitized, SEEDS, names, "detect_leaks=0")
    assert "Sanitizer" not in said, said
    assert said.count("\n") == len(refused) * len(SEEDS), said
    assert "copy_async16: 16 bytes at the global address" in said


@pytest.mark.parametrize(
    ("name", "kind"), [("shared_overrun", "use-after-poison"), ("global_overrun", "heap-buffer-overflow")]
)
def test_address_sanitizer_finds_one_number_too_far(address_sanitized: Path, name: str, kind: str) -> None:
    said = run_sanitized("address", address_sanitized, [0], [f"-{name}"], "detect_leaks=0")
    assert f"AddressSanitizer: {kind}" in said, said
    assert f"in {name}" in said, said
