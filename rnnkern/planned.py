"""Plans of whole calls: the backend's own for plain ones without gradients, else one layer after the other, with
gradients as autograd Functions."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnkern import compat, masks, native, views
from rnnkern.autograd import LayerGradient, refuse_batched
from rnnkern.backends import Cotangents, Extras, Given, LayerPlan, select
from rnnkern.cells import Weights, split_directions
from rnnkern.layer import Operands, Settings
from rnnkern.options import PLAIN
from rnnkern.shortcut import Direct, Form, Plan
from rnnkern.views import States


def make_plan(
    form: Form, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], resets: Sequence[Tensor]
) -> Plan | None:
    """A plan for calls like this one, if the backend makes one."""
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *states, *weights, *resets))
    if form.plain and not graded:
        return select(form.backend, x.device).inference_plan(form, x, states, weights)
    return LayeredCall.make(form, graded, x, states, weights, resets)


class LayeredCall:
    """A call layer by layer, with options or gradients or both."""

    def __init__(self, form: Form, graded: bool, choose: masks.Choose) -> None:
        self.form, self.plain, self.graded = form, form.plain, graded
        self.plans: list[LayerPlan] = []
        self.layers: list[Callable[..., tuple[Tensor, ...]]] = []  # plans, with gradients where there are any
        self.wanted: list[list[masks.Wanted | None]] = []  # of each layer
        self.choose = choose
        self.direct: Direct | None = None

    @classmethod
    def make(
        cls,
        form: Form,
        graded: bool,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        resets: Sequence[Tensor],
    ) -> "LayeredCall | None":
        """From tensors that look like those of the calls to come; None if the backend has no plan for a layer."""
        backend, one = select(form.backend, x.device), form._replace(layers=1)
        call = cls(form, graded, backend.choose)
        flow = x
        with torch.no_grad():
            reset, reset_to = call._resets(x, resets)
            for k in range(form.layers):
                call.wanted.append(call._wanted(k, form.rows(flow, x), weights))
                given = call._given(k, call._between(k, flow, x, False), x, states, weights, reset, reset_to, False)
                plan = backend.layer_plan(one, given, graded)
                if plan is None:
                    return None
                call.plans.append(plan)
                call.layers.append(with_gradients(plan) if graded else partial(_without_gradients, plan))
                flow = x.new_empty(plan.y_shape)
        if form.plain and form.layers == 1 and native.calls is not None:
            call.direct = Direct(call.layers[0], 0, 0 if form.step else 1, form.spec.states)
        return call

    def __call__(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], resets: Sequence[Tensor] = ()
    ) -> tuple[Any, ...]:
        """Output and final states, and with `return_states` all states."""
        if self.plain and len(self.plans) == 1:
            results = self.layers[0](x, *states, *weights)
            return results[0], results if self.form.step else results[1:]
        form, count, flow = self.form, self.form.spec.states, x
        reset, reset_to = self._resets(x, resets)
        outputs: list[Tensor] = []
        finals: list[States] = []
        cells: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            results = layer(*self._given(k, self._between(k, flow, x), x, states, weights, reset, reset_to).flat())
            flow = results[0]
            outputs.append(flow)
            finals.append(results[1 : 1 + count])
            cells += results[1 + count :]
        joined = finals[0] if len(finals) == 1 else tuple(torch.cat(part) for part in zip(*finals, strict=True))
        if not form.return_states:
            return flow, joined
        every = views.all_states(form.directions, [form.rows(y, x) for y in outputs], [form.rows(c, x) for c in cells])
        return flow, joined, tuple(s.squeeze(2) for s in every) if x.dim() == 2 else every

    def _resets(self, x: Tensor, resets: Sequence[Tensor]) -> tuple[Tensor | None, States | None]:
        """`reset` and `reset_to` as layers see them."""
        if not resets:
            return None, None
        unbatched, batch_first = x.dim() == 2, self.form.batch_first
        batch = 1 if unbatched else x.shape[0 if batch_first else 1]
        reset = views.reset_rows(resets[0], batch_first, unbatched)
        return reset, views.reset_states(tuple(resets[1:]), batch, unbatched) if len(resets) > 1 else None

    def _between(self, k: int, flow: Tensor, x: Tensor, drawn: bool = True) -> Tensor:
        """What layer k gets of what the one before gave."""
        form = self.form
        if k == 0 or not form.dropout:
            return flow
        return form.rows_back(masks.drop_between(form.dropout, form.rows(flow, x), form.batch_first, drawn), x)

    def _wanted(self, k: int, rows: Tensor, weights: Sequence[Tensor]) -> list[masks.Wanted | None]:
        """The masks of layer k."""
        form = self.form
        if not form.training or form.options is PLAIN:
            return []
        return masks.wanted(form.spec, form.options, rows, rows.shape[1], self._named(self._own(k, weights)))

    def _own(self, k: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of layer k."""
        count = len(tensors) // self.form.layers
        return tensors if self.form.layers == 1 else tensors[k * count : (k + 1) * count]

    def _named(self, weights: Sequence[Tensor]) -> Sequence[Weights]:
        """Those of a layer by names, for each direction."""
        form = self.form
        return split_directions(form.spec, weights, form.directions, form.options.peephole, form.options.layer_norm)

    def _given(
        self,
        k: int,
        flow: Tensor,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        reset: Tensor | None,
        reset_to: States | None,
        drawn: bool = True,
    ) -> Given:
        """The tensors of layer k with its masks, `drawn` or only such as they look like."""
        form, options, directions = self.form, self.form.options, self.form.directions
        own = self._own(k, weights)
        initial = states if form.layers == 1 else [s[k * directions : (k + 1) * directions] for s in states]
        if self.plain:
            return Given(flow, initial, own)
        found = masks.Masks()
        if self.wanted[k]:
            found = masks.draw(self.wanted[k], x, drawn, self.choose)
            if options.weight_dropout:
                own = [t for w in masks.drop_weights(self._named(own), found) for t in w.present()]
        shares = options.shares(form.spec, form.training)
        of_resets = views.reset_states_of(reset_to, k)
        every = form.return_states and form.spec.has_c
        zone_masks = found.zoneout_h, found.zoneout_c
        extras = Extras(
            found.input, found.recurrent, *zone_masks, reset, *of_resets, *shares, options.recompute, states=every
        )
        return Given(flow, initial, own, extras)


def looks(tensors: Sequence[Tensor]) -> list[object]:
    """What a plan relies on of tensors whose addresses it takes."""
    return [(t.shape, t.stride(), t.dtype, t.is_cpu, t.is_neg()) for t in tensors]


def is_kept(plan: LayerPlan, kept: Sequence[Tensor]) -> bool:
    """Whether tensors kept for backward look as they did: hooks may have changed them."""
    if plan.guard is not None and plan.guard(*kept):
        return True
    same = looks(kept) == plan.looks
    if same and plan.guard is None and compat.can_guard(kept):
        plan.guard = compat.guard(kept)
    return same


def with_gradients(plan: LayerPlan) -> Callable[..., tuple[Tensor, ...]]:
    """What a plan gives, of the tensors of `Given.flat`, as autograd sees it."""
    return plan.native(partial(_again, plan)) or partial(compat.apply, PlannedLayer, plan)


def _without_gradients(plan: LayerPlan, *tensors: Tensor) -> tuple[Tensor, ...]:
    return plan.forward(tensors)[0]


class PlannedLayer(torch.autograd.Function):
    """(y, h_n, c_n, cells) of a layer with a plan, (h, c) of a step: what LayerFunction is, in calls that nothing
    watches."""

    @staticmethod
    def forward(ctx: Any, plan: LayerPlan, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the plan; `tensors` are those of `Given.flat`."""
        outputs, saved = plan.forward(tensors)
        ctx.plan, ctx.count = plan, len(tensors)
        ctx.set_materialize_grads(False)
        kept = (*tensors, *saved)
        if plan.looks is None:
            plan.looks = looks(kept)  # as those of all calls with this plan
        ctx.save_for_backward(*kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors`, differentiable where the graph is kept."""
        plan, kept, needs = ctx.plan, ctx.saved_tensors, ctx.needs_input_grad[1:]
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        refuse_batched(grads)
        watched = torch.is_grad_enabled() or not compat.in_plain_eager()
        if watched or not is_kept(plan, kept) or not compat.PLAIN_OR_NONE.issuperset(map(type, (*kept, *grads))):
            return (None, *_again(plan, tensors, saved, grads, needs))
        return (None, *plan.backward(tensors, saved, grads, needs))


def _operands(plan: LayerPlan, given: Given) -> Operands:
    """The tensors of a planned layer in the form of an ordinary call."""
    form, x, extras = plan.form, given.x, given.extras
    states: list[Tensor | None] = [form.state(state, x) for state in given.states]
    if not states:
        shapes = (plan.h_shape, plan.c_shape)[: form.spec.states]
        states = [form.state(x.new_zeros(shape), x) for shape in shapes]
    *fixed, reset_h, reset_c = extras.tensors()
    states += [None] * (2 - len(states))
    tensors: list[Any] = [None, None, *fixed, form.rows(x, x), *states, reset_h, reset_c]
    return Operands(*tensors, tuple(given.weights))  # type: ignore[call-arg]


def _again(
    plan: LayerPlan,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients the ordinary way, which can be differentiated in its turn."""
    refuse_batched(grads)
    given = plan.split(tensors)
    form, x, extras, options = plan.form, given.x, given.extras, plan.form.options
    operands = _operands(plan, given)
    settings = Settings(
        form.cell,
        form.backend,
        form.batch_first and x.dim() == 3,
        options.peephole,
        options.layer_norm,
        *extras[7:],
    )
    y, gates, cells = (form.rows(t, x) for t in plan.kept(saved, x.new_zeros(plan.y_shape)))
    of = plan.of_results(grads)
    cotangents = Cotangents(
        None if of.y is None else form.rows(of.y, x),
        None if of.h_n is None else form.state(of.h_n, x),
        None if of.c_n is None else form.state(of.c_n, x),
        None if of.cells is None else form.rows(of.cells, x),
    )
    need = plan.split(needs)
    of_states = (*need.states, False, False)[:2]
    of_resets = [bool(wanted) for wanted in (need.extras.reset_h, need.extras.reset_c)]
    wanted = (need.x, *of_states, *of_resets, *need.weights)
    found = iter(
        LayerGradient.apply(  # type: ignore[no-untyped-call]
            *settings, wanted, *operands.flat(), y, gates, cells, *cotangents
        )
    )
    dx = form.rows_back(next(found), x) if need.x else None
    dstates = [form.state_back(next(found), x) if of_state else None for of_state in need.states]
    dresets = [next(found) if of_reset else None for of_reset in of_resets]
    dweights = [next(found) if of_weight else None for of_weight in need.weights]
    masks_and_reset = [None for t in extras.tensors()[:5] if t is not None]
    given_resets = [g for g, t in zip(dresets, extras.tensors()[5:], strict=True) if t is not None]
    return [dx, *dstates, *dweights, *masks_and_reset, *given_resets]
