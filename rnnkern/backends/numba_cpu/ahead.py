"""Calls laid out ahead, from the tensors of the caller to results in their shapes: whole calls in inference, and single
layers with gradients. What runs them knows that they look like those that they were made from (rnnkern/shortcut.py).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import native
from rnnkern.backends import Cotangents, Extras, Given, Layer, Saved, States, compute_dtype, is_readable, readable
from rnnkern.backends.numba_cpu.optional_plans import EXTRAS, named_shares
from rnnkern.backends.numba_cpu.plans import SCALARS, WEIGHTS, Address, Plan
from rnnkern.backends.numba_cpu.program import Contents, program
from rnnkern.backends.numba_cpu.ways import adds_rows, total, way_of
from rnnkern.backends.pages import LEAST_BYTES
from rnnkern.cells import Weights, split_directions
from rnnkern.shortcut import Direct, Form

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
    """A whole call, all its layers, that keeps nothing for backward. The tensors of a call are, in this order, its
    workspace, x, initial states, weights, zeros, and what it makes: final states, the output, the outputs of inner
    layers."""

    def __init__(self, form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__(form, x, states, weights)
        plans: list[Plan] = []
        count, inner = len(weights) // form.layers, [f"y{k}" for k in range(form.layers - 1)]
        made = {"h_n": self.h_shape, **({"c_n": self.c_shape} if self.has_c else {})}
        made |= {} if form.step else dict.fromkeys(("y", *inner), self.y_shape)
        first = 2 + len(states)  # of the weights
        place = in_turn(["workspace", "x", "h0", "c0"][:first]) | in_turn(["zeros", *made], first + len(weights))
        flow = x
        for k in range(form.layers):
            y = x.new_empty(*self.y_shape)
            layer, results = self.layer(k, x, flow, y, states)
            way = way_of(layer)
            plan = way.forward_plan(layer, results)
            flows = ["x", *inner, "h_n" if form.step else "y"][k : k + 2]
            numbers = {"workspace": (0, 0), "x": place[flows[0]], "y": place[flows[1]]}
            # layer k's part of a state begins where its view does in the whole
            parts = {"h_n": results.h_n, "c_n": results.c_n, "h0": layer.h0, "c0": layer.c0}
            begins = dict(zip(("h0", "c0"), (state.storage_offset() for state in states), strict=False))
            for name, part in parts.items():
                if part is not None:
                    number_of, _ = place.get(name, place["zeros"])
                    numbers[name] = number_of, int(part.storage_offset() - begins.get(name, 0)) * x.element_size()
            number(plan, numbers | in_turn(weight_names(layer.weights), first + k * count))
            plans.append(plan)
            flow = y
        kernel = way.kernels[form.cell].forward
        launches = [plan.launch(kernel, way.pack_forward) for plan in plans]
        contents = Contents([self.zeros], list(made.values()), [], [], max(plan.space.bytes for plan in plans))
        self.program = program(launches, contents, x)
        self.states = form.spec.states
        self.output = 0 if form.step else self.states
        self.direct = None if native.calls is None else Direct(self.program, self.output, 0, self.states)
        del self.sweeps

    def __call__(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], resets: Sequence[Tensor] = ()
    ) -> tuple[Any, ...]:
        made = self.program(x, *states, *weights)
        return made[self.output], made[: self.states]


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

    program: Any
    inputs: int  # so many dx, one of each direction, are the first that it makes
    summed: list[int]  # which have a part for each share of the batch
    returned: list[int | None]  # which is the gradient of each tensor of the call


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
        self.zero = SCALARS[x.dtype](0)
        self.program = self._program(x, layer, results)
        self.like = _meta(x)
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

    def _program(self, x: Tensor, layer: Layer, results: States) -> Any:
        """What forward does."""
        plan = self.way.forward_plan(layer, results)
        number(plan, self._numbers([], self.made, "h_n"))
        shapes = list(self.made.values())
        contents = Contents(list(self.constants.values()), shapes, [], self.large, plan.space.bytes)
        return program([plan.launch(self.kernels.forward, self.way.pack_forward)], contents, x)

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
        made = self.program(*tensors)
        return made[: self.gives], tuple([made[i] for i in self.keeps])

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
        given, back = self.back(grads, needs)
        made = list(back.program(*tensors, *saved, *[g for g in given if g is not None]))
        for other in made[1 : back.inputs]:
            made[0].add_(other)
        for i in back.summed:
            made[i] = total(made[i], self.zero)
        return [None if i is None else made[i] for i in back.returned]

    def back(self, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[list[Tensor | None], _Back]:
        """The gradients given as kernels can read them, and how those needed are found."""
        given = [None if g is None else readable(g) for g in grads]
        key = (torch.get_num_threads(), tuple(needs), *[None if g is None else g.stride() for g in given])
        back = self.backwards.get(key)
        if back is None:
            if len(self.backwards) >= MOST_BACKWARDS:
                self.backwards.clear()
            back = self.backwards[key] = self._back(self.like, self.of_results(given), needs)
        return given, back

    def native(self, again: Callable[..., Any]) -> Any:
        """`forward` with gradients as one function in C++, where it can be had. What `backward` is not for, `again`
        does: (tensors, saved, grads, needs) -> gradients."""
        if native.calls is None:
            return None
        return native.calls.PlannedLayer(self.program, self.gives, self.keeps, self.back, again)

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
        inputs = len(empty)
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
        contents = Contents(
            list(self.constants.values()), list(empty.values()), list(zeroed.values()), [], plan.space.bytes
        )
        launch = plan.launch(self.kernels.backward, self.way.pack_backward)
        return _Back(program([launch], contents, x), inputs, summed, returned)

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
