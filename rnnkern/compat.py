"""What rnnkern asks of torch beyond its public interface, in one place, since it may change with torch's version."""

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN_TYPES = (Tensor, Parameter)
_PLAIN_DEVICES = ("cpu", "cuda")


def in_transform() -> bool:
    """Whether torch.func (grad, vmap, jvp ...) or forward-mode autograd is at work around this call."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def in_plain_eager() -> bool:
    """Whether nothing watches the operations of this call: no compiler, tracer, transform or dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not in_transform()
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is just memory: no subclass (FakeTensor, DTensor ...), no meta device."""
    return type(tensor) in _PLAIN_TYPES and tensor.device.type in _PLAIN_DEVICES and tensor.layout == torch.strided
