"""The short way of a call: one that looks like an earlier one needs no checks and no layout.

What a call is checked for, and how a backend lays it out, depends on its arguments' shapes, strides, dtypes and the
like, never on their numbers or addresses. So when the same description comes by again, a plan that the backend made
for it runs the call: 11 to 15 us of Python instead of 130. Nothing of the weights is kept, and masks are drawn anew at
each call. Whatever is not plain memory in undisturbed eager mode (tracers, subclasses, autocast, torch.func ...) goes
the ordinary way, and so do first calls.
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


class Plan(Protocol):
    """What is made of a form and of tensors that look like those of calls to come."""

    def __call__(
        self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], resets: Sequence[Tensor] = ()
    ) -> tuple[Any, ...]:
        """Output and final states, and with `return_states` all states; without initial `states` they are zero.
        `resets` are `reset` and the states of `reset_to`."""


# What has come by so far. By description: None for once, False where there is no plan to be had.
_plans: dict[Hashable, Plan | Literal[False] | None] = {}
MOST_KNOWN = 1024
# The first plans of each kind of call, with what tells its tensors: quicker than to describe them.
_guarded: dict[Hashable, list[tuple[Callable[..., bool], Plan]]] = {}
MOST_GUARDED = 8


def through(
    form: tuple[Any, ...],
    x: Any,
    states: States | None,
    weights: Sequence[Tensor],
    ordinary: Callable[[], tuple[Any, ...]],
    resets: tuple[Any, ...] = (),
) -> tuple[Any, ...]:
    """The results of a call: by its plan once there is one, and until then the `ordinary` way."""
    plan, description = find(form, x, states, weights, resets)
    if plan is not None:
        return plan(x, states or (), weights, resets)
    results = ordinary()
    learn(description, form, x, states, weights, resets)
    return results


def find(
    form: tuple[Any, ...], x: object, states: object, weights: Sequence[Tensor], resets: tuple[Any, ...] = ()
) -> tuple[Plan | None, Hashable]:
    """The plan of a call, once there is one, or a description for `learn`; neither where the call must go the ordinary
    way. Nothing has been checked yet, except that no compiler is at work. `form` has the fields of a Form."""
    if not compat.is_undisturbed() or not (states is None or type(states) is tuple):
        return None, None
    tensors: tuple[Any, ...] = (x, *weights, *resets) if states is None else (x, *states, *weights, *resets)
    graded = torch.is_grad_enabled()
    # The two ways save different tensors, and checkpoint wants to see the same ones at its second run, which may come
    # when there is a plan that there was not at the first.
    if graded and compat.hooks_saved_tensors():
        return None, None
    given = -1 if states is None else len(states)
    kind = (form, given, len(tensors), graded, torch.get_num_threads())
    guarded = _guarded.get(kind, ())
    for looks_like, plan in guarded:
        if looks_like(*tensors):
            return plan, None
    description = _describe(kind, tensors, graded)
    found = None if description is None else _plans.get(description) or None
    if found is not None and len(guarded) < MOST_GUARDED and compat.can_guard(tensors):
        _guarded.setdefault(kind, []).append((compat.guard(tensors), found))
    return found, description


def _describe(kind: Hashable, tensors: Sequence[Any], graded: bool) -> Hashable:
    """All that a plan depends on; None where there is none for such tensors."""
    description: list[Hashable] = [kind]
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
    if len(_plans) >= MOST_KNOWN:
        forget()
    if _plans.get(description, False) is None:
        from rnnkern.planned import make_plan  # here, since it needs what this module gives

        _plans[description] = make_plan(Form(*form), x, states or (), weights, resets) or False
    else:
        _plans.setdefault(description, None)


def forget() -> None:
    """Every call is new again."""
    _plans.clear()
    _guarded.clear()
