"""The layout of calls that ask for more than the plain cell; plans.py has the plain ones, and what a plan is."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rnnkern.backends import Layer, Saved, States
from rnnkern.backends.numba_cpu import plans
from rnnkern.backends.numba_cpu.operands import (
    Beside,
    Matrix,
    OptionalBackward,
    OptionalForward,
    Recurrence,
    Rows,
)
from rnnkern.backends.numba_cpu.plans import WEIGHTS, Plan, Space
from rnnkern.backends.numba_cpu.tile import MAX_ROWS, MAX_VECTORS
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES

# the tensors of `Extras` as the kernels call them
EXTRAS = ("input_mask", "recurrent_mask", "zone_h", "zone_c", "reset", "reset_h", "reset_c")


def named_shares(layer: Layer) -> dict[str, Tensor]:
    """The shares of zoneout without masks, where there are any, as the kernels read them."""
    shares = {"share_h": layer.extras.zoneout_h, "share_c": layer.extras.zoneout_c}
    return {name: layer.x.new_full((), share) for name, share in shares.items() if share}


def named_extras(layer: Layer) -> dict[str, Tensor | None]:
    """The tensors of a call that only optional plans have, by the names that they give them."""
    return dict(zip(EXTRAS, layer.extras.tensors(), strict=True)) | named_shares(layer)


class _OptionalPlan(Plan):
    """What forward and backward plans have in common."""

    def __init__(self, layer: Layer, chunk_rows: int, backward: bool) -> None:
        super().__init__(layer, chunk_rows, backward)
        self.normed = layer.weights[0].ln_ih_weight is not None
        self.resets_before = layer.cell.resets_before
        self.kept = layer.cell.kept(layer.extras.zones, self.normed)

    def vector(self, field: str, tensor: str, given: Tensor | None) -> None:
        """Says where an operand is that is no more than an address."""
        if given is not None:
            self.at(field, tensor)

    def given_states(self, field: str, name: str, tensor: Tensor | None) -> Rows:
        """Rows of states that resets give or get, (B, n) or (T, B, n)."""
        if tensor is None:
            return Rows()
        self.at(f"{field}.base", name)
        step = tensor.stride(0) * self.item if tensor.dim() == 3 else 0
        return Rows(0, step, tensor.stride(-2) * self.item)

    def flags(self, field: str, name: str, tensor: Tensor | None, offset: int) -> Rows:
        """Rows of bytes, (T, B, n) or packed (N, n)."""
        if tensor is None:
            return Rows()
        self.at(f"{field}.base", name, offset)
        return Rows(0, 0 if self.packed else tensor.stride(0), tensor.stride(-2))

    def beside(self, layer: Layer, d: int) -> Beside:
        extras, w = layer.extras, layer.weights[d]
        for name, share in named_shares(layer).items():
            self.vector(f"beside.{name}", name, share)
        for name, weight in zip(WEIGHTS[5:], w[5:], strict=True):
            self.vector(f"beside.{name}", f"{name}{d}", weight)
        reset = Rows()
        if extras.reset is not None:
            self.at("beside.reset.base", "reset")
            reset = Rows(0, extras.reset.stride(0), extras.reset.stride(1))
        return Beside(
            input_mask=self.states("beside.input_mask", extras.input_mask, d, "input_mask"),
            recurrent_mask=self.states("beside.recurrent_mask", extras.recurrent_mask, d, "recurrent_mask"),
            zone_h=self.flags("beside.zone_h", "zone_h", extras.zoneout_mask_h, d * self.outputs),
            zone_c=self.flags("beside.zone_c", "zone_c", extras.zoneout_mask_c, d * self.hidden),
            reset=reset,
            reset_h=self.given_states("beside.reset_h", "reset_h", extras.reset_h),
            reset_c=self.given_states("beside.reset_c", "reset_c", extras.reset_c),
            keeps_h=int(extras.zones and not layer.cell.saved),
            outer_cells=int(extras.states),
        )

    def recurrence(
        self, layer: Layer, d: int, space: Space, rows: int, buffer: int, panels: Callable[[int, int, int], int]
    ) -> Recurrence:
        """The forward products. gh and what goes with it are `buffer` rows, gx are `rows`."""
        w, hidden = layer.weights[d], self.width(self.hidden)
        for name, bias in (("b_ih", w.bias_ih), ("b_hh", w.bias_hh)):
            self.vector(f"step.{name}", f"{name}{d}", bias)
        first = self.gates - int(self.resets_before)
        last, normed = Matrix(), self.gates * int(self.normed)
        if self.resets_before:
            offset = first * self.hidden * w.weight_hh.stride(0) * self.item
            last = self.matrix("step.last", f"w_hh{d}", w.weight_hh, panels(1, self.hidden, self.outputs), offset)
        return Recurrence(
            w_ih=self.matrix("step.w_ih", f"w_ih{d}", w.weight_ih, panels(self.gates, self.hidden, self.inputs)),
            w_hh=self.matrix("step.w_hh", f"w_hh{d}", w.weight_hh, panels(first, self.hidden, self.outputs)),
            last=last,
            b_ih=0,
            b_hh=0,
            b_x=space.take(self.gates, hidden),
            b_h=space.take(self.gates, hidden),
            n_x=space.take(normed, hidden),
            n_h=space.take(normed, hidden),
            nothing=space.take(self.gates, hidden),
            gx=space.take(rows * self.gates, hidden),
            gh=space.take(buffer * self.gates, hidden),
            ru=space.take(buffer, hidden) if self.resets_before else 0,
            v=space.take(1, hidden),
        )


class OptionalForwardPlan(_OptionalPlan):
    """The layout of forward sweeps. Its tensors are among those of a ForwardPlan and of `named_extras`."""

    operands = OptionalForward

    def __init__(self, layer: Layer, states: States) -> None:
        super().__init__(layer, plans.CHUNK_ROWS, backward=False)
        self.packs = self.total > self.rows_in_place
        for d in range(len(layer.weights)):
            self.add_direction(self._direction(layer, states, d))

    def _panels(self, gates: int, units: int, depth: int) -> int:
        return gates * self.width(units) * depth if self.packs else 0

    def _direction(self, layer: Layer, states: States, d: int) -> OptionalForward:
        space, rows, w = plans.Space(), self.chunk * self.block, layer.weights[d]
        hidden, outputs = self.width(self.hidden), self.width(self.outputs)
        outer = layer.extras.states
        return OptionalForward(
            sizes=self.sizes(d),
            x=self.rows("x", "x", layer.x),
            y=self.rows("y", "y", states.y, d * self.outputs),
            gates=self.saved_rows("gates", states.gates, d),
            cells=self.cell_rows("cells", states.cells, d, outer),
            h0=self.states("h0", layer.h0, d),
            c0=self.states("c0", layer.c0, d),
            h_n=self.states("h_n", states.h_n, d),
            c_n=self.states("c_n", states.c_n, d),
            w_hr=self.matrix("w_hr", f"w_hr{d}", w.weight_hr, self._panels(1, self.outputs, self.hidden)),
            step=self.recurrence(layer, d, space, rows, self.block, self._panels),
            beside=self.beside(layer, d),
            workspace=0,
            xs=space.take(rows, self.width(self.inputs)),
            h=space.take(2 * self.block, outputs),
            c=space.take(self.block, hidden),
            m=space.take(self.block, hidden) if w.weight_hr is not None else 0,
            u=space.take(self.block, outputs) if layer.extras.recurrent_mask is not None else 0,
            workspace_bytes=space.bytes,
        )


class OptionalBackwardPlan(_OptionalPlan):
    """The layout of backward sweeps. Its tensors are among those of a BackwardPlan and of `named_extras`, and dcells,
    dreset_h and dreset_c."""

    operands = OptionalBackward

    def __init__(self, layer: Layer, saved: Saved, tensors: dict[str, Tensor | None]) -> None:
        super().__init__(layer, plans.BACKWARD_CHUNK_ROWS, backward=True)
        self.packs = True
        for d in range(len(layer.weights)):
            self.add_direction(self._direction(layer, saved, tensors, d))

    def _panels(self, gates: int, units: int, depth: int) -> int:
        return gates * self.width(units) * depth

    def _matrices(self, layer: Layer, d: int) -> dict[str, Any]:
        """The weights of the backward products."""
        w, first = layer.weights[d], (self.gates - int(self.resets_before)) * self.hidden
        matrices = {
            "w_ih": self.matrix("w_ih", f"w_ih{d}", w.weight_ih, self._panels(1, self.inputs, self.recurrent)),
            "w_hh": self.matrix("w_hh", f"w_hh{d}", w.weight_hh, self._panels(1, self.outputs, first)),
            "w_hr": self.matrix("w_hr", f"w_hr{d}", w.weight_hr, self._panels(1, self.hidden, self.outputs)),
            "last": Matrix(),
        }
        if self.resets_before:
            offset, panels = first * w.weight_hh.stride(0) * self.item, self._panels(1, self.outputs, self.hidden)
            matrices["last"] = self.matrix("last", f"w_hh{d}", w.weight_hh, panels, offset)
        return matrices

    def _direction(self, layer: Layer, saved: Saved, tensors: dict[str, Tensor | None], d: int) -> OptionalBackward:
        space, rows, extras = plans.Space(), self.chunk * self.block, layer.extras
        inputs, hidden, outputs = self.width(self.inputs), self.width(self.hidden), self.width(self.outputs)
        for name in WEIGHTS:
            self.vector(f"d{name}", f"d{name}{d}", tensors[f"d{name}{d}"])
        projected, again = layer.weights[d].weight_hr is not None, rows * int(extras.recompute)
        dg_row = (self.width(self.recurrent + max(MAX_ROWS)) // VECTOR_BYTES | 1) * VECTOR_BYTES  # as a BackwardPlan's
        dgx, us = space.take(rows, dg_row), space.take(rows, outputs)
        masked = extras.recurrent_mask is not None
        kept_row = self.width(self.kept * self.hidden)
        gradients: dict[str, Any] = {f"d{name}": 0 for name in WEIGHTS}
        return OptionalBackward(
            sizes=self.sizes(d),
            x=self.rows("x", "x", layer.x),
            gates=self.saved_rows("gates", saved.gates, d),
            cells=self.cell_rows("cells", saved.cells, d, extras.states),
            y=self.rows("y", "y", saved.y, d * self.outputs),
            h0=self.states("h0", layer.h0, d),
            c0=self.states("c0", layer.c0, d),
            dy=self.rows("dy", "dy", tensors["dy"], d * self.outputs),
            dcells=self.cell_rows("dcells", tensors["dcells"], d, outer=True),
            dh_n=self.states("dh_n", tensors["dh_n"], d),
            dc_n=self.states("dc_n", tensors["dc_n"], d),
            dx=self.rows("dx", f"dx{d}", tensors[f"dx{d}"]),
            dh0=self.states("dh0", tensors["dh0"], d),
            dc0=self.states("dc0", tensors["dc0"], d),
            dreset_h=self.given_states("dreset_h", "dreset_h", tensors["dreset_h"]),
            dreset_c=self.given_states("dreset_c", "dreset_c", tensors["dreset_c"]),
            **self._matrices(layer, d),
            **gradients,
            step=self.recurrence(layer, d, space, again, again, self._panels) if again else self._no_recurrence(space),
            recompute=int(extras.recompute),
            beside=self.beside(layer, d),
            workspace=0,
            dg_row=dg_row,
            dgx=dgx,
            dgh=space.take(rows, dg_row) if layer.cell.separate or self.normed else dgx,
            xs=space.take(rows, inputs),
            us=us,
            hs=space.take(rows, outputs) if masked else us,
            cs=space.take(rows, hidden) if layer.cell.has_c else 0,
            rus=space.take(rows, outputs) if self.resets_before else 0,
            kept=space.take(again, kept_row),
            kept_row=kept_row,
            ms=space.take(rows, hidden) if projected else 0,
            dp=space.take(rows, outputs) if projected else 0,
            dh=space.take(self.block, outputs),
            dc=space.take(self.block, hidden) if layer.cell.has_c else 0,
            dm=space.take(self.block, hidden) if projected else 0,
            old=space.take(self.block, outputs),
            du=space.take(self.block, outputs),
            tanh_v=space.take(1, hidden),
            dv=space.take(1, hidden),
            tile=space.take(1 + max(MAX_ROWS), MAX_VECTORS * VECTOR_BYTES) + MAX_VECTORS * VECTOR_BYTES,
            workspace_bytes=space.bytes,
        )

    def _no_recurrence(self, space: Space) -> Recurrence:
        """Where activations were saved; LayerNorm of c needs a row all the same."""
        numbers = dict.fromkeys(Recurrence._fields[3:], 0) | {"v": space.take(1, self.width(self.hidden))}
        return Recurrence(Matrix(), Matrix(), Matrix(), **numbers)
