"""The CPU backend: finds or makes the plan of a call, allocates what it gives, and runs the compiled sweeps."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from rnnkern.backends import Cotangents, Layer, Needs, Saved, States, readable
from rnnkern.backends.numba_cpu.ahead import inference_plan, layer_plan
from rnnkern.backends.numba_cpu.kernels import KERNELS, pack_for_backward, pack_for_forward
from rnnkern.backends.numba_cpu.plans import WEIGHTS, BackwardPlan, Cut, ForwardPlan


def _prepared(layer: Layer) -> Layer:
    return layer._replace(
        x=readable(layer.x),
        h0=readable(layer.h0),
        c0=None if layer.c0 is None else readable(layer.c0),
        weights=tuple(weights.map(readable) for weights in layer.weights),
    )


def _named(layer: Layer) -> dict[str, Tensor | None]:
    """The tensors of a call by the names that plans give them."""
    tensors = {"x": layer.x, "h0": layer.h0, "c0": layer.c0}
    for d, weights in enumerate(layer.weights):
        tensors |= {f"{name}{d}": weight for name, weight in zip(WEIGHTS, weights, strict=False)}
    if layer.batch_sizes is not None:
        tensors["counts"] = layer.batch_sizes.contiguous()
        tensors["starts"] = layer.batch_sizes.cumsum(0) - layer.batch_sizes
        tensors["order"] = layer.order
    return tensors


__all__ = ["as_given", "backward", "forward", "inference_plan", "layer_plan"]

as_given = False

# Plans by what they depend on. Where sequences differ in length, that is all their lengths: such a plan is not kept.
_plans: dict[Hashable, Any] = {}
MOST_PLANS = 512


def _plan(kind: Any, layer: Layer, *parts: Any, key: tuple[Hashable, ...]) -> Any:
    """The plan of calls with these strides, an old one if there is one."""
    if layer.batch_sizes is not None:
        return kind(layer, *parts)
    key = (kind, layer.cell.name, layer.x.dtype, torch.get_num_threads(), *key)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = kind(layer, *parts)
    return plan


def _run(plan: Any, kernel: Any, pack: Any, tensors: dict[str, Tensor | None]) -> None:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    workspace = present["x"].new_empty(plan.space.bytes // plan.item)
    addresses = [workspace.data_ptr(), *(present[name].data_ptr() for name in plan.tensors[1:])]
    plan.run(kernel, pack, addresses, (workspace, tensors))


def _strides(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    return tuple([None if t is None else (t.shape, t.stride()) for t in tensors])


def forward(layer: Layer, save: bool) -> States:
    cell, layer = layer.cell, _prepared(layer)
    directions, keep = len(layer.weights), save and bool(layer.cell.saved)
    states = States(
        layer.rows(directions * layer.outputs),
        torch.empty_like(layer.h0, memory_format=torch.contiguous_format),
        None if layer.c0 is None else torch.empty_like(layer.c0, memory_format=torch.contiguous_format),
        layer.saved_rows(directions, len(cell.saved) * layer.hidden) if keep else None,
        layer.saved_rows(directions, layer.hidden) if keep and cell.has_c else None,
    )
    key = _strides(layer.x, layer.h0, layer.c0, *states, *(w for weights in layer.weights for w in weights))
    plan = _plan(ForwardPlan, layer, states, key=key)
    if plan.shares:
        _run(plan, KERNELS[cell.name].forward, pack_for_forward, _named(layer) | states._asdict())
    return states


def backward(layer: Layer, saved: Saved, grads: Cotangents, needs: Needs) -> list[Tensor | None]:
    layer = _prepared(layer)
    y, gates, cells = (None if t is None else readable(t) for t in saved)
    assert y is not None
    saved = Saved(y, gates, cells)
    tensors = _named(layer) | saved._asdict()
    grads = grads.map(readable)
    tensors |= {"dy": grads.y, "dh_n": grads.h_n, "dc_n": grads.c_n}
    tensors["dh0"] = torch.empty_like(layer.h0, memory_format=torch.contiguous_format)
    tensors["dc0"] = None if layer.c0 is None else torch.empty_like(layer.c0, memory_format=torch.contiguous_format)
    key = _strides(layer.x, layer.h0, layer.c0, *saved, *(t for w in layer.weights for t in w))
    cut = _plan(Cut, layer, key=key)
    new = layer.x.new_empty if cut.shares else layer.x.new_zeros  # without a sequence nobody writes the gradients
    for d, (weights, wanted) in enumerate(zip(layer.weights, needs.weights, strict=True)):
        tensors[f"dx{d}"] = layer.rows(layer.x.shape[-1]) if needs.x else None
        for name, weight, want in zip(WEIGHTS, weights, wanted, strict=False):
            tensors[f"d{name}{d}"] = new(cut.parts, *weight.shape) if want and weight is not None else None
    if cut.shares:
        given = _strides(tensors["dy"], tensors["dh_n"], tensors["dc_n"])
        plan = _plan(BackwardPlan, layer, saved, tensors, key=(*key, *given, needs))
        _run(plan, KERNELS[layer.cell.name].backward, pack_for_backward, tensors)
    return [
        _input_gradient(tensors, len(layer.weights)) if needs.x else None,
        tensors["dh0"] if needs.h0 else None,
        tensors["dc0"] if needs.c0 else None,
        None,
        None,
        *(_total(tensors.get(f"d{name}{d}")) for d in range(len(layer.weights)) for name in (*WEIGHTS, *[""] * 7)),
    ]


def _input_gradient(tensors: dict[str, Tensor | None], directions: int) -> Tensor | None:
    """The sum over directions, in the first one's rows."""
    dx, *others = [dx for d in range(directions) if (dx := tensors[f"dx{d}"]) is not None]
    for other in others:
        dx.add_(other)
    return dx


def _total(of_shares: Tensor | None) -> Tensor | None:
    """(shares, ...) -> the sum over shares, in their order."""
    if of_shares is None or of_shares.shape[0] > 1:
        return None if of_shares is None else of_shares.sum(0)
    return of_shares.squeeze(0)
