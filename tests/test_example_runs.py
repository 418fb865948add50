"""Runs of the examples end to end: what they leave, what they say, and how the command line goes about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from examples import clips, images, mnist, timing, training
from examples.__main__ import main
from examples.catalogue import CATALOGUE, ENTRIES, FAMILIES, Recipe
from examples.classifier import KERAS_EPSILON, RMSprop, make_optimizer
from examples.data import Examples
from examples.images import digits
from examples.plots import plot_predictions
from tests.example_files import write_idx, write_imdb

MNIST_KEYS = (
    "name",
    "cell",
    "test_accuracy",
    "test_loss",
    "epochs",
    "seconds_per_epoch",
    "parameters",
    "backend",
    "torch",
    "rnnkern",
)
PICTURES = {"curves.png", "confusion.png", "predictions.png"}


@pytest.fixture(autouse=True)
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A data folder with a tiny MNIST and IMDB, few clips, no GPU; nothing is written but to a folder of the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_idx(tmp_path / "data" / "mnist", 96, 20, (28, 28))
    write_imdb(tmp_path / "data")
    monkeypatch.setenv("RNNKERN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(images, "check_hash", lambda *_: None)
    monkeypatch.setattr(clips, "make_clips", lambda: clips_of(40, 20))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # Lightning's default folders would show up here
    yield
    assert [path.name for path in (tmp_path / "work").iterdir() if path.name not in ("runs", "docs")] == []


clips_of = clips.make_clips


def result_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path("runs") / name / "result.json").read_text())
    return content


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    said = capsys.readouterr().out
    assert all(f"  {entry.name} " in said for entry in ENTRIES)
    assert all(f"{family.title}: {family.recipe.epochs} epochs" in said for family in FAMILIES)
    assert "mnist-3bilstm-steps" in said
    assert "[0.9894, 0.0379]" in said


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_run_and_its_test(capsys: pytest.CaptureFixture[str], backend: str) -> None:
    options = ["mnist-lstm", "--epochs", "2", "--backend", backend]
    main(options)
    name = "mnist-lstm" + "-torch" * (backend == "torch")
    result = result_of(name)
    assert tuple(result)[: len(MNIST_KEYS)] == MNIST_KEYS
    assert (result["name"], result["entry"], result["epochs"]) == (name, "mnist-lstm", 2)
    assert (result["parameters"], result["keras_parameters"]) == (24_714, 24_458)
    assert (np.sum(result["confusion"]), len(result["history"])) == (20, 2)
    assert {path.name for path in (Path("runs") / name).iterdir()} == {"result.json", "model.ckpt", *PICTURES}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "mnist-lstm: MNIST, 64 units, 2 epochs, 96 examples"
    assert any(line.split()[:1] == ["LSTM(64)"] for line in said[:4])
    accuracy = result["test_accuracy"]
    assert said[-1].startswith(f"test accuracy {accuracy:.4f} (published 0.9772), loss {result['test_loss']:.4f}, ")
    main(["evaluate", *options])
    assert f"accuracy {accuracy:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_reviews_stop_early_with_the_best_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Three epochs after the best, however many those are."""
    main(["imdb-300-rnn", "--truncating", "post"])
    result = result_of("imdb-300-rnn-post")
    losses = [epoch["val_loss"] for epoch in result["history"]]
    best = int(np.argmin(losses))
    assert result["asked"]["epochs"] == 100
    assert result["epochs"] == min(best + 1 + 3, 100)
    checkpoint = torch.load(Path("runs/imdb-300-rnn-post/model.ckpt"), weights_only=True)
    assert checkpoint["epoch"] == best
    assert not Path("runs/imdb-300-rnn-post/predictions.png").exists()
    assert set(result["measures"]) == {"precision", "recall", "f1", "tpr", "tnr"}
    main(["evaluate", "imdb-300-rnn", "--truncating", "post"])
    assert f"loss {result['test_loss']:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_clips_against_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "STEPS", 2)
    main(["clips-2bilstm", "--epochs", "1", "--limit-steps", "1", "--against-torch"])
    result = result_of("clips-2bilstm")
    (tn, fp), (fn, tp) = result["confusion"]
    measures = result["measures"]
    assert measures["tnr"] == pytest.approx(tn / (tn + fp), abs=1e-6)
    assert measures["recall"] == measures["tpr"] == pytest.approx(tp / (tp + fn), abs=1e-6)
    assert measures["precision"] == pytest.approx(tp / max(tp + fp, 1), abs=1e-6)
    assert measures["seconds_a_frame"] > 0
    assert set(result["step_seconds"]) == {"rnnkern", "torch"}
    main(["report"])
    label = "clips-2bilstm (1 of 20 epochs, 1 batches a pass)"
    assert f"| {label} | {100 * measures['precision']:.2f} |" in Path("docs/results.md").read_text()


QUICK = ["--epochs", "1", "--limit-steps", "2"]


def test_all_goes_on_where_it_was_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "both_ways", lambda *_: {"rnnkern": 1.0, "torch": 2.0})
    pattern = "mnist-???-64-3*"
    main(["mnist-rnn", *QUICK, "--against-torch"])
    before = Path("runs/mnist-rnn/result.json").read_text()
    main(["all", "mnist-rnn", pattern, "cifar-rnn-no", *QUICK])
    said = capsys.readouterr().out
    assert "[1/2] mnist-rnn\n[2/2] mnist-rnn-64-32\nmnist-rnn-64-32: MNIST" in said
    assert Path("runs/mnist-rnn/result.json").read_text() == before
    main(["all", "mnist-rnn", "--epochs", "2", "--limit-steps", "2"])  # not that run
    assert result_of("mnist-rnn")["epochs"] == 2
    main(["mnist-rnn", *QUICK])
    main(["all", "mnist-rnn", *QUICK])  # nor one that was not timed
    assert result_of("mnist-rnn")["step_seconds"]
    with pytest.raises(SystemExit) as ended:
        main(["all", "mnist-rnn", "cifar-gru", *QUICK])
    assert ended.value.code == 1
    assert "cifar-gru: data folder: expected the 6 files of cifar10" in capsys.readouterr().err

    main(["report"])
    text = Path("docs/results.md").read_text()
    assert "| mnist-rnn (1 of 5 epochs, 2 batches a pass) | RNN(64); Dense(10) | 0." in text
    assert " below | 0.9437 | " in text
    assert "| 1.0, 2.0 | 6,602, 6,666 |" in text
    assert "![MNIST, 64 units, confusion](results/mnist-64-confusion.png)" in text
    assert {path.name for path in Path("docs/results").iterdir()} == {"mnist-64-curves.png", "mnist-64-confusion.png"}
    Path("docs/results.md").write_text(text.replace("# What", "Our words.\n\n# What"))
    main(["report"])
    assert Path("docs/results.md").read_text() == "Our words.\n\n" + text


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "mnist-rnn", "mnist-rnn@torch", *QUICK])
    written = Path("runs/comparison.md").read_text()
    names = [line.split(" | ")[0].split(" (")[0] for line in written.splitlines()[2:]]
    assert names == ["| mnist-rnn", "| mnist-rnn-torch"]
    assert written in capsys.readouterr().out
    assert Path("runs/comparison.png").stat().st_size > 10_000
    ours, theirs = (result_of(name)["test_loss"] for name in ("mnist-rnn", "mnist-rnn-torch"))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected --list, a NAME, or compare, evaluate, all or report"),
        (["mnist-lsmt"], "NAME: expected an entry of the catalogue, got 'mnist-lsmt'; did you mean mnist-lstm"),
        (["evaluate", "mnist-gru"], "model.ckpt: expected what a training left, found nothing; train mnist-gru first"),
        (["compare", "mnist-rnn@cpu"], "mnist-rnn@cpu: expected a backend among auto, numba"),
        (["mnist-rnn", "--truncating", "post"], "--truncating: expected an entry on IMDB, got mnist-rnn"),
        (["mnist-gru-reset-before", "--backend", "torch"], "--backend: torch.nn has no recurrent_dropout and no reset"),
        (["mnist-rnn", "--devices", "3"], "--devices times --nodes: expected a divisor of the batch of 32, got 3"),
        (["all", "nothing*"], "all: expected names or patterns of the catalogue, got nothing*"),
        (["mnist-rnn", "--backend", "cuda"], "--backend: expected a CUDA device for cuda, found none"),
        (["report"], "runs: expected runs of the catalogue, found none"),
        (["report", "--write", "results"], "--write: expected a file like docs/results.md, got results"),
        (["mnist-rnn", "--seed", "-1"], "argument --seed: expected an integer from 0 to 4294967295, got -1"),
        (["compare", "mnist-rnn", "mnist-rnn"], "mnist-rnn: expected each run once, got it twice"),
        (["compare", "mnist-rnn", "cifar-rnn"], "data folder: expected the 6 files of cifar10"),
        (["evaluate"], "evaluate: expected a NAME behind it"),
        (["evaluate", "mnist-rnn", "mnist-gru"], "evaluate: expected one NAME behind it"),
        (["mnist-rnn", "--runs-dir", "/proc/nowhere"], "--runs-dir: expected a folder to write to, got /proc/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_run_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    main(["mnist-rnn", *QUICK])
    before = {path.name: path.read_bytes() for path in Path("runs/mnist-rnn").iterdir()}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "leave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["mnist-rnn", *QUICK, "--seed", "1"])
    assert {path.name: path.read_bytes() for path in Path("runs/mnist-rnn").iterdir()} == before
    monkeypatch.undo()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4", None], ids=["empty", "text", "cut", "another"])
def test_a_checkpoint_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    main(["mnist-rnn", *QUICK])
    main(["mnist-rnn-24", *QUICK])
    path = Path("runs/mnist-rnn/model.ckpt")
    path.write_bytes(Path("runs/mnist-rnn-24/model.ckpt").read_bytes() if content is None else content)
    with pytest.raises(SystemExit):
        main(["evaluate", "mnist-rnn"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "model.ckpt: expected the weights of mnist-rnn, got something else" in said


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"entry": "mnist-rnn"}'])
def test_a_result_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], content: str) -> None:
    folder = Path("runs/mnist-rnn")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(content)
    for words in (["report"], ["all", "mnist-rnn", *QUICK]):
        with pytest.raises(SystemExit):
            main(words)
        assert "result.json: expected what a run leaves, got " in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "result.json").read_text() == content


def test_a_document_without_a_place_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main(["mnist-rnn", *QUICK])
    Path("docs").mkdir()
    Path("docs/results.md").write_text("nothing")
    with pytest.raises(SystemExit):
        main(["report"])
    assert "expected <!-- mnist-64 --> and <!-- end of mnist-64 --> once" in capsys.readouterr().err


def test_predictions_show_what_is_wrong(tmp_path: Path) -> None:
    pictures = torch.zeros(10, 3, 8, 8)
    pictures[:, 0] = 1  # all red
    classes = CATALOGUE["cifar-rnn"].family.data.classes
    plot_predictions(pictures, list(range(10)), [0, 1, 2, 3, 4, 5, 6, 7, 8, 0], classes, "title", tmp_path / "a.png")
    plot_predictions(pictures[:, 0] * 0, [0] * 10, [0] * 10, classes, "title", tmp_path / "b.png")
    colour, gray = (imread(tmp_path / name)[..., :3] for name in ("a.png", "b.png"))
    red = (colour[..., 0] > 0.99) & (colour[..., 1:] < 0.01).all(axis=-1)
    frame = (colour[..., 0] > 0.7) & (colour[..., 1:] < 0.3).all(axis=-1) & ~red
    assert red.mean() > 0.2
    assert 500 < frame.sum() < 10_000
    assert not ((gray[..., 0] > 0.7) & (gray[..., 1:] < 0.3).all(axis=-1)).any()


# Keras asks its own variables for arrays in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_optimizers_step_as_keras_s(keras: Any, name: Any) -> None:
    """Also where gradients are small, and epsilon says how far."""
    kind = {"rmsprop": keras.optimizers.RMSprop, "adam": keras.optimizers.Adam}[name]
    theirs, start = kind(1e-2), torch.randn(6)
    variable = keras.Variable(start.numpy())
    ours = nn.Parameter(start.clone())
    optimizer = make_optimizer(Recipe(1, 1, name, 1e-2), [ours])
    assert isinstance(optimizer, RMSprop if name == "rmsprop" else torch.optim.Adam)
    scale = torch.tensor([1, 1e-2, 3e-4, 1e-4, 1e-5, 1e-6])
    for _ in range(4):
        gradient = torch.randn(6) * scale
        ours.grad = gradient.clone()
        optimizer.step()
        theirs.apply([keras.ops.convert_to_tensor(gradient.numpy())], [variable])
    # Keras's Adam corrects no bias beside its epsilon, torch's does: nothing, unless gradients come near epsilon
    few = slice(None) if name == "rmsprop" else slice(2)
    torch.testing.assert_close(ours.detach()[few], variable.value.detach()[few], atol=1e-5, rtol=1e-4)
    assert theirs.epsilon == KERAS_EPSILON


@pytest.fixture
def bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MNIST example has scikit-learn's digits."""
    monkeypatch.setattr(mnist, "load", lambda _: digits())


@pytest.mark.usefixtures("bundled")
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_the_mnist_example(capsys: pytest.CaptureFixture[str], cell: str) -> None:
    result = mnist.main(["--cell", cell, "--hidden", "8", "--epochs", "2", "--limit-steps", "3"])
    name = f"digits-rows-{cell}-8"
    written = result_of(name)
    assert tuple(written)[: len(MNIST_KEYS)] == MNIST_KEYS
    assert (written["name"], written["cell"], written["epochs"]) == (name, cell, 2)
    assert not any("-rows-" in name for name in CATALOGUE)  # a run of one is never taken for one of the other
    assert written["test_accuracy"] == result.test_accuracy
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"test accuracy {result.test_accuracy:.4f}, loss ")


@pytest.mark.usefixtures("bundled")
def test_same_seed_same_result() -> None:
    options = ["--backend", "torch", "--hidden", "8", "--epochs", "3", "--limit-steps", "5", "--early-stopping", "2"]
    first, second = (mnist.main([*options, "--seed", "3", "--runs-dir", f"runs/{run}"]) for run in "ab")
    assert first.test_loss == second.test_loss
    assert first.asked == {"epochs": 3, "seed": 3, "limit_steps": 5}


@pytest.mark.usefixtures("bundled")
def test_learns_the_bundled_digits() -> None:
    result = mnist.main(["--backend", "torch", "--cell", "rnn", "--epochs", "6"])
    assert result.test_accuracy > 0.8  # chance is 0.1


def test_examples_are_taken_by_rows() -> None:
    found = Examples(torch.arange(6).view(3, 2), torch.arange(3)).take(torch.tensor([2, 0]))
    assert found.inputs.tolist() == [[4, 5], [0, 1]]
    assert found.labels.tolist() == [2, 0]
