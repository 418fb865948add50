"""The benchmark measures the right thing: registry, checks, statistics, ONNX, CSV, picture. No time is asserted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import machine, memory, report, results, rivals, timing
from benchmarks.shapes import FAMILIES, SHAPES, Shape, select

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
    expected = "mnist text speech word large stream series rl tagger stacked packed lengths cell tiny odd"
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
    pair = {
        results.TORCH: rivals.torch_rival(problem, mode),
        results.RNNKERN: rivals.rnnkern_rival(problem, mode, "auto"),
    }
    with torch.inference_mode(mode == "forward"):
        command.check(pair, torch.float64)
    names = set(pair[results.TORCH].results())
    assert {"output", "h_n"} <= names
    assert ("gradient of input" in names) == (mode == "train")


@pytest.mark.parametrize("cell", rivals.CELLS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stepwise"])
def test_onnx_model_gives_torchs_numbers(cell: str, variant: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from benchmarks.onnx_rival import OnnxRival

    problem = rivals.make_problem(cell, VARIANTS[variant], torch.float32)
    command.check(
        {results.TORCH: rivals.torch_rival(problem, "forward"), results.ONNX: OnnxRival(problem, threads=1)},
        torch.float32,
    )


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

    monkeypatch.setattr(command, "rnnkern_rival", spoilt)
    words = ["--shapes", "tiny-short", "--cells", "gru", "--modes", "train", "--output", str(tmp_path)]
    assert command.main(words) == 1
    assert "ERROR gru train tiny-short, 1 threads: rnnkern: output is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rounds_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "estimate", lambda call: 1.0)
    order: list[str] = []
    samples = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, budget=0)
    assert "".join(order) == "abbaabbaab"
    assert [len(samples[name]) for name in "ab"] == [timing.LEAST_ROUNDS] * 2


def test_plan_of_a_turn() -> None:
    assert timing.plan_turn(1e-3) == timing.Turn(uncounted=10, counted=20)
    assert timing.plan_turn(0.05) == timing.Turn(uncounted=1, counted=1)
    assert timing.plan_turn(2.0) == timing.Turn(uncounted=0, counted=1)


def test_statistics() -> None:
    assert timing.quantiles([[0.0, 1.0], [2.0, 3.0, 4.0]]) == pytest.approx({10: 0.4, 25: 1, 50: 2, 75: 3, 90: 3.6})
    # the machine is three times slower in the second round, for both alike
    assert timing.ratio([[2.0, 2.0], [6.0, 6.0]], [[1.0, 1.0], [3.0, 3.0]]) == 2
    assert timing.geometric_mean([0.5, 2, 8]) == pytest.approx(2)
    pairs = [("a", 1.0), ("a", 4.0), ("b", 3.0), ("b", float("nan")), ("c", float("nan"))]
    assert results.family_means(pairs) == pytest.approx({"a": 2, "b": 3})


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
    (picture,) = report.report(measured)
    assert picture == measured.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| tiny-short | 10 4 5 16 |" in printed
    assert "mean over families" in printed


def test_csv_keeps_the_newest_and_refuses_other_columns(measured: Path) -> None:
    (row, _) = results.read(measured)
    newer = {name: replace(record, date="2999-01-01T00:00:00+00:00", ratio=7.0) for name, record in row.items()}
    results.append(measured, newer)
    assert len(results.read(measured)) == 2
    assert results.read(measured)[0][results.RNNKERN].ratio == 7
    measured.write_text("cell,mode\n")
    with pytest.raises(ValueError, match="move the file away"):
        results.append(measured, newer)


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
