"""Calls laid out ahead, from the tensors of the caller to results in their shapes: whole calls in inference, and single
layers with gradients. What runs them knows that they look like those that they were made from (rnnkern/shortcut.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern.backends import Layer, Saved, States, compute_dtype, is_readable, readable
from rnnkern.backends.numba_cpu.kernels import KERNELS, pack_for_backward, pack_for_forward
from rnnkern.backends.numba_cpu.plans import WEIGHTS, Address, BackwardPlan, ForwardPlan
from rnnkern.cells import split_directions
from rnnkern.shortcut import Form

# A workspace up to this size is kept from one call to the next: to allocate it would take as long as to use it.
MOST_KEPT_BYTES = 65536

Numbers = dict[str, tuple[int, int]]  # of a tensor: which one of a call it is, and from which byte on


def possible(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether kernels take the tensors of a call as they are, and have something to do."""
    return x.dtype == compute_dtype(x.dtype) and x.numel() > 0 and all(map(is_readable, (x, *tensors)))


def number(plan: ForwardPlan | BackwardPlan, numbers: Numbers) -> None:
    """Makes a plan count the tensors of a call as the call does, in place of its own order."""
    for _, addresses in plan.directions:
        for i, (position, tensor, offset) in enumerate(addresses):
            index, extra = numbers[plan.tensors[tensor]]
            addresses[i] = Address(position, index, offset + extra)


def number_weights(form: Form, first: int, count: int, prefix: str = "") -> Numbers:
    """The numbers of the weights of a layer, `count` of them from `first` on in torch's order."""
    names = {5: WEIGHTS[:5], 4: WEIGHTS[:4], 3: (*WEIGHTS[:2], WEIGHTS[4]), 2: WEIGHTS[:2]}[count // form.directions]
    named = [f"{prefix}{name}{d}" for d in range(form.directions) for name in names]
    return {name: (first + i, 0) for i, name in enumerate(named)}


class Workspaces:
    """Workspaces of a plan: small ones are kept, each taken and given back by one operation, so that threads never
    share one."""

    def __init__(self, x: Tensor, space: int) -> None:
        self.numbers, self.keeps = space // x.element_size(), space <= MOST_KEPT_BYTES
        self.free: list[Tensor] = []

    def take(self, x: Tensor) -> Tensor:
        try:
            return self.free.pop()
        except IndexError:
            return x.new_empty(self.numbers)

    def give(self, workspace: Tensor) -> None:
        if self.keeps:
            self.free.append(workspace)


class _Ahead:
    """The shapes of a call, and its layers as backends know them, without their memory."""

    def __init__(self, form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.form, self.kernels = form, KERNELS[form.cell]
        self.sweeps = split_directions(form.spec, weights, form.layers * form.directions)
        self.outputs = self.sweeps[0].weight_hh.shape[1]
        self.hidden = self.sweeps[0].weight_hh.shape[0] // len(form.spec.gates)
        self.has_c = form.spec.has_c
        self.y_shape = form.output_shape(x, self.outputs)
        self.h_shape, self.c_shape = form.state_shape(x, self.outputs), form.state_shape(x, self.hidden)
        self.zeros = x.new_zeros(max(self.outputs, self.hidden))  # the initial state of a call without one

    def layer(self, k: int, x: Tensor, flow: Tensor, y: Tensor, states: Sequence[Tensor]) -> tuple[Layer, States]:
        """Layer k, from `flow` to y, and what it gives in inference."""
        form = self.form
        part = slice(k * form.directions, (k + 1) * form.directions)
        finals = [form.state(x.new_empty(shape), x)[part] for shape in (self.h_shape, self.c_shape)]
        initial = [form.state(state, x)[part] for state in states] or [
            self.zeros[: final.shape[-1]].expand(*final.shape) for final in finals
        ]
        h0, c0 = initial[0], initial[1] if self.has_c else None
        layer = Layer(form.spec, form.rows(flow, x), h0, c0, self.sweeps[part], None, None, form.batch_first)
        rows = finals[0] if form.step else form.rows(y, x)
        return layer, States(rows, finals[0], finals[1] if self.has_c else None, None, None)


def inference_plan(
    form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> "InferencePlan | None":
    """The plan of calls like this one."""
    return InferencePlan(form, x, states, weights) if possible(x, (*states, *weights)) else None


class InferencePlan(_Ahead):
    """A whole call, all its layers, that keeps nothing for backward."""

    def __init__(self, form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__(form, x, states, weights)
        self.plans: list[ForwardPlan] = []
        flow, count = x, len(weights) // form.layers
        for k in range(form.layers):
            y = x.new_empty(self.y_shape)
            layer, results = self.layer(k, x, flow, y, states)
            plan = ForwardPlan(layer, results)
            outer = 7 + len(weights) + k  # the outputs of inner layers come last
            numbers = {
                "workspace": (0, 0),
                "x": (outer - 1 if k else 1, 0),
                "y": (3 if form.step else 2 if k == form.layers - 1 else outer, 0),
            }
            # layer k's part of a state begins where its view does in the whole
            parts = (results.h_n, results.c_n, layer.h0, layer.c0)
            begins = (0, 0, *(state.storage_offset() for state in states or [self.zeros] * 2), 0)
            for i, (name, part, begin) in enumerate(zip(("h_n", "c_n", "h0", "c0"), parts, begins, strict=False)):
                if part is not None:
                    numbers[name] = (3 + i, int(part.storage_offset() - begin) * x.element_size())
            number(plan, numbers | number_weights(form, 7 + k * count, count))
            self.plans.append(plan)
            flow = y
        self.workspaces = Workspaces(x, max(plan.space.bytes for plan in self.plans))
        del self.sweeps

    def __call__(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        h_n = x.new_empty(self.h_shape)
        c_n = x.new_empty(self.c_shape) if self.has_c else h_n
        y = h_n if self.form.step else x.new_empty(self.y_shape)
        h0, c0 = (states[0], states[-1]) if states else (self.zeros, self.zeros)
        workspace = self.workspaces.take(x)
        tensors = [workspace, x, y, h_n, c_n, h0, c0, *weights]
        tensors += [x.new_empty(self.y_shape) for _ in self.plans[1:]]  # of inner layers
        addresses = [tensor.data_ptr() for tensor in tensors]
        for plan in self.plans:
            plan.run(self.kernels.forward, pack_for_forward, addresses, tensors)
        self.workspaces.give(workspace)
        return y, (h_n, c_n) if self.has_c else (h_n,)


def layer_plan(form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> "LayerPlan | None":
    """The plan of layers like this one."""
    return LayerPlan(form, x, states, weights) if possible(x, (*states, *weights)) else None


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class LayerPlan(_Ahead):
    """One layer, forward and backward. Tensors of a call: x, the initial states if there are any, the weights."""

    def __init__(self, form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__(form, x, states, weights)
        spec, lead = form.spec, x.shape[:-1]
        self.states, self.weight_count = len(states), len(weights)
        self.y_kept = not (form.step and spec.saved)
        self.gates_shape = (*lead, form.directions, len(spec.saved) * self.hidden) if spec.saved else None
        self.cells_shape = (*lead, form.directions, self.hidden) if spec.has_c else None
        layer, results = self.layer(0, x, x, x.new_empty(self.y_shape), states)
        gates, cells = (
            None if shape is None else form.rows(x.new_empty(shape), x)
            for shape in (self.gates_shape, self.cells_shape)
        )
        results = results._replace(gates=gates, cells=cells)
        self.forward_plan = ForwardPlan(layer, results)
        names = ("workspace", "x", "y", "h_n", "c_n", "h0", "c0", "gates", "cells")
        self.weights = number_weights(form, len(names), len(weights))
        number(self.forward_plan, {name: (i, 0) for i, name in enumerate(names)} | self.weights)
        self.forward_space = Workspaces(x, self.forward_plan.space.bytes)
        self.meta = layer._replace(
            x=_without_memory(layer.x),
            h0=_without_memory(layer.h0),
            c0=None if layer.c0 is None else _without_memory(layer.c0),
            weights=tuple(w.map(_without_memory) for w in layer.weights),
        )
        self.saved = Saved(
            _without_memory(results.y),
            None if gates is None else _without_memory(gates),
            None if cells is None else _without_memory(cells),
        )
        self.backwards: dict[Any, tuple[BackwardPlan, Workspaces]] = {}
        del self.sweeps

    def _initial(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return (tensors[1], tensors[self.states]) if self.states else (self.zeros, self.zeros)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(y, h_n, c_n), of a step (h, c), and what backward needs beside the tensors."""
        x = tensors[0]
        h_n = x.new_empty(self.h_shape)
        c_n = x.new_empty(self.c_shape) if self.has_c else h_n
        y = h_n if self.form.step else x.new_empty(self.y_shape)
        gates = h_n if self.gates_shape is None else x.new_empty(self.gates_shape)
        cells = h_n if self.cells_shape is None else x.new_empty(self.cells_shape)
        workspace = self.forward_space.take(x)
        everything = [workspace, x, y, h_n, c_n, *self._initial(tensors), gates, cells, *tensors[1 + self.states :]]
        addresses = [tensor.data_ptr() for tensor in everything]
        self.forward_plan.run(self.kernels.forward, pack_for_forward, addresses, everything)
        self.forward_space.give(workspace)
        finals = (h_n, c_n) if self.has_c else (h_n,)
        saved = [y] if self.y_kept else []
        saved += [t for t in (gates, cells) if t is not h_n]
        return finals if self.form.step else (y, *finals), tuple(saved)

    def kept(self, saved: Sequence[Tensor], otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, gates and cells of what `forward` kept; `otherwise` for one that backward does not read."""
        found = iter(saved)
        return (
            next(found) if self.y_kept else otherwise,
            otherwise if self.gates_shape is None else next(found),
            otherwise if self.cells_shape is None else next(found),
        )

    def of_results(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dy, dh_n and dc_n of the gradients of what `forward` gave."""
        dy, dh_n, *rest = (None, *grads) if self.form.step else grads
        return dy, dh_n, rest[0] if rest else None

    def backward(
        self, tensors: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of `tensors` that are needed."""
        x, weights = tensors[0], tensors[1 + self.states :]
        given = [None if g is None else readable(g) for g in self.of_results(grads)]
        key = (tuple(needs), *[None if g is None else g.stride() for g in given])
        if key not in self.backwards:
            self.backwards[key] = self._backward_plan(x, given, needs)
        plan, spaces = self.backwards[key]
        h0, c0 = self._initial(tensors)
        dh0, dc0 = (x.new_empty(self.h_shape), x.new_empty(self.c_shape) if self.has_c else None)
        dx = [x.new_empty(x.shape) for _ in range(self.form.directions)] if needs[0] else [None] * self.form.directions
        wanted = needs[1 + self.states :]
        lead = (plan.parts,) if plan.parts > 1 else ()
        of_weights = [x.new_empty(*lead, *w.shape) if want else None for w, want in zip(weights, wanted, strict=True)]
        workspace = spaces.take(x)
        everything = [workspace, x, *self.kept(saved, x), h0, c0, *given, dh0, dc0, *dx, *weights, *of_weights]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in everything]
        plan.run(self.kernels.backward, pack_for_backward, addresses, everything)
        spaces.give(workspace)
        for other in dx[1:]:
            if other is not None:
                dx[0].add_(other)  # type: ignore[union-attr]
        if lead:
            of_weights = [None if g is None else g.sum(0) for g in of_weights]
        of_states = [g if want else None for g, want in zip((dh0, dc0), needs[1 : 1 + self.states], strict=False)]
        return [dx[0], *of_states, *of_weights]

    def _backward_plan(
        self, x: Tensor, given: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[BackwardPlan, Workspaces]:
        """The plan for gradients of results with these strides."""
        form, count = self.form, len(self.weights)
        dy, dh_n, dc_n = given
        meta = [torch.empty(shape, dtype=x.dtype, device="meta") for shape in (self.h_shape, self.c_shape)]
        tensors: dict[str, Tensor | None] = {
            "dy": None if dy is None else form.rows(dy, x),
            "dh_n": None if dh_n is None else form.state(dh_n, x),
            "dc_n": None if dc_n is None else form.state(dc_n, x),
            "dh0": form.state(meta[0], x),
            "dc0": form.state(meta[1], x) if self.has_c else None,
        }
        for d in range(form.directions):
            tensors[f"dx{d}"] = form.rows(torch.empty(x.shape, dtype=x.dtype, device="meta"), x) if needs[0] else None
            tensors |= {f"d{name}{d}": None for name in WEIGHTS}
        for name, want in zip(self.weights, needs[1 + self.states :], strict=True):
            tensors[f"d{name}"] = meta[0] if want else None  # only whether it is there counts
        plan = BackwardPlan(self.meta, self.saved, tensors)
        names = ["workspace", "x", "y", "gates", "cells", "h0", "c0", "dy", "dh_n", "dc_n", "dh0", "dc0"]
        names += [f"dx{d}" for d in range(form.directions)]
        numbers = {name: (i, 0) for i, name in enumerate(names)}
        numbers |= number_weights(form, len(names), count) | number_weights(form, len(names) + count, count, "d")
        number(plan, numbers)
        return plan, Workspaces(x, plan.space.bytes)
