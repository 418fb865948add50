"""Trains an LSTM, GRU or plain RNN to read handwritten digits, each image row by row: 28 steps of 28 pixels.

One model with a recipe of its own: Adam's rate falls in a line from 2e-3 to 0, and gradients are cut to the norm 1.
Without the data and without a network it trains on scikit-learn's bundled digits. The published configurations are in
the catalogue: `python -m examples --list`. Run it from anywhere:

    python examples/mnist.py --cell lstm --hidden 128 --epochs 10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # run as a file, not as a module: Python then looks in examples/, not above it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from examples.arguments import Refused, add_settings, positive
from examples.catalogue import CELLS, MNIST_128, Entry, Recipe, last
from examples.data import Dataset, Holdout, NotFetchedError
from examples.images import MNIST, digits, load_idx
from examples.layers import Recurrent
from examples.training import Result, Settings, check, make_runs_dir, train

RECIPE = Recipe(10, 64, rate=2e-3, holdout=Holdout(), decay=True, clip=1.0)


def main(argv: Sequence[str] | None = None) -> Result:
    """Runs the command line."""
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    cell, hidden, patience = (options.pop(name) for name in ("cell", "hidden", "early_stopping"))
    family = replace(MNIST_128, recipe=replace(RECIPE, patience=patience))
    try:
        data = load(options.pop("data_dir"))
        entry = Entry(f"{data.name}-rows-{cell}-{hidden}", family, last(Recurrent(cell, hidden)))
        settings = Settings(**options)
        check(entry, settings)
        make_runs_dir(settings)
    except (FileNotFoundError, ValueError, Refused) as error:
        parser.error(str(error))
    return train(entry, data, settings)


def load(data_dir: Path | None) -> Dataset:
    """MNIST, or the bundled digits where no folder is named and no mirror answers."""
    try:
        return load_idx(MNIST, data_dir)
    except NotFetchedError as error:
        print(f"mnist cannot be fetched ({error}); training on scikit-learn's bundled 8x8 digits instead")
        return digits()


def make_parser() -> argparse.ArgumentParser:
    """What the model is, and what all trainings can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--hidden", type=positive, default=128, metavar="H", help="hidden units (default 128)")
    parser.add_argument(
        "--early-stopping",
        type=positive,
        metavar="PATIENCE",
        help="stop after so many epochs without a lower validation loss, and test the best epoch (default: off)",
    )
    add_settings(parser)
    return parser


if __name__ == "__main__":
    main()
