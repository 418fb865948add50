"""The catalogue: what was published of its models' sizes, that each of them runs, and that its layers are measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.shapes import SHAPES
from examples.catalogue import CATALOGUE, CLIPS, ENTRIES, FAMILIES, SMOKE, Entry
from examples.classifier import decided, loss_of
from examples.datasets import Reviews
from examples.layers import Layer, Loop, MapsAsSteps, Recurrent, Shape, StepLoop, Steps, walk
from examples.models import build, counts, summary, torch_has

B = 3

# What was published of whole models, in Keras's convention.
TOTALS = {
    "mnist-rnn": 6_602,
    "mnist-rnn-steps": 63_658,
    "mnist-rnn-64-64-32": 17_642,
    "mnist-lstm": 24_458,
    "mnist-lstm-steps": 41_738,
    "mnist-gru": 18_698,
    "mnist-birnn-steps": 47_754,
    "mnist-bilstm-steps": 83_466,
    "imdb-300-rnn": 5_009,
    "imdb-500-gru": 8_633,
}
# Of layers: entry, which of its recurrent layers, Keras's count, torch's.
LAYERS = {
    ("imdb-128-lstm", 0): (4_384, 4_416),
    ("imdb-128-2lstm-dropout", 1): (544, 576),
    ("imdb-128-gru-dropout", 0): (3_312, 3_312),
    ("mnist-3bilstm-steps", 1): (98_816, 99_328),
    ("mnist-lstm", 0): (23_808, 24_064),
}

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def model_of(entry: Entry, backend: str = "reference", seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return build(entry.layers, entry.family.data.shape, backend)


def batch_of(entry: Entry) -> tuple[Tensor, Tensor]:
    data = entry.family.data
    labels = torch.arange(B) % len(data.classes)
    if isinstance(data, Reviews):
        return torch.randint(data.words, (B, *data.shape)), labels
    return torch.rand(B, *data.shape), labels


def test_names() -> None:
    assert len(CATALOGUE) == len(ENTRIES)
    assert {entry.family.name for entry in ENTRIES} == {family.name for family in FAMILIES}
    assert set(SMOKE) == {entry.name for entry in ENTRIES if entry.family is CLIPS}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name: str) -> None:
    assert counts(model_of(CATALOGUE[name]))[0] == TOTALS[name]


@pytest.mark.parametrize(("name", "place"), LAYERS)
def test_published_layers(name: str, place: int) -> None:
    recurrent = [module for module in model_of(CATALOGUE[name]) if isinstance(module, Steps)]
    assert counts(recurrent[place]) == LAYERS[name, place]


@every_entry
def test_an_entry_runs(entry: Entry) -> None:
    """A step of training; every layer gives the shape that it says; torch.nn's gives the same from the same seed."""
    model, (inputs, labels) = model_of(entry), batch_of(entry)
    loss_of(model(inputs), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    x = inputs
    for module, (_, _, gives) in zip(model, walk(entry.layers, entry.family.data.shape), strict=True):
        x = module(x)
        assert x.shape == (B, *gives)
    assert decided(x).shape == (B,)
    if torch_has(entry.layers):
        torch.testing.assert_close(model_of(entry, "torch").eval()(inputs), x, atol=1e-5, rtol=1e-4)
    else:
        with pytest.raises(ValueError, match=r"torch\.nn\.\w+ has no (recurrent_dropout|reset_after)"):
            model_of(entry, "torch")


def test_dropout_in_torch_is_one_mask_for_all_steps() -> None:
    layer = build((Recurrent("lstm", 8, dropout=0.3),), (20, 50), "torch")[0]
    assert isinstance(layer, Steps)
    seen = []
    layer.rnn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for training in (True, False):
        layer.train(training)(torch.ones(B, 20, 50))
    masked, whole = seen
    assert masked.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert torch.equal(masked, masked[:, :1].expand_as(masked))
    assert (whole == 1).all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_loop_over_a_cell_is_one_call(backend: str) -> None:
    """Of the same seed: logits and gradients, and so every step of a training."""
    loop, call = (model_of(CATALOGUE[name], backend) for name in ("mnist-cell-rnn", "mnist-cell-rnn-call"))
    inputs, labels = batch_of(CATALOGUE["mnist-cell-rnn"])
    found, expected = loop(inputs), call(inputs)
    torch.testing.assert_close(found, expected)
    for logits in (found, expected):
        loss_of(logits, labels).backward()
    for ours, theirs in zip(loop.parameters(), call.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert isinstance(loop[0], Loop)
    output = loop[1].weight
    assert isinstance(output, Tensor)
    assert abs(output.std().item() - 1) < 0.1


def test_published_steps_are_not_the_maps() -> None:
    maps = torch.arange(2 * 3 * 2).view(1, 2, 3, 2)
    given = (2, 3, 2)
    assert MapsAsSteps(channels_last=False).make(given, "auto")(maps).tolist() == [
        [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    ]
    as_published = MapsAsSteps(channels_last=True).make(given, "auto")(maps)
    assert as_published.tolist() == [[[0, 6, 1, 7, 2, 8], [3, 9, 4, 10, 5, 11]]]


def test_the_summary_has_both_conventions() -> None:
    entry = CATALOGUE["mnist-lstm-steps"]
    text = summary(entry.layers, entry.family.data.shape, model_of(entry))
    cells = [line.split() for line in text.splitlines()]
    assert cells[2] == ["LSTM(64,", "steps)", "(28,", "64)", "23,808", "24,064"]
    assert cells[-1] == ["all", "41,738", "41,994"]


def recurrent_shapes(layers: tuple[Layer, ...], given: Shape) -> Iterator[tuple[Recurrent | StepLoop, Shape]]:
    for layer, shape, _ in walk(layers, given):
        if isinstance(layer, Recurrent | StepLoop):
            yield layer, shape


@every_entry
def test_its_layers_are_measured(entry: Entry) -> None:
    """In the registry of the benchmark, whose shapes are run with every cell."""
    measured = {(s.T, s.B, s.I, s.H, s.bidirectional, s.stepwise) for s in SHAPES if s.layers == 1 and not s.ragged}
    for layer, (steps, inputs) in recurrent_shapes(entry.layers, entry.family.data.shape):
        stepwise = isinstance(layer, StepLoop)
        both = isinstance(layer, Recurrent) and layer.bidirectional
        assert (steps, entry.family.recipe.batch, inputs, layer.units, both, stepwise) in measured


def test_two_classes_have_one_logit() -> None:
    logits, labels = torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 1])
    assert decided(logits).tolist() == [1, 0]
    assert loss_of(logits, labels).item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.e)) / 2)
