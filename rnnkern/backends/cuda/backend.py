"""The CUDA backend: a layer by the sweeps of the extension `rnnkern._cuda`."""

from rnnkern.backends.cuda.extension import load
from rnnkern.backends.cuda.sweeps import SweepBackend
from rnnkern.masks import choose

__all__ = ["as_given", "backward", "choose", "forward", "inference_plan", "layer_plan"]

_backend = SweepBackend(load())
as_given = _backend.as_given
forward = _backend.forward
backward = _backend.backward
inference_plan = _backend.inference_plan
layer_plan = _backend.layer_plan
