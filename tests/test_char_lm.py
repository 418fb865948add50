"""The character model: its text, the state carried from chunk to chunk, its steps one by one, and a short run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import rnnkern
from examples import char_lm
from examples.char_lm import CharModel, Stream, main, sample, streaming_difference
from examples.text import Chunks, standard_library_text

ALPHABET = "\n abc"
TEXT = '"""A module."""\n\n\ndef f():\n    """Of it."""\n\n\ndef g():\n    """Née."""\n'


def make(layers: int = 1, **options: Any) -> CharModel:
    return CharModel(len(ALPHABET), rnnkern.LSTM(7, 9, layers, batch_first=True, **options))


def characters(*shape: int) -> Tensor:
    return torch.randint(len(ALPHABET), shape)


def test_text_is_every_docstring_in_ascii(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.py").write_text("class C:\n    '''Last.'''\n")
    assert standard_library_text(tmp_path) == "A module.\n\nOf it.\n\nLast."
    with pytest.raises(FileNotFoundError, match="expected Python sources with docstrings, found none"):
        standard_library_text(tmp_path / "absent")


def test_chunks_follow_one_another() -> None:
    text = torch.arange(2 * 3 * 4 + 5)
    chunks = Chunks(text, streams=2, chunk=4)
    found = list(chunks)
    assert len(found) == len(chunks) == 3
    assert torch.equal(torch.cat([inputs for inputs, _ in found], 1), text[:24].view(2, 12))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in found)
    assert len(Chunks(text[:9], 2, 4)) == 1
    with pytest.raises(ValueError, match="expected at least 9 characters for 2 streams in chunks of 4, got 8"):
        Chunks(text[:8], 2, 4)


@pytest.mark.parametrize("layers", [1, 2])
def test_state_is_carried_without_gradient(layers: int) -> None:
    """Chunks of equal text are read as one text, not each from the start; the two stages do not meet."""
    model, chunk = make(layers), characters(2, 5)
    batch = chunk, chunk.roll(-1, 1)
    first, second = (model.read("train", batch) for _ in range(2))
    h, _ = model.carried["train"]  # type: ignore[misc]
    assert not h.requires_grad
    whole, _ = model(chunk.repeat(1, 2))
    halves = [cross_entropy(part.flatten(0, 1), batch[1].flatten()) for part in whole.split(5, 1)]
    torch.testing.assert_close(torch.stack([first, second]), torch.stack(halves))
    assert abs(first - second) > 1e-4
    assert torch.equal(model.read("val", batch), first)
    model.on_validation_epoch_start()
    assert model.carried["val"] is None
    assert model.carried["train"] is not None
    model.on_train_epoch_start()
    assert torch.equal(model.read("train", batch), first)


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}, {"recurrent_dropout": 0.3, "weight_dropout": 0.2}], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
def test_steps_give_the_logits_of_sequences(layers: int, options: dict[str, float]) -> None:
    model = make(layers, backend="reference" if options else "auto", **options).eval()
    assert streaming_difference(model, characters(4, 30)) < 1e-6
    stream = Stream(model)
    for layer, cell in enumerate(stream.cells):
        assert cell.weight_hh is getattr(model.lstm, f"weight_hh_l{layer}")
    old = stream.step(characters(1))
    assert not torch.allclose(old, Stream(model).step(characters(1)), atol=1e-4)


def test_a_sample_is_of_the_alphabet_and_of_the_seed() -> None:
    model, found = make().eval(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(sample(model, ALPHABET, "cab", 40))
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 43
    assert found[0].startswith("cab")
    assert set(found[0]) <= set(ALPHABET)


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> str:
    text = "".join(f"{n} bottles hanging on the wall, and {n} bottles more.\n" for n in range(90, 10, -1))
    monkeypatch.setattr(char_lm, "standard_library_text", lambda: text)
    return text


OPTIONS = ["--hidden", "24", "--chunk", "16", "--batch", "4"]


@pytest.mark.usefixtures("short_text")
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning's default folders would show up here
    states: list[Any] = []
    forward = CharModel.forward

    def spy(self: CharModel, read: Tensor, state: Any = None) -> Any:
        logits, after = forward(self, read, state)
        if self.training:
            states.append((state, after))
        return logits, after

    monkeypatch.setattr(CharModel, "forward", spy)
    result = main([*OPTIONS, "--steps", "83", "--layers", "2"])
    assert result.steps == 83
    assert result.train_bits < 0.75 * result.first_train_bits
    assert result.val_bits < 0.75 * result.first_train_bits
    starts = [before is None for before, _ in states]
    assert 1 < sum(starts) < 10  # each pass over the text, and no validation in between
    assert all(before is None or torch.equal(before[0], end[0]) for (_, end), (before, _) in pairwise(states))
    folder = tmp_path / "runs" / "char-lm-24x2"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert {path.name for path in folder.iterdir()} == {"result.json", "sample.txt", "last.ckpt"}
    assert json.loads((folder / "result.json").read_text())["val_bits"] == result.val_bits
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()[:9]] == [f"step {n}" for n in (*range(10, 81, 10), 83)]
    assert f"differ by {result.streaming_difference:.1e} at most; written to" in said


@pytest.mark.usefixtures("short_text")
def test_a_run_fails_where_streaming_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(char_lm, "streaming_difference", lambda *_: float("nan"))
    with pytest.raises(RuntimeError, match=r"streamed logits differ by nan"):
        main([*OPTIONS, "--steps", "1", "--runs-dir", str(tmp_path)])


def test_bad_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(char_lm, "standard_library_text", lambda: "too short")
    for options, message in ((["--zoneout", "2"], "zoneout: expected a probability"), ([], "text: expected at least")):
        with pytest.raises(SystemExit):
            main(options)
        assert message in capsys.readouterr().err
