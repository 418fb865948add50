"""Which of cuDNN's algorithms torch.nn's recurrent layers take on a GPU, by the rules that torch chooses by:
`get_algo` in its aten/src/ATen/native/cudnn/RNN.cpp, and `use_cudnn` in aten/src/ATen/native/RNN.cpp."""

from typing import NamedTuple

import torch

from benchmarks.shapes import Shape

STANDARD = "standard"  # CUDNN_RNN_ALGO_STANDARD: a product and a pointwise kernel a step
STATIC = "static"  # CUDNN_RNN_ALGO_PERSIST_STATIC: the recurrent weights stay on the chip
SMALL = "small"  # CUDNN_RNN_ALGO_PERSIST_STATIC_SMALL_H: the same for few units
NATIVE = "native"  # none of cuDNN's: torch's own loop over the steps

# Most hidden units of the small one
SMALL_FORWARD = {"lstm": 192, "gru": 192, "rnn": 384}
SMALL_BACKWARD = {"lstm": 128, "gru": 128, "rnn": 256}
STATIC_MULTIPLE, STATIC_H = 128, 1024
STATIC_B_MULTIPLE, STATIC_B = 8, 128
STATIC_PROCESSORS = 98
BFLOAT16_CUDNN = 91300  # the first version that takes it


class Gpu(NamedTuple):
    """What the rules ask of a GPU, which has compute capability 8.0 or newer."""

    capability: tuple[int, int]
    processors: int
    cudnn: int  # its version, as 91300


def algorithm(cell: str, shape: Shape, dtype: torch.dtype, gpu: Gpu, *, forward: bool) -> str:
    """What a layer's forward pass takes, or its backward pass."""
    if shape.stepwise or (dtype == torch.bfloat16 and gpu.cudnn < BFLOAT16_CUDNN):
        return NATIVE
    if shape.ragged:  # torch.nn gets a PackedSequence
        return STANDARD
    most = SMALL_FORWARD if forward else SMALL_BACKWARD
    if dtype != torch.float64 and most[cell] >= shape.H:
        return SMALL
    if dtype == torch.float16 and _static_layer(shape) and _static_on(cell, shape, gpu):
        return STATIC
    return STANDARD


def _static_layer(shape: Shape) -> bool:
    """use_persist_common_heuristics."""
    one = shape.layers == 1 and not shape.bidirectional
    return one and shape.H <= STATIC_H and shape.H % STATIC_MULTIPLE == 0 and shape.I % STATIC_MULTIPLE == 0


def _static_on(cell: str, shape: Shape, gpu: Gpu) -> bool:
    """use_persist_device_heuristics."""
    if gpu.processors < STATIC_PROCESSORS or gpu.capability[1] == 6 or cell == "gru":
        return False
    if shape.B % STATIC_B_MULTIPLE != 0 or shape.B > STATIC_B:
        return False
    return cell == "lstm" or shape.B < 96 or shape.H < 896


def algorithms(cell: str, shape: Shape, dtype: torch.dtype, gpu: Gpu, mode: str) -> str:
    """The forward pass's algorithm and, if the mode has a backward pass, that one's."""
    passes = (True, False) if mode == "train" else (True,)
    return " / ".join(algorithm(cell, shape, dtype, gpu, forward=forward) for forward in passes)
