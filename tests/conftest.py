"""What every test runs under: a fixed seed, fixed hypothesis examples, and buffers that hold NaN until something writes them."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_buffers() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN: torch fills them in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
