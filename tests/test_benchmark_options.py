"""The benchmark of options measures the right thing: what it compares agrees, and a rival that is wrong is caught; the
table of cases, costs, means and goals. No time is asserted."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine, measure, memory, option_rivals, options, options_report, report, results, rivals, timing
from benchmarks.option_loops import Loop, Step, cell_step
from benchmarks.option_table import LONG_SHAPES, OPTIONS, RESET_SHAPES, SHAPES, Case, cases
from benchmarks.option_tables import cost, mean_cost, mean_speedup, summary
from benchmarks.platforms import OnCpu
from benchmarks.precisions import PRECISIONS
from benchmarks.results import MEMORY, PLAIN, PLAIN_AGAIN, RNNKERN, TORCH
from benchmarks.shapes import Shape
from rnnkern.cells import Weights

SMALL = Shape("small", "tiny", T=12, B=7, I=4, H=6)
MEASURED = [(cell, name) for name, option in OPTIONS.items() for cell in option.cells]


@pytest.fixture(autouse=True)
def a_glance(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each call is timed twice, and what a run sets is put back."""
    monkeypatch.setattr(options, "WATCH", timing.GLANCE)
    monkeypatch.setattr(machine, "ceiling", lambda dtype: 100.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small_case(option: str) -> Case:
    return Case(**vars(SMALL), option=OPTIONS[option])


def oracle_run() -> measure.Run:
    """One on the reference, in float64, that lets no difference pass."""
    return measure.Run(OnCpu(), machine.describe(), "float64", "reference", 0.0, {"ceiling_gflops": 100.0}, ())


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize(("cell", "option"), MEASURED)
def test_the_loop_computes_what_the_option_says(cell: str, option: str, mode: str) -> None:
    case = small_case(option)
    problem = rivals.make_problem(cell, case, torch.float64)
    made = option_rivals.make_rivals(problem, case, mode, "reference")
    with torch.inference_mode(mode == "forward"):
        found = {name: made[name].results() for name in (RNNKERN, TORCH, PLAIN)}
    rivals.check(RNNKERN, found[TORCH], found[RNNKERN], PRECISIONS["float64"].tolerance, "the loop")
    same = option in ("return_states", "recompute") or (mode == "forward" and option.endswith("dropout"))
    assert torch.allclose(found[PLAIN]["output"], found[RNNKERN]["output"]) == same
    names = set(found[RNNKERN])
    assert ("gradient of input" in names) == (mode == "train")
    assert ("gradient of start_h" in names) == (mode == "train" and option == "reset_to")
    assert ("h of all steps" in names) == (option == "return_states")
    assert ("c of all steps" in names) == (option == "return_states" and cell == "lstm")


class Unreset(Loop):
    """Forgets the resets."""

    def forward(self, x: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        return super().forward(x)


class OtherMasks(Loop):
    """Draws something first."""

    def forward(self, x: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        torch.rand(1)
        return super().forward(x, **arguments)


class MaskedTwice(Loop):
    """A GRU whose h is masked beside the product too."""

    def step(self, w: Weights, masked: bool) -> Step:
        return cell_step(self.spec.name, w)


class Spoilt(Loop):
    """A bias is off by little."""

    def weights(self) -> Weights:
        w = super().weights()
        assert w.bias_hh is not None
        return w._replace(bias_hh=w.bias_hh + 1e-6)


class NotANumber(Loop):
    def weights(self) -> Weights:
        return super().weights().map(lambda w: w * math.nan)


@pytest.mark.parametrize(
    ("wrong", "cell", "option"),
    [
        (Unreset, "gru", "reset"), (OtherMasks, "rnn", "zoneout"), (OtherMasks, "lstm", "weight_dropout"),
        (MaskedTwice, "gru", "recurrent_dropout"), (Spoilt, "lstm", "layer_norm"), (NotANumber, "gru", "recompute"),
    ],
)  # fmt: skip
def test_a_wrong_rival_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: type[Loop], cell: str, option: str) -> None:
    options.times(oracle_run(), cell, "train", small_case(option), 1)
    monkeypatch.setattr(option_rivals, "Loop", wrong)
    with pytest.raises(rivals.Disagreement, match=rf"rnnkern's {option}: .* from the loop's \(relative RMS\)"):
        options.times(oracle_run(), cell, "train", small_case(option), 1)


def test_without_a_loop_the_plain_layer_is_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    long = replace(small_case("recompute"), family="long")
    row = options.times(oracle_run(), "gru", "train", long, 1)
    assert row.keys() == {PLAIN, PLAIN_AGAIN, RNNKERN}
    with pytest.raises(rivals.Disagreement, match="from the plain layer's"):
        options.times(oracle_run(), "gru", "train", replace(small_case("reset"), family="long"), 1)


def test_a_run_from_the_command_to_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cells", "lstm", "--options", "peephole", "reset", "--shapes", "tiny", "--modes", "forward", "train"]
    assert options.main([*words, "--budget", "0", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "cost / speedup, lstm train, 1 thread" in printed
    assert "- slower than the loop: " in printed
    (csv,) = tmp_path.glob("*-options.csv")
    rows = results.read(csv)
    assert [(row[RNNKERN].mode, row[RNNKERN].options) for row in rows] == [
        ("forward", "peephole"), ("forward", "reset"), ("train", "peephole"), ("train", "reset"),
    ]  # fmt: skip
    assert all(row.keys() == {PLAIN, PLAIN_AGAIN, RNNKERN, TORCH} for row in rows)
    document = tmp_path / "page.md"
    document.write_text(f"{report.BEGIN}\n{report.END}\n")
    options_report.main([str(csv), "--write", str(document)])
    assert "| peephole " in document.read_text()
    assert len(report.MARKED.findall(options_report.DOCUMENT.read_text())) == 1


def test_a_wrong_result_ends_the_command_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(option_rivals, "Loop", NotANumber)
    words = ["--cells", "lstm", "--options", "peephole", "--shapes", "tiny", "--modes", "forward"]
    assert options.main([*words, "--budget", "0", "--output", str(tmp_path)]) == 1
    assert "ERROR lstm forward tiny, 1 thread: rnnkern's peephole: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_which_cases_are_usual() -> None:
    assert {(shape.T, shape.B, shape.H, shape.I) for shape in RESET_SHAPES} == {
        (128, 8, 128, 64), (128, 64, 128, 64), (128, 128, 256, 64),
    }  # fmt: skip
    assert len({shape.family for shape in SHAPES if shape.B <= 16 and shape not in LONG_SHAPES}) >= 3
    usual = {(case.name, case.options()) for case in cases("lstm", "train", None, None)}
    assert {option for name, option in usual if name == "reset-128"} == {"reset", "reset_to"}
    assert {option for name, option in usual if name.startswith("long")} == {"recompute"}
    assert {option for name, option in usual if name == "tiny"} == set(OPTIONS) - {"reset_after=False"}
    assert {case.options() for case in cases("gru", "train", ["reset-128"], ["z*", "peephole"])} == {"zoneout"}
    assert [case.name for case in cases("gru", MEMORY, None, None)] == ["long-64", "long-128"]
    assert not cases("rnn", MEMORY, None, None)


def test_bad_patterns_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for word, message in (("--options", "options: expected names among input_dropout"), ("--shapes", "shapes: exp")):
        with pytest.raises(SystemExit):
            options.main([word, "nothing"])
        assert message in capsys.readouterr().err


def test_peaks_are_of_a_layer_with_recompute_and_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, recompute in ((memory.RECOMPUTE, True), (RNNKERN, False)):
        step: Any = memory.warm_step(name, "lstm", SMALL, torch.float64, "reference")
        assert step.module.recompute is recompute
    peak = {RNNKERN: 100.0, memory.RECOMPUTE: 46.0}
    asked: list[str] = []

    def measured(name: str, cell: str, shape: Shape, *_: Any) -> float:
        asked.append(shape.name)
        return peak[name]

    monkeypatch.setattr(memory, "measure", measured)
    row = options.peaks(oracle_run(), "lstm", Case(**vars(LONG_SHAPES[0]), option=OPTIONS["recompute"]), 1)
    assert asked == ["T4096,B16,I64,H128"] * 2
    said = summary([row])
    assert "| long-64 | 100.0 / 46.0 |              0.46 |" in said
    assert goal(said, "recompute's peak above 0.45") == "long-64 0.46"
    peak[memory.RECOMPUTE] = 45.0
    case = Case(**vars(LONG_SHAPES[1]), option=OPTIONS["recompute"])
    assert goal(summary([options.peaks(oracle_run(), "lstm", case, 1)]), "recompute's peak") == "none"


def made_row(
    option: str, shape: str, costs: float, speedup: float = math.nan, *, again: float = 1.0, **fields: Any
) -> results.Row:
    """A row as if measured."""
    common: dict[str, Any] = dict.fromkeys(("cpu", "torch", "numba", "rnnkern", "onnxruntime", "commit"), "")
    common |= {"cores": 2, "date": "2999-01-01", "dtype": "float32", "backend": "auto", "threads": 1, "cell": "lstm"}
    common |= {"mode": "train", "family": shape, "shape": shape, "T": 5, "B": 16, "I": 8, "H": 64, "real_steps": 80}
    common |= {"ceiling_gflops": 100.0, "options": option} | fields
    ratios = {PLAIN: 1.0, PLAIN_AGAIN: again, RNNKERN: 1 / costs, TORCH: 1 / (costs * speedup)}
    return {
        name: results.Record(**common, implementation=name, ratio=ratio)
        for name, ratio in ratios.items()
        if not math.isnan(ratio)
    }


def goal(text: str, start: str) -> str:
    """What is listed under the goal that begins so."""
    (found,) = (line for line in text.splitlines() if line.startswith(f"- {start}"))
    return found.rpartition(": ")[2]


def test_costs_and_their_means() -> None:
    rows = [
        made_row("reset", "a", 1.0, 4.0, family="one"), made_row("reset", "b", 4.0, 16.0, family="one", B=17),
        made_row("reset", "c", 8.0, 9.0, family="two"),
    ]  # fmt: skip
    assert cost(rows[1]) == pytest.approx(4)
    assert mean_cost(rows) == pytest.approx(4)  # of 2 and 8
    assert mean_speedup(rows) == pytest.approx(6)  # of 4 and 9: b has too many sequences
    assert math.isnan(mean_speedup(rows[1:2]))
    lines = (line for line in summary(rows).splitlines() if line.startswith("| reset"))
    speedups, cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert speedups == ["reset", "6.00", "6.00"]
    assert cells == ["reset", "1.00 / 4.00", "4.00 / 16", "8.00 / 9.00", "4.00", "6.00"]


def test_goals_list_what_falls_short() -> None:
    rows = [
        made_row("zoneout", "tiny", 1.29, 5.1), made_row("layer_norm", "tiny", 1.41, 4.9),
        made_row("peephole", "tiny", 1.16, 6.0), made_row("recompute", "tiny", 2.0, 0.9),
        made_row("reset", "reset-8", 1.12, 5.0), made_row("reset", "reset-64", 1.12, 5.0, again=0.97),
        made_row("reset", "reset-128", 1.09, 5.0), made_row("reset", "tiny", 1.14, 7.0),
    ]  # fmt: skip
    said = summary(rows)
    assert goal(said, "mean cost above 1.15 (zoneout 1.30, layer_norm 1.40)") == "layer_norm 1.41; peephole 1.16"
    assert goal(said, "cost of a reset above 1.10") == "reset-8 reset 1.12"
    assert goal(said, "slower than the loop") == "recompute tiny 0.90"
    assert goal(said, "mean speedup under 5 with B <= 16") == "layer_norm 4.90; recompute 0.90"
    forward = summary([made_row("reset", "reset-8", 1.12, mode="forward")])
    assert "cost of a reset" not in forward
    assert "slower" not in forward
