"""The CPU backend: finds or makes the plan of a call, allocates what it gives, and runs the compiled sweeps."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from rnnkern.backends import Cotangents, Layer, Needs, Saved, States, readable
from rnnkern.backends.numba_cpu.ahead import inference_plan, layer_plan
from rnnkern.backends.numba_cpu.choice import choose
from rnnkern.backends.numba_cpu.optional_plans import named_extras
from rnnkern.backends.numba_cpu.plans import WEIGHTS, Cut
from rnnkern.backends.numba_cpu.ways import adds_rows, total, way_of
from rnnkern.backends.pages import in_huge_pages


def _prepared(layer: Layer) -> Layer:
    layer = layer._replace(
        x=readable(layer.x),
        h0=readable(layer.h0),
        c0=None if layer.c0 is None else readable(layer.c0),
        weights=tuple(weights.map(readable) for weights in layer.weights),
    )
    if not layer.extras:
        return layer
    fields = layer.extras._asdict()
    read: dict[str, Any] = {n: readable(t) for n, t in fields.items() if isinstance(t, Tensor) and n != "reset"}
    return layer._replace(extras=layer.extras._replace(**read))


def _named(layer: Layer) -> dict[str, Tensor | None]:
    """The tensors of a call by the names that plans give them."""
    tensors = {"x": layer.x, "h0": layer.h0, "c0": layer.c0}
    for d, weights in enumerate(layer.weights):
        tensors |= {f"{name}{d}": weight for name, weight in zip(WEIGHTS, weights, strict=True)}
    if layer.batch_sizes is not None:
        tensors["counts"] = layer.batch_sizes.contiguous()
        tensors["starts"] = layer.batch_sizes.cumsum(0) - layer.batch_sizes
        tensors["order"] = layer.order
    return tensors | named_extras(layer) if layer.extras else tensors


__all__ = ["as_given", "backward", "choose", "forward", "inference_plan", "layer_plan"]

as_given = False

# Plans by what they depend on. Where sequences differ in length, that is all their lengths: such a plan is not kept.
_plans: dict[Hashable, Any] = {}
MOST_PLANS = 512


def _plan(kind: Any, layer: Layer, *parts: Any, key: tuple[Hashable, ...]) -> Any:
    """The plan of calls with these strides, an old one if there is one."""
    if layer.batch_sizes is not None:
        return kind(layer, *parts)
    extras: tuple[Hashable, ...] = ()
    if layer.extras:
        extras = (*_strides(*layer.extras.tensors()), *layer.extras[7:])
    key = (kind, layer.cell.name, layer.x.dtype, torch.get_num_threads(), *extras, *key)
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
    plan.launch(kernel, pack)(addresses, (workspace, tensors))


def _strides(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    return tuple([None if t is None else (t.shape, t.stride()) for t in tensors])


def forward(layer: Layer, save: bool) -> States:
    cell, layer = layer.cell, _prepared(layer)
    way, directions, keep = way_of(layer), len(layer.weights), save and layer.kept > 0
    states = States(
        layer.rows(directions * layer.outputs),
        torch.empty_like(layer.h0, memory_format=torch.contiguous_format),
        None if layer.c0 is None else torch.empty_like(layer.c0, memory_format=torch.contiguous_format),
        in_huge_pages(layer.saved_rows(directions, layer.kept * layer.hidden)) if keep else None,
        in_huge_pages(layer.cell_rows()) if cell.has_c and (save or layer.extras.states) else None,
    )
    key = _strides(layer.x, layer.h0, layer.c0, *states, *(w for weights in layer.weights for w in weights))
    plan = _plan(way.forward_plan, layer, states, key=key)
    if plan.shares:
        _run(plan, way.kernels[cell.name].forward, way.pack_forward, _named(layer) | states._asdict())
    return states


def backward(layer: Layer, saved: Saved, grads: Cotangents, needs: Needs) -> list[Tensor | None]:
    layer = _prepared(layer)
    way = way_of(layer)
    y, gates, cells = (None if t is None else readable(t) for t in saved)
    assert y is not None
    saved, grads = Saved(y, gates, cells), grads.map(readable)
    tensors = _named(layer) | saved._asdict()
    tensors |= {"dy": grads.y, "dh_n": grads.h_n, "dc_n": grads.c_n, "dcells": grads.cells}
    tensors |= {
        "dh0": torch.empty_like(layer.h0, memory_format=torch.contiguous_format),
        "dc0": None if layer.c0 is None else torch.empty_like(layer.c0, memory_format=torch.contiguous_format),
        "dreset_h": _zeros(layer.extras.reset_h, needs.reset_h),
        "dreset_c": _zeros(layer.extras.reset_c, needs.reset_c),
    }
    key = _strides(layer.x, layer.h0, layer.c0, *saved, *(t for w in layer.weights for t in w))
    cut = _plan(Cut, layer, True, key=key)
    for d, (weights, wanted) in enumerate(zip(layer.weights, needs.weights, strict=True)):
        tensors[f"dx{d}"] = layer.rows(layer.x.shape[-1]) if needs.x else None
        for name, weight, want in zip(WEIGHTS, weights, wanted, strict=True):
            written = cut.shares and not adds_rows(name, weights)  # without a sequence nobody writes anything
            new = layer.x.new_empty if written else layer.x.new_zeros
            tensors[f"d{name}{d}"] = new(cut.parts, *weight.shape) if want and weight is not None else None
    if cut.shares:
        given = _strides(*grads)
        plan = _plan(way.backward_plan, layer, saved, tensors, key=(*key, *given, needs))
        assert plan.parts == cut.parts  # as many sums as have room
        _run(plan, way.kernels[layer.cell.name].backward, way.pack_backward, tensors)
    return [
        _input_gradient(tensors, len(layer.weights)) if needs.x else None,
        tensors["dh0"] if needs.h0 else None,
        tensors["dc0"] if needs.c0 else None,
        tensors["dreset_h"],
        tensors["dreset_c"],
        *(_total(tensors[f"d{name}{d}"], cut.zero) for d in range(len(layer.weights)) for name in WEIGHTS),
    ]


def _zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
    """What the gradients of resets are added to, where they are wanted."""
    return torch.zeros_like(like, memory_format=torch.contiguous_format) if wanted and like is not None else None


def _input_gradient(tensors: dict[str, Tensor | None], directions: int) -> Tensor | None:
    """The sum over directions, in the first one's rows."""
    dx, *others = [dx for d in range(directions) if (dx := tensors[f"dx{d}"]) is not None]
    for other in others:
        dx.add_(other)
    return dx


def _total(of_shares: Tensor | None, zero: Any) -> Tensor | None:
    """(shares, ...) -> the sum over shares."""
    if of_shares is None or of_shares.shape[0] > 1:
        return None if of_shares is None else total(of_shares, zero)
    return of_shares.squeeze(0)
