"""The cost probe of benchmarks/gpu compiles without a warning, for the GPUs that it is for."""

import subprocess
from pathlib import Path

import pytest

from csrc import build
from tests.test_kernel_resources import kernels_by_target, local_memory


def test_compiles_without_a_warning(tmp_path: Path) -> None:
    try:
        toolkit = build.find_toolkit()
    except build.BuildError as error:
        pytest.skip(f"nothing to compile kernels with: {error}")
    source = build.ROOT / "benchmarks" / "gpu" / "probe.cu"
    command = [
        str(toolkit.nvcc),
        *build.NVCC_FLAGS,
        "-gencode=arch=compute_90a,code=sm_90a",
        str(source),
        "-o",
        "probe",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert kernels_by_target(done.stderr)["sm_90a"] > 0
    assert local_memory(done.stderr) == []
