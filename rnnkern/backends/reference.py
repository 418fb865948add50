"""The oracle as a backend: plain torch on any device. For tests, for devices without a faster one, and to read."""

from rnnkern.masks import choose
from rnnkern.reference import backward, forward

__all__ = ["as_given", "backward", "choose", "forward", "inference_plan", "layer_plan"]

as_given = False


def inference_plan(*call: object) -> None:
    """There is none: every call is laid out anew."""


layer_plan = inference_plan
