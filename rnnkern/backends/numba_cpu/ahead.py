"""Calls laid out ahead, from the tensors of the caller to results in their shapes: whole calls in inference, and single
layers with gradients. What runs them knows that they look like those that they were made from (rnnkern/shortcut.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern.backends import Cotangents, Extras, Given, Layer, Saved, States, compute_dtype, is_readable, readable
from rnnkern.backends.numba_cpu.optional_plans import EXTRAS, named_shares
from rnnkern.backends.numba_cpu.plans import WEIGHTS, Address, Plan
from rnnkern.backends.numba_cpu.ways import adds_rows, total, way_of
from rnnkern.backends.pages import in_huge_pages
from rnnkern.cells import Weights, split_directions
from rnnkern.shortcut import Form

# A workspace up to this size is kept from one call to the next: to allocate it would take as long as to use it.
MOST_KEPT_BYTES = 65536
# A gradient that is a view has the strides of the whole: there may be any number of these.
MOST_BACKWARDS = 16

Numbers = dict[str, tuple[int, int]]  # of a tensor: which one of a call it is, and from which byte on


def possible(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether kernels take the tensors of a call as they are, and have something to do."""
    return x.dtype == compute_dtype(x.dtype) and x.numel() > 0 and all(map(is_readable, (x, *tensors)))


def number(plan: Plan, numbers: Numbers) -> None:
    """Makes a plan count the tensors of a call as the call does, in place of its own order."""
    for _, addresses in plan.directions:
        for i, (position, tensor, offset) in enumerate(addresses):
            index, extra = numbers[plan.tensors[tensor]]
            addresses[i] = Address(position, index, offset + extra)


def weight_names(weights: Sequence[Weights]) -> list[str]:
    """Of all directions of a layer, one after the other, as plans call them."""
    return [f"{n}{d}" for d, own in enumerate(weights) for n, w in zip(WEIGHTS, own, strict=True) if w is not None]


def in_turn(names: Sequence[str], first: int = 0) -> Numbers:
    """The numbers of tensors that come one after the other, from `first` on."""
    return {name: (first + i, 0) for i, name in enumerate(names)}


# Those not in use, by how many numbers of which dtype they hold: there are never more than calls ran at once.
_free: dict[tuple[int, torch.dtype], list[Tensor]] = {}


class Workspaces:
    """Workspaces of a plan: small ones are kept for all plans of about the size, each taken and given back by one
    operation, so that threads never share one."""

    def __init__(self, x: Tensor, space: int) -> None:
        self.keeps = space <= MOST_KEPT_BYTES
        self.numbers = (1 << (space - 1).bit_length() if self.keeps else space) // x.element_size()
        self.free = _free.setdefault((self.numbers, x.dtype), []) if self.keeps else []

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
        self.form, options = form, form.options
        directions = form.layers * form.directions
        self.sweeps = split_directions(form.spec, weights, directions, options.peephole, options.layer_norm)
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
        self.plans: list[Plan] = []
        flow, count = x, len(weights) // form.layers
        for k in range(form.layers):
            y = x.new_empty(*self.y_shape)
            layer, results = self.layer(k, x, flow, y, states)
            self.way = way_of(layer)
            plan = self.way.forward_plan(layer, results)
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
            number(plan, numbers | in_turn(weight_names(layer.weights), 7 + k * count))
            self.plans.append(plan)
            flow = y
        self.workspaces = Workspaces(x, max(plan.space.bytes for plan in self.plans))
        self.kernel = self.way.kernels[form.cell].forward
        del self.sweeps

    def __call__(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], resets: Sequence[Tensor] = ()
    ) -> tuple[Any, ...]:
        h_n = x.new_empty(*self.h_shape)
        c_n = x.new_empty(*self.c_shape) if self.has_c else h_n
        y = h_n if self.form.step else x.new_empty(*self.y_shape)
        h0, c0 = (states[0], states[-1]) if states else (self.zeros, self.zeros)
        workspace = self.workspaces.take(x)
        tensors = [workspace, x, y, h_n, c_n, h0, c0, *weights]
        tensors += [x.new_empty(*self.y_shape) for _ in self.plans[1:]]  # of inner layers
        addresses = [tensor.data_ptr() for tensor in tensors]
        for plan in self.plans:
            plan.run(self.kernel, self.way.pack_forward, addresses, tensors)
        self.workspaces.give(workspace)
        return y, (h_n, c_n) if self.has_c else (h_n,)


def layer_plan(form: Form, given: Given, graded: bool) -> "LayerPlan | None":
    """The plan of layers like this one."""
    read = (t for name, t in zip(EXTRAS, given.extras.tensors(), strict=True) if t is not None and name != "reset")
    return LayerPlan(form, given, graded) if possible(given.x, (*given.states, *given.weights, *read)) else None


def _meta(tensor: Tensor | None) -> Any:
    """The same without memory."""
    return (
        None
        if tensor is None
        else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    )


# The tensors of a call behind one another, as plans call them; weights, extras and shares follow.
_FORWARD = ("workspace", "x", "y", "h_n", "c_n", "h0", "c0", "gates", "cells")
_BACKWARD = ("workspace", "x", "y", "gates", "cells", "h0", "c0", "dy", "dh_n", "dc_n", "dcells", "dh0", "dc0")


class LayerPlan(_Ahead):
    """One layer, forward and backward."""

    def __init__(self, form: Form, given: Given, graded: bool) -> None:
        x, states, weights, extras = given
        super().__init__(form, x, states, weights)
        layer, results = self.layer(0, x, x, x.new_empty(*self.y_shape), states)
        layer = layer._replace(extras=extras)
        self.weights = weight_names(layer.weights)
        self._sizes(x, layer, graded)
        gates, cells = (
            None if shape is None else form.rows(x.new_empty(shape), x)
            for shape in (self.gates_shape, self.cells_shape)
        )
        results = results._replace(gates=gates, cells=cells)
        self.first_weight, self.first_extra = 1 + len(states), 1 + len(states) + len(weights)
        self.present = [i for i, tensor in enumerate(extras.tensors()) if tensor is not None]
        self.extras = Extras(*map(_meta, extras.tensors()), *extras[len(EXTRAS) :])
        self.shares = tuple(named_shares(layer).values())
        self.others = [*(EXTRAS[i] for i in self.present), *named_shares(layer)]
        self.way = way_of(layer)
        self.kernels = self.way.kernels[form.cell]
        self.forward_plan = self.way.forward_plan(layer, results)
        number(self.forward_plan, in_turn([*_FORWARD, *self.weights, *self.others]))
        self.forward_space = Workspaces(x, self.forward_plan.space.bytes)
        self.meta = layer._replace(
            x=_meta(layer.x),
            h0=_meta(layer.h0),
            c0=_meta(layer.c0),
            weights=tuple(w.map(_meta) for w in layer.weights),
            extras=self.extras,
        )
        self.saved = Saved(_meta(results.y), _meta(gates), _meta(cells))
        self.backwards: dict[Any, tuple[Plan, Workspaces]] = {}
        self.looks: list[object] | None = None
        self.guard: Callable[..., bool] | None = None
        del self.sweeps

    def _sizes(self, x: Tensor, layer: Layer, graded: bool) -> None:
        """Of what is kept for backward, and given."""
        spec, lead, directions = self.form.spec, x.shape[:-1], self.form.directions
        self.every_c = layer.extras.states
        self.y_kept = graded and not (self.form.step and bool(spec.saved))
        self.gates_shape = (*lead, directions, layer.kept * self.hidden) if graded and layer.kept else None
        self.cells_shape = (*lead, directions, self.hidden) if spec.has_c and (graded or self.every_c) else None
        self.zeroed = [adds_rows(name[:-1], layer.weights[0]) for name in self.weights]

    def split(self, tensors: Sequence[Any]) -> Given:
        """`Given.flat` undone, of the tensors or of something for each of them."""
        states, weights = tensors[1 : self.first_weight], tensors[self.first_weight : self.first_extra]
        found = zip(self.present, tensors[self.first_extra :], strict=True)
        return Given(tensors[0], states, weights, self.extras._replace(**{Extras._fields[i]: t for i, t in found}))

    def _initial(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return (tensors[1], tensors[self.first_weight - 1]) if self.first_weight > 1 else (self.zeros, self.zeros)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(y, h_n, c_n), with `Extras.states` also cells, of a step (h, c); and what backward needs beside the
        tensors."""
        x = tensors[0]
        h_n = x.new_empty(*self.h_shape)
        c_n = x.new_empty(*self.c_shape) if self.has_c else h_n
        y = h_n if self.form.step else x.new_empty(*self.y_shape)
        gates = h_n if self.gates_shape is None else in_huge_pages(x.new_empty(*self.gates_shape))
        cells = h_n if self.cells_shape is None else in_huge_pages(x.new_empty(*self.cells_shape))
        workspace = self.forward_space.take(x)
        initial, others = self._initial(tensors), (*tensors[self.first_weight :], *self.shares)
        everything = [workspace, x, y, h_n, c_n, *initial, gates, cells, *others]
        addresses = [tensor.data_ptr() for tensor in everything]
        self.forward_plan.run(self.kernels.forward, self.way.pack_forward, addresses, everything)
        self.forward_space.give(workspace)
        finals = (h_n, c_n) if self.has_c else (h_n,)
        saved = [y] if self.y_kept else []
        saved += [t for t in (gates, cells) if t is not h_n]
        if self.every_c:
            return (y, *finals, cells), tuple(saved)
        return finals if self.form.step else (y, *finals), tuple(saved)

    def kept(self, saved: Sequence[Tensor], otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, gates and cells of what `forward` kept; `otherwise` for one that backward does not read."""
        found = iter(saved)
        return (
            next(found) if self.y_kept else otherwise,
            otherwise if self.gates_shape is None else next(found),
            otherwise if self.cells_shape is None else next(found),
        )

    def of_results(self, grads: Sequence[Tensor | None]) -> Cotangents:
        """The gradients of what `forward` gave by name, in their shapes."""
        dy, dh_n, *rest = (None, *grads) if self.form.step else grads
        dc_n, dcells = (*rest, None, None)[:2]
        return Cotangents(dy, dh_n, dc_n, dcells)

    def backward(
        self, tensors: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of `tensors` that are needed."""
        x, others, directions = tensors[0], tensors[self.first_weight :], self.form.directions
        given = [None if g is None else readable(g) for g in self.of_results(grads)]
        key = (torch.get_num_threads(), tuple(needs), *[None if g is None else g.stride() for g in given])
        found = self.backwards.get(key)
        if found is None:
            if len(self.backwards) >= MOST_BACKWARDS:
                self.backwards.clear()
            found = self.backwards[key] = self._backward_plan(x, given, needs)
        plan, spaces = found
        h0, c0 = self._initial(tensors)
        dh0, dc0 = (x.new_empty(*self.h_shape), x.new_empty(*self.c_shape) if self.has_c else None)
        dx = [x.new_empty(*x.shape) for _ in range(directions)] if needs[0] else [None] * directions
        of_weights = self._weight_gradients(others, needs, plan.parts)
        of_extras = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if want else None
            for t, want in zip(tensors[self.first_extra :], needs[self.first_extra :], strict=True)
        ]
        workspace, kept = spaces.take(x), self.kept(saved, x)
        everything = [
            workspace,
            x,
            *kept,
            h0,
            c0,
            *given,
            dh0,
            dc0,
            *dx,
            *others,
            *self.shares,
            *of_weights,
            *of_extras,
        ]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in everything]
        plan.run(self.kernels.backward, self.way.pack_backward, addresses, everything)
        spaces.give(workspace)
        for other in dx[1:]:
            if other is not None:
                dx[0].add_(other)  # type: ignore[union-attr]
        if plan.parts > 1:
            of_weights = [None if g is None else total(g, plan.zero) for g in of_weights]
        of_states = [g if want else None for g, want in zip((dh0, dc0), needs[1 : self.first_weight], strict=False)]
        return [dx[0], *of_states, *of_weights, *of_extras]

    def _weight_gradients(self, weights: Sequence[Tensor], needs: Sequence[bool], parts: int) -> list[Tensor | None]:
        """What a backward sweep writes or adds to, (parts, ...) if it is cut into several."""
        lead, wanted = (parts,) if parts > 1 else (), needs[self.first_weight : self.first_extra]
        return [
            None if not want else w.new_zeros(*lead, *w.shape) if zeroed else w.new_empty(*lead, *w.shape)
            for w, want, zeroed in zip(weights, wanted, self.zeroed, strict=False)
        ]

    def _backward_plan(
        self, x: Tensor, given: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Plan, Workspaces]:
        """The plan for gradients of results with these strides."""
        form = self.form
        dy, dh_n, dc_n, dcells = given
        meta = [torch.empty(shape, dtype=x.dtype, device="meta") for shape in (self.h_shape, self.c_shape)]
        tensors: dict[str, Tensor | None] = {
            "dy": None if dy is None else form.rows(dy, x),
            "dh_n": None if dh_n is None else form.state(dh_n, x),
            "dc_n": None if dc_n is None else form.state(dc_n, x),
            "dcells": None if dcells is None else form.rows(dcells, x),
            "dh0": form.state(meta[0], x),
            "dc0": form.state(meta[1], x) if self.has_c else None,
            "dreset_h": None,
            "dreset_c": None,
        }
        for d in range(form.directions):
            tensors[f"dx{d}"] = form.rows(torch.empty(x.shape, dtype=x.dtype, device="meta"), x) if needs[0] else None
            tensors |= {f"d{name}{d}": None for name in WEIGHTS}
        for name, want in zip(self.weights, needs[self.first_weight : self.first_extra], strict=True):
            tensors[f"d{name}"] = meta[0] if want else None  # only whether it is there counts
        extras, given_extras = [EXTRAS[i] for i in self.present], [t for t in self.extras.tensors() if t is not None]
        for name, like, want in zip(extras, given_extras, needs[self.first_extra :], strict=True):
            if want:
                tensors[f"d{name}"] = torch.empty_like(like, memory_format=torch.contiguous_format)
        plan = self.way.backward_plan(self.meta, self.saved, tensors)
        names = [*_BACKWARD, *(f"dx{d}" for d in range(form.directions)), *self.weights, *self.others]
        names += [f"d{name}" for name in (*self.weights, *extras)]
        number(plan, in_turn(names))
        return plan, Workspaces(x, plan.space.bytes)
