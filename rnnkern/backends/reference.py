"""The oracle as a backend: plain torch on any device. For tests, for devices without a faster one, and to read."""

from rnnkern.reference import backward, forward

__all__ = ["backward", "forward"]
