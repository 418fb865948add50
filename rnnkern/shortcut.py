"""The short way of a call: one that looks like an earlier one needs no checks and no layout.

What a call is checked for, and how a backend lays it out, depends on its arguments' shapes, strides, dtypes and the
like, never on their numbers or addresses. So when the same description comes by again, a plan that the backend made
for it runs the call. Nothing of the weights is kept, and masks are drawn anew at each call. Whatever is not plain
memory in undisturbed eager mode (tracers, subclasses, autocast, torch.func ...) goes the ordinary way, and so do first
calls.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rnnkern import compat
from rnnkern.cells import CELLS, CellSpec
from rnnkern.options import PLAIN, Options
from rnnkern.views import States


class Form(NamedTuple):
    """What kind of call it is, apart from its tensors."""

    cell: str
    backend: str
    layers: int
    directions: int
    batch_first: bool
    step: bool  # of a *Cell module: x is one step, and the output is the state h
    options: Options = PLAIN  # those that do something in this call
    training: bool = False  # masks are drawn
    dropout: float = 0.0  # between layers, in training
    resets: int = 0  # how many tensors `reset` and `reset_to` are
    return_states: bool = False

    @property
    def spec(self) -> CellSpec:
        """The cell's entry in the table."""
        return CELLS[self.cell]

    @property
    def plain(self) -> bool:
        """Whether the cell's equations are all there is, for each layer and from one to the next."""
        return self[6:] == _PLAIN_FORM

    def rows(self, t: Tensor, x: Tensor) -> Tensor:
        """A tensor (..., n) of as many rows as the input x, as (T, B, n)."""
        if self.step:
            return t.unsqueeze(0) if x.dim() == 2 else t[None, None]
        if x.dim() == 2:
            return t.unsqueeze(1)
        return t.transpose(0, 1) if self.batch_first else t

    def rows_back(self, rows: Tensor, x: Tensor) -> Tensor:
        """`rows` undone."""
        if self.step:
            return rows[0] if x.dim() == 2 else rows[0, 0]
        if x.dim() == 2:
            return rows.squeeze(1)
        return rows.transpose(0, 1) if self.batch_first else rows

    def state(self, state: Tensor, x: Tensor) -> Tensor:
        """An initial or final state beside x as (layers*directions, B, n)."""
        if self.step:
            return state.unsqueeze(0) if x.dim() == 2 else state[None, None]
        return state.unsqueeze(1) if x.dim() == 2 else state

    def state_back(self, state: Tensor, x: Tensor) -> Tensor:
        """`state` undone."""
        if self.step:
            return state[0] if x.dim() == 2 else state[0, 0]
        return state.squeeze(1) if x.dim() == 2 else state

    def output_shape(self, x: Tensor, units: int) -> tuple[int, ...]:
        """Of the output beside x, `units` a direction."""
        return (*x.shape[:-1], self.directions * units)

    def state_shape(self, x: Tensor, units: int) -> tuple[int, ...]:
        """Of a final state beside x."""
        if self.step:
            return (*x.shape[:-1], units)
        batch = () if x.dim() == 2 else (x.shape[0 if self.batch_first else 1],)
        return (self.layers * self.directions, *batch, units)


_PLAIN_FORM = (PLAIN, False, 0.0, 0, False)


class Direct(NamedTuple):
    """How the extension runs a plan: what makes tensors of those of a call, and which of them are results."""

    makes: Any  # a Program or a PlannedLayer of the extension
    output: int
    first_state: int
    states: int  # so many, one behind the other


class Plan(Protocol):
    """What is made of a form and of tensors that look like those of calls to come."""

    direct: Direct | None  # None: it runs in Python

    def __call__(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], resets: Sequence[Tensor] = ()
    ) -> tuple[Any, ...]:
        """Output and final states, and with `return_states` all states; without initial `states` they are zero.
        `resets` are `reset` and the states of `reset_to`."""


class KnownCalls:
    """Calls of a form whose plan has been looked up before: one look at their tensors finds it again. The extension has
    a class of this name that does the same in a tenth of the time."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, list[tuple[Callable[..., bool], Plan]]] = {}  # by kind, with what tells tensors

    def __len__(self) -> int:
        return sum(map(len, self._plans.values()))

    def __call__(self, x: Any, states: Any, weights: Sequence[Tensor], resets: Sequence[Any]) -> tuple[Any, ...] | None:
        """The results; None of calls that are not known, or must go the ordinary way."""
        if not _can_be_planned(states):
            return None
        tensors = _in_one_list(x, states, weights, resets)
        for looks_like, plan in self._plans.get(_kind(states, tensors), ()):
            if looks_like(*tensors):
                return plan(x, states or (), weights, resets)
        return None

    def add(
        self,
        plan: Plan,
        direct: Direct | None,
        x: Tensor,
        states: States | None,
        weights: Sequence[Tensor],
        resets: Sequence[Tensor],
    ) -> None:
        """Knows calls like this one from now on; `direct` is for the extension."""
        tensors = _in_one_list(x, states, weights, resets)
        if compat.can_guard(tensors):
            self._plans.setdefault(_kind(states, tensors), []).append((compat.guard(tensors), plan))


def _in_one_list(
    x: Any, states: Sequence[Any] | None, weights: Sequence[Any], resets: Sequence[Any]
) -> tuple[Any, ...]:
    return (x, *weights, *resets) if states is None else (x, *states, *weights, *resets)


def _kind(states: Sequence[Any] | None, tensors: Sequence[Any]) -> Hashable:
    """What a plan depends on beside its form and what the tensors look like."""
    given = -1 if states is None else len(states)
    return given, len(tensors), torch.is_grad_enabled(), torch.get_num_threads()


def _can_be_planned(states: object) -> bool:
    """Whether the call need not go the ordinary way whatever its tensors are."""
    if not compat.is_undisturbed() or not (states is None or type(states) is tuple):
        return False
    # The two ways save different tensors, and checkpoint wants to see the same ones at its second run, which may come
    # when there is a plan that there was not at the first.
    return not (torch.is_grad_enabled() and compat.hooks_saved_tensors())


# What has come by so far. By description: None for once, False where there is no plan to be had.
_plans: dict[Hashable, Plan | Literal[False] | None] = {}
MOST_PLANS = 1024
_known: dict[Hashable, KnownCalls] = {}  # by form
MOST_KNOWN = 16  # of a form: to try more would take longer than to describe a call


def through(
    form: tuple[Any, ...],
    x: Any,
    states: States | None,
    weights: Sequence[Tensor],
    ordinary: Callable[[], tuple[Any, ...]],
    resets: tuple[Any, ...] = (),
) -> tuple[Any, ...]:
    """The results of a call: by its plan once there is one, and until then the `ordinary` way. `form` has the fields of
    a Form. Nothing has been checked yet, except that no compiler is at work."""
    known = _known.get(form)
    results = None if known is None else known(x, states, weights, resets)
    if results is not None:
        return results
    description = _describe(form, x, states, weights, resets) if _can_be_planned(states) else None
    plan = None if description is None else _plans.get(description)
    if plan:
        _know(plan, form, x, states, weights, resets)
        return plan(x, states or (), weights, resets)
    results = ordinary()
    learn(description, form, x, states, weights, resets)
    return results


def _know(
    plan: Plan,
    form: Hashable,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    resets: Sequence[Tensor],
) -> None:
    """Has the plan found by one look from the next call on."""
    from rnnkern import native  # here, since it loads the extension, which is for plans alone

    if form not in _known:
        _known[form] = KnownCalls() if native.calls is None else native.calls.KnownCalls()
    if len(_known[form]) < MOST_KNOWN:
        _known[form].add(plan, plan.direct, x, states, weights, resets)


def _describe(
    form: Hashable, x: Any, states: Sequence[Any] | None, weights: Sequence[Any], resets: Sequence[Any]
) -> Hashable:
    """All that a plan depends on; None where there is none for such tensors."""
    tensors, graded = _in_one_list(x, states, weights, resets), torch.is_grad_enabled()
    description: list[Hashable] = [form, _kind(states, tensors)]
    try:
        for t in tensors:
            if type(t) not in compat.PLAIN_TYPES or not t.is_cpu:
                return None
            description.append((t.shape, t.stride(), t.dtype, t.is_neg(), graded and t.requires_grad))
    except RuntimeError:  # a sparse tensor, which has no strides
        return None
    return tuple(description)


def learn(
    description: Hashable,
    form: tuple[Any, ...],
    x: Any,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    resets: Sequence[Tensor] = (),
) -> None:
    """Takes note of a call that has gone the ordinary way; from the second on there is a plan, if the backend makes
    one."""
    if description is None:
        return
    if len(_plans) >= MOST_PLANS:
        forget()
    if _plans.get(description, False) is None:
        from rnnkern.planned import make_plan  # here, since it needs what this module gives

        _plans[description] = make_plan(Form(*form), x, states or (), weights, resets) or False
    else:
        _plans.setdefault(description, None)


def forget() -> None:
    """Every call is new again."""
    _plans.clear()
    _known.clear()
