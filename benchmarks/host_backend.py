"""What `rnnkern.backends.cuda.backend` is for the GPU, for the device of host.py."""

from benchmarks.host import extension
from rnnkern.backends.cuda.sweeps import SweepBackend
from rnnkern.masks import choose

__all__ = ["as_given", "backward", "choose", "forward", "inference_plan", "layer_plan"]

backend = SweepBackend(extension())
as_given = backend.as_given
forward = backend.forward
backward = backend.backward
inference_plan = backend.inference_plan
layer_plan = backend.layer_plan
