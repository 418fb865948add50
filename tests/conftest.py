"""What every test runs under: a fixed seed and fixed hypothesis examples; and buffers that are NaN until written."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def same_start() -> None:
    """One seed; and one thread, the quickest for small sizes: a test of threads sets their number itself."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def nan_buffers() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: torch fills them in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
