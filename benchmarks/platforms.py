"""What the benchmark runs on: the CPU, a CUDA GPU, or the host, where the GPU's kernels run on the CPU.

A platform has the shapes, modes and precisions that are measured there, tells the machine and its ceilings, times,
measures memory, and makes records.
"""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import cudnn, floors, host, machine, memory, timing
from benchmarks.floors import Ceilings
from benchmarks.gpu_shapes import GPU_SHAPES, cut_down
from benchmarks.machine import GpuMachine, Machine
from benchmarks.precisions import ON_CPU, ON_GPU, PRECISIONS, fp32_products
from benchmarks.results import AGAIN, ONNX, RNNKERN, TORCH, GpuRecord, Record
from benchmarks.rivals import CPU, Disagreement, Problem
from benchmarks.shapes import SHAPES, Shape
from rnnkern import backends

OUT_OF_MEMORY = "out of memory"
# what cuDNN, cuBLAS and the sweeps say, which raise no torch.OutOfMemoryError
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


class OnCpu:
    """rnnkern beside torch.nn and, in inference in float32, onnxruntime."""

    device = CPU
    backend = "auto"
    shapes: Sequence[Shape] = SHAPES
    modes: tuple[str, ...] = ("forward", "train")
    measures_memory = False  # unless the command says so: each peak takes a process
    precisions: tuple[str, ...] = ON_CPU
    usual_precisions: tuple[str, ...] = ("float32",)
    threads: tuple[int, ...] = (1,)
    budget = 1.0
    watch = timing.CPU
    kept = True  # results are, unless the command says otherwise
    record: type[Record] = Record

    def obstacle(self, backend: str) -> str | None:
        """Why nothing can be measured here, if so."""
        return None

    def describe(self) -> Machine:
        """What goes into every record."""
        return machine.describe()

    def fitted(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Shapes of the registry as they are measured."""
        return list(shapes)

    def implementations(self, here: Machine, precision: str) -> tuple[str, ...]:
        """What is installed and takes it."""
        onnx = here.onnxruntime and machine.installed("onnx") and precision == "float32"
        return (TORCH, AGAIN, RNNKERN, ONNX) if onnx else (TORCH, AGAIN, RNNKERN)

    def ceilings(self, precision: str) -> dict[str, float]:
        """How fast it could be at best, as columns of a record."""
        return {"ceiling_gflops": machine.ceiling(PRECISIONS[precision].dtype)}

    def ceilings_beside(self, precision: str, ceilings: Mapping[str, float]) -> Mapping[str, float]:
        """Those of a row that is being measured: the clock of a shared machine may be another than at the start."""
        return self.ceilings(precision)

    def heading(self, ceilings: Mapping[str, float]) -> str:
        """The ceilings, and what else is to be known, in words."""
        return (
            f"the ceiling of one core is now {ceilings['ceiling_gflops']:.1f} GF/s, "
            f"the load average was {os.getloadavg()[0]:.1f} at the start"
        )

    @contextmanager
    def computing(self, precision: str, threads: int) -> Iterator[None]:
        """Sets what a row is computed with."""
        torch.set_num_threads(threads)
        yield

    def columns(self, name: str, problem: Problem, mode: str, ceilings: Mapping[str, float]) -> dict[str, Any]:
        """What else a record of the implementation says."""
        return {}

    def peak(self, name: str, cell: str, shape: Shape, precision: str, threads: int, backend: str) -> float:
        """MB of a training step."""
        return memory.measure(name, cell, shape, precision, threads, backend)

    def excuse(self, name: str, error: RuntimeError) -> str:
        """What the row says in place of a figure; raises what does not excuse one."""
        raise error

    def tidy(self) -> None:
        """Gives back the memory of what failed."""


class OnGpu(OnCpu):
    """rnnkern beside torch.nn, which calls cuDNN."""

    device = torch.device("cuda")
    backend = "cuda"
    shapes = GPU_SHAPES
    modes = ("forward", "saving", "train")
    measures_memory = True
    precisions = usual_precisions = ON_GPU
    threads = (0,)
    budget = 0.2
    watch = timing.GPU
    record = GpuRecord
    product, copy = 8192, 1 << 30  # what the ceilings are measured on: rows of a square matrix, bytes

    def obstacle(self, backend: str) -> str | None:
        """Why nothing can be measured here, if so."""
        if not torch.cuda.is_available():
            return "torch finds no CUDA device; --device host runs the same on the CPU"
        return None if backend == "auto" else backends.obstacle(backend, self.device)

    def describe(self) -> GpuMachine:
        """What goes into every record."""
        found = torch.cuda.get_device_properties(self.device)
        return GpuMachine(
            **vars(machine.describe()),
            gpu=found.name,
            capability=f"{found.major}.{found.minor}",
            processors=found.multi_processor_count,
            cuda=torch.version.cuda or "",
            cudnn=torch.backends.cudnn.version() or 0,
        )

    def implementations(self, here: Machine, precision: str) -> tuple[str, ...]:
        """torch.nn twice, and rnnkern."""
        return TORCH, AGAIN, RNNKERN

    def ceilings(self, precision: str) -> dict[str, float]:
        """How fast it could be at best, as columns of a record."""
        found = floors.measure(self.device, PRECISIONS[precision], self.watch, product=self.product, copy=self.copy)
        return {"ceiling_gflops": found.gflops, "ceiling_gbs": found.gbs}

    def ceilings_beside(self, precision: str, ceilings: Mapping[str, float]) -> Mapping[str, float]:
        """Those of the whole run."""
        return ceilings

    def heading(self, ceilings: Mapping[str, float]) -> str:
        """The ceilings in words."""
        return (
            f"a product of matrices reaches {ceilings['ceiling_gflops']:.0f} GF/s, "
            f"a copy {ceilings['ceiling_gbs']:.0f} GB/s, read and written"
        )

    @contextmanager
    def computing(self, precision: str, threads: int) -> Iterator[None]:
        """Sets what a row is computed with."""
        with fp32_products(torch.backends.cudnn.rnn, PRECISIONS[precision].tf32):
            yield

    def columns(self, name: str, problem: Problem, mode: str, ceilings: Mapping[str, float]) -> dict[str, Any]:
        """The floor, and cuDNN's algorithm."""
        found = floors.floor(problem, mode, Ceilings(ceilings["ceiling_gflops"], ceilings["ceiling_gbs"]))
        columns: dict[str, Any] = {"floor_moving_us": found.moving, "floor_computing_us": found.computing}
        if name != RNNKERN:
            columns["algorithm"] = cudnn.algorithms(
                problem.cell, problem.shape, problem.x.dtype, self.rules_for(), mode
            )
        return columns

    def rules_for(self) -> cudnn.Gpu:
        """What torch chooses cuDNN's algorithm by."""
        found = torch.cuda.get_device_properties(self.device)
        version = torch.backends.cudnn.version() or 0
        return cudnn.Gpu((found.major, found.minor), found.multi_processor_count, version)

    def peak(self, name: str, cell: str, shape: Shape, precision: str, threads: int, backend: str) -> float:
        """MB of a training step."""
        with self.computing(precision, threads):
            return self.growth(memory.warm_step(name, cell, shape, PRECISIONS[precision].dtype, backend, self.device))

    def growth(self, step: Any) -> float:
        """MB that the step allocates at its peak beside what is there before it."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def excuse(self, name: str, error: RuntimeError) -> str:
        """Out of memory, and for torch.nn what cuDNN can't do."""
        text = str(error).strip().partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY):
            return OUT_OF_MEMORY
        if isinstance(error, torch.AcceleratorError):  # nothing runs on the GPU after it
            raise error
        if name == RNNKERN:
            raise Disagreement(f"{name}: {text}") from error
        return text

    def tidy(self) -> None:
        """Gives back the memory of what failed."""
        gc.collect()
        torch.cuda.empty_cache()


class OnHost(OnGpu):
    """The GPU's kernels on the CPU, beside torch.nn there: the whole way of a measurement, on sizes cut down."""

    device = CPU
    backend = host.NAME
    budget = 0.0
    watch = timing.GLANCE
    kept = False
    product, copy = 256, 1 << 22

    def obstacle(self, backend: str) -> str | None:
        """Why nothing can be measured here, if so."""
        host.register()
        return backends.obstacle(backend, self.device)

    def describe(self) -> GpuMachine:
        """What goes into every record."""
        return GpuMachine(
            **vars(machine.describe()),
            gpu="host (these times mean nothing)",
            capability="",
            processors=0,
            cuda="",
            cudnn=0,
        )

    def fitted(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Shapes of the registry cut down."""
        return cut_down(shapes)

    def heading(self, ceilings: Mapping[str, float]) -> str:
        """The warning in words."""
        return (
            f"{super().heading(ceilings)}\nThe kernels run on the CPU, thread by thread: THESE TIMES MEAN NOTHING. "
            "What counts is that every row runs and agrees with torch.nn. "
            "The column cuDNN is what torch's rules give for compute capability 9.0."
        )

    @contextmanager
    def computing(self, precision: str, threads: int) -> Iterator[None]:
        """Sets what a row is computed with: one thread, the quickest for small sizes."""
        torch.set_num_threads(1)
        with super().computing(precision, threads):
            yield

    def rules_for(self) -> cudnn.Gpu:
        """A GPU for which no rule is out of reach."""
        return cudnn.Gpu((9, 0), cudnn.STATIC_PROCESSORS, cudnn.BFLOAT16_CUDNN)

    def growth(self, step: Any) -> float:
        """MB by which resident memory rises, after all that ran before in this process."""
        return memory.resident_growth(step)


PLATFORMS: dict[str, type[OnCpu]] = {"cpu": OnCpu, "cuda": OnGpu, "host": OnHost}
