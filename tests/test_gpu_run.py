"""The unattended run on a GPU: its time limits, its reading of what commands say, its table; and some of its parts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from zipfile import ZipFile

import pytest

from benchmarks import gpu_parts, gpu_run, processes, pytest_report, rivals
from benchmarks.gpu_parts import FAILED, OK, PARTS, Context, Report
from benchmarks.precisions import ON_GPU
from benchmarks.processes import Finished

FINE = Finished(0, 1.0)


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_command_that_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os, sys; print(os.environ['WORD'], os.getcwd()); sys.exit(3)"
    done = processes.run([sys.executable, "-c", code], log, 60, tmp_path, {"WORD": "said"})
    assert done.status == 3
    assert not done.ok
    assert done.why() == "exit status 3"
    assert processes.tail(log, 1) == f"said {tmp_path}"


@pytest.mark.parametrize("ignores", [False, True], ids=["asked", "made to"])
def test_a_command_whose_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores: bool) -> None:
    """It ends with what it has started."""
    monkeypatch.setattr(processes, "GRACE", 0.2)
    ids = tmp_path / "ids"
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignores else ""
    code += "import os, subprocess, sys, time\n"
    code += "child = subprocess.Popen(['sleep', '60'])\n"
    code += f"open({str(ids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\ntime.sleep(60)"
    start = monotonic()
    done = processes.run([sys.executable, "-c", code], tmp_path / "log", 2, tmp_path, {})
    assert monotonic() - start < 20
    assert done.status is None
    assert done.why() == "stopped after 2 s"
    assert "its time was up" in (tmp_path / "log").read_text()
    for process in map(int, ids.read_text().split()):
        for _ in range(100):
            if gone(process):
                break
            sleep(0.05)
        assert gone(process)


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert processes.run([tmp_path / "nothing"], log, 60, tmp_path, {}).status == 127
    assert "cannot be started" in log.read_text()


REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.a" name="passes"/>
<testcase classname="tests.a" name="fails[1]"><failure message="no">text</failure></testcase>
<testcase classname="tests.a" name="breaks"><error message="no">text</error></testcase>
<testcase classname="tests.b" name="one"><skipped type="pytest.skip" message="needs 2 GPUs">x</skipped></testcase>
<testcase classname="tests.b" name="two"><skipped message="tests/b.py:12: needs 2 GPUs">x</skipped></testcase>
<testcase classname="tests.b" name="three"><skipped message="needs memory">x</skipped></testcase>
</testsuite></testsuites>"""


def test_every_skip_is_counted_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    counts = pytest_report.read(tmp_path / "report.xml")
    assert counts.line() == "1 passed, 2 failed, 3 skipped"
    assert counts.ran == 3
    assert counts.skipped == {"needs 2 GPUs": 2, "needs memory": 1}
    assert counts.failed == ["tests.a::fails[1]", "tests.a::breaks"]


def context(folder: Path, device: str = "cuda") -> Context:
    return Context(device, folder, None, None, part="tests", deadline=float("inf"))


def pretend_pytest(monkeypatch: pytest.MonkeyPatch, text: str | None, status: int | None) -> None:
    """Any command leaves the report that it was asked for, and ends so."""

    def run(command: list[str], log: Path, *_: object) -> Finished:
        name = next(str(word) for word in command if str(word).startswith("--junitxml="))
        if text is not None:
            Path(name.partition("=")[2]).write_text(text)
        return Finished(status, 1.0)

    monkeypatch.setattr(processes, "run", run)


ALL_SKIPPED = '<testsuites><testsuite><testcase><skipped message="no GPU"/></testcase></testsuite></testsuites>'
ONE_PASSED = "<testsuites><testsuite><testcase/></testsuite></testsuites>"


@pytest.mark.parametrize(
    ("text", "exit_status", "status", "line"),
    [
        (ONE_PASSED, 0, OK, "1 passed, 0 failed, 0 skipped"),
        (REPORT, 1, FAILED, "1 passed, 2 failed, 3 skipped"),
        (ALL_SKIPPED, 0, FAILED, "no test ran: 0 passed, 0 failed, 1 skipped"),
        (None, None, FAILED, "pytest left no report: stopped after 1 s, see tests.log"),
    ],
    ids=["passed", "failed", "none ran", "stopped"],
)
def test_tests_that_did_not_run_are_no_success(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str | None,
    exit_status: int | None,
    status: str,
    line: str,
) -> None:
    pretend_pytest(monkeypatch, text, exit_status)
    report = gpu_parts.test(context(tmp_path))
    assert (report.status, report.line) == (status, line)


OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void rnnkern::<unnamed>::forward_step<float>(rnnkern::ForwardSweep)+0x1b0
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: rnnkern::forward(rnnkern::ForwardSweep const&) at _cuda.so
========= ERROR SUMMARY: 1 error
"""
RACE = """========= Error: Race reported between Write access at void rnnkern::forward_step()+0x40 in x.cu:3
=========     and Read access at void rnnkern::forward_step()+0x90
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
OF_OTHERS = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel()+0x10
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("said", "done", "judgement"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", FINE, "0 errors"),
        (OUT_OF_BOUNDS, FINE, "FAILED, 1 reports of our kernels"),
        (RACE, FINE, "FAILED, 2 reports of our kernels"),
        (OF_OTHERS, FINE, "1 error"),
        ("========= ERROR SUMMARY: 0 errors\n", Finished(1, 1.0), "FAILED, exit status 1, 0 errors"),
        ("", Finished(None, 130.0), "did not finish (stopped after 130 s), it said: nothing"),
        ("========= Device not supported\n", Finished(1, 1.0),
         "did not finish (exit status 1), it said: ========= Device not supported"),
    ],
    ids=["clean", "out of bounds", "race", "of others", "the program failed", "too slow", "does not start"],
)  # fmt: skip
def test_what_a_sanitizer_said(said: str, done: Finished, judgement: str) -> None:
    assert gpu_parts.judge(said, done) == judgement


def test_a_sanitizer_that_is_missing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "find_tool", lambda name: None)
    report = gpu_parts.sanitize(context(tmp_path))
    assert report.status == gpu_parts.SKIPPED
    assert "compute-sanitizer was not found" in report.line


def test_parts_by_name_and_by_start() -> None:
    assert gpu_run.chosen_parts(["mnist", "build"]) == ["build", "mnist"]
    assert gpu_run.chosen_parts(["benchmark-gru"]) == [f"benchmark-gru-{name}" for name in ON_GPU]
    assert len(gpu_run.chosen_parts(["benchmark"])) == len(ON_GPU) * len(rivals.CELLS)
    with pytest.raises(ValueError, match=r"parts: expected some of build tests .*, got bench"):
        gpu_run.chosen_parts(["bench"])


def test_without_a_gpu_its_tests_are_skipped_and_say_why(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu_primitives.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, f"--junitxml={report}"], cwd=gpu_parts.ROOT, env=environment, check=True)
    counts = pytest_report.read(report)
    assert counts.ran == 0
    assert counts.skipped.total() > 0
    assert all(reason.startswith("no GPU to test on: ") for reason in counts.skipped)


def test_the_table() -> None:
    reports = {"build": Report(OK, "fine", seconds=3.2), "benchmark-tf32": Report(FAILED, "not", seconds=531.0)}
    assert gpu_run.table(reports).splitlines() == [
        "part            status    seconds  result",
        "build           ok              3  fine",
        "benchmark-tf32  failed        531  not",
    ]


def test_explanations(tmp_path: Path) -> None:
    (tmp_path / "tests.log").write_text("first\n" * 50 + "last\n")
    reports = {"tests": Report(FAILED, "", {"skipped": {"needs 2 GPUs": 4}})}
    lines = gpu_run.explanations(tmp_path, reports).splitlines()
    assert lines[:2] == ["tests: skipped 4: needs 2 GPUs", "--- the end of tests.log"]
    assert lines[2:] == ["first"] * (gpu_run.SHOWN - 1) + ["last"]


def pretend_parts(monkeypatch: pytest.MonkeyPatch, parts: dict[str, Callable[[Context], Report]]) -> None:
    monkeypatch.setattr(gpu_run, "prepare", parts.pop("environment", lambda _: Report(OK, "")))
    for module in (gpu_run, gpu_parts):
        monkeypatch.setattr(module, "PARTS", parts)


def breaks(_: Context) -> Report:
    raise KeyError("something")


def test_a_part_that_breaks_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_parts(monkeypatch, {"build": breaks, "tests": lambda _: Report(OK, "all")})
    assert gpu_run.main(["--output", str(tmp_path), "--device", "host", "--parts", "build", "tests"]) == 1
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {"environment": OK, "build": FAILED, "tests": OK}
    assert parts["build"]["line"] == "KeyError: 'something'"


def test_without_an_environment_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_parts(monkeypatch, {"environment": lambda _: Report(FAILED, "no GPU"), "build": breaks})
    assert gpu_run.main(["--output", str(tmp_path), "--parts", "build"]) == 1
    assert list(json.loads((tmp_path / "summary.json").read_text())["parts"]) == ["environment"]
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=3) == ["environment", "failed", "0", "no GPU"]


def test_every_part_has_its_limit() -> None:
    assert gpu_parts.LIMIT < 9 * 60
    assert len(gpu_parts.SANITIZERS) * gpu_parts.SANITIZER_LIMIT < gpu_parts.LIMIT
    assert {"build", "tests", "sanitizers", "probe", "mnist"} < set(PARTS)


def make_wheel(folder: Path) -> None:
    """A package of one line."""
    folder.mkdir()
    with ZipFile(folder / "carried_along-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_along.py", "here = True\n")
        about = "carried_along-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: carried_along\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_a_part_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line: an environment with a wheel and torch in it, and the probe, which can't run."""
    monkeypatch.setattr(gpu_parts, "VENV", tmp_path / "venv")
    output, wheels = tmp_path / "out", tmp_path / "wheels"
    make_wheel(wheels)
    words = ["--device", "host", "--output", str(output), "--wheels", str(wheels), "--parts", "probe"]
    status = gpu_run.main(words)
    summary = json.loads((output / "summary.json").read_text())
    assert status == 0, summary["parts"]
    code = "import carried_along, torch, sys; assert sys.prefix != sys.base_prefix"
    subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", code], check=True)
    assert summary["parts"]["probe"]["status"] == gpu_parts.SKIPPED
    assert summary["environment"] == json.loads((output / "environment.json").read_text())
    assert {"torch", "nvcc", "driver", "gpus", "commit", "python"} <= set(summary["environment"])
