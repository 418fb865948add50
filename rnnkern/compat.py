"""What rnnkern asks of torch beyond its public interface, in one place, since it may change with torch's version."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # then calls are recognised by reading attributes, which takes longer
    TensorGuards = None  # type: ignore[assignment, misc]
from torch.nn import Parameter

PLAIN_TYPES = (Tensor, Parameter)
_PLAIN_DEVICES = ("cpu", "cuda")


PLAIN_OR_NONE = {*PLAIN_TYPES, type(None)}


def can_guard(tensors: Sequence[Tensor]) -> bool:
    """Whether torch has guards, and no tensor comes twice: a guard never recognises such tensors."""
    return TensorGuards is not None and len(set(map(id, tensors))) == len(tensors)


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Tells whether other tensors look like these: class, dtype, device, shape, strides, requires_grad, no negated view
    or the like, all under the same modes of torch. It is what torch.compile guards its code with: one call for all
    tensors, where to read these attributes one by one takes ten times as long."""
    sizes: list[Any] = [list(t.shape) for t in tensors]
    strides: list[Any] = [list(t.stride()) for t in tensors]
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` without what torch does first for torch.func and for arguments left out, in half the time."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


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


def is_undisturbed() -> bool:
    """Whether nothing but eager computation on the CPU is going on (`in_plain_eager`, no compiler at work): no mode of
    torch would change what a call does, or wants to see it."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def hooks_saved_tensors() -> bool:
    """Whether hooks will see what autograd saves now: torch.autograd.graph.saved_tensors_hooks, checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is just memory: no subclass (FakeTensor, DTensor ...), no meta device."""
    return type(tensor) in PLAIN_TYPES and tensor.device.type in _PLAIN_DEVICES and tensor.layout == torch.strided


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
