"""What the command lines of the examples have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.data import DATA_DIR_VARIABLE
from examples.layers import TORCH


class Refused(Exception):
    """What a command line cannot do; the message is for whoever typed it."""


BACKENDS = ("auto", "numba", "cuda", "reference", TORCH)


def positive(text: str) -> int:
    """An integer from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 up, got {text}")
    return value


def seed(text: str) -> int:
    """What every generator takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {2**32 - 1}, got {text}")
    return value


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The data folder, and an option for each field of training.Settings."""
    add = parser.add_argument
    add("--epochs", type=positive, metavar="N", help="passes over the data (default: the recipe's)")
    add(
        "--data-dir",
        type=Path,
        metavar="D",
        help=f"folder of the data's files, or above folders of them; also ${DATA_DIR_VARIABLE} (default: download)",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="of rnnkern, or torch for torch.nn's own layers (default auto)",
    )
    add("--seed", type=seed, default=0, metavar="S", help="of weights, masks and order (default 0)")
    add("--devices", type=positive, default=1, metavar="N", help="processes of a machine that train (default 1)")
    add("--nodes", type=positive, default=1, metavar="N", help="machines, by Lightning's DDP (default 1)")
    add("--limit-steps", type=positive, metavar="N", help="at most N batches a pass, for a quick look")
    add("--against-torch", action="store_true", help="also time training steps against torch.nn's, in turn")
    add("--runs-dir", type=Path, default=Path("runs"), metavar="R", help="where to write (default runs)")
