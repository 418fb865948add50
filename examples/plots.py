"""The pictures a training leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

RIGHT, WRONG = "#2a6f4e", "#c8102e"
TRAIN, VALIDATION = "#1f5fa8", "#e07b00"
GRID = (5, 10)  # rows and columns of images
WRONG_ROWS = 2  # of the rows, at most so many for wrong predictions


def plot_curves(history: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Loss and accuracy after each epoch, of the training and the validation set."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = range(1, len(history) + 1)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for stage, label, colour in (("train", "training", TRAIN), ("val", "validation", VALIDATION)):
            values = [epoch[f"{stage}_{quantity}"] for epoch in history]
            axes.plot(epochs, values, marker="o", markersize=4, color=colour, label=label)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_predictions(images: Tensor, truth: Tensor, predicted: Tensor, title: str, path: Path) -> None:
    """A grid of images (N, rows, columns) under their predictions, the first right ones above the first wrong ones."""
    rows, columns = GRID
    wrong = (predicted != truth).nonzero().flatten()
    shown_wrong = wrong[: WRONG_ROWS * columns].tolist()
    right = (predicted == truth).nonzero().flatten()
    shown = right[: rows * columns - len(shown_wrong)].tolist() + shown_wrong
    figure = Figure(figsize=(columns, 1.25 * rows + 0.8), layout="constrained")
    grid = list(figure.subplots(rows, columns).flat)
    for axes in grid:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, index in zip(grid, shown, strict=False):
        label, colour = f"{predicted[index]}", RIGHT
        if predicted[index] != truth[index]:
            label, colour = f"{predicted[index]}, is {truth[index]}", WRONG
            axes.spines[:].set(visible=True, color=WRONG, linewidth=2)
        axes.imshow(images[index].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(label, fontsize=11, color=colour, pad=3)
    caption = f"prediction above each image; red: {len(shown_wrong)} of the {len(wrong):,} wrong ones in {len(truth):,}"
    figure.suptitle(f"{title}\n{caption}")
    figure.savefig(path, dpi=120)
