"""The pictures that trainings leave behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

History = Sequence[Mapping[str, float]]  # of each epoch

RIGHT, WRONG = "#2a6f4e", "#c8102e"
STAGES = (("train", "training", "#1f5fa8"), ("val", "validation", "#e07b00"))
GRID = (2, 5)  # rows and columns of images
PANELS = 4  # confusion matrices side by side


def plot_curves(history: History, title: str, path: Path) -> None:
    """Loss and accuracy after each epoch, of the training and, where there is one, the validation set."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for stage, label, colour in STAGES:
            values = [epoch[f"{stage}_{quantity}"] for epoch in history if f"{stage}_{quantity}" in epoch]
            if values:
                axes.plot(range(1, len(values) + 1), values, "o-", markersize=4, color=colour, label=label)
        tidy(axes, quantity)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: Path) -> None:
    """How often each class was taken for which."""
    side = 3.2 + 0.42 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    draw_confusion(axes, confusion, classes)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.savefig(path, dpi=120)


def plot_predictions(
    images: Tensor, truth: Sequence[int], predicted: Sequence[int], classes: Sequence[str], title: str, path: Path
) -> None:
    """The first images, gray (N, rows, columns) or in colour (N, 3, rows, columns), under their predictions: a wrong
    one is framed, and says what it is."""
    rows, columns = GRID
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows + 0.6), layout="constrained")
    grid = list(figure.subplots(rows, columns).flat)
    for axes in grid:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image, real, said in zip(grid, images, truth, predicted, strict=False):
        label, colour = classes[said], RIGHT
        if said != real:
            label, colour = f"{classes[said]}, is {classes[real]}", WRONG
            axes.spines[:].set(visible=True, color=WRONG, linewidth=2)
        pixels = image.permute(1, 2, 0) if image.dim() == 3 else image
        axes.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(label, fontsize=11, color=colour, pad=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_comparison(histories: Mapping[str, History], title: str, path: Path) -> None:
    """Training loss and accuracy of several runs, a line each; dashed what was held out."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for index, (name, history) in enumerate(histories.items()):
            for stage, line in (("train", "-"), ("val", "--")):
                values = [epoch[f"{stage}_{quantity}"] for epoch in history if f"{stage}_{quantity}" in epoch]
                label = name if stage == "train" else None
                axes.plot(
                    range(1, len(values) + 1), values, line, marker=".", color=f"C{index % 10}", lw=1.2, label=label
                )
        tidy(axes, quantity)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"{title} (dashed: validation)" if "val_loss" in next(iter(histories.values()))[0] else title)
    figure.savefig(path, dpi=110)


def plot_confusions(
    matrices: Mapping[str, Sequence[Sequence[int]]], classes: Sequence[str], title: str, path: Path
) -> None:
    """The confusion matrices of several runs."""
    rows, columns = math.ceil(len(matrices) / PANELS), min(PANELS, len(matrices))
    figure = Figure(figsize=(3.3 * columns, 3.5 * rows + 0.4), layout="constrained")
    grid = list(np.ravel(figure.subplots(rows, columns)))
    for axes in grid[len(matrices) :]:
        axes.set_axis_off()
    for axes, (name, confusion) in zip(grid, matrices.items(), strict=False):
        draw_confusion(axes, confusion, classes, fontsize=5 if len(classes) > 2 else 9)
        axes.set_title(name, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_confusion(axes: Axes, confusion: Sequence[Sequence[int]], classes: Sequence[str], fontsize: float = 8) -> None:
    """A square for each pair of classes, darker the more of the true class there are in it."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1)  # the root, or few mistakes would not be seen
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=fontsize, color=colour)
    names = [name.replace(" ", "\n") for name in classes]
    axes.set_xticks(range(len(names)), names, fontsize=fontsize, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(names)), names, fontsize=fontsize)


def tidy(axes: Axes, quantity: str) -> None:
    """What all curves have."""
    axes.set(xlabel="epoch", ylabel=quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
