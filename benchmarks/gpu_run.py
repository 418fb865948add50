"""Everything that there is to do on a machine with a GPU, unattended and without a network:

    python -m benchmarks.gpu_run --output DIR --data-dir MNIST --wheels WHEELS

builds rnnkern for the Python that runs this, runs the GPU's tests, compute-sanitizer, the cost probe, the benchmark and
a training, each part in under 9 minutes, and prints a table last. Logs, CSVs, environment.json and summary.json go to
DIR. `--parts tests mnist` runs some, `--parts benchmark-lstm` all that start so. `--device host` goes the same way
without a GPU: the kernels run on the CPU, and its times mean nothing.

What is not installed is looked for among the wheels in WHEELS. MNIST is the folder that examples/mnist.py takes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu_parts import FAILED, PARTS, Context, Report, prepare, timed
from benchmarks.processes import tail

SETUP = "environment"
SHOWN = 15  # lines of the log of a part that failed


def chosen_parts(names: Sequence[str]) -> list[str]:
    """The parts called so or starting so, in their own order; a ValueError for a name that none has."""

    def called(part: str, name: str) -> bool:
        return part == name or part.startswith(f"{name}-")

    for name in names:
        if not any(called(part, name) for part in PARTS):
            raise ValueError(f"parts: expected some of {' '.join(PARTS)}, got {name}")
    return [part for part in PARTS if any(called(part, name) for name in names)]


def table(reports: Mapping[str, Report]) -> str:
    """A line for each part."""
    width = max(map(len, reports))
    lines = [f"{'part':<{width}}  {'status':<8}  {'seconds':>7}  result"]
    lines += [f"{name:<{width}}  {r.status:<8}  {r.seconds:>7.0f}  {r.line}" for name, r in reports.items()]
    return "\n".join(lines)


def explanations(output: Path, reports: Mapping[str, Report]) -> str:
    """Why tests were skipped, and how the logs of what failed end."""
    parts = []
    for name, report in reports.items():
        for reason, count in report.details.get("skipped", {}).items():
            parts.append(f"{name}: skipped {count}: {reason}")
        if report.status == FAILED:
            log = output / f"{name}.log"
            parts.append(f"--- the end of {log.name}\n{tail(log, SHOWN)}")
    return "\n".join(parts)


def save(context: Context, reports: Mapping[str, Report]) -> None:
    """Leaves summary.json, anew after each part: the machine may go away."""
    summary = {
        "device": context.device,
        "environment": context.environment,
        "parts": {name: asdict(report) for name, report in reports.items()},
    }
    (context.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def run_parts(context: Context, names: Sequence[str]) -> dict[str, Report]:
    """Runs them in turn; without an environment to run in, none."""
    reports: dict[str, Report] = {}
    for name in (SETUP, *names):
        print(f"{name} ...", flush=True)
        reports[name] = timed(context, name, prepare if name == SETUP else PARTS[name])
        print(f"{name}: {reports[name].status} after {reports[name].seconds:.0f} s", flush=True)
        save(context, reports)
        if reports[SETUP].status == FAILED:
            break
    return reports


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--data-dir", type=Path, metavar="MNIST", help="where MNIST's files are")
    parser.add_argument("--wheels", type=Path, metavar="WHEELS", help="wheels to install before anything else")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), metavar="PART", help=f"of {' '.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "host"), default="cuda")
    options = parser.parse_args(argv)
    try:
        names = chosen_parts(options.parts)
    except ValueError as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    data, wheels = (path and path.resolve() for path in (options.data_dir, options.wheels))
    context = Context(options.device, options.output.resolve(), data, wheels)
    reports = run_parts(context, names)
    print(f"\n{explanations(context.output, reports)}\n\n{table(reports)}")
    return 1 if any(report.status == FAILED for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
