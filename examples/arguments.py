"""What the command lines of the examples have in common."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An integer from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 up, got {text}")
    return value
