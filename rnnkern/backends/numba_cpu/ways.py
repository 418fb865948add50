"""The two ways of a layer call: plans and kernels of plain cells, and of those that ask for more."""

from typing import Any, NamedTuple

from torch import Tensor

from rnnkern.backends import Layer
from rnnkern.backends.numba_cpu.jit import ready
from rnnkern.backends.numba_cpu.kernels import KERNELS, Kernels, add_shares, pack_for_backward, pack_for_forward
from rnnkern.backends.numba_cpu.optional_kernels import (
    OPTIONAL_KERNELS,
    pack_for_optional_backward,
    pack_for_optional_forward,
)
from rnnkern.backends.numba_cpu.optional_plans import OptionalBackwardPlan, OptionalForwardPlan
from rnnkern.backends.numba_cpu.plans import BackwardPlan, ForwardPlan
from rnnkern.cells import Weights

# Weights whose gradients are products; those of the others are sums.
_PRODUCTS = ("w_ih", "w_hh", "w_hr")


class Way(NamedTuple):
    """What runs a call."""

    forward_plan: Any
    backward_plan: Any
    kernels: dict[str, Kernels]
    pack_forward: Any
    pack_backward: Any


_PLAIN = Way(ForwardPlan, BackwardPlan, KERNELS, pack_for_forward, pack_for_backward)
_OPTIONAL = Way(
    OptionalForwardPlan, OptionalBackwardPlan, OPTIONAL_KERNELS, pack_for_optional_forward, pack_for_optional_backward
)


def way_of(layer: Layer) -> Way:
    """The way of a call."""
    return _PLAIN if layer.plain else _OPTIONAL


def total(of_shares: Tensor, zero: Any) -> Tensor:
    """(shares, ...) -> the sum over shares, in their order."""
    found = of_shares.new_empty(of_shares.shape[1:])
    addresses = of_shares.data_ptr(), found.data_ptr()
    ready(add_shares, 4, zero)(*addresses, found.numel(), of_shares.shape[0], zero)
    return found


def adds_rows(name: str, weights: Weights) -> bool:
    """Whether a backward sweep adds to the gradient of a weight row by row, and so begins at zero."""
    return name not in _PRODUCTS and (weights.ln_ih_weight is not None or name == "w_ch")
