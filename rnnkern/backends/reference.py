"""The oracle as a backend: plain torch on any device. For tests, for devices without a faster one, and to read."""

from collections.abc import Sequence

from torch import Tensor

from rnnkern.reference import backward, forward

__all__ = ["as_given", "backward", "forward", "inference_plan", "layer_plan"]

as_given = False


def inference_plan(form: object, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """There is none: every call is laid out anew."""


layer_plan = inference_plan
