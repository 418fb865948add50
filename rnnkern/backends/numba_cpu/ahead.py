"""Calls laid out ahead, from the tensors of the caller to results in their shapes: whole calls in inference, and single
layers with gradients. What runs them knows that they look like those that they were made from (rnnkern/shortcut.py).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.backends import Cotangents, Extras, Given, Layer, Saved, States, compute_dtype, is_readable, readable
from rnnkern.backends.numba_cpu.optional_plans import EXTRAS, named_shares
from rnnkern.backends.numba_cpu.plans import WEIGHTS, Address, Plan
from rnnkern.backends.numba_cpu.ways import adds_rows, total, way_of
from rnnkern.backends.pages import LEAST_BYTES, in_huge_pages
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


# As plans call what backward reads of what forward made, and the gradients of its results.
_KEPT, _GRADIENTS = ("y", "gates", "cells"), ("dy", "dh_n", "dc_n", "dcells")


class _Back(NamedTuple):
    """How gradients are found where the same ones are given and asked for."""

    plan: Plan
    spaces: Workspaces
    empty: list[tuple[int, ...]]  # shapes of what sweeps write, first, where it is asked for, dx of each direction,
    zeroed: list[tuple[int, ...]]  # and of what they add to
    summed: list[int]  # which of these have a part for each share of the batch
    returned: list[int | None]  # which of these is the gradient of each tensor of the call


class LayerPlan(_Ahead):
    """One layer, forward and backward. The tensors of a call are, in this order, its workspace, those that it is given
    and forward has kept, gradients that it is given, constants, and what it makes."""

    def __init__(self, form: Form, given: Given, graded: bool) -> None:
        x, states, weights, extras = given
        super().__init__(form, x, states, weights)
        layer, results = self.layer(0, x, x, x.new_empty(*self.y_shape), states)
        layer = layer._replace(extras=extras)
        self._makes(x, layer, graded)
        gates, cells = (
            None if name not in self.made else form.rows(x.new_empty(self.made[name]), x) for name in ("gates", "cells")
        )
        results = results._replace(gates=gates, cells=cells)
        self.weights = weight_names(layer.weights)
        self.adds = {name for name in self.weights if adds_rows(name[:-1], layer.weights[0])}.union(EXTRAS)
        self.first_weight, self.first_extra = 1 + len(states), 1 + len(states) + len(weights)
        self.present = [i for i, tensor in enumerate(extras.tensors()) if tensor is not None]
        self.names = ["x", *("h0", "c0")[: len(states)], *self.weights, *(EXTRAS[i] for i in self.present)]
        self.extras = Extras(*map(_meta, extras.tensors()), *extras[len(EXTRAS) :])
        self.constants = {"zeros": self.zeros, **named_shares(layer)}
        self.way = way_of(layer)
        self.kernels = self.way.kernels[form.cell]
        self.forward_plan = self.way.forward_plan(layer, results)
        number(self.forward_plan, self._numbers([], self.made, "h_n"))
        self.forward_space = Workspaces(x, self.forward_plan.space.bytes)
        self.meta = layer._replace(
            x=_meta(layer.x),
            h0=_meta(layer.h0),
            c0=_meta(layer.c0),
            weights=tuple(w.map(_meta) for w in layer.weights),
            extras=self.extras,
        )
        self.saved = Saved(_meta(results.y), _meta(gates), _meta(cells))
        self.backwards: dict[Any, _Back] = {}
        self.looks: list[object] | None = None
        self.guard: Callable[..., bool] | None = None
        del self.sweeps

    def _makes(self, x: Tensor, layer: Layer, graded: bool) -> None:
        """What forward makes: shapes by name, how many of them it gives, and which are kept for backward."""
        form, spec, lead = self.form, self.form.spec, (*x.shape[:-1], self.form.directions)
        every_c = layer.extras.states
        self.made: dict[str, tuple[int, ...]] = {} if form.step else {"y": self.y_shape}
        self.made["h_n"] = self.h_shape
        if spec.has_c:
            self.made["c_n"] = self.c_shape
        self.gives = len(self.made) + every_c
        if spec.has_c and (graded or every_c):
            self.made["cells"] = (*lead, self.hidden)
        if graded and layer.kept:
            self.made["gates"] = (*lead, layer.kept * self.hidden)
        keeps_y = graded and not (form.step and spec.saved)
        self.kept_names = [name for name in _KEPT if (keeps_y if name == "y" else name in self.made)]
        place = {name: i for i, name in enumerate(self.made)}
        self.keeps = [place.get(name, place["h_n"]) for name in self.kept_names]  # the y of a step is its h
        sizes = {name: math.prod(self.made[name]) * x.element_size() for name in self.kept_names if name != "y"}
        self.large = [place[name] for name, size in sizes.items() if size >= LEAST_BYTES]

    def _numbers(self, between: Sequence[str], made: Iterable[str], y: str) -> Numbers:
        """Of the tensors of a call. Initial states that are not given are zeros, and where there is no y another
        tensor stands for it."""
        found = in_turn(["workspace", *self.names, *between, *self.constants, *made])
        return {"h0": found["zeros"], "c0": found["zeros"], "y": found[y]} | found

    def split(self, tensors: Sequence[Any]) -> Given:
        """`Given.flat` undone, of the tensors or of something for each of them."""
        states, weights = tensors[1 : self.first_weight], tensors[self.first_weight : self.first_extra]
        found = zip(self.present, tensors[self.first_extra :], strict=True)
        return Given(tensors[0], states, weights, self.extras._replace(**{Extras._fields[i]: t for i, t in found}))

    def forward(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(y, h_n, c_n), with `Extras.states` also cells, of a step (h, c); and what backward needs beside the
        tensors."""
        x = tensors[0]
        made = [x.new_empty(*shape) for shape in self.made.values()]
        for i in self.large:
            in_huge_pages(made[i])
        workspace = self.forward_space.take(x)
        everything = [workspace, *tensors, *self.constants.values(), *made]
        addresses = [tensor.data_ptr() for tensor in everything]
        self.forward_plan.run(self.kernels.forward, self.way.pack_forward, addresses, everything)
        self.forward_space.give(workspace)
        return tuple(made[: self.gives]), tuple([made[i] for i in self.keeps])

    def kept(self, saved: Sequence[Tensor], otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, gates and cells of what `forward` kept; `otherwise` for one that backward does not read."""
        found = dict(zip(self.kept_names, saved, strict=True))
        y, gates, cells = (found.get(name, otherwise) for name in _KEPT)
        return y, gates, cells

    def of_results(self, grads: Sequence[Tensor | None]) -> Cotangents:
        """The gradients of what `forward` gave by name, in their shapes."""
        dy, dh_n, *rest = (None, *grads) if self.form.step else grads
        dc_n, dcells = (*rest, None, None)[:2]
        return Cotangents(dy, dh_n, dc_n, dcells)

    def backward(
        self, tensors: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of `tensors` that are needed."""
        x, given = tensors[0], [None if g is None else readable(g) for g in grads]
        key = (torch.get_num_threads(), tuple(needs), *[None if g is None else g.stride() for g in given])
        back = self.backwards.get(key)
        if back is None:
            if len(self.backwards) >= MOST_BACKWARDS:
                self.backwards.clear()
            back = self.backwards[key] = self._back(x, self.of_results(given), needs)
        made = [x.new_empty(*shape) for shape in back.empty]
        made += [x.new_zeros(*shape) for shape in back.zeroed]
        workspace, present = back.spaces.take(x), [g for g in given if g is not None]
        everything = [workspace, *tensors, *saved, *present, *self.constants.values(), *made]
        addresses = [tensor.data_ptr() for tensor in everything]
        back.plan.run(self.kernels.backward, self.way.pack_backward, addresses, everything)
        del everything  # what is summed up can go
        back.spaces.give(workspace)
        if needs[0]:
            for other in made[1 : self.form.directions]:
                made[0].add_(other)
        for i in back.summed:
            made[i] = total(made[i], back.plan.zero)
        return [None if i is None else made[i] for i in back.returned]

    def _back(self, x: Tensor, given: Cotangents, needs: Sequence[bool]) -> _Back:
        """For gradients of results with these strides."""
        wanted = [name for name, want in zip(self.names, needs, strict=True) if want]
        like: dict[str, Any] = dict(zip(self.weights, (t for w in self.meta.weights for t in w.present()), strict=True))
        like |= {EXTRAS[i]: self.extras.tensors()[i] for i in self.present}
        tensors = self._cotangents(x, given, wanted, like)
        plan = self.way.backward_plan(self.meta, self.saved, tensors)
        lead = (plan.parts,) if plan.parts > 1 else ()
        shapes = {n: tuple(t.shape) if n in EXTRAS else (*lead, *t.shape) for n, t in like.items()}
        shapes |= {"h0": self.h_shape, "c0": self.c_shape}
        empty = {f"dx{d}": tuple(x.shape) for d in range(self.form.directions)} if needs[0] else {}
        empty |= {f"d{name}": shapes[name] for name in wanted if name != "x" and name not in self.adds}
        zeroed = {f"d{name}": shapes[name] for name in wanted if name in self.adds}
        made = [*empty, *zeroed]
        present = [name for name, g in zip(_GRADIENTS, given, strict=True) if g is not None]
        numbers = self._numbers([*self.kept_names, *present], made, "x")
        for name in ("dh0", "dc0"):
            state = tensors[name]
            if state is not None and name not in made:  # nobody asks: it ends in the workspace
                numbers[name] = 0, plan.space.take(1, plan.width(state.numel()))
        number(plan, numbers)
        place = {name: i for i, name in enumerate(made)}
        summed = [place[f"d{name}"] for name in self.weights if name in wanted and plan.parts > 1]
        returned = [place.get("dx0" if name == "x" else f"d{name}") for name in self.names]
        spaces = Workspaces(x, plan.space.bytes)
        return _Back(plan, spaces, list(empty.values()), list(zeroed.values()), summed, returned)

    def _cotangents(
        self, x: Tensor, given: Cotangents, wanted: Sequence[str], like: dict[str, Any]
    ) -> dict[str, Tensor | None]:
        """What plans want to know of gradients, those given and those that will be made."""
        form, spec = self.form, self.form.spec
        dy, dh_n, dc_n, dcells = given
        tensors: dict[str, Tensor | None] = {
            "dy": None if dy is None else form.rows(dy, x),
            "dh_n": None if dh_n is None else form.state(dh_n, x),
            "dc_n": None if dc_n is None else form.state(dc_n, x),
            "dcells": None if dcells is None else form.rows(dcells, x),
            "dh0": form.state(x.new_empty(self.h_shape, device="meta"), x),
            "dc0": form.state(x.new_empty(self.c_shape, device="meta"), x) if spec.has_c else None,
            "dreset_h": None,
            "dreset_c": None,
        }
        dx = form.rows(x.new_empty(x.shape, device="meta"), x) if "x" in wanted else None
        for d in range(form.directions):
            tensors |= {f"dx{d}": dx, **{f"d{name}{d}": None for name in WEIGHTS}}
        return tensors | {f"d{n}": x.new_empty(t.shape, device="meta") for n, t in like.items() if n in wanted}
