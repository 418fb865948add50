"""The parts of an unattended run on a GPU (gpu_run.py): what each does, and what it says in a line."""

import json
import re
import shutil
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import processes, pytest_report
from benchmarks.processes import Finished
from csrc import build

ROOT = build.ROOT
LIMIT = 530.0  # seconds that a part may take
VENV = ROOT / "build" / "gpu_run"
HOST_TESTS = [f"tests/test_gpu_{name}.py" for name in ("parity", "autograd", "streams", "primitives")]
CELLS = ("lstm", "gru", "rnn")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
OK, FAILED, SKIPPED = "ok", "failed", "skipped"
NEEDS_A_GPU = "needs a GPU"

ROWS_ADDED = re.compile(r"(\d+) rows added to (.+); ")

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_LIMIT = 130.0
# Only our kernels are watched; but what the others write has to be seen, or it would count as never written.
ONLY_OURS = ["--kernel-regex", "kns=rnnkern"]
SANITIZER_SUMMARY = re.compile(r"========= (?:ERROR|RACECHECK) SUMMARY: (.+)")
OF_OUR_KERNELS = re.compile(r"(?m)^========= (?!.*Host Frame).*\bat .*rnnkern::")


@dataclass
class Report:
    """What became of a part."""

    status: str
    line: str
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Context:
    """What parts are told."""

    device: str  # cuda or host
    output: Path
    data: Path | None
    wheels: Path | None
    environment: dict[str, Any] = field(default_factory=dict)  # what gpu_environment.py says
    part: str = ""
    deadline: float = 0.0

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels run on one."""
        return self.device == "cuda"

    @property
    def python(self) -> Path:
        """That of the virtual environment."""
        return VENV / "bin" / "python"

    @property
    def log(self) -> Path:
        """Of the part that runs."""
        return self.output / f"{self.part}.log"

    def run(self, *command: str | Path, folder: Path = ROOT, limit: float = LIMIT, **environment: str) -> Finished:
        """Runs a command in the time that is left to the part."""
        left = min(limit, self.deadline - perf_counter())
        return processes.run(command, self.log, left, folder, {"PYTHONUNBUFFERED": "1", **environment})

    def run_python(self, *words: str | Path, **options: Any) -> Finished:
        """Runs Python with rnnkern and its tools in reach."""
        return self.run(self.python, *words, **options)

    def failed(self, what: str, finished: Finished) -> Report:
        """The report of a command that went wrong."""
        return Report(FAILED, f"{what}: {finished.why()}, see {self.log.name}")


def prepare(context: Context) -> Report:
    """A virtual environment that sees what is installed here, with the wheels that were given; the record of both."""
    venv.create(VENV, system_site_packages=True, with_pip=False, symlinks=True)
    inner = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(VENV)}))
    outer = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (inner / "outer.pth").write_text("\n".join(outer) + "\n")
    if context.wheels:
        wheels = sorted(context.wheels.glob("*.whl"))
        done = context.run_python("-m", "pip", "install", "--no-index", "--no-deps", *wheels)
        if not done.ok:
            return context.failed("pip install of the wheels", done)
    record = context.output / "environment.json"
    record.unlink(missing_ok=True)
    done = context.run("sh", "-c", '"$0" -m benchmarks.gpu_environment > "$1"', context.python, record)
    if not done.ok:
        return context.failed("python -m benchmarks.gpu_environment", done)
    context.environment.update(json.loads(record.read_text()))
    names = [gpu["name"] for gpu in context.environment["gpus"]] or ["no GPU"]
    if context.on_gpu and not context.environment["gpus"]:
        return Report(FAILED, "torch finds no CUDA device; --device host runs the same on the CPU")
    return Report(OK, f"{', '.join(names)}, torch {context.environment['torch']}, nvcc {context.environment['nvcc']}")


def install(context: Context) -> Report:
    """Builds, and asks the installed package what it has."""
    options = ["-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    if context.on_gpu:
        done = context.run_python(*options, "-e", ROOT, RNNKERN_CUDA="1")
    else:
        # not in place: an extension that is there already stays
        done = context.run_python(*options, "--force-reinstall", ROOT, RNNKERN_CUDA="0")
    if not done.ok:
        return context.failed("pip install", done)
    done = context.run_python("-m", "rnnkern", folder=context.output)
    if not done.ok:
        return context.failed("python -m rnnkern", done)
    if not context.on_gpu:
        done = context.run_python("-c", "from benchmarks import host; host.extension()")
        if not done.ok:
            return context.failed("compiling the kernels for the host", done)
        return Report(OK, "the package without CUDA, and the kernels for the host")
    said = re.findall(r"(?m)^  cuda +(.+)$", context.log.read_text())[-1]
    return Report(FAILED if said.startswith("absent") else OK, f"cuda: {said}")


def test(context: Context) -> Report:
    """The GPU's tests; on the host those of the same files that need none."""
    report = context.output / "tests.xml"
    report.unlink(missing_ok=True)
    chosen = ["-m", "gpu"] if context.on_gpu else ["-m", "not gpu", *HOST_TESTS]
    options = ["-q", "-rfEs", "--tb=short", "--show-capture=no", "--continue-on-collection-errors"]
    done = context.run_python("-m", "pytest", *options, f"--junitxml={report}", *chosen)
    if not report.exists():
        return context.failed("pytest left no report", done)
    counts = pytest_report.read(report)
    details = {"skipped": dict(counts.skipped.most_common()), "failed": counts.failed}
    if counts.ran == 0:
        return Report(FAILED, f"no test ran: {counts.line()}", details)
    return Report(OK if done.ok else FAILED, counts.line(), details)


def sanitize(context: Context) -> Report:
    """Small shapes under compute-sanitizer, a tool at a time."""
    if not context.on_gpu:
        done = context.run_python("-m", "benchmarks.small_calls", "--device", "host")
        if not done.ok:
            return context.failed("python -m benchmarks.small_calls", done)
        return Report(SKIPPED, f"{NEEDS_A_GPU}; its program ran: {processes.tail(context.log, 1)}")
    program = find_tool("compute-sanitizer")
    if program is None:
        return Report(SKIPPED, "compute-sanitizer was not found on PATH or in the toolkit")
    results = {tool: sanitize_by(context, program, tool) for tool in SANITIZERS}
    bad = [tool for tool, said in results.items() if said.startswith("FAILED")]
    return Report(FAILED if bad else OK, "; ".join(f"{tool}: {said}" for tool, said in results.items()), results)


def sanitize_by(context: Context, program: Path, tool: str) -> str:
    """What the tool found; FAILED in front if it is something in our kernels."""
    log = context.output / f"{tool}.log"
    log.unlink(missing_ok=True)
    watched = [] if tool == "initcheck" else ONLY_OURS
    done = context.run(
        program, "--tool", tool, *watched, "--log-file", log, context.python, "-m", "benchmarks.small_calls",
        "--device", "cuda", limit=SANITIZER_LIMIT, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    return judge(log.read_text(errors="replace") if log.exists() else "", done)


def judge(said: str, done: Finished) -> str:
    """What a sanitizer's log comes to."""
    ours = len(OF_OUR_KERNELS.findall(said))
    summary = SANITIZER_SUMMARY.search(said)
    if ours:
        return f"FAILED, {ours} reports of our kernels"
    if summary is None:
        last = (said.strip() or "nothing").splitlines()[-1]
        return f"did not finish ({done.why()}), it said: {last}"
    if not done.ok:
        return f"FAILED, {done.why()}, {summary[1]}"
    return summary[1]


def probe(context: Context) -> Report:
    """Compiles and runs benchmarks/gpu/probe.cu."""
    try:
        toolkit = build.find_toolkit()
    except build.BuildError as error:
        return Report(FAILED if context.on_gpu else SKIPPED, str(error))
    gpus = context.environment.get("gpus") or [{"capability": "9.0"}]
    target = gpus[0]["capability"].replace(".", "").replace("90", "90a")
    program, table = VENV / "probe", context.output / "probe.csv"
    source = ROOT / "benchmarks" / "gpu" / "probe.cu"
    code = f"-gencode=arch=compute_{target},code=sm_{target}"
    done = context.run(toolkit.nvcc, "-std=c++17", "-O3", code, source, "-o", program)
    if not done.ok:
        return context.failed("nvcc", done)
    if not context.on_gpu:
        return Report(SKIPPED, f"{NEEDS_A_GPU}; it compiles")
    done = context.run(program, "--csv", table)
    if not done.ok:
        return context.failed("probe", done)
    return Report(OK, f"{len(table.read_text().splitlines()) - 1} figures in {table.name}")


def benchmark(cell: str, precision: str) -> Callable[[Context], Report]:
    """The part that times one cell in one precision: all of them together take longer than a part may."""

    def time_it(context: Context) -> Report:
        words = ["--device", context.device, "--cells", cell, "--dtype", precision]
        done = context.run_python("-m", "benchmarks", *words, "--output", context.output)
        if not done.ok:
            return context.failed("python -m benchmarks", done)
        added = ROWS_ADDED.search(context.log.read_text())
        return Report(OK, f"{added[1]} rows in {Path(added[2]).name}") if added else Report(FAILED, "no row was added")

    return time_it


def train(context: Context) -> Report:
    """MNIST by an LSTM of 128 units, to the end; on the host a glance of it on the CPU."""
    runs = context.output / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    words: list[str | Path] = ["--cell", "lstm", "--hidden", "128", "--runs-dir", runs]
    words += ["--data-dir", context.data] if context.data else []
    words += ["--backend", "cuda"] if context.on_gpu else ["--epochs", "1", "--limit-steps", "5"]
    done = context.run_python("examples/mnist.py", *words)
    results = list(runs.glob("*/result.json"))
    if not done.ok or not results:
        return context.failed("examples/mnist.py", done)
    result = json.loads(results[0].read_text())
    line = f"{result['name']}: test accuracy {result['test_accuracy']:.4f} after {result['epochs']} epochs"
    if not context.on_gpu:
        return Report(OK, f"{line} of 5 steps on the CPU")
    if not result["name"].startswith("mnist"):
        return Report(FAILED, f"{line}: not MNIST, whose files were not found; give --data-dir", result)
    return Report(OK, f"{line}, {result['seconds_per_epoch']:.1f} s each", result)


def find_tool(name: str) -> Path | None:
    """A tool of the toolkit."""
    found = shutil.which(name)
    if found is None:
        try:
            found = shutil.which(build.find_toolkit().include.parent / "bin" / name)
        except build.BuildError:
            return None
    return Path(found) if found else None


PARTS: dict[str, Callable[[Context], Report]] = {
    "build": install,
    "tests": test,
    "sanitizers": sanitize,
    "probe": probe,
    **{f"benchmark-{cell}-{name}": benchmark(cell, name) for name in PRECISIONS for cell in CELLS},
    "mnist": train,
}


def timed(context: Context, name: str, part: Callable[[Context], Report]) -> Report:
    """Runs a part, whatever becomes of it."""
    start = perf_counter()
    context.part, context.deadline = name, start + LIMIT
    context.log.unlink(missing_ok=True)
    try:
        report = part(context)
    except Exception as error:  # noqa: BLE001  # the other parts shall run
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        report = Report(FAILED, f"{type(error).__name__}: {error}")
    report.seconds = perf_counter() - start
    return report
