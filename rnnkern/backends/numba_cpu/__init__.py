"""The CPU backend: packs the weights of a call, lays out its buffers, and runs the compiled sweeps over shares of the
batch."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from rnnkern.backends import Gradients, Layer, Saved, States
from rnnkern.backends.numba_cpu import jit, pool
from rnnkern.backends.numba_cpu.kernels import KERNELS, Weight, pack
from rnnkern.backends.numba_cpu.sweep import Backward, Forward, Rows
from rnnkern.backends.numba_cpu.tile import MAX_ROWS, MAX_VECTORS
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES
from rnnkern.cells import Weights

_log = logging.getLogger("rnnkern")

NONE = Rows(0, 0, 0)
SLOW_COMPILE_SECONDS = 2.0
# A task under this many multiply-adds ends before another thread has woken up.
WORTH_A_THREAD = 500_000

_compiled: set[tuple[Any, type]] = set()
_compile_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a fork waits for a compilation under way: its child would inherit the lock held
    os.register_at_fork(
        before=_compile_lock.acquire, after_in_parent=_compile_lock.release, after_in_child=_compile_lock.release
    )


def _ready(kernel: Any, *arguments: Any) -> Callable[..., None]:
    """The kernel, compiled for these arguments or loaded from the cache; a long compilation is told."""
    key = (kernel, type(arguments[-1]))
    if key not in _compiled:
        with _compile_lock:
            start = time.perf_counter()
            jit.compile_kernel(kernel, tuple(numba.typeof(argument) for argument in arguments))
            seconds = time.perf_counter() - start
        if seconds > SLOW_COMPILE_SECONDS:
            kept = f"kept in {jit.CACHE_FOLDER}" if jit.CACHE_FOLDER else "not kept: no cache folder is writable"
            name = kernel.py_func.__name__
            _log.warning("rnnkern: compiled %s for %s in %.1f s, once; %s", name, key[1].__name__, seconds, kept)
        _compiled.add(key)
    return kernel  # type: ignore[no-any-return]


def _zero(tensor: Tensor) -> Any:
    """The scalar that tells a kernel its dtype."""
    return np.float64(0) if tensor.dtype == torch.float64 else np.float32(0)


class _Call:
    """The buffers of one call: sizes in vectors, the rows of tensors, and the tensors that must outlive the sweeps."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.zero = _zero(layer.x)
        self.item = layer.x.element_size()
        self.lanes = VECTOR_BYTES // self.item
        self.directions = len(layer.weights)
        self.batch = layer.h0.shape[1]
        self.alive: list[Tensor] = []
        if layer.batch_sizes is None:
            steps = layer.x.shape[0]
            self.counts = np.full(steps, self.batch, np.int64)
            self.starts = np.zeros(steps, np.int64)
        else:
            self.counts = np.ascontiguousarray(layer.batch_sizes.numpy())
            self.starts = np.concatenate(([0], np.cumsum(self.counts)[:-1])).astype(np.int64)

    def rows(self, tensor: Tensor | None) -> Rows:
        """Of (T, B, n), of packed (N, n) or of states (B, n); a row's numbers must be adjacent."""
        if tensor is None:
            return NONE
        tensor = tensor.resolve_neg()
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        step = tensor.stride(0) if tensor.dim() == 3 else 0
        return Rows(tensor.data_ptr(), step * self.item, tensor.stride(-2) * self.item)

    def padded(self, units: int) -> int:
        """`units` rounded up to whole vectors."""
        return -(-units // self.lanes) * self.lanes

    def workspace(self, units: int, buffers: int = 1) -> Rows:
        """(buffers, B, units rounded up) numbers, as rows whose step goes from one buffer to the next."""
        return self.rows(self.layer.x.new_empty(buffers, self.batch, self.padded(units)))

    def packed(self, matrix: Tensor, gates: int, per_panel: int = MAX_VECTORS) -> int:
        """The address of `matrix` (gates*units, depth), packed into panels."""
        matrix = matrix.resolve_neg()
        units, depth = matrix.shape[0] // gates, matrix.shape[1]
        target = self.layer.x.new_empty(gates * self.padded(units) * depth)
        self.alive += [matrix, target]
        unit_stride, k_stride = (stride * self.item for stride in matrix.stride())
        weight = Weight(matrix.data_ptr(), units * unit_stride, unit_stride, k_stride, gates, units, depth)
        arguments = (weight, per_panel, target.data_ptr(), self.zero)
        _ready(pack, *arguments)(*arguments)
        return target.data_ptr()

    def shares(self, multiply_adds_per_row: int) -> Iterator[tuple[int, int, int]]:
        """(direction, first, last): the rows of each task, as many real steps in one as in another."""
        threads = torch.get_num_threads()
        steps_of_row = (
            (self.counts[:, None] > np.arange(self.batch)).sum(0) if self.layer.batch_sizes is not None else None
        )
        total = int(self.counts.sum())
        worth = max(1, total * multiply_adds_per_row * self.directions // WORTH_A_THREAD)
        parts = max(1, min(-(-min(threads, worth) // self.directions), self.batch))
        if steps_of_row is None:
            edges = [self.batch * part // parts for part in range(parts + 1)]
        else:
            done = np.cumsum(steps_of_row)
            edges = [0, *(int(np.searchsorted(done, total * part / parts)) for part in range(1, parts)), self.batch]
        for direction in range(self.directions):
            for first, last in pairwise(edges):
                if first < last:
                    yield direction, first, last

    def run(self, kernel: Any, arguments: list[Any], scratch_vectors: int, multiply_adds_per_row: int) -> None:
        """Runs `kernel` for each share, with a scratch of its own where it takes one."""
        tasks = []
        for direction, first, last in self.shares(multiply_adds_per_row):
            operands = [arguments[direction], first, last]
            if scratch_vectors:
                scratch = self.layer.x.new_empty(scratch_vectors * self.lanes)
                self.alive.append(scratch)
                operands.append(scratch.data_ptr())
            operands.append(self.zero)
            tasks.append(partial(self._run_share, _ready(kernel, *operands), operands))
        if torch.get_num_threads() == 1:
            for task in tasks:
                task()
        else:
            pool.run(tasks)

    def _run_share(self, kernel: Callable[..., None], operands: list[Any]) -> None:
        """A task. It holds this object, and so the buffers, even if the caller is interrupted while it runs."""
        kernel(*operands)


def _direction(tensor: Tensor | None, d: int, width: int | None = None) -> Tensor | None:
    """The part of direction d: of (..., D, n), or of (..., D*width)."""
    if tensor is None:
        return None
    return tensor.select(-2, d) if width is None else tensor.narrow(-1, d * width, width)


def _state(tensor: Tensor | None, d: int) -> Tensor | None:
    return None if tensor is None else tensor[d]


def _biases(weights: Weights, separate: bool) -> tuple[Tensor, Tensor | None]:
    """The bias that the input product starts from, and the one for the recurrent product where the cell keeps them
    apart."""
    if weights.bias_ih is None or weights.bias_hh is None:
        zeros = weights.weight_ih.new_zeros(weights.weight_ih.shape[0])
        return zeros, zeros if separate else None
    if separate:
        return weights.bias_ih, weights.bias_hh
    return weights.bias_ih + weights.bias_hh, None


def forward(layer: Layer, save: bool) -> States:
    cell, hidden, outputs = layer.cell, layer.hidden, layer.outputs
    call, gates = _Call(layer), len(layer.cell.gates)
    per_panel = MAX_VECTORS // gates
    keep = save and bool(cell.saved)
    y = layer.rows(call.directions * outputs)
    h_n = torch.empty_like(layer.h0, memory_format=torch.contiguous_format)
    c_n = None if layer.c0 is None else torch.empty_like(layer.c0, memory_format=torch.contiguous_format)
    states = States(
        y,
        h_n,
        c_n,
        layer.rows(call.directions, len(cell.saved) * hidden) if keep else None,
        layer.rows(call.directions, hidden) if keep and cell.has_c else None,
    )
    x = call.rows(layer.x)  # once: it may have to be copied
    arguments = []
    for d, weights in enumerate(layer.weights):
        b_x, b_h = _biases(weights, cell.separate)
        projected = weights.weight_hr is not None
        arguments.append(
            Forward(
                steps=len(call.counts),
                reverse=d,
                inputs=layer.x.shape[-1],
                hidden=hidden,
                outputs=outputs,
                starts=call.starts.ctypes.data,
                counts=call.counts.ctypes.data,
                x=x,
                y=call.rows(_direction(y, d, outputs)),
                gates=call.rows(_direction(states.gates, d)),
                cells=call.rows(_direction(states.cells, d)),
                h0=call.rows(layer.h0[d]),
                c0=call.rows(_state(layer.c0, d)),
                h_n=call.rows(h_n[d]),
                c_n=call.rows(_state(c_n, d)),
                w_ih=call.packed(weights.weight_ih, gates, per_panel),
                w_hh=call.packed(weights.weight_hh, gates, per_panel),
                w_hr=call.packed(weights.weight_hr, 1) if weights.weight_hr is not None else 0,
                b_x=call.packed(b_x.unsqueeze(1), gates, per_panel),
                b_h=call.packed(b_h.unsqueeze(1), gates, per_panel) if b_h is not None else 0,
                h=call.workspace(outputs, 2),
                c=call.workspace(hidden) if cell.has_c else NONE,
                m=call.workspace(hidden) if projected else NONE,
            )
        )
    multiply_adds = gates * hidden * (layer.x.shape[-1] + outputs)
    call.run(KERNELS[cell.name].forward, arguments, 2 * max(MAX_ROWS) * MAX_VECTORS, multiply_adds)
    return states


def backward(layer: Layer, saved: Saved, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None) -> Gradients:
    cell, hidden, outputs = layer.cell, layer.hidden, layer.outputs
    call, recurrent = _Call(layer), len(layer.cell.gates) * layer.hidden
    projected = layer.weights[0].weight_hr is not None
    dgx = layer.rows(call.directions, recurrent)
    gradients = Gradients(
        dgx,
        layer.rows(call.directions, recurrent) if cell.separate else dgx,
        layer.rows(call.directions, outputs) if projected else None,
        torch.empty_like(layer.h0, memory_format=torch.contiguous_format),
        None if layer.c0 is None else torch.empty_like(layer.c0, memory_format=torch.contiguous_format),
    )
    arguments = []
    for d, weights in enumerate(layer.weights):
        arguments.append(
            Backward(
                steps=len(call.counts),
                reverse=d,
                hidden=hidden,
                outputs=outputs,
                recurrent=recurrent,
                starts=call.starts.ctypes.data,
                counts=call.counts.ctypes.data,
                gates=call.rows(_direction(saved.gates, d)),
                cells=call.rows(_direction(saved.cells, d)),
                y=call.rows(_direction(saved.y, d, outputs)),
                h0=call.rows(layer.h0[d]),
                c0=call.rows(_state(layer.c0, d)),
                dy=call.rows(_direction(dy, d, outputs)),
                dh_n=call.rows(_state(dh_n, d)),
                dc_n=call.rows(_state(dc_n, d)),
                dgx=call.rows(_direction(gradients.dgx, d)),
                dgh=call.rows(_direction(gradients.dgh, d)),
                dp=call.rows(_direction(gradients.dp, d)),
                dh0=call.rows(gradients.dh0[d]),
                dc0=call.rows(_state(gradients.dc0, d)),
                w_hh=call.packed(weights.weight_hh.t(), 1),
                w_hr=call.packed(weights.weight_hr.t(), 1) if weights.weight_hr is not None else 0,
                dh=call.workspace(outputs),
                dc=call.workspace(hidden) if cell.has_c else NONE,
                dm=call.workspace(hidden) if projected else NONE,
            )
        )
    call.run(KERNELS[cell.name].backward, arguments, 0, recurrent * outputs)
    return gradients
