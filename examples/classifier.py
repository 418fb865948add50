"""What Lightning trains: a model that gives logits, its loss, its measures and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
    BinarySpecificity,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
)

from examples.catalogue import Recipe
from examples.data import Examples

KERAS_EPSILON = 1e-7
KERAS_DECAY = 0.9  # of RMSprop's mean of squares
STAGES = ("train", "val", "test")


class RMSprop(torch.optim.Optimizer):
    """RMSprop as Keras has it: g / sqrt(v + epsilon), where torch's divides by sqrt(v) + epsilon.

    With Keras's epsilon, 1e-7, that is another step wherever gradients are below 3e-4, as those of embeddings are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A step down."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter]["squares"] = torch.zeros_like(parameter)
                squares = self.state[parameter]["squares"]
                squares.mul_(KERAS_DECAY).addcmul_(parameter.grad, parameter.grad, value=1 - KERAS_DECAY)
                parameter.addcdiv_(parameter.grad, (squares + KERAS_EPSILON).sqrt_(), value=-group["lr"])
        return loss


def make_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's, with Keras's constants. Adam is torch's, which corrects the bias beside epsilon, too: another step
    than Keras's in the first hundreds where gradients are below 1e-5."""
    if recipe.optimizer == "rmsprop":
        return RMSprop(parameters, recipe.rate)
    return torch.optim.Adam(parameters, lr=recipe.rate, eps=KERAS_EPSILON)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (B, classes), or (B, 1) of two classes."""
    if logits.shape[1] == 1:
        return binary_cross_entropy_with_logits(logits.squeeze(1), labels.to(logits.dtype))
    return cross_entropy(logits, labels)


def decided(logits: Tensor) -> Tensor:
    """The likeliest class (B,) of each."""
    return (logits.squeeze(1) > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def two_class_measures() -> MetricCollection:
    """Of the second class among two; the rate of true positives is the recall by another name."""
    return MetricCollection(
        {
            "precision": BinaryPrecision(),
            "recall": BinaryRecall(),
            "f1": BinaryF1Score(),
            "tpr": BinaryRecall(),
            "tnr": BinarySpecificity(),
        },
        compute_groups=False,
    )


class Classifier(lightning.LightningModule):
    """Trains a model by cross entropy; logs `{train,val,test}_{loss,accuracy}`, each over a whole pass and over all
    processes. After a test `confusion` (true class, decided class) and `measures` are there."""

    def __init__(self, model: nn.Sequential, classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.metrics: Any = nn.ModuleDict()
        for stage in STAGES:
            self.metrics[f"{stage}_loss"] = MeanMetric()
            self.metrics[f"{stage}_accuracy"] = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.matrix = MulticlassConfusionMatrix(classes)
        self.two_classes = two_class_measures() if classes == 2 else None
        self.confusion: list[list[int]] = []
        self.measures: dict[str, float] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, classes), or (B, 1) for two classes."""
        logits: Tensor = self.model(inputs)
        return logits

    def training_step(self, batch: Examples, index: int) -> Tensor:
        """The loss of a batch."""
        return self._step("train", batch)[0]

    def validation_step(self, batch: Examples, index: int) -> None:
        """Counts a batch held out."""
        self._step("val", batch)

    def test_step(self, batch: Examples, index: int) -> None:
        """Counts a batch of the test set, and measures what is measured there alone."""
        classes = self._step("test", batch)[1]
        self.matrix.update(classes, batch.labels)
        if self.two_classes is not None:
            self.two_classes.update(classes, batch.labels)

    def on_fit_start(self) -> None:
        """Each process draws masks of its own for its share of a batch."""
        if self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def on_validation_epoch_end(self) -> None:
        """Logs what early stopping watches."""
        self.sum_up("val")

    def on_test_epoch_end(self) -> None:
        """Logs the results, and keeps what is no number."""
        self.sum_up("test")
        self.confusion = self.matrix.compute().tolist()
        self.matrix.reset()
        if self.two_classes is not None:
            self.measures = {name: round(float(value), 6) for name, value in self.two_classes.compute().items()}
            self.two_classes.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer; where it says decay, the rate falls in a line to 0 at the last step."""
        optimizer = make_optimizer(self.recipe, self.parameters())
        if not self.recipe.decay:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def sum_up(self, stage: str) -> dict[str, float]:
        """The loss and accuracy of a pass, over all processes; the next pass starts anew. Once a pass and not once a
        step, as Lightning would log metrics, which takes more time than a small model."""
        found = {name: metric for name, metric in self.metrics.items() if name.startswith(stage)}
        values = {name: float(metric.compute()) for name, metric in found.items()}
        for metric in found.values():
            metric.reset()
        self.log_dict(values, prog_bar=True, sync_dist=True)
        return values

    def _step(self, stage: str, batch: Examples) -> tuple[Tensor, Tensor]:
        logits = self(batch.inputs)
        loss, classes = loss_of(logits, batch.labels), decided(logits.detach())
        self.metrics[f"{stage}_loss"].update(loss.detach(), weight=len(batch.labels))
        self.metrics[f"{stage}_accuracy"].update(classes, batch.labels)
        return loss, classes
