"""One training, from the data to a folder of results, and the test of what it left there."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar

import rnnkern
from examples.arguments import Refused
from examples.catalogue import Entry
from examples.classifier import Classifier, decided
from examples.data import Batches, Dataset
from examples.layers import TORCH
from examples.models import build, counts, summary, torch_has
from examples.plots import GRID, plot_confusion, plot_curves, plot_predictions
from examples.timing import both_ways, seconds_a_frame

TEST_BATCH = 500
RESULT, CHECKPOINT = "result.json", "model.ckpt"
OUTPUTS = (RESULT, CHECKPOINT, "curves.png", "confusion.png", "predictions.png")
UNFINISHED = ".part"  # behind the name of the folder of a run that has not come to its end

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no list of absent hardware, no advertisement


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do beside its entry: `epochs` in place of the recipe's, `limit_steps` cuts every pass
    short, `against_torch` times the steps against torch.nn's, too."""

    epochs: int | None = None
    backend: str = "auto"
    seed: int = 0
    devices: int = 1
    nodes: int = 1
    limit_steps: int | None = None
    against_torch: bool = False
    runs_dir: Path = Path("runs")

    def asked(self, entry: Entry) -> dict[str, int | None]:
        """What settles the results of an entry, beside the backend."""
        epochs = self.epochs or entry.family.recipe.epochs
        return {"epochs": epochs, "seed": self.seed, "limit_steps": self.limit_steps}

    def folder(self, entry: Entry) -> Path:
        """Where a run of an entry writes."""
        name = entry.name + entry.variant
        return self.runs_dir / (name if self.backend == "auto" else f"{name}-{self.backend}")


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
    entry: str
    keras_parameters: int  # the same in Keras's convention
    asked: dict[str, int | None]  # epochs, seed and limit_steps
    threads: int
    measures: dict[str, float]  # of two classes; and of clips, seconds a frame
    step_seconds: dict[str, float]  # an epoch's steps alone, rnnkern's and torch.nn's in turn, if that was asked for
    confusion: list[list[int]] = field(repr=False)
    history: list[dict[str, float]] = field(repr=False)


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
        assert isinstance(pl_module, Classifier)
        self.seconds.append(time.perf_counter() - self._start)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        found |= pl_module.sum_up("train")
        self.metrics.append({name: round(value, 6) for name, value in found.items()})


def check(entry: Entry, settings: Settings) -> None:
    """Raises Refused if an entry cannot be trained so."""
    batch, processes = entry.family.recipe.batch, settings.devices * settings.nodes
    if batch % processes:
        raise Refused(
            f"--devices times --nodes: expected a divisor of the batch of {batch}, got {processes}; choose others"
        )
    if settings.backend == "cuda" and not torch.cuda.is_available():
        raise Refused("--backend: expected a CUDA device for cuda, found none; leave the option out")
    if settings.backend == TORCH and not torch_has(entry.layers):
        raise Refused(
            f"--backend: torch.nn has no recurrent_dropout and no reset_after=False, which {entry.name} needs; "
            "leave the option out"
        )


def make_runs_dir(settings: Settings) -> None:
    """Raises Refused if there is no writing there: before data is loaded and anything trained."""
    try:
        settings.runs_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(
            f"--runs-dir: expected a folder to write to, got {settings.runs_dir} ({error.strerror}); choose another"
        ) from error


def read_result(path: Path) -> Result:
    """A result.json. Raises Refused if it is none."""
    try:
        return Result(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise Refused(
            f"{path}: expected what a run leaves, got {type(error).__name__}: {error}; move it away and train again"
        ) from error


def is_done(entry: Entry, settings: Settings) -> bool:
    """Whether there is a result of just such a run."""
    path = settings.folder(entry) / RESULT
    if not path.is_file():
        return False
    result = read_result(path)
    return result.asked == settings.asked(entry) and (not settings.against_torch or bool(result.step_seconds))


def train(entry: Entry, data: Dataset, settings: Settings) -> Result:
    """Trains and tests an entry's model, leaves result.json, checkpoint and pictures, and prints the outcome. Until it
    has come to its end, what an earlier run left stays."""
    recipe, epochs = entry.family.recipe, settings.epochs or entry.family.recipe.epochs
    model = make_classifier(entry, data, settings)
    folder = settings.folder(entry).with_name(settings.folder(entry).name + UNFINISHED)
    history = History()
    trainer = make_trainer(entry, settings, epochs, folder, history)
    if trainer.is_global_zero:
        empty(folder)
        print(f"{entry.name}: {entry.family.title}, {epochs} epochs, {len(data.train.labels):,} examples")
        print(summary(entry.layers, tuple(data.train.inputs.shape[1:]), model.model))
    training, held_out = (data.train, None) if recipe.holdout is None else recipe.holdout.split(data.train)
    order = torch.Generator().manual_seed(settings.seed)
    with quiet():
        trainer.fit(
            model,
            Batches(training, recipe.batch, order, recipe.drop_last),
            None if held_out is None else Batches(held_out, TEST_BATCH),
        )
        metrics = trainer.test(model, Batches(data.test, TEST_BATCH), ckpt_path=folder / CHECKPOINT, verbose=False)[0]
    result = outcome(entry, data, settings, model, metrics, history)
    if trainer.is_global_zero:
        leave(result, entry, data, model, folder)
        publish(folder, settings.folder(entry))
    return result


def outcome(
    entry: Entry, data: Dataset, settings: Settings, model: Classifier, tested: Mapping[str, float], history: History
) -> Result:
    """All that is known after a test, and what has yet to be timed."""
    keras_parameters, parameters = counts(model.model)
    return Result(
        name=settings.folder(entry).name,
        cell=entry.cell,
        test_accuracy=round(tested["test_accuracy"], 6),
        test_loss=round(tested["test_loss"], 6),
        epochs=len(history.seconds),
        seconds_per_epoch=round(statistics.median(history.seconds), 3),
        parameters=parameters,
        backend=settings.backend,
        torch=torch.__version__,
        rnnkern=rnnkern.__version__,
        entry=entry.name,
        keras_parameters=keras_parameters,
        asked=settings.asked(entry),
        threads=torch.get_num_threads(),
        measures=model.measures | seconds_a_frame(model.model, data),
        step_seconds=both_ways(entry, data, settings.seed)
        if settings.against_torch and model.trainer.is_global_zero
        else {},
        confusion=model.confusion,
        history=history.metrics,
    )


def evaluate(entry: Entry, data: Dataset, settings: Settings) -> dict[str, float]:
    """Tests what a run left: accuracy, loss, and the measures of two classes.

    Raises:
        Refused: there is no checkpoint, or not one of this model.
    """
    checkpoint = settings.folder(entry) / CHECKPOINT
    if not checkpoint.is_file():
        raise Refused(f"{checkpoint}: expected what a training left, found nothing; train {entry.name} first")
    model = make_classifier(entry, data, settings)
    try:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise Refused(
            f"{checkpoint}: expected the weights of {entry.name}, got something else ({type(error).__name__}); "
            "train it again"
        ) from error
    trainer = make_trainer(entry, settings, 1, checkpoint.parent, History())
    with quiet():
        metrics = trainer.test(model, Batches(data.test, TEST_BATCH), verbose=False)[0]
    return {name.removeprefix("test_"): round(value, 6) for name, value in metrics.items()} | model.measures


def make_classifier(entry: Entry, data: Dataset, settings: Settings) -> Classifier:
    """The model with weights drawn by the seed."""
    lightning.seed_everything(settings.seed, verbose=False)
    model = build(entry.layers, tuple(data.train.inputs.shape[1:]), settings.backend)
    return Classifier(model, len(data.classes), entry.family.recipe)


def make_trainer(entry: Entry, settings: Settings, epochs: int, folder: Path, history: History) -> lightning.Trainer:
    """A Lightning trainer that writes to `folder` only. With a patience the best weights are kept there, else the
    last."""
    recipe, limit = entry.family.recipe, settings.limit_steps
    monitor = "val_loss" if recipe.patience else None
    callbacks: list[Callback] = [
        history,
        TQDMProgressBar(refresh_rate=25),
        ModelCheckpoint(
            folder,
            filename=Path(CHECKPOINT).stem,
            monitor=monitor,
            save_weights_only=True,
            enable_version_counter=False,
        ),
    ]
    if recipe.patience:
        callbacks.append(EarlyStopping(monitor="val_loss", patience=recipe.patience))
    on_cuda = settings.backend != "numba" and torch.cuda.is_available()
    return lightning.Trainer(
        accelerator="cuda" if on_cuda else "cpu",
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy="ddp" if settings.devices * settings.nodes > 1 else "auto",
        use_distributed_sampler=False,  # Batches shares out
        max_epochs=epochs,
        limit_train_batches=limit,
        limit_val_batches=limit,
        limit_test_batches=limit,
        num_sanity_val_steps=0,
        gradient_clip_val=recipe.clip,
        callbacks=callbacks,
        logger=False,
        default_root_dir=folder,
        enable_model_summary=False,
    )


def empty(folder: Path) -> None:
    """Makes the folder, or removes what a run left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in OUTPUTS:
        (folder / file).unlink(missing_ok=True)


def publish(part: Path, folder: Path) -> None:
    """Puts a finished run in the place of an earlier one; result.json comes last: where it is, a run was finished."""
    empty(folder)
    for name in reversed(OUTPUTS):
        if (part / name).is_file():
            (part / name).replace(folder / name)
    shutil.rmtree(part)


@contextmanager
def quiet() -> Iterator[None]:
    """Without two warnings that mean nothing here: Lightning 2.6 calls what torch 2.13 deprecates, and wonders at a
    training without validation, as some of the published ones are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
        yield


@torch.no_grad()
def leave(result: Result, entry: Entry, data: Dataset, model: Classifier, folder: Path) -> None:
    """Draws the pictures and writes result.json."""
    title = f"{result.name}: test accuracy {result.test_accuracy:.2%}"
    plot_curves(result.history, title, folder / "curves.png")
    plot_confusion(result.confusion, data.classes, title, folder / "confusion.png")
    first = data.test.take(slice(GRID[0] * GRID[1]))
    if first.inputs.is_floating_point() and first.inputs.dim() < 5:  # images
        predicted = decided(model.eval()(first.inputs.to(model.device))).tolist()
        plot_predictions(
            first.inputs, first.labels.tolist(), predicted, data.classes, title, folder / "predictions.png"
        )
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(result).items())
    (folder / RESULT).write_text(f"{{\n{lines}\n}}\n")
    published = "" if entry.accuracy is None else f" (published {entry.accuracy:.4f})"
    print(
        f"test accuracy {result.test_accuracy:.4f}{published}, loss {result.test_loss:.4f}, "
        f"{result.seconds_per_epoch:.1f} s an epoch; written to {folder.with_name(result.name)}"
    )
