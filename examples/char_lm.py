"""Trains an LSTM to write the docstrings of Python's standard library, then runs it one character at a time.

The text is cut into parallel streams, and these into chunks; the state is carried from chunk to chunk, gradients are
not (truncated backpropagation through time). Writes result.json, sample.txt and a checkpoint to a folder under
--runs-dir. Run it from anywhere:

    python examples/char_lm.py --steps 400 --zoneout 0.05
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file, not as a module: Python then looks in examples/, not above it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnkern
from examples.arguments import positive
from examples.text import Batch, Chunks, standard_library_text

BACKENDS = ("auto", "numba", "cuda", "reference")

State = tuple[Tensor, Tensor]  # h and c, (layers, B, H) each

LEARNING_RATE = 4e-3
GRADIENT_NORM = 1.0  # longer gradients are cut to it
EMBEDDING = 64
VALIDATION_SHARE = 0.05  # the end of the text
REPORTS = 8  # in a training
PROMPTS = ("Return the ", "This module ")
SAMPLE = 200  # characters behind each
STREAMED = 300  # characters whose logits are compared
STREAM_TOLERANCE = 1e-4  # of logits in float32; they sum in another order, step after step

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no list of absent hardware, no advertisement


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do."""

    steps: int
    hidden: int
    layers: int
    chunk: int
    batch: int
    zoneout: float
    recurrent_dropout: float
    weight_dropout: float
    backend: str
    seed: int
    runs_dir: Path


@dataclass(frozen=True)
class Result:
    """What result.json holds."""

    name: str
    steps: int
    train_bits: float  # bits a character, mean since the report before
    val_bits: float
    first_train_bits: float  # of the very first chunk
    streaming_difference: float
    seconds: float  # of training and validation


class CharModel(lightning.LightningModule):
    """Characters (B, T) to the logits (B, T, V) of those that follow; trained with Adam by cross entropy."""

    def __init__(self, alphabet: int, lstm: rnnkern.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, lstm.input_size)
        self.lstm = lstm
        self.head = nn.Linear(lstm.hidden_size, alphabet)
        self.carried: dict[str, State | None] = {"train": None, "val": None}

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits, and the state after the last character."""
        y, state = self.lstm(self.embedding(characters), state)
        return self.head(y), state

    def read(self, stage: str, batch: Batch) -> Tensor:
        """The loss of a chunk, read on from the state in which the chunk before it ended."""
        characters, following = batch
        logits, (h, c) = self(characters, self.carried[stage])
        self.carried[stage] = (h.detach(), c.detach())
        return cross_entropy(logits.flatten(0, 1), following.flatten())

    def on_train_epoch_start(self) -> None:
        """The text starts again."""
        self.carried["train"] = None

    def on_validation_epoch_start(self) -> None:
        """So does the text for validation."""
        self.carried["val"] = None

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of a chunk."""
        return self.read("train", batch)

    def validation_step(self, batch: Batch, index: int) -> None:
        """Logs the loss of a chunk for validation."""
        self.log("val_loss", self.read("val", batch), batch_size=batch[0].numel())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, its rate falling in a line to 0 at the last step."""
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        steps = int(self.trainer.max_steps)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Report(Callback):
    """Prints and keeps the losses in bits a character."""

    def __init__(self) -> None:
        self.first = self.train = self.val = math.nan
        self.step = 0
        self._losses: list[float] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the loss of a step."""
        self._losses.append(float(outputs["loss"]) / math.log(2))
        if trainer.global_step == 1:
            self.first = self._losses[0]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Says where the training is."""
        self.step = trainer.global_step
        self.train = sum(self._losses) / len(self._losses)
        self.val = float(trainer.callback_metrics["val_loss"]) / math.log(2)
        self._losses.clear()
        print(f"step {self.step}: {self.train:.3f} bits a character in training, {self.val:.3f} in validation")


class Stream:
    """A model one step at a time, from zeros: a cell for each layer, on the very parameters of the layer."""

    def __init__(self, model: CharModel, batch: int = 1) -> None:
        self.model, lstm = model, model.lstm
        # without masks, a layer with zoneout keeps this share of the old states
        self.kept: float = lstm.zoneout
        self.cells = []
        for layer in range(lstm.num_layers):
            inputs = lstm.input_size if layer == 0 else lstm.hidden_size
            cell = rnnkern.LSTMCell(inputs, lstm.hidden_size, backend=lstm.backend)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, name, getattr(lstm, f"{name}_l{layer}"))
            self.cells.append(cell)
        zeros = model.head.weight.new_zeros(batch, lstm.hidden_size)
        self.states = [(zeros, zeros)] * len(self.cells)

    @torch.no_grad()
    def step(self, characters: Tensor) -> Tensor:
        """The logits (B, V) after one more character (B,) of each stream."""
        x = self.model.embedding(characters)
        for layer, cell in enumerate(self.cells):
            old = self.states[layer]
            h, c = (self.kept * s + (1 - self.kept) * n for s, n in zip(old, cell(x, old), strict=True))
            self.states[layer], x = (h, c), h
        logits: Tensor = self.model.head(x)
        return logits


@torch.no_grad()
def streaming_difference(model: CharModel, characters: Tensor) -> float:
    """How far the logits of characters (B, T) read one by one are from those read at once, at most."""
    whole, _ = model(characters)
    stream = Stream(model, len(characters))
    steps = torch.stack([stream.step(column) for column in characters.unbind(1)], 1)
    return float((steps - whole).abs().max())


def sample(model: CharModel, alphabet: str, prompt: str, length: int, temperature: float = 0.6) -> str:
    """The prompt and what the model writes behind it, each character drawn from its softmax."""
    stream, written = Stream(model), prompt
    for position in range(len(prompt) + length - 1):
        read = torch.tensor([alphabet.index(written[position])], device=model.head.weight.device)
        logits = stream.step(read)
        if position == len(written) - 1:
            written += alphabet[int(torch.multinomial((logits / temperature).softmax(-1), 1))]
    return written


def train(text: str, settings: Settings) -> Result:
    """Trains, writes a sample, compares streaming with whole sequences, and leaves all of it in a folder."""
    lightning.seed_everything(settings.seed, verbose=False)
    lstm = rnnkern.LSTM(
        EMBEDDING,
        settings.hidden,
        settings.layers,
        batch_first=True,
        backend=settings.backend,
        zoneout=settings.zoneout,
        recurrent_dropout=settings.recurrent_dropout,
        weight_dropout=settings.weight_dropout,
    )
    alphabet = "".join(sorted(set(text).union(*PROMPTS)))
    numbers = torch.tensor([alphabet.index(character) for character in text])
    held_out = max(int(VALIDATION_SHARE * len(numbers)), settings.batch * settings.chunk + 1)
    training, validation = (
        Chunks(part, settings.batch, settings.chunk) for part in (numbers[:-held_out], numbers[-held_out:])
    )
    model, report = CharModel(len(alphabet), lstm), Report()
    name = f"char-lm-{settings.hidden}x{settings.layers}"
    folder = settings.runs_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(settings, folder, report)
    start = time.perf_counter()
    with warnings.catch_warnings():
        # Lightning 2.6 calls what torch 2.13 deprecates; nothing here can change that
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        trainer.fit(model, training, validation)
        if report.step < settings.steps:
            trainer.validate(model, validation, verbose=False)
    seconds = time.perf_counter() - start
    model.eval()
    difference = streaming_difference(model, numbers[-STREAMED:].unsqueeze(0).to(model.device))
    if not difference <= STREAM_TOLERANCE:
        raise RuntimeError(
            f"streamed logits differ by {difference:.1e} from those of the layer, over {STREAM_TOLERANCE}"
        )
    written = "\n\n".join(sample(model, alphabet, prompt, SAMPLE) for prompt in PROMPTS)
    result = Result(
        name=name,
        steps=trainer.global_step,
        train_bits=round(report.train, 4),
        val_bits=round(report.val, 4),
        first_train_bits=round(report.first, 4),
        streaming_difference=difference,
        seconds=round(seconds, 1),
    )
    trainer.save_checkpoint(folder / "last.ckpt")
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    (folder / "sample.txt").write_text(written + "\n")
    print(f"\n{written}\n")
    print(
        f"from {report.first:.2f} to {report.train:.2f} bits a character; validation {report.val:.2f}; {seconds:.0f} s"
    )
    print(f"streamed step by step, logits differ by {difference:.1e} at most; written to {folder}")
    return result


def main(argv: Sequence[str] | None = None) -> Result:
    """Runs the command line."""
    parser = make_parser()
    settings = Settings(**vars(parser.parse_args(argv)))
    try:
        return train(standard_library_text(), settings)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def make_trainer(settings: Settings, folder: Path, report: Report) -> lightning.Trainer:
    """A Lightning trainer that writes to `folder` only."""
    on_cuda = settings.backend != "numba" and torch.cuda.is_available()
    return lightning.Trainer(
        accelerator="cuda" if on_cuda else "cpu",
        devices=1,
        max_steps=settings.steps,
        val_check_interval=max(1, settings.steps // REPORTS),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=GRADIENT_NORM,
        callbacks=[report],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def make_parser() -> argparse.ArgumentParser:
    """The options, one for each field of Settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=positive, default=400, metavar="N", help="chunks to train on (default 400)")
    add("--hidden", type=positive, default=256, metavar="H", help="hidden units (default 256)")
    add("--layers", type=positive, default=1, metavar="L", help="LSTM layers (default 1)")
    add("--chunk", type=positive, default=64, metavar="T", help="characters gradients go back (default 64)")
    add("--batch", type=positive, default=32, metavar="B", help="parallel streams (default 32)")
    for name, meaning in (
        ("--zoneout", "that a unit keeps its state"),
        ("--recurrent-dropout", "that a unit is not seen by the next step"),
        ("--weight-dropout", "that a recurrent weight is 0"),
    ):
        add(name, type=float, default=0.0, metavar="P", help=f"probability {meaning} (default 0)")
    add("--backend", choices=BACKENDS, default="auto", help="of rnnkern (default auto)")
    add("--seed", type=int, default=0, metavar="S", help="of weights, masks and sample (default 0)")
    add("--runs-dir", type=Path, default=Path("runs"), metavar="R", help="where to write (default runs)")
    return parser


if __name__ == "__main__":
    main()
