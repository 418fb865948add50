"""The benchmark measures the right thing: registry, checks, statistics, CSV, goals, report. No time is asserted."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import goals, machine, measure, memory, report, results, rivals, scaling, tables, timing
from benchmarks.precisions import PRECISIONS
from benchmarks.shapes import CUSTOM, FAMILIES, SHAPES, STEPWISE, Shape, named, select, spelled

PNG = b"\x89PNG"
SMALL = Shape("small", "tiny", T=5, B=3, I=4, H=6)
VARIANTS = {
    "plain": SMALL,
    "bidirectional": replace(SMALL, bidirectional=True),
    "stacked": replace(SMALL, layers=2),
    "stacked-bidirectional": replace(SMALL, layers=2, bidirectional=True),
    "packed": replace(SMALL, ragged="packed", bidirectional=True, layers=2),
    "lengths": replace(SMALL, ragged="lengths", bidirectional=True),
    "stepwise": replace(SMALL, stepwise=True),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small shapes are quickest on one, and what a run sets is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_shapes_have_unique_names_and_every_family() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    expected = "mnist text speech word large stream series rl tagger stacked packed lengths cell tiny classifier odd"
    assert tuple(expected.split()) == FAMILIES
    assert {1, 256} <= {shape.B for shape in SHAPES}
    assert {1, 650} <= {shape.I for shape in SHAPES}
    assert {8, 1024} <= {shape.H for shape in SHAPES}
    assert {1, 1000} <= {shape.T for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_lengths_fill_the_shape(shape: Shape) -> None:
    lengths = shape.lengths()
    assert lengths.shape == (shape.B,)
    assert lengths.min() >= 1
    assert lengths.max() == shape.T
    filled = float(lengths.sum()) / (shape.T * shape.B)
    assert 0.4 < filled < 0.6 if shape.ragged else filled == 1
    assert torch.equal(lengths, shape.lengths())


def test_select_takes_names_families_and_patterns() -> None:
    assert [shape.name for shape in select(["word", "tiny-*"])] == ["word", "word-large", "tiny-short"]
    assert len(select(["*"])) == len(SHAPES)
    with pytest.raises(ValueError, match="got 'speach'"):
        select(["speach"])


@pytest.mark.parametrize("cell", rivals.CELLS)
@pytest.mark.parametrize("mode", rivals.MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rnnkern_is_given_the_same_problem(cell: str, mode: str, variant: str) -> None:
    problem = rivals.make_problem(cell, VARIANTS[variant], torch.float64)
    pair = rivals.torch_rival(problem, mode), rivals.rnnkern_rival(problem, mode, "auto")
    with torch.inference_mode(mode == "forward"):
        expected, found = (rival.results() for rival in pair)
    rivals.check(results.RNNKERN, expected, found, PRECISIONS["float64"].tolerance)
    names = set(expected)
    assert {"output", "h_n"} <= names
    assert ("gradient of input" in names) == (mode == "train")


@pytest.mark.parametrize("cell", rivals.CELLS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stepwise"])
def test_onnx_model_gives_torchs_numbers(cell: str, variant: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from benchmarks.onnx_rival import OnnxRival

    problem = rivals.make_problem(cell, VARIANTS[variant], torch.float32)
    expected = rivals.torch_rival(problem, "forward").results()
    found = OnnxRival(problem, threads=1).results()
    rivals.check(results.ONNX, expected, found, PRECISIONS["float32"].tolerance)


def test_operations_are_counted_over_real_steps() -> None:
    shape = replace(SMALL, ragged="packed")
    problem = rivals.make_problem("lstm", shape, torch.float32)
    expected = 2 * int(shape.lengths().sum()) * 4 * shape.H * (shape.I + shape.H)
    assert problem.flops("forward") == expected
    assert problem.flops("train") == 3 * expected


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_result_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, wrong: float
) -> None:
    def spoilt(problem: rivals.Problem, mode: str, backend: str) -> rivals.Rival:
        problem.module.get_parameter("bias_hh_l0").data[0] += wrong
        return rivals.torch_rival(problem, mode)

    monkeypatch.setattr(measure, "rnnkern_rival", spoilt)
    words = ["--shapes", "tiny-short", "--cells", "gru", "--modes", "train", "--output", str(tmp_path)]
    assert command.main(words) == 1
    assert "ERROR gru train tiny-short, 1 threads: rnnkern: output is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rounds_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.Watch, "estimate", lambda watch, call: 1.0)
    order: list[str] = []
    samples = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, budget=0)
    assert "".join(order) == "abbaabbaab"
    assert [len(samples[name]) for name in "ab"] == [timing.CPU.rounds] * 2


def test_plan_of_a_turn() -> None:
    assert timing.CPU.plan_turn(1e-3) == timing.Turn(uncounted=10, counted=20)
    assert timing.CPU.plan_turn(0.05) == timing.Turn(uncounted=1, counted=1)
    assert timing.CPU.plan_turn(2.0) == timing.Turn(uncounted=0, counted=1)


def test_statistics() -> None:
    assert timing.quantiles([[0.0, 1.0], [2.0, 3.0, 4.0]]) == pytest.approx({10: 0.4, 25: 1, 50: 2, 75: 3, 90: 3.6})
    # the machine is three times slower in the second round, for both alike
    assert timing.ratio([[2.0, 2.0], [6.0, 6.0]], [[1.0, 1.0], [3.0, 3.0]]) == 2
    assert timing.geometric_mean([0.5, 2, 8]) == pytest.approx(2)


def test_relative_rms() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert rivals.relative_rms(expected, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert rivals.relative_rms(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(2,\), got \(1, 2\)"):
        rivals.relative_rms(expected, expected[None])


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A CSV of two rows."""
    words = ["--shapes", "tiny-short", "--cells", "rnn", "--budget", "0.05", "--output", str(tmp_path)]
    assert command.main(words) == 0
    return next(tmp_path.glob("*.csv"))


def test_run_saves_and_report_draws(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = results.read(measured)
    assert [row[results.RNNKERN].mode for row in rows] == ["forward", "train"]
    for row in rows:
        ours = row[results.RNNKERN]
        assert {results.TORCH, results.AGAIN} <= row.keys()
        assert row[results.TORCH].ratio == 1
        assert 0 < ours.ms_q10 <= ours.ms_q25 <= ours.ms_median <= ours.ms_q75 <= ours.ms_q90
        assert ours.ceiling_gflops > 1
        assert (ours.torch, ours.threads) == (torch.__version__, 1)
    matplotlib.use("agg")
    report.main([str(measured)])
    assert measured.with_suffix(".png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "| tiny-short | 10 4 5 16 |" in printed
    assert "| over families " in printed
    assert "- torch.nn's time / rnnkern's under 0.95: " in printed


def test_report_goes_between_a_documents_markers(measured: Path, tmp_path: Path) -> None:
    matplotlib.use("agg")
    document = tmp_path / "docs" / "page.md"
    document.parent.mkdir()
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nbehind\n")
    report.main([str(measured), "--write", str(document)])
    first = document.read_text()
    assert first.startswith(f"before\n{report.BEGIN}\n\n### ")
    assert first.endswith(f"\n\n{report.END}\nbehind\n")
    assert "old" not in first
    assert f"](../{measured.stem}.png)" in first
    report.main([str(measured), "--write", str(document)])
    assert document.read_text() == first
    document.write_text("no markers")
    with pytest.raises(ValueError, match=r"expected the lines <!-- tables --> and .* found 0 such places"):
        report.main([str(measured), "--write", str(document)])


def test_the_performance_page_has_the_markers() -> None:
    assert len(report.MARKED.findall((machine.ROOT / "docs" / "performance.md").read_text())) == 1


def test_csv_keeps_the_newest_and_refuses_other_columns(measured: Path) -> None:
    (row, _) = results.read(measured)
    newer = {name: replace(record, date="2999-01-01T00:00:00+00:00", ratio=7.0) for name, record in row.items()}
    results.append(measured, newer)
    assert len(results.read(measured)) == 2
    assert results.read(measured)[0][results.RNNKERN].ratio == 7
    measured.write_text("cell,mode\n")
    with pytest.raises(ValueError, match="move the file away"):
        results.append(measured, newer)


@pytest.mark.parametrize("name", [results.TORCH, results.RNNKERN])
def test_peak_memory_of_a_cell_in_a_loop(name: str) -> None:
    """Cells have fewer options than layers."""
    shape = Shape("steps", "cell", 4, 2, 3, 5, stepwise=True)
    step: Any = memory.warm_step(name, "gru", shape, torch.float32, "auto")
    output, _ = step()
    assert output.shape == (4, 2, 5)


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_sees_what_a_step_keeps() -> None:
    shape = next(shape for shape in SHAPES if shape.name == "speech")
    least = shape.T * shape.B * 4 * shape.H * 4 / 1e6  # the gates alone, in float32
    assert least < memory.measure(results.TORCH, "lstm", shape, "float32", 1, "auto") < 10 * least


def test_list_and_bad_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SHAPES)
    with pytest.raises(SystemExit):
        command.main(["--shapes", "nothing"])
    assert "expected names or families" in capsys.readouterr().err


def test_machine_is_named() -> None:
    here = machine.describe()
    assert here.cpu
    assert set(machine.slug(here)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert machine.installed("no-such-distribution") == ""


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("T28,B64,I28,H128", {}),
        ("T28,B64,I28,H128,layers=2,bidirectional,packed", {"layers": 2, "bidirectional": True, "ragged": "packed"}),
        ("T28,B64,I28,H128,lengths", {"ragged": "lengths"}),
        ("T28,B64,I28,H128,stepwise", {"stepwise": True}),
    ],
)
def test_a_shape_is_spelled(text: str, options: dict[str, Any]) -> None:
    assert spelled(text) == named(text) == Shape(text, CUSTOM, 28, 64, 28, 128, **options)
    assert named("word").family == "word"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("T28,B64,I28", "expected sizes from 1 up as in T28,B64,I28,H128"),
        ("T28,B0,I28,H128", "expected sizes from 1 up"),
        ("T28,B64,I28,H128,", "expected sizes from 1 up"),
        ("T28,B64,I28,H128,layers=0", "expected options among layers=N, bidirectional, .* got 'layers=0'"),
        ("T28,B64,I28,H128,packed,lengths", "one of packed and lengths, got 'lengths'"),
        ("T28,B64,I28,H128,stepwise,packed", "expected no option beside stepwise"),
    ],
)
def test_a_shape_spelled_wrong(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=expected):
        spelled(text)
    with pytest.raises(SystemExit):
        command.main(["--shape", text])
    assert "error: shape: expected" in capsys.readouterr().err


def test_which_shapes_and_modes_run() -> None:
    own = ["--shape", "T1,B1,I1,H1", "--shape", "T2,B1,I1,H1"]
    assert [shape.T for shape in command.arguments(own).shapes] == [1, 2]
    assert [shape.name for shape in command.arguments([*own, "--shapes", "tiny"]).shapes][:2] == ["tiny", "tiny-short"]
    assert command.arguments([]).shapes == list(SHAPES)
    assert command.arguments([]).modes == ["forward", "train"]
    assert command.arguments(["--memory", "--modes", "train"]).modes == ["train", "memory"]
    assert command.arguments(["--only-memory"]).modes == ["memory"]


def made_row(
    name: str, over_torch: float = 1.0, *, family: str = "text", again: float = 1.0, over_onnx: float = math.nan,
    share: float = 0.9, torch_share: float = 0.5, memory: tuple[float, float] = (math.nan, math.nan), **fields: Any,
) -> results.Row:  # fmt: skip
    """A row as if measured, rnnkern's figure first in `memory`."""
    common: dict[str, Any] = dict.fromkeys(("cpu", "torch", "numba", "rnnkern", "onnxruntime", "commit", "options"), "")
    common |= {"cores": 2, "date": "2999-01-01", "dtype": "float32", "backend": "auto", "threads": 1, "cell": "lstm"}
    common |= {"mode": "train", "family": family, "shape": name, "T": 5, "B": 16, "I": 8, "H": 64, "real_steps": 80}
    common |= {"ceiling_gflops": 100.0} | fields
    ceiling = 100 * common["threads"]
    figures = {
        results.TORCH: {"ratio": 1.0, "gflops": torch_share * ceiling, "memory_mb": memory[1]},
        results.AGAIN: {"ratio": again},
        results.RNNKERN: {"ratio": over_torch, "gflops": share * ceiling, "memory_mb": memory[0]},
    }
    if not math.isnan(over_onnx):
        figures[results.ONNX] = {"ratio": over_torch / over_onnx}
    return {key: results.Record(**common, implementation=key, **values) for key, values in figures.items()}


def goal(text: str, start: str) -> str:
    """What is listed under the goal that begins so."""
    (found,) = (line for line in text.splitlines() if line.startswith(f"- {start}"))
    return found.rpartition(": ")[2]


def test_goals_list_what_is_slow_beyond_noise() -> None:
    rows = [
        made_row("slow", 0.90), made_row("level", 0.96), made_row("noisy", 0.90, again=0.9),
        made_row("near", 0.97, torch_share=0.86), made_row("near-slow", 0.80, torch_share=0.86, over_onnx=0.7),
        made_row("behind-onnx", 2.0, over_onnx=0.9), made_row("before-onnx", 0.5, over_onnx=1.1),
    ]  # fmt: skip
    said = goals.summary(rows)
    assert goal(said, "torch.nn's time / rnnkern's under 0.95") == "slow 0.90; before-onnx 0.50"
    assert goal(said, "torch.nn above 85% of the ceiling") == "near 0.97; near-slow 0.80 (under 0.95)"
    assert goal(said, "onnxruntime's time / rnnkern's under 0.95") == "near-slow 0.70; behind-onnx 0.90"
    alone = goals.summary(rows[1:2])
    assert goal(alone, "torch.nn's time") == "none"
    assert "onnxruntime" not in alone
    assert "above 85%" not in alone


def test_goals_list_large_layers_far_from_the_ceiling() -> None:
    small: list[dict[str, Any]] = [{"B": 15}, {"H": 63}, {"T": 1}, {"options": STEPWISE}]
    rows = [made_row(f"small-{index}", share=0.1, **fields) for index, fields in enumerate(small)]
    assert "of the ceiling" not in goals.summary(rows)
    rows += [made_row("low", share=0.74), made_row("enough", share=0.76)]
    assert goal(goals.summary(rows), "under 75% of the ceiling") == "low 74.0%"
    forward = [made_row("low", share=0.79, mode="forward", threads=2)]
    assert "lstm forward, 2 threads:" in goals.summary(forward)
    assert goal(goals.summary(forward), "under 80% of the ceiling") == "low 79.0%"


def test_share_is_of_the_cores_in_use() -> None:
    ours = made_row("a", share=0.4)[results.RNNKERN]
    assert ours.share == pytest.approx(0.4)
    assert replace(ours, threads=2).share == pytest.approx(0.2)
    assert replace(ours, threads=4).share == pytest.approx(0.2)  # of two cores


def test_goals_list_peaks_above_torchs() -> None:
    peaks = {"more": (10.6, 10.0), "alike": (10.4, 10.0), "tiny": (0.4, 0.0), "less": (5.0, 10.0)}
    rows = [made_row(name, math.nan, mode=results.MEMORY, memory=pair) for name, pair in peaks.items()]
    assert goal(goals.summary(rows), "peak above torch.nn's by more than 5%") == "more 10.6 MB against 10.0"
    (table,) = tables.memory_tables(rows)
    assert "| more  | 10.6 / 10.0 |" in table


def test_means_of_families() -> None:
    families = {"a": ("text", 1.0), "b": ("text", 4.0), "c": ("packed", 8.0), "d": ("lengths", 2.0), "e": (CUSTOM, 0.1)}
    rows = [made_row(name, ratio, family=family) for name, (family, ratio) in families.items()]
    (text,) = tables.family_tables(rows)
    means = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in text.splitlines()[4:])}
    assert means == {
        "text": "2.00", "packed": "8.00", "lengths": "2.00", "custom": "0.10",
        "over families": "3.17", "packed and lengths": "4.00", "A/A, the worst": "1.00",
    }  # fmt: skip


def test_memory_is_measured_without_times_and_kept_apart(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "measure", lambda name, *_: {results.TORCH: 10.0, results.RNNKERN: 12.0}[name])
    words = ["--only-memory", "--shapes", "tiny-short", "--cells", "rnn", "--output", str(measured.parent)]
    assert command.main(words) == 0
    assert goal(capsys.readouterr().out, "peak above torch.nn's") == "tiny-short 12.0 MB against 10.0"
    rows = results.read(measured)
    assert [row[results.RNNKERN].mode for row in rows] == ["forward", "train", "memory"]
    assert rows[2].keys() == {results.TORCH, results.RNNKERN}
    assert math.isnan(rows[2][results.RNNKERN].ms_median)
    matplotlib.use("agg")
    report.main([str(measured)])
    assert "| tiny-short | 12.0 / 10.0 |" in capsys.readouterr().out


def test_scaling_measures_torch_only_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert [shape.T for shape in scaling.SHAPES] == [50, 100, 200, 500, 1000, 2000, 4000]
    small = [replace(shape, T=T, B=3, I=4, H=6, name=f"T{T}") for shape, T in zip(scaling.SHAPES, (4, 8), strict=False)]
    monkeypatch.setattr(scaling, "SHAPES", small)
    monkeypatch.setattr(scaling, "CELLS", ("rnn",))
    scaling.main(["--torch-until", "4", "--budget", "0.01", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    (csv,) = tmp_path.glob(f"*{scaling.SUFFIX}.csv")
    short, long = results.read(csv)
    assert short.keys() == {results.TORCH, results.RNNKERN}
    assert long.keys() == {results.RNNKERN}
    assert csv.with_suffix(".png").read_bytes().startswith(PNG)
    report.main([str(csv)])
    assert capsys.readouterr().out.strip() in printed
