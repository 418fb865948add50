"""Trains an LSTM, GRU or plain RNN to read handwritten digits, each image row by row: 28 steps of 28 pixels.

Writes result.json, curves.png, predictions.png and a checkpoint to a folder under --runs-dir. Run it from anywhere:

    python examples/mnist.py --cell lstm --hidden 128 --epochs 10
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, not as a module: Python then looks in examples/, not above it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from examples.arguments import positive
from examples.classifier import BACKENDS, CELLS
from examples.data import DATA_DIR_VARIABLE, MNIST, load_images
from examples.training import Result, Settings, train


def main(argv: Sequence[str] | None = None) -> Result:
    """Runs the command line."""
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    data_dir = options.pop("data_dir")
    try:
        data = load_images(MNIST, data_dir)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return train(data, Settings(**options))


def make_parser() -> argparse.ArgumentParser:
    """The options, one for each field of Settings, and the data folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--hidden", type=positive, default=128, metavar="H", help="hidden units (default 128)")
    parser.add_argument("--epochs", type=positive, default=10, metavar="N", help="passes over the data (default 10)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="D",
        help=f"folder, or its subfolder mnist, of the MNIST files; also ${DATA_DIR_VARIABLE} (default: download)",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="of rnnkern, or torch for torch.nn's own layer (default auto)",
    )
    parser.add_argument(
        "--early-stopping",
        type=positive,
        metavar="PATIENCE",
        help="stop after so many epochs without a lower validation loss, and test the best epoch (default: off)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of weights, split and order (default 0)")
    parser.add_argument("--limit-steps", type=positive, metavar="N", help="at most N batches a pass, for a quick look")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="R", help="where to write (default runs)"
    )
    return parser


if __name__ == "__main__":
    main()
