"""What torch sees of a layer call: two gradient-free operators, and the autograd Functions around them.

    LayerFunction    forward: rnnkern::layer             backward: LayerGradient
    LayerGradient    forward: rnnkern::layer_backward    backward: recomputed through reference.py, any number of times

The operators exist for tracers (torch.compile, torch.export, FakeTensor, jit.trace): functional, with shapes known
without running. In plain eager mode their bodies in layer.py are called directly, and without gradients the Functions
are left out too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import backends, checks, compat, layer, reference, torch_kernels
from rnnkern.backends import Saved, compute_dtype, empty_rows
from rnnkern.cells import CELLS, split_directions
from rnnkern.layer import Operands, Results, Settings

_library = torch.library.Library("rnnkern", "DEF")
_OPERANDS = "Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? batch_sizes"
_SETTINGS = "str cell, str backend, bool batch_major"
_library.define(
    f"layer({_SETTINGS}, {_OPERANDS}, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
_library.define(
    f"layer_backward({_SETTINGS}, {_OPERANDS}, Tensor y, Tensor gates, Tensor cells, "
    "Tensor? dy, Tensor? dh_n, Tensor? dc_n, bool[] needs) -> Tensor[]"
)


def _layer(cell: str, backend: str, batch_major: bool, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *operands, save = rest
    given = _operands(x, *operands)
    with torch.no_grad(), compat.without_autocast(x.device.type):
        results = layer.forward(Settings(cell, backend, batch_major), given, save)
    if given.lengths is None or not save:
        return tuple(results)
    count = x.shape[0] * x.shape[1]
    return *results[:3], _fill_up(results.gates, count), _fill_up(results.cells, count)


def _fill_up(rows: Tensor, count: int) -> Tensor:
    """Saved rows as `count` rows, zero behind: what an operator gives must not depend in shape on the lengths."""
    if rows.dim() == 1 or rows.shape[0] == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def _layer_backward(cell: str, backend: str, batch_major: bool, x: Tensor, *rest: Any) -> list[Tensor]:
    operands, saved, grads, needs = rest[:5], rest[5:8], rest[8:11], rest[11]
    with torch.no_grad(), compat.without_autocast(x.device.type):
        return layer.backward(
            Settings(cell, backend, batch_major), _operands(x, *operands), Saved(*saved), grads, needs
        )


def _operands(x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor], *sizes: Tensor | None) -> Operands:
    return Operands(x, h0, c0, tuple(weights), *sizes)


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
def _layer_fake(
    cell: str,
    backend: str,
    batch_major: bool,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    spec, layer_weights, dtype = CELLS[cell], split_directions(weights, h0.shape[0]), compute_dtype(x.dtype)
    directions, hidden = len(layer_weights), layer_weights[0].weight_hh.shape[0] // len(spec.gates)

    def saved(blocks: int) -> Tensor:
        if not (save and blocks):
            return x.new_empty(0, dtype=dtype)
        if lengths is not None:
            return x.new_empty(x.shape[0] * x.shape[1], directions, blocks * hidden, dtype=dtype)
        return _fake_rows(x, (directions, blocks * hidden), None, batch_major, dtype)

    y = _fake_rows(x, (directions * h0.shape[2],), lengths, batch_major)
    c_n = x.new_empty(0) if c0 is None else _fake_state(c0)
    return y, _fake_state(h0), c_n, saved(len(spec.saved)), saved(int(spec.has_c))


@torch.library.register_fake("rnnkern::layer_backward", lib=_library)  # type: ignore[untyped-decorator]
def _layer_backward_fake(
    cell: str,
    backend: str,
    batch_major: bool,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    needs = rest[-1]
    dx = _fake_rows(x, (x.shape[-1],), lengths, batch_major)
    of = [dx, *(None if t is None else _fake_state(t) for t in (h0, c0, *weights))]
    return [gradient for gradient, needed in zip(of, needs, strict=True) if needed and gradient is not None]


def _direct(operands: Operands) -> bool:
    """Whether the body of an operator may be called past the dispatcher."""
    tensors = (operands.x, operands.h0, operands.c0, *operands.weights, operands.lengths, operands.batch_sizes)
    return (
        compat.in_plain_eager()
        and all(compat.is_plain(t) for t in tensors if t is not None)
        and compat.autocast_dtype(operands.x.device.type) is None
    )


def _forward(settings: Settings, operands: Operands, save: bool) -> Results:
    if _direct(operands):
        return layer.forward(settings, operands, save)
    return Results(*torch.ops.rnnkern.layer(*settings, *operands, save))


def _backward(
    settings: Settings, operands: Operands, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    if _direct(operands) and all(compat.is_plain(t) for t in (*saved, *grads) if t is not None):
        return layer.backward(settings, operands, saved, grads, needs)
    found: list[Tensor] = torch.ops.rnnkern.layer_backward(*settings, *operands, *saved, *grads, needs)
    return found


def _tensors(operands: Operands) -> tuple[Tensor | None, ...]:
    """Operands as a flat list, those that may carry a gradient (x, h0, c0, weights) last."""
    return (operands.lengths, operands.batch_sizes, operands.x, operands.h0, operands.c0, *operands.weights)


def _from_tensors(tensors: Sequence[Tensor | None]) -> Operands:
    lengths, batch_sizes, x, h0, c0, *weights = tensors
    assert x is not None
    assert h0 is not None
    return Operands(x, h0, c0, tuple(weights), lengths, batch_sizes)  # type: ignore[arg-type]


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
    """(y, h_n, c_n, gates, cells) of a layer call; the last two, what backward saves, are returned so that second
    derivatives see them."""

    @staticmethod
    def forward(cell: str, backend: str, batch_major: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(_forward(Settings(cell, backend, batch_major), _from_tensors(tensors), save=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, tensors = inputs[:3], inputs[3:]
        ctx.count = len(tensors)
        y, _, c_n, gates, cells = output
        has_c = _from_tensors(tensors).c0 is not None
        ctx.mark_non_differentiable(*((gates, cells) if has_c else (c_n, gates, cells)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # asked for once: checkpoint recomputes at each look
        tensors, saved = kept[: ctx.count], Saved(*kept[ctx.count :])
        needs = tuple(ctx.needs_input_grad[5:])
        nothing: tuple[None, ...] = (None,) * (3 + ctx.count)
        wanted = (grads[0], grads[1], grads[2] if tensors[4] is not None else None)
        if all(g is None for g in wanted) or not any(needs):
            return nothing
        refuse_batched(wanted)
        if torch.is_grad_enabled() or compat.in_transform():
            found = LayerGradient.apply(*ctx.settings, needs, *tensors, *saved, *wanted)  # type: ignore[no-untyped-call]
        else:
            found = _backward(Settings(*ctx.settings), _from_tensors(tensors), saved, wanted, needs)
        gradients = iter(found)
        return (*(None,) * 5, *(next(gradients) if needed else None for needed in needs))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _vmap_loop(LayerFunction, info, in_dims, *args)


class LayerGradient(torch.autograd.Function):
    """The gradients that `needs` asks for. Its own derivative is that of the oracle, recomputed from the inputs."""

    @staticmethod
    def forward(
        cell: str, backend: str, batch_major: bool, needs: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = 2 + len(needs)
        saved = Saved(*tensors[count : count + 3])  # type: ignore[arg-type]
        settings = Settings(cell, backend, batch_major)
        return tuple(_backward(settings, _from_tensors(tensors[:count]), saved, tensors[count + 3 :], needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, ctx.needs, tensors = inputs[:3], inputs[3], inputs[4:]
        count = 2 + len(ctx.needs)
        ctx.save_for_backward(*tensors[:count], *tensors[count + 3 :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        count = 2 + len(ctx.needs)
        kept = ctx.saved_tensors
        tensors, grads = kept[:count], kept[count:]
        second = _second_derivatives(Settings(*ctx.settings), ctx.needs, tensors, grads, cotangents)
        return (*(None,) * 4, *second[:count], *(None,) * 3, *second[count:])

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
    sizes, inputs = tensors[:2], list(tensors[2:])
    variable = [i for i, tensor in enumerate(inputs) if tensor is not None]
    given = [i for i, grad in enumerate(grads) if grad is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(inputs)
        for i, value in zip(variable, values, strict=True):
            filled[i] = value
        results = _differentiable(settings, _from_tensors((*sizes, *filled)))
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
    return [None, None, *(by_input.get(i) for i in range(len(inputs))), *(by_grad.get(i) for i in range(len(grads)))]


def _differentiable(settings: Settings, operands: Operands) -> tuple[Tensor | None, ...]:
    """(y, h_n, c_n) by the oracle, in operations that torch can differentiate."""
    prepared = layer.prepare(settings, operands)
    return layer.finish(reference.forward(prepared, save=False), operands.x.dtype)


def apply_layer(settings: Settings, operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n) of one layer, differentiable where an operand asks for it; c_n is None for a cell without c."""
    if backends.torch_serves(settings.backend, operands.x.device):
        checks.operands(
            CELLS[settings.cell],
            operands.x,
            operands.h0,
            operands.c0,
            split_directions(operands.weights, operands.h0.shape[0]),
        )
        return torch_kernels.run_layer(settings, operands)
    tensors = _tensors(operands)
    if any(t is not None and compat.has_tangent(t) for t in tensors):
        raise NotImplementedError(
            "rnnkern has no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad); use reverse mode, "
            "such as torch.func.vjp or torch.func.jacrev, or torch.nn's modules through rnnkern.to_torch(model)"
        )
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # torch.jit.trace cannot keep a Python Function in what it saves: it gets the operator, and torch warns of a
    # backward through that.
    if compat.in_transform() or (wanted and not compat.in_jit_trace()):
        y, h_n, c_n, _, _ = LayerFunction.apply(*settings, *tensors)  # type: ignore[no-untyped-call]
    else:
        y, h_n, c_n, _, _ = _forward(settings, operands, save=False)
    return y, h_n, None if operands.c0 is None else c_n
