"""Plans of whole calls: without gradients the backend's own, with gradients an autograd Function for each layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import compat
from rnnkern.autograd import LayerGradient, refuse_batched
from rnnkern.backends import Cotangents, LayerPlan, select
from rnnkern.layer import Settings, plain_operands
from rnnkern.shortcut import Form, Plan


def make_plan(form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Plan | None:
    """A plan for calls like this one, if the backend makes one."""
    backend = select(form.backend, x.device)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *states, *weights))):
        return backend.inference_plan(form, x, states, weights)
    return TrainingCall.make(form, x, states, weights)


class TrainingCall:
    """A call with gradients: one Function for each layer."""

    def __init__(self, form: Form, plans: Sequence[LayerPlan]) -> None:
        self.form, self.plans = form, plans

    @classmethod
    def make(cls, form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> "TrainingCall | None":
        """From tensors that look like those of the calls to come; None if the backend has no plan for a layer."""
        backend, count = select(form.backend, x.device), len(weights) // form.layers
        plans, one = [], form._replace(layers=1)
        for k in range(form.layers):
            part = slice(k * form.directions, (k + 1) * form.directions)
            initial = states if form.layers == 1 else [state[part].detach() for state in states]
            plan = backend.layer_plan(one, x.detach(), initial, weights[k * count : (k + 1) * count])
            if plan is None:
                return None
            plans.append(plan)
            x = x.new_empty(plan.y_shape)
        return cls(form, plans)

    def __call__(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and final states."""
        if len(self.plans) == 1:
            results = compat.apply(PlannedLayer, self.plans[0], x, *states, *weights)
            return results[0], results if self.form.step else results[1:]
        count, directions = len(weights) // len(self.plans), self.form.directions
        parts = []
        for k, plan in enumerate(self.plans):
            initial = [state[k * directions : (k + 1) * directions] for state in states]
            own = weights[k * count : (k + 1) * count]
            x, *finals = compat.apply(PlannedLayer, plan, x, *initial, *own)
            parts.append(finals)
        return x, tuple(torch.cat(part) for part in zip(*parts, strict=True))


def looks(tensors: Sequence[Tensor]) -> list[object]:
    """What a plan relies on of tensors whose addresses it takes."""
    return [(t.shape, t.stride(), t.dtype, t.is_cpu, t.is_neg()) for t in tensors]


class PlannedLayer(torch.autograd.Function):
    """(y, h_n, c_n) of a layer with a plan, (h, c) of a step: what LayerFunction is, in calls that nothing watches."""

    @staticmethod
    def forward(ctx: Any, plan: LayerPlan, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the plan; `tensors` are x, the initial states if there are any, and the weights."""
        outputs, saved = plan.forward(tensors)
        ctx.plan, ctx.count = plan, len(tensors)
        ctx.set_materialize_grads(False)
        kept = (*tensors, *saved)
        ctx.form = looks(kept)
        ctx.save_for_backward(*kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors`, differentiable where the graph is kept."""
        plan, kept, needs = ctx.plan, ctx.saved_tensors, ctx.needs_input_grad[1:]
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        refuse_batched(grads)
        changed = ctx.form != looks(kept)  # by hooks on saved tensors
        if changed or torch.is_grad_enabled() or not compat.PLAIN_OR_NONE.issuperset(map(type, (*kept, *grads))):
            return (None, *_again(plan, tensors, saved, grads, needs))
        return (None, *plan.backward(tensors, saved, grads, needs))


def _again(
    plan: LayerPlan,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients the ordinary way, which can be differentiated in its turn."""
    form, x = plan.form, tensors[0]
    rows, weights = form.rows(x, x), tensors[len(tensors) - plan.weight_count :]
    given = list(tensors[1 : len(tensors) - len(weights)])
    states: list[Tensor | None] = [form.state(state, x) for state in given]
    if not given:
        shapes = (plan.h_shape, plan.c_shape)[: form.spec.states]
        states = [form.state(x.new_zeros(shape), x) for shape in shapes]
    states += [None] * (2 - len(states))
    nothing = x.new_zeros(plan.y_shape)
    y, gates, cells = (form.rows(t, x) for t in plan.kept(saved, nothing))
    dy, dh_n, dc_n = plan.of_results(grads)
    of_results = (
        None if dy is None else form.rows(dy, x),
        *(None if g is None else form.state(g, x) for g in (dh_n, dc_n)),
    )
    of_states = [*needs[1 : 1 + len(given)], False, False][:2]
    wanted = (needs[0], *of_states, False, False, *needs[1 + len(given) :])
    settings = Settings(form.cell, form.backend, form.batch_first and x.dim() == 3)
    operands = plain_operands(rows, states[0], states[1], tuple(weights))  # type: ignore[arg-type]
    found = iter(
        LayerGradient.apply(  # type: ignore[no-untyped-call]
            *settings, wanted, *operands.flat(), y, gates, cells, *Cotangents(*of_results)
        )
    )
    results: list[Tensor | None] = [form.rows_back(next(found), x) if needs[0] else None]
    results += [form.state_back(next(found), x) if need else None for need in needs[1 : 1 + len(given)]]
    return results + [next(found) if need else None for need in needs[1 + len(given) :]]
