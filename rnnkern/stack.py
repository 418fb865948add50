"""A stack of layers, as the functions and the modules call it.

Layers x directions, dropout of every kind, packed and padded sequences, resets, batch_first, unbatched input and
autocast are settled here: below, `rnnkern.autograd.apply_layer` sees one layer, time first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnnkern import checks, masks, shortcut, views
from rnnkern.autograd import LayerResults, apply_layer
from rnnkern.backends import backend_names
from rnnkern.cells import CELLS, CellSpec, Weights, named_weights
from rnnkern.compat import autocast_dtype, in_jit_trace
from rnnkern.layer import Operands, Settings
from rnnkern.options import PLAIN, Options, cell_name
from rnnkern.views import States

LayerWeights = Sequence[Sequence[Tensor]]


class Call(NamedTuple):
    """How a layer or stack of layers is called, apart from its input, states and weights."""

    bidirectional: bool
    batch_first: bool
    dropout: float
    training: bool
    backend: str
    options: Options = PLAIN
    lengths: Tensor | None = None  # (B,)
    reset: Tensor | None = None  # (T, B), (B, T) with batch_first, (T,) unbatched
    reset_to: States | None = None  # (L, 1, n), (L, B, n) or (T, L, B, n); unbatched without B
    return_states: bool = False


class Outcome(NamedTuple):
    """What a stack gives."""

    output: Any
    finals: States  # (layers*directions, B, n)
    states: States  # (T, layers*directions, B, n) with `Call.return_states`, else empty


class _Stack(NamedTuple):
    """What the layers of a call have in common."""

    cell: CellSpec
    who: str  # for messages
    weights: Sequence[Weights]  # layers x directions
    call: Call  # batch_first where the input is padded; reset (T, B), reset_to (L, B, n) or (T, L, B, n)

    @property
    def directions(self) -> int:
        return 2 if self.call.bidirectional else 1

    @property
    def units(self) -> tuple[int, ...]:
        """Of each state."""
        rows, outputs = self.weights[0].weight_hh.shape
        return (outputs, rows // len(self.cell.gates))[: self.cell.states]

    def settings(self) -> Settings:
        """What its layer calls are."""
        call, options = self.call, self.call.options
        zone_h, zone_c = options.shares(self.cell, call.training)
        return Settings(
            self.cell.name,
            call.backend,
            call.batch_first,
            options.peephole,
            options.layer_norm,
            zone_h,
            zone_c,
            options.recompute,
            states=call.return_states and self.cell.has_c,
        )


def _in_autocast(stack: _Stack, input: Tensor, hx: States | None) -> tuple[_Stack, Tensor, States | None]:
    """Everything in the autocast dtype where autocast is on, float64 excepted as in torch."""
    dtype = autocast_dtype(input.device.type)
    if dtype is None:
        return stack, input, hx

    def cast(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t

    def cast_all(states: Any) -> Any:  # what is no tuple is for the checks to refuse
        return tuple(map(cast, states)) if isinstance(states, tuple | list) else states

    call = stack.call._replace(reset_to=cast_all(stack.call.reset_to))
    stack = stack._replace(weights=[w.map(cast) for w in stack.weights], call=call)
    return stack, cast(input), cast_all(hx)


def _operands(stack: _Stack, layer: int, x: Tensor, hx: States, batch_sizes: Tensor | None) -> Operands:
    """Those of one layer, masks drawn; x (T, B, n) or packed rows."""
    call, cell, count = stack.call, stack.cell, stack.directions
    part = slice(layer * count, (layer + 1) * count)
    weights = stack.weights[part]
    drawn = masks.Masks()
    if call.training and call.options != PLAIN:
        drawn = masks.draw(masks.wanted(cell, call.options, x, hx[0].shape[1], weights), x)
        weights = masks.drop_weights(weights, drawn)
    return Operands(
        call.lengths,
        batch_sizes,
        drawn.input,
        drawn.recurrent,
        drawn.zoneout_h,
        drawn.zoneout_c,
        call.reset,
        x,
        hx[0][part],
        hx[1][part] if cell.has_c else None,
        *views.reset_states_of(call.reset_to, layer),
        tuple(t for w in weights for t in w.present()),
    )


def _layers(
    stack: _Stack, x: Tensor, hx: States, batch_sizes: Tensor | None
) -> tuple[Tensor, States, list[LayerResults]]:
    """x (T, B, I) or packed rows through all layers: output, states (layers*directions, B, units), and with
    `return_states` what each layer gave."""
    settings, call = stack.settings(), stack.call
    finals: list[States] = []
    kept: list[LayerResults] = []
    for layer in range(len(stack.weights) // stack.directions):
        if layer and call.dropout and call.training:
            x = masks.drop_between(call.dropout, x, call.batch_first)
        results = apply_layer(settings, _operands(stack, layer, x, hx, batch_sizes))
        x = results.y
        finals.append((results.h_n,) if results.c_n is None else (results.h_n, results.c_n))
        if call.return_states:
            kept.append(results)
    if len(finals) == 1:
        return x, finals[0], kept
    return x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True)), kept


def _initial(stack: _Stack, x: Tensor, hx: States | None, batch: int) -> States:
    """The states given, checked, or zeros."""
    shapes = [(len(stack.weights), batch, units) for units in stack.units]
    if hx is None:
        return tuple(x.new_zeros(shape) for shape in shapes)
    checks.states(hx, shapes, x, stack.who)
    return hx


def _all_states(stack: _Stack, layers: list[LayerResults], packed: PackedSequence | None) -> States:
    """Every state of every step, (T, layers*directions, B, n), from what the layers gave; sequences of packed rows in
    the order of hx."""

    def padded(rows: Tensor) -> Tensor:
        return rows if packed is None else pad_packed_sequence(packed._replace(data=rows))[0]

    cells = [padded(results.cells) for results in layers if results.cells is not None]
    return views.all_states(stack.directions, [padded(results.y) for results in layers], cells)


def _run_packed(stack: _Stack, input: PackedSequence, hx: States | None) -> Outcome:
    call, who = stack.call._replace(batch_first=False), stack.who
    checks.no_lengths(call.lengths, "a PackedSequence has its own")
    checks.no_reset(call.reset, call.reset_to, "a PackedSequence has no place for it; pad the input, give lengths")
    checks.packed(input, who)
    data, batch_sizes, sorted_indices, unsorted_indices = input
    stack, data, hx = _in_autocast(stack._replace(call=call), data, hx)
    checks.input_kind(data, stack.weights[0].weight_ih, who)
    states = _initial(stack, data, hx, int(batch_sizes[0]))
    if hx is not None and sorted_indices is not None:
        states = tuple(s.index_select(1, sorted_indices) for s in states)
    y, states, layers = _layers(stack, data, states, batch_sizes)
    if unsorted_indices is not None:
        states = tuple(s.index_select(1, unsorted_indices) for s in states)
    output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
    return Outcome(output, states, _all_states(stack, layers, output) if layers else ())


def _with_resets(stack: _Stack, input: Tensor, x: Tensor, unbatched: bool) -> _Stack:
    """Resets checked, time first and with a batch: of `input` as it came, and x (T, B, I)."""
    call, (steps, batch) = stack.call, x.shape[:2]
    if call.reset is None:
        return stack
    checks.reset(call.reset, tuple(input.shape[:-1]), call.bidirectional, input, stack.who)
    reset, reset_to = views.reset_rows(call.reset, call.batch_first, unbatched), call.reset_to
    if reset_to is not None:
        expected = checks.ResetStates(steps, len(stack.weights), () if unbatched else (batch,), stack.units)
        checks.reset_to(reset_to, expected, input, stack.who)
        reset_to = views.reset_states(reset_to, batch, unbatched)
    return stack._replace(call=call._replace(reset=reset, reset_to=reset_to))


def _run_padded(stack: _Stack, input: Tensor, hx: States | None) -> Outcome:
    checks.reset_to_alone(stack.call.reset, stack.call.reset_to)
    checks.tensors_of_states("reset_to", stack.call.reset_to, stack.cell.states, stack.who)
    checks.input_rank(input, (2, 3), stack.who)
    call, unbatched = stack.call, input.dim() == 2
    lengths, batch_dim = call.lengths, 0 if call.batch_first else 1
    if unbatched:
        checks.no_lengths(lengths, "an unbatched input (T, I) is one sequence of its own length T")
        if hx is not None:
            checks.states_rank(hx, 2, stack.who)
            hx = tuple(s.unsqueeze(1) for s in hx)
    stack, input, hx = _in_autocast(stack, input, hx)
    checks.input_kind(input, stack.weights[0].weight_ih, stack.who)
    x = input.unsqueeze(batch_dim) if unbatched else input
    x = x.transpose(0, 1) if call.batch_first else x
    if lengths is not None:
        stack = stack._replace(call=stack.call._replace(lengths=checks.lengths(lengths, x.shape[1])))
    states = _initial(stack, x, hx, x.shape[1])
    y, finals, layers = _layers(_with_resets(stack, input, x, unbatched), x, states, None)
    y = y.transpose(0, 1) if call.batch_first else y
    every = _all_states(stack, layers, None) if layers else ()
    if unbatched:
        return Outcome(y.squeeze(batch_dim), tuple(s.squeeze(1) for s in finals), tuple(s.squeeze(2) for s in every))
    return Outcome(y, finals, every)


def one_state(hx: Tensor | None) -> States | None:
    """The hx of a cell without c, in the form of all cells."""
    return None if hx is None else (hx,)


def run(
    cell: str, who: str, input: Tensor | PackedSequence, hx: States | None, weights: LayerWeights, call: Call
) -> tuple[Any, ...]:
    """What every cell's function and module does: output, final states, and with `return_states` all states. States are
    tuples here whatever the cell; weights, lists of tensors for each layer and direction."""
    if call.options is not PLAIN:
        graded = torch.is_grad_enabled() or in_jit_trace()  # a trace is of both kinds of calls
        call = call._replace(options=call.options.at_work(call.training, graded))
    resets = _resets(call)
    if resets is None or call.lengths is not None or torch.compiler.is_compiling():
        return ordinary(cell, who, input, hx, weights, call)
    form = _form(cell, weights, call, len(resets))
    flat = weights[0] if len(weights) == 1 else [weight for layer in weights for weight in layer]
    return shortcut.through(form, input, hx, flat, lambda: ordinary(cell, who, input, hx, weights, call), resets)


def _resets(call: Call) -> tuple[Any, ...] | None:
    """`reset` and the states of `reset_to`; None where they are not what they have to be."""
    if call.reset is None:
        return () if call.reset_to is None else None
    if call.reset_to is None:
        return (call.reset,)
    return (call.reset, *call.reset_to) if type(call.reset_to) is tuple else None


def _form(cell: str, weights: LayerWeights, call: Call, resets: int) -> tuple[Any, ...]:
    """The fields of a `shortcut.Form`; of a call without options only the first."""
    directions, options = 2 if call.bidirectional else 1, call.options
    layers = len(weights) // directions
    dropout = call.dropout if call.training and layers > 1 else 0.0
    if options is PLAIN and not (dropout or resets or call.return_states):
        return cell, call.backend, layers, directions, call.batch_first, False
    kind = (cell_name(cell, options), call.backend, layers, directions, call.batch_first, False)
    return *kind, options, call.training, dropout, resets, call.return_states


def ordinary(
    cell: str, who: str, input: Tensor | PackedSequence, hx: States | None, weights: LayerWeights, call: Call
) -> tuple[Any, ...]:
    """A call with all its checks."""
    checks.backend_name(call.backend, backend_names())
    spec, options = CELLS[cell_name(cell, call.options)], call.options
    named = [named_weights(spec, flat, options.peephole, options.layer_norm) for flat in weights]
    stack = _Stack(spec, who, named, call)
    outcome = _run_packed(stack, input, hx) if isinstance(input, PackedSequence) else _run_padded(stack, input, hx)
    return outcome if call.return_states else outcome[:2]
