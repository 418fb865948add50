"""Resets and what they reset to, and all states of all steps as a result."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from tests.option_layers import OPTION_BACKENDS
from tests.option_modules import H, I, assert_same, flat, gradients, make, option_cases, random, start

T, B, L = 7, 4, 2
SINGLE = option_cases(1)
every_backend = pytest.mark.parametrize("backend", OPTION_BACKENDS)
every_kind = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
every_option = pytest.mark.parametrize("name", SINGLE)
every_form = pytest.mark.parametrize("form", ["zeros", "one", "each", "steps"])


def some_resets() -> Tensor:
    """At the first step, at the last, two in a row, none."""
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[[0, 3, 4], 0] = reset[[0], 1] = reset[[2, T - 1], 2] = True
    return reset


def reset_states(kind: str, form: str, units: tuple[int, int] = (H, H)) -> Any:
    """What is reset to, in each of the forms that there are."""
    shapes = {"one": (L, 1), "each": (L, B), "steps": (T, L, B)}
    return None if form == "zeros" else start(kind, *shapes[form], units=units)


def at(states: Any, form: str, t: int, b: int) -> Any:
    """The states (L, n) that sequence b is reset to before step t."""
    index: Any = {"one": (slice(None), 0), "each": (slice(None), b), "steps": (t, slice(None), b)}[form]
    return tuple(s[index] for s in states) if isinstance(states, tuple) else states[index]


def episodes(module: Any, x: Tensor, hx: Any, reset: Tensor, reset_to: Any, form: str) -> tuple[Tensor, list[Any]]:
    """Every episode of every sequence run by itself: outputs (T, B, n), and the last states of each sequence."""
    columns, finals = [], []
    for b in range(x.shape[1]):
        first = tuple(s[:, b] for s in hx) if isinstance(hx, tuple) else hx[:, b]
        cuts = [0, *(t for t in range(len(x)) if reset[t, b] and t), len(x)]
        parts, states = [], first
        for begin, end in pairwise(cuts):
            if reset[begin, b]:
                states = None if reset_to is None else at(reset_to, form, begin, b)
            y, states = module(x[begin:end, b], states)
            parts.append(y)
        columns.append(torch.cat(parts))
        finals.append(states)
    return torch.stack(columns, 1), finals


@every_backend
@every_form
@every_option
def test_a_reset_begins_an_episode_of_its_own(name: str, form: str, backend: str) -> None:
    """Values and gradients, of x, of hx, of what is reset to, and of the weights."""
    kind, arguments = SINGLE[name]
    module = make(kind, backend, num_layers=L, **arguments).eval()
    units = (module.proj_size or H, H)
    x, hx, reset = random(T, B, I).requires_grad_(), start(kind, L, B, units=units), some_resets()
    reset_to = reset_states(kind, form, units)
    states = flat(hx) + (flat(reset_to) if reset_to is not None else [])
    leaves = [x, *(s.requires_grad_() for s in states), *module.parameters()]
    y, finals = module(x, hx, reset=reset, reset_to=reset_to)
    expected, alone = episodes(module, x, hx, reset, reset_to, form)
    assert_same(y, expected)
    last = [torch.stack(parts, 1) for parts in zip(*(flat(f) for f in alone), strict=True)]
    assert_same(flat(finals), last)
    assert_same(gradients((y, finals), leaves), gradients((expected, last), leaves))


@every_backend
@every_kind
def test_gradients_stop_at_the_border(kind: str, backend: str) -> None:
    module, x = make(kind, backend), random(T, B, I).requires_grad_()
    hx, reset_to = start(kind, 1, B), start(kind, 1, 1, units=(H, H))
    leaves = [s.requires_grad_() for s in (*flat(hx), *flat(reset_to))]
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, :2] = True
    y, _ = module(x, hx, reset=reset, reset_to=reset_to)
    of_x, *of_states = torch.autograd.grad(y[3:].sum(), [x, *leaves])
    assert not of_x[:3, :2].any()
    assert of_x[:3, 2:].all()
    for of_start in of_states[: len(of_states) // 2]:
        assert not of_start[:, :2].any()
        assert of_start[:, 2:].all()
    assert all(of_reset.all() for of_reset in of_states[len(of_states) // 2 :])


@every_backend
@every_option
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_of_the_old_state_passes(name: str, bad: float, backend: str) -> None:
    """Neither a value nor a gradient, however broken it is."""
    kind, arguments = SINGLE[name]
    module = make(kind, backend, **arguments)
    x, hx = random(T, B, I), start(kind, 1, B, units=(module.proj_size or H, H))
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 0] = reset[3] = True
    for s in flat(hx):
        s[:, 0] = bad
    leaves = [x.requires_grad_(), *(s.requires_grad_() for s in flat(hx)), *module.parameters()]
    y, finals = module(x, hx, reset=reset)
    found = gradients((y[3:], finals), leaves)
    assert all(s.isfinite().all() for s in (y, *flat(finals), *found))
    assert not any(s.any() for s in (found[0][:3], *found[1 : 1 + len(flat(hx))]))


@every_backend
@every_option
def test_an_episode_does_not_see_what_broke_in_the_one_before(name: str, backend: str) -> None:
    kind, arguments = SINGLE[name]
    module, x = make(kind, backend, **arguments), random(T, B, I)
    x[2, 1] = float("nan")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    y, finals = module(x.requires_grad_(), reset=reset)
    assert all(s.isfinite().all() for s in (y[3:], *flat(finals)))
    (of_x,) = gradients((y[3:], finals), [x])
    assert of_x[3:].isfinite().all()
    assert not of_x[:3, [0, 2, 3]].any()


@every_backend
@every_form
@every_kind
@pytest.mark.parametrize("how", ["batch_first", "unbatched", "unbatched, batch_first", "lengths", "strides"])
def test_forms_of_a_call(kind: str, form: str, how: str, backend: str) -> None:
    module = make(kind, backend, num_layers=L)
    x, hx, reset, reset_to = random(T, B, I), start(kind, L, B), some_resets(), reset_states(kind, form)
    y, finals = module(x, hx, reset=reset, reset_to=reset_to)
    if how == "batch_first":
        module.batch_first = True
        other, others = module(x.transpose(0, 1), hx, reset=reset.t(), reset_to=reset_to)
        assert_same((other.transpose(0, 1), others), (y, finals))
        other, others = module(x.transpose(0, 1).contiguous(), hx, reset=reset.t().contiguous(), reset_to=reset_to)
        assert_same((other.transpose(0, 1), others), (y, finals))
    elif how.startswith("unbatched"):
        module.batch_first = "batch_first" in how
        first = tuple(s[:, 0] for s in flat(hx))
        own: Any = None if form == "zeros" else tuple(s[..., 0, :] for s in flat(reset_to))
        hx, own = (first, own) if kind == "LSTM" else (first[0], own and own[0])
        other, others = module(x[:, 0], hx, reset=reset[:, 0], reset_to=own)
        assert_same((other, flat(others)), (y[:, 0], [s[:, 0] for s in flat(finals)]))
    elif how == "lengths":
        lengths = torch.tensor([T, 2, T - 1, 4])
        reset[4:, 3] = True  # at the end and past it
        other, others = module(x, hx, lengths=lengths, reset=reset, reset_to=reset_to)
        for b, length in enumerate(lengths.tolist()):
            mine = None if form == "zeros" else [s[: length if form == "steps" else None] for s in flat(reset_to)]
            mine = mine and [s if form == "one" else s[..., b : b + 1, :] for s in mine]
            given = None if mine is None else tuple(mine) if kind == "LSTM" else mine[0]
            own_hx = [s[:, b : b + 1] for s in flat(hx)]
            alone, last = module(
                x[:length, b : b + 1],
                tuple(own_hx) if kind == "LSTM" else own_hx[0],
                reset=reset[:length, b : b + 1],
                reset_to=given,
            )
            assert_same(other[:length, b], alone[:, 0])
            assert not other[length:, b].any()
            assert_same([s[:, b] for s in flat(others)], [s[:, 0] for s in flat(last)])
    else:
        wide = torch.zeros(T, B, 2, dtype=torch.bool)
        wide[..., 0] = reset
        strange = (
            None if form == "zeros" else [s.transpose(0, -1).contiguous().transpose(0, -1) for s in flat(reset_to)]
        )
        given = None if strange is None else tuple(strange) if kind == "LSTM" else strange[0]
        assert_same(module(x, hx, reset=wide[..., 0], reset_to=given), (y, finals))


@every_backend
@every_kind
def test_a_replay_buffer_starts_where_the_actor_was(kind: str, backend: str) -> None:
    """What `return_states` gives goes in as `reset_to`: with every step reset to the states before it, all is as
    without resets."""
    module, x, hx = make(kind, backend, num_layers=L), random(T, B, I), start(kind, L, B)
    function = getattr(rnnkern.functional, kind.lower())
    y, finals, states = function(x, hx, module.all_weights, return_states=True, backend=backend)
    before = [torch.cat([first[None], every[:-1]]) for first, every in zip(flat(hx), flat(states), strict=True)]
    given = tuple(before) if kind == "LSTM" else before[0]
    everywhere = torch.ones(T, B, dtype=torch.bool)
    assert_same(module(x, None, reset=everywhere, reset_to=given), (y, finals))


@every_backend
@every_option
@pytest.mark.parametrize("how", ["padded", "lengths", "packed", "unbatched", "batch_first"])
def test_all_states(name: str, how: str, backend: str) -> None:
    """h and c of each step are the final states of the sequence up to there, with gradients."""
    kind, arguments = SINGLE[name]
    module = make(kind, backend, num_layers=L, bidirectional=False, **arguments).eval()
    arguments = {k: v for k, v in arguments.items() if k != "proj_size"}
    units, lengths = (module.proj_size or H, H), torch.tensor([3, T, 1, 5])
    x, hx = random(T, B, I).requires_grad_(), start(kind, L, B, units=units)
    leaves = [x, *(s.requires_grad_() for s in flat(hx)), *module.parameters()]
    alive = torch.arange(T)[:, None] < (lengths if how in ("lengths", "packed") else torch.full((B,), T))
    given: dict[str, Any] = {"lengths": lengths} if how == "lengths" else {"batch_first": how == "batch_first"}
    rows: Any = x.transpose(0, 1) if how == "batch_first" else x
    rows = pack_padded_sequence(x, lengths, enforce_sorted=False) if how == "packed" else rows
    start_from = hx
    if how == "unbatched":
        rows, alive = x[:, 1], alive[:, 1]
        start_from = tuple(s[:, 1] for s in flat(hx)) if kind == "LSTM" else hx[:, 1]
    function = getattr(rnnkern.functional, kind.lower())
    call = (rows, start_from, module.all_weights)
    output, finals, states = function(*call, return_states=True, backend=backend, **given, **arguments)
    plain = function(*call, backend=backend, **given, **arguments)
    assert_same(
        [output.data if how == "packed" else output, finals], [plain[0].data if how == "packed" else plain[0], plain[1]]
    )
    expected = [module(x[: t + 1], hx)[1] for t in range(T)]
    stacked = [torch.stack(parts) for parts in zip(*(flat(e) for e in expected), strict=True)]
    if how == "unbatched":
        stacked = [s[:, :, 1] for s in stacked]
    mask = alive[(slice(None), None, ..., None)]
    wanted = [s * mask for s in stacked]
    assert_same(states, wanted)
    assert all(s.is_contiguous() for s in flat(states))
    assert_same(gradients(states, leaves), gradients(wanted, leaves))


@every_backend
@every_kind
def test_all_states_of_both_directions(kind: str, backend: str) -> None:
    module, x = make(kind, backend, num_layers=L, bidirectional=True), random(T, B, I)
    function = getattr(rnnkern.functional, kind.lower())
    y, finals, states = function(x, None, module.all_weights, bidirectional=True, return_states=True, backend=backend)
    assert [s.shape for s in flat(states)] == [(T, 2 * L, B, H)] * len(flat(states))
    h = flat(states)[0]
    assert_same(y, torch.cat([h[:, -2], h[:, -1]], -1))
    for every, final in zip(flat(states), flat(finals), strict=True):
        assert_same([every[-1, ::2], every[0, 1::2]], [final[::2], final[1::2]])


@every_backend
def test_states_are_those_before_dropout_between_layers(backend: str) -> None:
    module, x = make("LSTM", backend, num_layers=L), random(T, B, I)
    *_, states = rnnkern.functional.lstm(
        x, None, module.all_weights, dropout=0.9, training=True, return_states=True, backend=backend
    )
    *_, without = rnnkern.functional.lstm(x, None, module.all_weights, return_states=True, backend=backend)
    assert_same([s[:, 0] for s in states], [s[:, 0] for s in without])
    assert states[0][:, 0].all()


class Recall(nn.Module):
    """Says at every step what it saw at the first step of the episode, from a learned initial state."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.lstm = rnnkern.LSTM(1, 12, backend=backend)
        self.start = nn.Parameter(torch.zeros(1, 1, 12))
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor, reset: Tensor | None) -> Tensor:
        given = None if reset is None else (self.start, self.start)
        answer: Tensor = self.head(self.lstm(x, reset=reset, reset_to=given)[0])
        return answer.squeeze(-1)


@every_backend
def test_learns_what_only_resets_tell(backend: str) -> None:
    """Steps are plus or minus one at random, and nothing but the reset tells where an episode begins."""

    def stream() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randint(2, (12, 32)).float() * 2 - 1
        reset = torch.rand(12, 32) < 0.25
        reset[0] = True
        begin = torch.where(reset, torch.arange(12)[:, None], 0).cummax(0).values
        return x, reset, x.gather(0, begin)

    def accuracy(with_resets: bool) -> float:
        torch.manual_seed(2)
        model = Recall(backend)
        adam = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(100):
            x, reset, wanted = stream()
            loss = nn.functional.soft_margin_loss(model(x[..., None], reset if with_resets else None), wanted)
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            x, reset, wanted = stream()
            found = model(x[..., None], reset if with_resets else None)
        return float(((found > 0) == (wanted > 0)).float().mean())

    assert accuracy(with_resets=True) > 0.97
    assert accuracy(with_resets=False) < 0.85
