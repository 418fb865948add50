"""Trains a model of the catalogue in as many processes as are asked for: Lightning starts the others by running this
module again. On MNIST where RNNKERN_DATA_DIR says it is, else on scikit-learn's digits.

    python -m tests.ddp_run FOLDER PROCESSES
"""

import sys
from pathlib import Path

import torch

from examples.catalogue import CATALOGUE
from examples.data import named_folder
from examples.images import MNIST, digits, load_idx
from examples.training import Settings, train

STEPS = 40  # batches of all that there is


def run(folder: Path, processes: int) -> None:
    """The training."""
    torch.set_num_threads(1)
    settings = Settings(epochs=2, devices=processes, limit_steps=STEPS, runs_dir=folder)
    data = digits() if named_folder(None) is None else load_idx(MNIST)
    train(CATALOGUE["mnist-lstm"], data, settings)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
