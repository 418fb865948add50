"""A sequence classifier: a recurrent layer over the steps, its last hidden state into a linear layer."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

import rnnkern

Batch = tuple[Tensor, Tensor]  # sequences (B, T, I), classes (B,)

CELLS = ("lstm", "gru", "rnn")
LEARNING_RATE = 2e-3
BACKENDS = ("auto", "numba", "cuda", "reference", "torch")


def make_rnn(cell: str, input_size: int, hidden_size: int, backend: str) -> nn.RNNBase:
    """One recurrent layer, from rnnkern or (backend "torch") from torch.nn."""
    name = cell.upper()
    rnn: nn.RNNBase
    if backend == "torch":
        rnn = getattr(nn, name)(input_size, hidden_size, batch_first=True)
    else:
        rnn = getattr(rnnkern, name)(input_size, hidden_size, batch_first=True, backend=backend)
    return rnn


class SequenceClassifier(lightning.LightningModule):
    """Classifies sequences (B, T, I) by cross entropy, trained with Adam; logs `{train,val,test}_{loss,accuracy}`."""

    def __init__(self, rnn: nn.RNNBase, classes: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, classes)
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")
        rnnkern.init_keras_(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, classes) for sequences (B, T, I)."""
        _, state = self.rnn(inputs)
        h_n = state[0] if isinstance(state, tuple) else state  # LSTM's is (h_n, c_n)
        logits: Tensor = self.head(h_n[-1])
        return logits

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of a batch."""
        return self._step("train", self.train_accuracy, batch)

    def validation_step(self, batch: Batch, index: int) -> None:
        """Logs a batch of the validation set."""
        self._step("val", self.val_accuracy, batch)

    def test_step(self, batch: Batch, index: int) -> None:
        """Logs a batch of the test set."""
        self._step("test", self.test_accuracy, batch)

    def predict_step(self, batch: Batch, index: int) -> Tensor:
        """The likeliest class (B,) of each sequence."""
        return self.forward(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, its rate falling in a line to 0 at the last step, so that the run does not end on a noisy epoch."""
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, stage: str, accuracy: Metric, batch: Batch) -> Tensor:
        inputs, labels = batch
        logits = self.forward(inputs)
        loss = cross_entropy(logits, labels)
        accuracy.update(logits, labels)
        shown: dict[str, Metric | Tensor | int | float] = {f"{stage}_loss": loss, f"{stage}_accuracy": accuracy}
        self.log_dict(shown, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss
