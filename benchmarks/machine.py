"""What a time was measured on: the CPU, the versions, the commit, and how fast one core could be at best."""

import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from pathlib import Path
from time import perf_counter
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

import rnnkern

ROOT = Path(__file__).resolve().parents[1]

ACCUMULATORS = 12  # chains of dependent FMAs that hide each other's latency and fit the registers
VECTOR_BYTES = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Goes into every line of the CSV."""

    cpu: str
    cores: int
    torch: str
    numba: str
    rnnkern: str
    onnxruntime: str
    commit: str

    @property
    def computer(self) -> str:
        """What computes."""
        return self.cpu

    @property
    def title(self) -> str:
        """What computes, and how much of it there is."""
        return f"{self.cpu}, {self.cores} cores"


@dataclass(frozen=True, kw_only=True)
class GpuMachine(Machine):
    """The same with a GPU, on which all is computed."""

    gpu: str
    capability: str  # "9.0"
    processors: int  # multiprocessors
    cuda: str  # torch's, as cudnn is
    cudnn: int  # 91300 is 9.13.0

    @property
    def computer(self) -> str:
        """What computes."""
        return self.gpu

    @property
    def title(self) -> str:
        """What computes: there is one of it."""
        return self.gpu


def describe() -> Machine:
    """This machine and what is installed on it."""
    return Machine(
        cpu=cpu_name(),
        cores=cpu_count() or 1,
        torch=torch.__version__,
        numba=numba.__version__,
        rnnkern=rnnkern.__version__,
        onnxruntime=installed("onnxruntime"),
        commit=commit(),
    )


def slug(machine: Machine) -> str:
    """The name of the machine's CSV: `amd-epyc-25-17-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", machine.title.lower()).strip("-")


def cpu_name() -> str:
    """The model's name, with family and model numbers, since virtual machines cut the name short (`AMD EPYC 25/17`)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b", "", found["model name"], flags=re.IGNORECASE)
    numbers = "/".join(found[key] for key in ("cpu family", "model") if key in found)
    return " ".join(f"{name} {numbers}".split())


def installed(distribution: str) -> str:
    """Its version, or nothing if it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that is checked out, `-dirty` if anything but the results differs from it; empty without git."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return ""
    if head.returncode != 0:
        return ""
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head.stdout.strip() + ("-dirty" if changes.stdout else "")


def ceiling(dtype: torch.dtype) -> float:
    """GF/s of one core: fused multiply-adds in registers, no memory touched; the best of three vector widths.

    bfloat16 layers compute in float32, so that float32's ceiling is theirs.
    """
    scalar, count = (types.float64 if dtype == torch.float64 else types.float32), 1_000_000
    best = 0.0
    for width in VECTOR_BYTES:
        lanes = width * 8 // scalar.bitwidth
        loop = fma_loop(scalar, lanes)
        loop(1, 0.999, 0.001)  # compiles
        for _ in range(5):
            start = perf_counter()
            loop(count, 0.999, 0.001)
            best = max(best, 2.0 * ACCUMULATORS * lanes * count / (perf_counter() - start) / 1e9)
    return best


@cache
def fma_loop(scalar: Any, lanes: int) -> Any:
    """A compiled `loop(count, factor, addend)`: each accumulator becomes itself * factor + addend, count times.

    An accumulator is a vector of so many lanes; the loop returns the sum of all their lanes.
    """

    def chains(typing: Any, count: Any, factor: Any, addend: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.VectorType(context.get_value_type(scalar), lanes)

            def splat(value: Any) -> Any:
                vector = ir.Constant(kind, ir.Undefined)
                for lane in range(lanes):
                    vector = builder.insert_element(vector, value, ir.IntType(32)(lane))
                return vector

            fma_type = ir.FunctionType(kind, [kind, kind, kind])
            fma = ir.Function(builder.module, fma_type, f"llvm.fmuladd.v{lanes}f{scalar.bitwidth}")
            factors, addends = splat(arguments[1]), splat(arguments[2])
            # on the stack in this text; LLVM lifts them into registers
            accumulators = [builder.alloca(kind) for _ in range(ACCUMULATORS)]
            for start, accumulator in enumerate(accumulators):
                builder.store(ir.Constant(kind, [float(start)] * lanes), accumulator)
            with cgutils.for_range(builder, arguments[0]):
                for accumulator in accumulators:
                    builder.store(builder.call(fma, [builder.load(accumulator), factors, addends]), accumulator)
            total = builder.load(accumulators[0])
            for accumulator in accumulators[1:]:
                total = builder.fadd(total, builder.load(accumulator))
            result = builder.extract_element(total, ir.IntType(32)(0))
            for lane in range(1, lanes):  # every lane is used, or LLVM would drop it
                result = builder.fadd(result, builder.extract_element(total, ir.IntType(32)(lane)))
            return result

        return scalar(types.intp, scalar, scalar), generate

    spin: Any = intrinsic(chains)

    def loop(count, factor, addend):  # type: ignore[no-untyped-def]  # compiled by Numba
        return spin(count, factor, addend)

    return numba.njit(scalar(types.intp, scalar, scalar))(loop)
