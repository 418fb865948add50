"""No kernel spills registers or keeps anything in local memory, which is as slow as global memory: by what ptxas said
when the extension was compiled."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from csrc import build

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
AMOUNT = re.compile(r"([1-9]\d*) bytes (stack frame|spill stores|spill loads|cumulative stack size|lmem)")

SPILLS = """
__global__ void __launch_bounds__(1024, 2) kernel(float* x) {
    float kept[48];
#pragma unroll
    for (int i = 0; i < 48; ++i) kept[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 48; ++i) x[i * 1024 + threadIdx.x] = kept[i] * kept[(i * 7 + 5) % 48];
}
"""
INDEXED = """
__global__ void kernel(float* x, const int* where) {
    float kept[48] = {};
    for (int i = 0; i < 48; ++i) kept[where[i]] += x[i];
    for (int i = 0; i < 48; ++i) x[i] = kept[i];
}
"""


def kernels_by_target(report: str) -> Counter[str]:
    """How many kernels ptxas compiled for each target."""
    return Counter(target for _, target in ENTRY.findall(report))


def local_memory(report: str) -> list[str]:
    """What in ptxas' report uses local memory, a line each."""
    found = []
    name = target = ""
    for line in report.splitlines():
        if entry := ENTRY.search(line):
            name, target = entry.groups()
        elif function := FUNCTION.search(line):
            name = function[1]
        found += [f"{name} for {target}: {amount} bytes {what}" for amount, what in AMOUNT.findall(line)]
    return found


@pytest.fixture(scope="module")
def toolkit() -> build.Toolkit:
    try:
        return build.find_toolkit()
    except build.BuildError as error:
        pytest.skip(f"nothing to compile kernels with: {error}")


def check_kernels(reports: list[Path]) -> None:
    machine_code = {name for name in build.targets() if name.startswith("sm_")}
    found = []
    for path in reports:
        report = path.read_text()
        counts = kernels_by_target(report)
        assert set(counts) == machine_code, f"{path.name}: kernels are missing"
        assert len(set(counts.values())) == 1, f"{path.name}: not all targets have all kernels: {dict(counts)}"
        found += local_memory(report)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        pytest.param(SPILLS, r"kernel.* for sm_80: \d+ bytes spill stores", id="too many registers"),
        pytest.param(INDEXED, r"kernel.* for sm_80: \d+ bytes stack frame", id="an array that is indexed"),
        pytest.param("", "kernels are missing", id="no kernel"),
    ],
)
def test_local_memory_is_seen(
    toolkit: build.Toolkit, tmp_path: Path, code: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_ARCHS", "80")
    (tmp_path / "kernel.cu").write_text(code)
    command = [str(toolkit.nvcc), *build.NVCC_FLAGS, "-arch=sm_80", "-cubin", "kernel.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    report = tmp_path / "kernel.ptxas"
    report.write_text(done.stderr)
    with pytest.raises(AssertionError, match=complaint):
        check_kernels([report])


def test_no_kernel_uses_local_memory(toolkit: build.Toolkit) -> None:
    """Takes the objects of the last build, and compiles what has been touched since."""
    check_kernels(build.build_kernels(build.cuda_folder(toolkit), toolkit))


@pytest.mark.slow
def test_no_kernel_uses_local_memory_on_gpus_that_compile_the_ptx(
    toolkit: build.Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have another compiler, the driver's; this is the nearest to it that is here."""
    known = subprocess.run([toolkit.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    monkeypatch.setenv("RNNKERN_CUDA_ARCHS", ";".join(arch for arch in ("90", "100", "120") if f"sm_{arch}" in known))
    check_kernels(build.build_kernels(tmp_path, toolkit))
