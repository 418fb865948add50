"""What rnnkern asks of torch beyond its public interface, in one place, since it may change with torch's version."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN_TYPES = (Tensor, Parameter)
_PLAIN_DEVICES = ("cpu", "cuda")


def in_transform() -> bool:
    """Whether torch.func (grad, vmap ...) is at work around this call, outside of a compiler."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode autograd (dual tensors, torch.func.jvp) carries a tangent on this tensor."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return False
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def is_legacy_batched(tensor: Tensor) -> bool:
    """Whether torch.autograd's own vmap, of is_grads_batched and vectorize=True, made this tensor."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(tensor)


def in_jit_trace() -> bool:
    """Whether torch.jit.trace records this call."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def in_plain_eager() -> bool:
    """Whether nothing watches the operations of this call: no compiler, tracer, transform or dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not in_jit_trace()
        and not in_transform()
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is just memory: no subclass (FakeTensor, DTensor ...), no meta device."""
    return type(tensor) in _PLAIN_TYPES and tensor.device.type in _PLAIN_DEVICES and tensor.layout == torch.strided


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device type, None where it is off.

    The meta device has none. torch.amp.is_autocast_available would tell, but Dynamo cannot trace it in torch 2.11.
    """
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast switched off; some device types (meta) have none."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()
