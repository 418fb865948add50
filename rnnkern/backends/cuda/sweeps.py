"""A layer by the sweeps of csrc/: allocates every buffer, forms the products around the sweeps with torch, and passes
addresses, strides and the current stream. Nothing waits for the device.

Forward: gx = x W_ih^T (T, B, D, G*H) by torch, then a sweep that adds the biases, steps through the recurrence and puts
the gates in the place of gx. Backward: a sweep that turns dy into dgx and dgh, the gradients of the two
pre-activations; then by torch dx = dgx W_ih, dW_ih = dgx^T x, dW_hh = dgh^T u, dW_hr = dh_projected^T h, and the sums
for the biases (gradients.py). Where gates are not kept, backward goes in chunks of steps, and has the gates of each
from all its h and c at once (between.py).

The extension is `rnnkern._cuda`, or in tests a build of the same sources that runs on the CPU.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.backends import Cotangents, Layer, Needs, Saved, States, compute_dtype, readable
from rnnkern.backends.cuda import between
from rnnkern.backends.cuda.gradients import Gradients, SweepRows
from rnnkern.backends.cuda.products import precision, product, products
from rnnkern.backends.cuda.rows import (
    NOTHING,
    Chunk,
    Layout,
    Sequences,
    Span,
    address,
    chunks,
    flat,
    layout,
    part,
    reset_layout,
    sequences_of,
    shifted,
    state_layout,
    whole,
)
from rnnkern.reference_cells import normalised


class SweepBackend:
    """A layer's forward and backward on one build of the sweeps."""

    as_given = True

    def __init__(self, extension: ModuleType) -> None:
        self.extension = extension
        self.no_extras = extension.Extras()
        self.tile = "automatic"  # or small, large: for tests
        self.in_sight: Callable[[Tensor], bool] = lambda lengths: lengths.device.type == "cpu"

    def inference_plan(self, *call: object) -> None:
        """There is none: every call is laid out anew."""

    layer_plan = inference_plan

    def _call(self, layer: Layer) -> Any:
        device = layer.x.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return self.extension.Call(layer.cell.name, precision(layer.x.dtype), self.tile, device.index or 0, stream)

    def _extras(self, layer: Layer) -> Any:
        """The sweeps' `Extras`, of tensors that the layer keeps."""
        if layer.plain:
            return self.no_extras
        extras, directions = layer.extras, len(layer.weights)
        names = ("weight_ch", "ln_hh_weight", "ln_hh_bias", "ln_c_weight", "ln_c_bias")
        return self.extension.Extras(
            recurrent_mask=address(extras.recurrent_mask),
            zone_mask_h=layout(extras.zoneout_mask_h, directions),
            zone_mask_c=layout(extras.zoneout_mask_c, directions),
            zoneout_h=extras.zoneout_h,
            zoneout_c=extras.zoneout_c,
            reset=address(extras.reset),
            reset_h=reset_layout(extras.reset_h),
            reset_c=reset_layout(extras.reset_c),
            **{name: [address(getattr(w, name)) for w in layer.weights] for name in names},
        )

    def forward(self, layer: Layer, save: bool) -> States:
        layer, sequences = sequences_of(_prepared(layer), self.in_sight)
        cell, directions, dtype = layer.cell, len(layer.weights), compute_dtype(layer.x.dtype)
        kept = layer.kept if save else 0
        gates = layer.saved_rows(directions, kept * layer.hidden, dtype=dtype) if kept else None
        keeps_c = cell.has_c and (save or layer.extras.states)
        cells = _padded(layer, layer.cell_rows(dtype) if keeps_c else None)
        buffers = _forward_buffers(layer, sequences, _padded(layer, gates), dtype)
        y = layer.rows(directions * layer.outputs)
        h_n = torch.empty_like(layer.h0)
        c = None if layer.c0 is None else layer.c0.to(dtype, copy=True)
        unprojected = layer.h0.new_empty(*layer.h0.shape[:2], layer.hidden) if _projects(layer) else None
        u = _first_u(layer)
        reset_u = torch.empty_like(layer.h0) if cell.resets_before else None
        inner = _inner(layer, dtype)
        self.extension.forward(
            self._call(layer),
            sizes=_sizes(layer, sequences),
            **sequences.addresses(),
            gx=layout(buffers.gx, directions),
            gates=buffers.gates,
            cells=layout(cells, directions),
            y=layout(y, directions),
            weight_hh=[w.weight_hh.data_ptr() for w in layer.weights],
            weight_hr=[address(w.weight_hr) for w in layer.weights],
            bias_ih=[address(w.bias_ih) for w in layer.weights],
            bias_hh=[address(w.bias_hh) for w in layer.weights],
            h0=layer.h0.data_ptr(),
            h_n=h_n.data_ptr(),
            c=address(c),
            unprojected=address(unprojected),
            extras=self._extras(layer),
            gh=buffers.gh,
            u=address(u),
            reset_u=address(reset_u),
            inner=address(inner),
        )
        of_rows = None if cells is None else cells.unflatten(-1, (directions, layer.hidden))
        if of_rows is not None and layer.lengths is not None and not layer.extras.states:
            of_rows = of_rows.flatten(0, 1)
        return States(y, h_n, c, gates, of_rows)

    def backward(self, layer: Layer, saved: Saved, grads: Cotangents, needs: Needs) -> list[Tensor | None]:
        layer, sequences = sequences_of(_prepared(layer), self.in_sight)
        extras, dtype = layer.extras, compute_dtype(layer.x.dtype)
        states = between.States(
            readable(saved.y), _padded(layer, saved.cells), None if layer.c0 is None else layer.c0.to(dtype)
        )
        sweep = _Backward(
            layer=layer,
            sequences=sequences,
            states=states,
            dy=None if grads.y is None else readable(grads.y),
            dcells=None if grads.cells is None else readable(grads.cells.flatten(-2)).to(dtype),
            dh=_start(grads.h_n, layer.h0, dtype),
            dc=None if layer.c0 is None else _start(grads.c_n, layer.c0, dtype),
            direct=None if _projects(layer) and not extras.zones else torch.empty_like(layer.h0, dtype=dtype),
            dreset_h=_zeros(extras.reset_h if needs.reset_h else None, dtype),
            dreset_c=_zeros(extras.reset_c if needs.reset_c else None, dtype),
            weight_hh_t=[w.weight_hh.t().contiguous() for w in layer.weights],
            weight_hr_t=[None if w.weight_hr is None else w.weight_hr.t().contiguous() for w in layer.weights],
        )
        gradients = Gradients(layer, sequences, states, needs.x, needs.weights)
        steps = _sizes(layer, sequences)[0]
        with products.as_in_sweeps(layer.x):
            for chunk in chunks(layer, sequences, math.isqrt(steps - 1) + 1 if extras.recompute else steps):
                if extras.recompute:
                    gates = between.activations(layer, sequences, chunk, states, dtype)
                else:
                    gates = _padded(layer, saved.gates)
                gradients.add(chunk, self._sweep_backward(sweep, chunk, gates), dtype)
        return [
            gradients.dx,
            sweep.dh if needs.h0 else None,
            sweep.dc if needs.c0 else None,
            sweep.dreset_h,
            sweep.dreset_c,
            *gradients.weights(),
        ]

    def _sweep_backward(self, sweep: "_Backward", chunk: Chunk, gates: Tensor | None) -> SweepRows:
        """The launches of a chunk."""
        layer, states, directions = sweep.layer, sweep.states, len(sweep.layer.weights)
        rows = _gradient_rows(layer, chunk, gates)
        dtype = sweep.dh.dtype
        of_gates = chunk.layout(gates, directions)
        gh = NOTHING
        if _normalises(layer):
            raw = _kept(layer) - len(layer.cell.gates)
            gh = shifted(of_gates, raw * layer.hidden, dtype.itemsize)
            if raw == len(layer.cell.gates):  # no activations before it
                of_gates = NOTHING
        of_chunk = {name: chunk.layout(t, directions) for name, t in rows._asdict().items() if name != "gates"}
        arrived = layer.h0.new_empty(_cell_shape(layer), dtype=dtype) if _normalises(layer) else None
        inner = _inner(layer, dtype)
        self.extension.backward(
            self._call(layer),
            sizes=_sizes(layer, sweep.sequences),
            **sweep.sequences.addresses(),
            range=(chunk.begin, chunk.end),
            rows={
                **of_chunk,
                "gates": of_gates,
                "gh": gh,
                "cells": layout(states.cells, directions),
                "y": layout(states.y, directions),
                "dy": layout(sweep.dy, directions),
                "dcells": layout(sweep.dcells, directions),
                "dreset_h": reset_layout(sweep.dreset_h),
                "dreset_c": reset_layout(sweep.dreset_c),
            },
            weight_hh_t=[w.data_ptr() for w in sweep.weight_hh_t],
            weight_hr_t=[address(w) for w in sweep.weight_hr_t],
            h0=layer.h0.data_ptr(),
            c0=address(states.c0),
            dh=sweep.dh.data_ptr(),
            dc=address(sweep.dc),
            direct=address(sweep.direct),
            arrived=address(arrived),
            inner=address(inner),
            extras=self._extras(layer),
        )
        return rows


class _Backward(NamedTuple):
    """What all launches of a backward sweep share (`BackwardSweep` of csrc/sweep.h)."""

    layer: Layer
    sequences: Sequences
    states: between.States
    dy: Tensor | None
    dcells: Tensor | None
    dh: Tensor
    dc: Tensor | None
    direct: Tensor | None
    dreset_h: Tensor | None
    dreset_c: Tensor | None
    weight_hh_t: list[Tensor]
    weight_hr_t: list[Tensor | None]


class _ForwardBuffers(NamedTuple):
    """Where a forward sweep finds gx and leaves gates and gh. The layouts are of tensors in `owners`."""

    gx: Tensor
    gates: Layout
    gh: Layout
    owners: tuple[Tensor | None, ...]


def _forward_buffers(layer: Layer, sequences: Sequences, gates: Tensor | None, dtype: torch.dtype) -> _ForwardBuffers:
    """gx, and the places for what is kept; `gates` (T, B, D*S*H) or (N, D*S*H) are saved, None: nothing is."""
    cell, directions, hidden = layer.cell, len(layer.weights), layer.hidden
    width = len(cell.gates) * hidden
    if not _normalises(layer):  # gates come where gx was, and have at least its columns
        gx = _new_rows(layer, directions * width, dtype) if gates is None else gates
        _input_products(layer, sequences, gx, 0)
        shared = gates is not None or cell.resets_before
        return _ForwardBuffers(gx, layout(gx, directions) if shared else NOTHING, NOTHING, ())
    activated = _kept(layer) * hidden - 2 * width
    raw = _new_rows(layer, directions * width, dtype) if gates is None else gates
    _input_products(layer, sequences, raw, 0 if gates is None else activated)
    gx = _new_rows(layer, directions * width, dtype)
    for d, w in enumerate(layer.weights):
        given = part(raw, d, directions)
        given = given if gates is None else given[..., activated : activated + width]
        weight, bias = (None if t is None else t.to(dtype) for t in (w.ln_ih_weight, w.ln_ih_bias))
        part(gx, d, directions).copy_(normalised(given, weight, bias))
    if gates is not None:
        saved = layout(gates, directions)
        of_gates = saved if activated else NOTHING
        return _ForwardBuffers(gx, of_gates, shifted(saved, activated + width, dtype.itemsize), (gates,))
    lead = layer.h0.shape[:2]
    gh = layer.h0.new_empty(*lead, width, dtype=dtype)
    activations = layer.h0.new_empty(*lead, width, dtype=dtype) if cell.has_c else None
    return _ForwardBuffers(gx, state_layout(activations), state_layout(gh), (gh, activations))


def _gradient_rows(layer: Layer, chunk: Chunk, gates: Tensor | None) -> SweepRows:
    """The buffers of a chunk's gradients; no more of them than the call needs."""
    cell, directions, width = layer.cell, len(layer.weights), len(layer.cell.gates) * layer.hidden

    def new(columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return chunk.rows(layer, directions * columns, dtype)

    norms, projects, real = _normalises(layer), _projects(layer), compute_dtype(layer.x.dtype)
    dgx = new(width, real if norms else None)
    dgh = new(width, real if norms else None) if cell.separate else dgx
    return SweepRows(
        gates=gates,
        dgx=dgx,
        dgh=dgh,
        dproduct=new(width) if norms else dgh,
        h_prev=new(layer.outputs),
        dh_projected=new(layer.outputs) if projects else None,
        unprojected=new(layer.hidden) if projects else None,
        dinner=new(layer.hidden, real) if norms and cell.has_c else None,
    )


def _normalises(layer: Layer) -> bool:
    return layer.weights[0].ln_ih_weight is not None


def _projects(layer: Layer) -> bool:
    return layer.weights[0].weight_hr is not None


def _kept(layer: Layer) -> int:
    """How many blocks of H backward finds of a step, saved or computed anew."""
    return layer.cell.kept(layer.extras.zones, _normalises(layer))


def _cell_shape(layer: Layer) -> tuple[int, int, int]:
    return len(layer.weights), layer.h0.shape[1], layer.hidden


def _inner(layer: Layer, dtype: torch.dtype) -> Tensor | None:
    """Room for v of a step, which LayerNorm of c reads."""
    return layer.h0.new_empty(_cell_shape(layer), dtype=dtype) if _normalises(layer) and layer.cell.has_c else None


def _prepared(layer: Layer) -> Layer:
    """The layer with operands as sweeps read them; x and its mask go into torch's products alone."""
    extras, real = layer.extras, compute_dtype(layer.x.dtype)

    def given(tensor: Tensor | None, change: Callable[[Tensor], Tensor] = whole) -> Tensor | None:
        return None if tensor is None else change(tensor)

    return layer._replace(
        h0=whole(layer.h0),
        c0=given(layer.c0),
        weights=tuple(weights.map(whole) for weights in layer.weights),
        extras=extras._replace(
            recurrent_mask=given(extras.recurrent_mask),
            zoneout_mask_h=given(extras.zoneout_mask_h, readable),
            zoneout_mask_c=given(extras.zoneout_mask_c, readable),
            reset=given(extras.reset),
            reset_h=given(extras.reset_h),
            reset_c=given(extras.reset_c, lambda c: whole(c).to(real)),
        ),
    )


def _first_u(layer: Layer) -> Tensor | None:
    """(2, D, B, P), both halves what a sequence's first step meets; None where that is h. A reset has one direction, in
    which all sequences start at step 0."""
    extras, u = layer.extras, layer.h0
    if extras.recurrent_mask is None and extras.reset is None:
        return None
    if extras.reset is not None:
        given = extras.reset_h
        new = torch.zeros_like(u) if given is None else given if given.dim() == 2 else given[0]
        u = torch.where(extras.reset[0].unsqueeze(1), new, u)
    u = u if extras.recurrent_mask is None else u * extras.recurrent_mask
    return torch.stack([u, u])


def _sizes(layer: Layer, sequences: Sequences) -> tuple[int, int, int, int, int]:
    """T, B, H, P, D."""
    steps = layer.x.shape[0] if sequences.counts is None else len(sequences.counts)
    return steps, layer.h0.shape[1], layer.hidden, layer.outputs, len(layer.weights)


def _new_rows(layer: Layer, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised buffer of rows, also where sequences have ended."""
    return layer._replace(lengths=None, batch_major=layer.batch_major_rows).rows(width, dtype=dtype)


def _padded(layer: Layer, saved: Tensor | None) -> Any:
    """Rows (T, B, D, n), (T*B, D, n) or packed (N, D, n) as (T, B, D*n) or (N, D*n)."""
    if saved is None:
        return None
    rows = readable(saved.flatten(-2))
    return rows.unflatten(0, tuple(layer.x.shape[:2])) if layer.lengths is not None and rows.dim() == 2 else rows


def _start(state: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A carried gradient as it starts: a copy in `dtype`, zeros for None."""
    if state is None:
        return torch.zeros_like(like, dtype=dtype)
    return state.resolve_neg().to(dtype, copy=True).contiguous()


def _zeros(like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if like is None else torch.zeros_like(like, dtype=dtype)


def _input_products(layer: Layer, sequences: Sequences, rows: Tensor, first: int) -> None:
    """x W_ih^T in columns `first` to first + G*H of each direction's rows."""
    directions, matrix = len(layer.weights), flat(layer, rows)
    masked = layer.extras.input_mask is not None or (_normalises(layer) and layer.lengths is not None)
    everything = Span(0, len(layer.x))
    with products.as_in_sweeps(layer.x):
        for d, weights in enumerate(layer.weights):
            x = between.Rows(layer, sequences, d, everything).x() if masked else layer.x
            columns = part(matrix, d, directions)[:, first : first + weights.weight_ih.shape[0]]
            product(flat(layer, x), weights.weight_ih.t(), out=columns)
