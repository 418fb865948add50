"""One training, from the data to a folder of results: the part that all examples share."""

from __future__ import annotations

import json
import logging
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from torch import Tensor

import rnnkern
from examples.classifier import SequenceClassifier, make_rnn
from examples.data import Batches, ImageData
from examples.plots import plot_curves, plot_predictions

BATCH_SIZE = 64
VALIDATION_SPLIT = 0.2
GRADIENT_NORM = 1.0  # longer gradients are cut to it: a plain RNN has a steep one now and then
OUTPUTS = ("result.json", "curves.png", "predictions.png", "last.ckpt", "best.ckpt")

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no list of absent hardware, no advertisement


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do; `early_stopping` is a patience in epochs, `limit_steps` cuts every pass short."""

    cell: str
    hidden: int
    epochs: int
    backend: str
    early_stopping: int | None
    seed: int
    limit_steps: int | None
    runs_dir: Path


@dataclass(frozen=True)
class Result:
    """What result.json holds."""

    name: str
    cell: str
    test_accuracy: float
    test_loss: float
    epochs: int
    seconds_per_epoch: float  # median, so that compiling kernels in the first epoch does not count
    parameters: int
    backend: str
    torch: str
    rnnkern: str


class History(Callback):
    """Keeps the losses, accuracies and seconds of each epoch, validation included."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes the epoch."""
        self.seconds.append(time.perf_counter() - self._start)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(data: ImageData, settings: Settings) -> Result:
    """Trains and tests a classifier, leaves checkpoint, result.json and plots in runs_dir/name, prints the outcome."""
    lightning.seed_everything(settings.seed, verbose=False)
    name = f"{data.name}-{settings.cell}-{settings.hidden}"
    if settings.backend != "auto":
        name += f"-{settings.backend}"
    folder = empty_folder(settings.runs_dir / name)

    rnn = make_rnn(settings.cell, data.train_images.shape[-1], settings.hidden, settings.backend)
    model = SequenceClassifier(rnn, classes=int(data.train_labels.max()) + 1)
    history = History()
    trainer = make_trainer(settings, folder, history)
    test = Batches(data.test_images, data.test_labels, BATCH_SIZE)
    with warnings.catch_warnings():
        # Lightning 2.6 calls what torch 2.13 deprecates; nothing here can change that
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        trainer.fit(model, *split_batches(data))
        best = "best" if settings.early_stopping else None
        metrics = trainer.test(model, test, ckpt_path=best, verbose=False)[0]
        predicted = torch.cat(cast("list[Tensor]", trainer.predict(model, test)))

    result = Result(
        name=name,
        cell=settings.cell,
        test_accuracy=round(metrics["test_accuracy"], 6),
        test_loss=round(metrics["test_loss"], 6),
        epochs=len(history.seconds),
        seconds_per_epoch=round(statistics.median(history.seconds), 3),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        backend=settings.backend,
        torch=torch.__version__,
        rnnkern=rnnkern.__version__,
    )
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    layer = f"{settings.cell.upper()} of {settings.hidden} units"
    title = f"{layer} on {data.name}: test accuracy {result.test_accuracy:.2%}"
    plot_curves(history.metrics, title, folder / "curves.png")
    truth = data.test_labels[: len(predicted)]
    plot_predictions(data.test_images, truth, predicted, title, folder / "predictions.png")
    print(f"test accuracy {result.test_accuracy:.4f}; plots: {folder / 'curves.png'} and {folder / 'predictions.png'}")
    return result


def empty_folder(folder: Path) -> Path:
    """The folder, made if need be, without what an earlier run of the same name left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in OUTPUTS:
        (folder / file).unlink(missing_ok=True)
    return folder


def split_batches(data: ImageData) -> tuple[Batches, Batches]:
    """Training and validation batches, drawn at random from the training images."""
    order = torch.randperm(len(data.train_labels))
    validation, training = order.tensor_split([round(VALIDATION_SPLIT * len(order))])
    return (
        Batches(data.train_images[training], data.train_labels[training], BATCH_SIZE, shuffle=True),
        Batches(data.train_images[validation], data.train_labels[validation], BATCH_SIZE),
    )


def make_trainer(settings: Settings, folder: Path, history: History) -> lightning.Trainer:
    """A Lightning trainer that writes to `folder` only."""
    callbacks: list[Callback] = [history, TQDMProgressBar(refresh_rate=25)]
    if settings.early_stopping is None:
        callbacks.append(ModelCheckpoint(folder, filename="last", enable_version_counter=False))
    else:
        callbacks.append(EarlyStopping(monitor="val_loss", patience=settings.early_stopping))
        callbacks.append(
            ModelCheckpoint(folder, filename="best", monitor="val_loss", save_last=True, enable_version_counter=False)
        )
    on_cuda = settings.backend != "numba" and torch.cuda.is_available()
    return lightning.Trainer(
        accelerator="cuda" if on_cuda else "cpu",
        devices=1,
        max_epochs=settings.epochs,
        limit_train_batches=settings.limit_steps,
        limit_val_batches=settings.limit_steps,
        limit_test_batches=settings.limit_steps,
        limit_predict_batches=settings.limit_steps,
        num_sanity_val_steps=0,
        gradient_clip_val=GRADIENT_NORM,
        callbacks=callbacks,
        logger=False,
        default_root_dir=folder,
        enable_model_summary=False,
    )
