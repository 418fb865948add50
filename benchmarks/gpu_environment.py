"""What a run on a GPU ran on, as JSON: `python -m benchmarks.gpu_environment`."""

import json
import os
import platform
import subprocess
import sys
from typing import Any

import torch

import rnnkern
from benchmarks import machine
from csrc import build


def describe() -> dict[str, Any]:
    """Machine, GPU, driver, compiler and versions."""
    return {
        "cpu": machine.cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "numba": machine.installed("numba"),
        "rnnkern": rnnkern.__version__,
        "commit": machine.commit(),
        "nvcc": compiler(),
        "driver": driver(),
        "gpus": gpus(),
    }


def gpus() -> list[dict[str, Any]]:
    """Those that torch finds."""
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "multiprocessors": gpu.multi_processor_count,
                "memory": gpu.total_memory,
            }
        )
    return found


def compiler() -> str:
    """The version of nvcc, or why there is none."""
    try:
        return build.find_toolkit().version
    except build.BuildError as error:
        return f"none: {error}"


def driver() -> str:
    """Its version, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip().partition("\n")[0]


if __name__ == "__main__":
    json.dump(describe(), sys.stdout, indent=2)
    print()
