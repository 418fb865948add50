"""The benchmark of the GPU: the whole of it on the host, what it does where something fails. No time is asserted."""

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import host, machine, measure, memory, report, results, rivals, screen, timing
from benchmarks.gpu_shapes import GPU_SHAPES
from benchmarks.platforms import OnGpu
from benchmarks.precisions import ON_GPU
from benchmarks.results import AGAIN, MEMORY, RNNKERN, TORCH, GpuRecord
from rnnkern.backends.cuda import products

WORDS = ["--device", "host", "--cells", "gru", "--dtype", "float32", "--modes", "train"]
CSV = "host-these-times-mean-nothing.csv"


@pytest.fixture(autouse=True)
def same_arithmetic() -> Iterator[None]:
    """A run sets torch's switches back."""
    switches: list[Any] = [torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    before = [switch.fp32_precision for switch in switches]
    yield
    assert [switch.fp32_precision for switch in switches] == before


def test_calls_on_a_gpu_are_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = 2.0 * len(log)
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing.time_on_gpu(lambda: log.append("call"), 2) == [0.004, 0.004]
    assert log == ["event", "call", "event", "call", "event", "wait"]


def test_whole_benchmark_on_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["odd-wide", "lengths-both-ways", "stacked-both-ways"]
    words = ["--device", "host", "--cells", "lstm", "--shapes", *shapes, "--dtype", "tf32", "bfloat16"]
    assert command.main([*words, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "THESE TIMES MEAN NOTHING" in printed
    assert "24 rows ran and agree with torch.nn. Their times mean nothing." in printed
    rows = results.read(tmp_path / CSV)
    assert len(rows) == 24
    for row in rows:
        ours, theirs = row[RNNKERN], row[TORCH]
        assert isinstance(ours, GpuRecord)
        assert isinstance(theirs, GpuRecord)
        assert (ours.threads, ours.status, ours.algorithm) == (0, "", "")
        assert ours.mode in ("forward", "saving", "train", MEMORY)
        assert min(ours.ceiling_gflops, ours.ceiling_gbs) > 0
        if ours.mode != MEMORY:
            assert row.keys() == {TORCH, AGAIN, RNNKERN}
            assert 0 < ours.floor_us == max(ours.floor_moving_us, ours.floor_computing_us)
            assert ours.us_step == pytest.approx(ours.ms_median * 1e3 / ours.T)
            packed = "lengths" in ours.options
            assert theirs.algorithm.split(" / ")[0] == ("standard" if packed else "small")
            assert (" / " in theirs.algorithm) == (ours.mode == "train")
    matplotlib.use("agg")
    report.main([str(tmp_path / CSV)])
    printed = capsys.readouterr().out
    assert "### host (these times mean nothing), bfloat16, backend host" in printed
    assert "lstm train, microseconds a step" in printed
    assert "small / small |" in printed
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_whole_benchmark_on_a_gpu_that_is_pretended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All that the device cuda does, with the host's kernels and a GPU that only says what it is."""

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            self.time = perf_counter() * 1e3

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.time - self.time

    allocated = iter(range(0, 10**9, 10**6))
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0, multi_processor_count=132)
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda device: properties,
        "Event": Event,
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: next(allocated),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    host.register()
    for name, value in {"device": rivals.CPU, "product": 64, "copy": 4096}.items():
        monkeypatch.setattr(OnGpu, name, value)
    own = ["--shape", "T3,B8,I128,H256", "--shape", "T3,B8,I128,H128"]
    words = ["--device", "cuda", "--backend", "host", "--cells", "lstm", "--dtype", "float16", *own]
    assert command.main([*words, "--budget", "0", "--output", str(tmp_path)]) == 0
    assert "Their times mean nothing" not in capsys.readouterr().out
    rows = results.read(tmp_path / "some-gpu.csv")
    theirs = [row[TORCH] for row in rows]
    found = {(record.mode, record.H): record.algorithm for record in theirs if isinstance(record, GpuRecord)}
    assert found["train", 256] == "static / static"
    assert found["saving", 128] == "small"
    ours = rows[0][RNNKERN]
    assert isinstance(ours, GpuRecord)
    assert (ours.gpu, ours.capability, ours.processors, ours.cudnn) == ("Some GPU", "9.0", 132, 91500)
    assert [row[RNNKERN].memory_mb for row in rows if row[RNNKERN].mode == MEMORY] == [1, 3]


def test_host_writes_nothing_unless_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert command.main([*WORDS, "--shapes", "odd-wide"]) == 0
    assert not list(tmp_path.iterdir())
    assert "1 rows ran" in capsys.readouterr().out


def test_precision_reaches_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def spied(problem: rivals.Problem, mode: str, backend: str) -> rivals.Rival:
        seen.append(products.precision(problem.x.dtype))
        return rivals.rnnkern_rival(problem, mode, backend)

    monkeypatch.setattr(measure, "rnnkern_rival", spied)
    assert command.main(["--device", "host", "--cells", "rnn", "--shapes", "odd-wide", "--modes", "forward"]) == 0
    assert tuple(seen) == ON_GPU


def no_memory(*_: object) -> rivals.Rival:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.\nMore of it.")


def test_out_of_memory_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "rnnkern_rival", no_memory)
    assert command.main([*WORDS, "--shapes", "odd-wide", "--output", str(tmp_path)]) == 0
    assert "  rnnkern: out of memory" in capsys.readouterr().out
    (row,) = results.read(tmp_path / CSV)
    assert row.keys() == {TORCH, AGAIN, RNNKERN}
    assert math.isnan(row[RNNKERN].ms_median)
    assert row[TORCH].ms_median > 0
    matplotlib.use("agg")
    report.main([str(tmp_path / CSV)])
    assert "rnnkern: out of memory |" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["CUDA out of memory", "CUDNN_STATUS_EXECUTION_FAILED at this size\nand more"])
def test_what_torch_cannot_do_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str
) -> None:
    def refused(problem: rivals.Problem, mode: str) -> rivals.Rival:
        raise RuntimeError(words)

    monkeypatch.setattr(measure, "torch_rival", refused)
    assert command.main([*WORDS, "--shapes", "odd-wide", "--output", str(tmp_path)]) == 0
    (row,) = results.read(tmp_path / CSV)
    theirs, ours = row[TORCH], row[RNNKERN]
    assert isinstance(theirs, GpuRecord)
    assert isinstance(ours, GpuRecord)
    assert theirs.status == ("out of memory" if "memory" in words else words.partition("\n")[0])
    assert ours.status == measure.UNCHECKED
    assert ours.ms_median > 0
    assert math.isnan(results.over(TORCH, row))
    matplotlib.use("agg")
    report.main([str(tmp_path / CSV)])
    assert measure.UNCHECKED in capsys.readouterr().out


def test_no_room_in_turn_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(timing, "interleave", no_memory)
    assert command.main([*WORDS, "--shapes", "odd-wide"]) == 0
    assert "rnnkern: out of memory together" in capsys.readouterr().out


def test_no_memory_for_a_step_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "warm_step", no_memory)
    assert command.main([*WORDS, "--shapes", "odd-wide", "--only-memory"]) == 0
    assert "torch: out of memory  rnnkern: out of memory" in capsys.readouterr().out


def test_what_rnnkern_cannot_do_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(problem: rivals.Problem, mode: str, backend: str) -> rivals.Rival:
        raise RuntimeError("lstm_forward: invalid argument")

    monkeypatch.setattr(measure, "rnnkern_rival", broken)
    assert command.main([*WORDS, "--shapes", "odd-wide"]) == 1
    assert "ERROR gru train odd-wide, float32: rnnkern: lstm_forward: invalid argument" in capsys.readouterr().err


def test_a_gpu_that_broke_down_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(problem: rivals.Problem, mode: str, backend: str) -> rivals.Rival:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "rnnkern_rival", lost)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        command.main([*WORDS, "--shapes", "odd-wide"])


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda"]) == 2
    assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err
    assert command.main(["--device", "cuda", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(GPU_SHAPES)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--device", "cuda", "--dtype", "float64"], "expected float32, tf32, bfloat16, float16 with --device cuda"),
        (["--dtype", "tf32"], "expected float64, float32, bfloat16 with --device cpu, got tf32"),
        (["--device", "host", "--threads", "2"], "expected none with --device host"),
        (["--device", "host", "--shapes", "mnist"], "expected names or families of the registry"),
    ],
)
def test_options_that_a_device_does_not_take(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.arguments(words)
    assert expected in capsys.readouterr().err.replace("\n", " ")


def test_what_a_device_measures_by_itself() -> None:
    chosen = command.arguments(["--device", "cuda"])
    assert (chosen.modes, chosen.dtype) == (["forward", "saving", "train", MEMORY], ON_GPU)
    assert (chosen.backend, chosen.threads, chosen.save) == ("cuda", (0,), True)
    assert command.arguments(["--device", "cuda", "--modes", "train"]).modes == ["train"]
    assert command.arguments(["--device", "host"]).save is False


def gpu_record(**changes: Any) -> GpuRecord:
    """One as if measured."""
    values: dict[str, Any] = {
        field.name: {str: "word", int: 3, float: 0.5}[field.type]  # type: ignore[index]
        for field in fields(GpuRecord)
    }
    return GpuRecord(**values | changes)


def test_gpu_records_keep_their_columns(tmp_path: Path) -> None:
    row = {name: gpu_record(implementation=name, threads=0) for name in (TORCH, AGAIN, RNNKERN)}
    results.append(tmp_path / "gpu.csv", row)
    assert results.read(tmp_path / "gpu.csv") == [row]
    assert machine.slug(row[TORCH]) == "word"
    assert screen.line(row)
    assert row[TORCH].share == 1


def test_csvs_of_cpus_read_as_before() -> None:
    found = sorted(results.FOLDER.glob("*-cores.csv"))
    assert found
    for path in found:
        records = [record for row in results.read(path) for record in row.values()]
        assert {type(record) for record in records} == {results.Record}
        header = path.read_text().partition("\n")[0].split(",")
        assert header == [field.name for field in fields(results.Record)]
