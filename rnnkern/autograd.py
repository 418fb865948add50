"""What torch sees of a layer call: two gradient-free operators, and the autograd Functions around them.

    LayerFunction    forward: rnnkern::layer             backward: LayerGradient
    LayerGradient    forward: rnnkern::layer_backward    backward: recomputed through reference.py, any number of times

The operators exist for tracers (torch.compile, torch.export, FakeTensor, jit.trace): functional, with shapes known
without running. In plain eager mode their bodies in layer.py are called directly, and without gradients the Functions
are left out too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import checks, compat, layer, reference, torch_kernels
from rnnkern.backends import Cotangents, Saved, compute_dtype, empty_rows
from rnnkern.layer import FIXED, Operands, Results, Settings, from_flat

_library = torch.library.Library("rnnkern", "DEF")
_SETTINGS = (
    "str cell, str backend, bool batch_major, bool peephole, bool layer_norm, float zoneout_h, float zoneout_c, "
    "bool recompute, bool states"
)
_OPERANDS = (
    "Tensor? lengths, Tensor? batch_sizes, Tensor? input_mask, Tensor? recurrent_mask, Tensor? zoneout_mask_h, "
    "Tensor? zoneout_mask_c, Tensor? reset, Tensor x, Tensor h0, Tensor? c0, Tensor? reset_h, Tensor? reset_c, "
    "Tensor[] weights"
)
_library.define(
    f"layer({_SETTINGS}, {_OPERANDS}, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
_library.define(
    f"layer_backward({_SETTINGS}, {_OPERANDS}, Tensor y, Tensor gates, Tensor cells, "
    "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, bool[] needs) -> Tensor[]"
)
_OWN = len(Settings._fields)  # so many first arguments of an operator or Function
_ALL = _OWN + len(Operands._fields)


def _arguments(args: Sequence[Any]) -> tuple[Settings, Operands]:
    """The settings and operands that an operator's arguments begin with."""
    *operands, weights = args[_OWN:_ALL]
    return Settings(*args[:_OWN]), Operands(*operands, tuple(weights))  # type: ignore[call-arg]


def _layer(*args: Any) -> tuple[Tensor, ...]:
    settings, operands = _arguments(args)
    x, save = operands.x, args[_ALL]
    with torch.no_grad(), compat.without_autocast(x.device.type):
        results = layer.forward(settings, operands, save)
    if operands.lengths is None or not save:
        return tuple(results)
    count = x.shape[0] * x.shape[1]
    cells = results.cells if settings.states else _fill_up(results.cells, count)
    return *results[:3], _fill_up(results.gates, count), cells


def _fill_up(rows: Tensor, count: int) -> Tensor:
    """Saved rows as `count` rows, zero behind: what an operator gives must not depend in shape on the lengths."""
    if rows.dim() == 1 or rows.shape[0] == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def _layer_backward(*args: Any) -> list[Tensor]:
    settings, operands = _arguments(args)
    saved, grads, needs = args[_ALL : _ALL + 3], args[_ALL + 3 : -1], args[-1]
    with torch.no_grad(), compat.without_autocast(operands.x.device.type):
        return layer.backward(settings, operands, Saved(*saved), Cotangents(*grads), needs)


_library.impl("layer", _layer, "CompositeExplicitAutograd")
_library.impl("layer_backward", _layer_backward, "CompositeExplicitAutograd")


def _fake_rows(
    x: Tensor, shape: tuple[int, ...], lengths: Tensor | None, batch_major: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """What layer.py gives for a row of `shape` in each step and sequence of x."""
    return empty_rows(x, shape, batch_major and x.dim() == 3 and lengths is None, dtype)


def _fake_state(state: Tensor) -> Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.register_fake("rnnkern::layer", lib=_library)  # type: ignore[untyped-decorator]
def _layer_fake(*args: Any) -> tuple[Tensor, ...]:
    settings, operands = _arguments(args)
    spec, x, h0, lengths, save = settings.spec, operands.x, operands.h0, operands.lengths, args[_ALL]
    weights, dtype = settings.directions(operands.weights, h0.shape[0]), compute_dtype(x.dtype)
    directions, hidden = len(weights), weights[0].weight_hh.shape[0] // len(spec.gates)

    def saved(blocks: int) -> Tensor:
        if not (save and blocks):
            return x.new_empty(0, dtype=dtype)
        if lengths is not None:
            return x.new_empty(x.shape[0] * x.shape[1], directions, blocks * hidden, dtype=dtype)
        return _fake_rows(x, (directions, blocks * hidden), None, settings.batch_major, dtype)

    y = _fake_rows(x, (directions * h0.shape[2],), lengths, settings.batch_major)
    c_n = x.new_empty(0) if operands.c0 is None else _fake_state(operands.c0)
    zones = operands.zoneout_mask_h is not None or settings.zoneout_h != 0
    gates = saved(0 if settings.recompute else spec.kept(zones, settings.layer_norm))
    if settings.states and spec.has_c:
        cells = _fake_rows(x, (directions, hidden), lengths, settings.batch_major, dtype)
    else:
        cells = saved(int(spec.has_c))
    return y, _fake_state(h0), c_n, gates, cells


@torch.library.register_fake("rnnkern::layer_backward", lib=_library)  # type: ignore[untyped-decorator]
def _layer_backward_fake(*args: Any) -> list[Tensor]:
    settings, operands = _arguments(args)
    x, *others = operands.flat()[FIXED:]
    assert x is not None
    dx = _fake_rows(x, (x.shape[-1],), operands.lengths, settings.batch_major)
    of = [dx, *(None if t is None else _fake_state(t) for t in others)]
    return [gradient for gradient, needed in zip(of, args[-1], strict=True) if needed and gradient is not None]


def _direct(operands: Operands) -> bool:
    """Whether the body of an operator may be called past the dispatcher."""
    return (
        compat.in_plain_eager()
        and all(compat.is_plain(t) for t in operands.flat() if t is not None)
        and compat.autocast_dtype(operands.x.device.type) is None
    )


def _forward(settings: Settings, operands: Operands, save: bool) -> Results:
    if _direct(operands):
        return layer.forward(settings, operands, save)
    return Results(*torch.ops.rnnkern.layer(*settings, *operands, save))


def _backward(
    settings: Settings, operands: Operands, saved: Saved, grads: Cotangents, needs: Sequence[bool]
) -> list[Tensor]:
    if _direct(operands) and all(compat.is_plain(t) for t in (*saved, *grads) if t is not None):
        return layer.backward(settings, operands, saved, grads, needs)
    found: list[Tensor] = torch.ops.rnnkern.layer_backward(*settings, *operands, *saved, *grads, needs)
    return found


def _vmap_loop(
    function: type[torch.autograd.Function], info: Any, in_dims: Sequence[Any], *args: Any
) -> tuple[Any, Any]:
    """The rule for torch.func.vmap: one call for each element, results stacked. A sweep has no batch dimension to lend
    to weights."""
    calls = [
        function.apply(
            *(arg.select(dim, index) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True))
        )
        for index in range(info.batch_size)
    ]
    stacked = []
    for parts in zip(*calls, strict=True):
        most = max(part.shape[0] for part in parts)  # with lengths, calls may have saved different numbers of rows
        stacked.append(torch.stack([_fill_up(part, most) for part in parts]))
    return tuple(stacked), (0,) * len(stacked)


def refuse_batched(grads: Sequence[Tensor | None]) -> None:
    """Raises for gradients that torch.autograd's own vmap made."""
    if any(g is not None and compat.is_legacy_batched(g) for g in grads):
        raise NotImplementedError(
            "rnnkern takes no batched gradients from torch.autograd (is_grads_batched=True, vectorize=True); "
            "use torch.func.vmap, torch.func.vjp or torch.func.jacrev"
        )


class LayerFunction(torch.autograd.Function):
    """`Results` of a layer call from its settings and flat operands; what backward saves is returned so that second
    derivatives see it."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(_forward(Settings(*args[:_OWN]), from_flat(args[_OWN:]), save=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, tensors = inputs[:_OWN], inputs[_OWN:]
        ctx.count = len(tensors)
        y, _, c_n, gates, cells = output
        has_c, states = from_flat(tensors).c0 is not None, Settings(*ctx.settings).states
        ctx.mark_non_differentiable(*(() if has_c else (c_n,)), gates, *(() if has_c and states else (cells,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        settings = Settings(*ctx.settings)
        kept = ctx.saved_tensors  # asked for once: checkpoint recomputes at each look
        tensors, saved = kept[: ctx.count], Saved(*kept[ctx.count :])
        before = _OWN + FIXED
        needs: tuple[bool, ...] = tuple(ctx.needs_input_grad[before:])
        has_c = settings.spec.has_c
        dy, dh_n, dc_n, _, dcells = grads
        wanted = Cotangents(dy, dh_n, dc_n if has_c else None, dcells if has_c and settings.states else None)
        if all(g is None for g in wanted) or not any(needs):
            return (None,) * (before + len(needs))
        refuse_batched(wanted)
        if torch.is_grad_enabled() or compat.in_transform():
            found = LayerGradient.apply(*settings, needs, *tensors, *saved, *wanted)  # type: ignore[no-untyped-call]
        else:
            found = _backward(settings, from_flat(tensors), saved, wanted, needs)
        gradients = iter(found)
        return (*(None,) * before, *(next(gradients) if needed else None for needed in needs))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _vmap_loop(LayerFunction, info, in_dims, *args)


class LayerGradient(torch.autograd.Function):
    """The gradients that `needs` asks for, from settings, needs, flat operands, what is saved and the gradients of
    results. Its own derivative is that of the oracle, recomputed from the inputs."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        needs, tensors = args[_OWN], args[_OWN + 1 :]
        count = FIXED + len(needs)
        saved, grads = Saved(*tensors[count : count + 3]), Cotangents(*tensors[count + 3 :])
        return tuple(_backward(Settings(*args[:_OWN]), from_flat(tensors[:count]), saved, grads, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, ctx.needs, tensors = inputs[:_OWN], inputs[_OWN], inputs[_OWN + 1 :]
        count = FIXED + len(ctx.needs)
        ctx.save_for_backward(*tensors[:count], *tensors[count + 3 :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        count = FIXED + len(ctx.needs)
        kept = ctx.saved_tensors
        tensors, grads = kept[:count], kept[count:]
        second = _second_derivatives(Settings(*ctx.settings), ctx.needs, tensors, grads, cotangents)
        return (*(None,) * (_OWN + 1), *second[:count], *(None,) * 3, *second[count:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _vmap_loop(LayerGradient, info, in_dims, *args)


def _second_derivatives(
    settings: Settings,
    needs: Sequence[bool],
    tensors: Sequence[Any],
    grads: Sequence[Any],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients, for `tensors` and `grads`, of the pairing of a layer's gradients with `cotangents`."""
    fixed, inputs = tensors[:FIXED], list(tensors[FIXED:])
    variable = [i for i, tensor in enumerate(inputs) if tensor is not None]
    given = [i for i, grad in enumerate(grads) if grad is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(inputs)
        for i, value in zip(variable, values, strict=True):
            filled[i] = value
        results = _differentiable(settings, from_flat((*fixed, *filled)))
        return tuple(results[i] for i in given)  # type: ignore[misc]

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        pullback = torch.func.vjp(outputs, *values[: len(variable)])[1]
        found = pullback(values[len(variable) :])
        return tuple(g for i, g in zip(variable, found, strict=True) if needs[i])

    primals = [inputs[i] for i in variable] + [grads[i] for i in given]
    pullback = torch.func.vjp(gradients, *primals)[1]
    second = iter(pullback(tuple(cotangents)))
    by_input = {i: next(second) for i in variable}
    by_grad = {i: next(second) for i in given}
    return [
        *(None,) * FIXED,
        *(by_input.get(i) for i in range(len(inputs))),
        *(by_grad.get(i) for i in range(len(grads))),
    ]


def _differentiable(settings: Settings, operands: Operands) -> tuple[Tensor | None, ...]:
    """(y, h_n, c_n, cells) by the oracle, in operations that torch can differentiate."""
    states = reference.forward(layer.prepare(settings, operands), save=False)
    return *layer.finish(states, operands.x.dtype), states.cells


class LayerResults(NamedTuple):
    """What a layer call gives its caller."""

    y: Tensor  # (T, B, D*P) or (N, D*P)
    h_n: Tensor  # (D, B, P)
    c_n: Tensor | None  # (D, B, H), of a cell with c
    cells: Tensor | None  # (T, B, D, H) or (N, D, H): c of every step, with `Settings.states`


def apply_layer(settings: Settings, operands: Operands) -> LayerResults:
    """One layer, differentiable where an operand asks for it."""
    if torch_kernels.serve(settings, operands):
        checks.operands(settings.spec, operands, settings.directions(operands.weights, operands.h0.shape[0]))
        return LayerResults(*torch_kernels.run_layer(settings, operands), cells=None)
    tensors = operands.flat()
    if any(t is not None and compat.has_tangent(t) for t in tensors):
        raise NotImplementedError(
            "rnnkern has no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad); use reverse mode, "
            "such as torch.func.vjp or torch.func.jacrev, or torch.nn's modules through rnnkern.to_torch(model)"
        )
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # torch.jit.trace cannot keep a Python Function in what it saves: it gets the operator, and torch warns of a
    # backward through that.
    if wanted and compat.in_plain_eager():
        y, h_n, c_n, _, cells = compat.apply(LayerFunction, *settings, *tensors)
    elif compat.in_transform() or (wanted and not compat.in_jit_trace()):
        y, h_n, c_n, _, cells = LayerFunction.apply(*settings, *tensors)  # type: ignore[no-untyped-call]
    else:
        y, h_n, c_n, _, cells = _forward(settings, operands, save=False)
    if operands.c0 is None:
        return LayerResults(y, h_n, None, None)
    return LayerResults(y, h_n, c_n, cells.to(y.dtype) if settings.states else None)
