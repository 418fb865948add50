"""Trains a model of the catalogue on scikit-learn's digits, in as many processes as are asked for: Lightning starts the
others by running this module again.

    python -m tests.ddp_run FOLDER PROCESSES
"""

import sys
from pathlib import Path

import torch

from examples.catalogue import CATALOGUE
from examples.images import digits
from examples.training import Settings, train

STEPS = 40  # batches of all that there is


def run(folder: Path, processes: int) -> None:
    """The training."""
    torch.set_num_threads(1)
    settings = Settings(epochs=2, devices=processes, limit_steps=STEPS, runs_dir=folder)
    train(CATALOGUE["mnist-lstm"], digits(), settings)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
