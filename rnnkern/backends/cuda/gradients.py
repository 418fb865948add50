"""The gradients of the input and of the weights, from the rows that a backward sweep leaves: sums over all steps and
sequences, by torch."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern.backends import Layer
from rnnkern.backends.cuda.between import Rows, States
from rnnkern.backends.cuda.rows import Chunk, Sequences, Span, flat, part, unflat
from rnnkern.cells import Weights
from rnnkern.reference_cells import normalised_backward


class SweepRows(NamedTuple):
    """What a backward sweep leaves of a chunk; rows are (S, B, D*n) or packed (S, D*n)."""

    gates: Tensor | None  # (..., D*S*H), as forward saved them
    dgx: Tensor  # (..., D*G*H): gradient of gx, normalised where it is, and then real
    dgh: Tensor  # (..., D*G*H), dgx itself where the cell's two are the same
    dproduct: Tensor  # (..., D*G*H): of u W_hh^T; dgh itself without LayerNorm
    h_prev: Tensor  # (..., D*P): u, what met W_hh
    dh_projected: Tensor | None  # (..., D*P)
    unprojected: Tensor | None  # (..., D*H)
    dinner: Tensor | None  # real, (..., D*H): of normalised v


class _Direction:
    """The rows of one direction, and what its weights' gradients are made of. What several need is formed once."""

    def __init__(self, layer: Layer, sequences: Sequences, rows: SweepRows, states: States, d: int, span: Span) -> None:
        self.layer, self.rows, self.states, self.d, self.span = layer, rows, states, d, span
        self.weights = layer.weights[d]
        self.around = Rows(layer, sequences, d, span)
        self.dgx, self.dgh, self.dproduct, self.u = (
            self.own(t) for t in (rows.dgx, rows.dgh, rows.dproduct, rows.h_prev)
        )
        self.dx_product = self.dgx
        self.of_sums: dict[str, Callable[[], Tensor]] = {
            "bias_ih": partial(self._summed, self.dgx),
            "bias_hh": partial(self._summed, self.dgh),
        }
        if self.weights.ln_ih_weight is not None:
            self._normalise()
        if self.weights.weight_ch is not None:
            self.of_sums["weight_ch"] = self._of_peepholes

    def own(self, rows: Tensor | None) -> Tensor:
        """This direction's part of a buffer of the chunk."""
        assert rows is not None
        return part(rows[: self.span.size], self.d, len(self.layer.weights))

    def _blocks(self, first: int, last: int) -> Tensor:
        """Blocks of H that forward kept, counted from the end where negative; 0 is the end."""
        return self.own(self.rows.gates)[..., first * self.layer.hidden : last * self.layer.hidden or None]

    def _summed(self, rows: Tensor) -> Tensor:
        return flat(self.layer, rows).sum(0)

    def _normalise(self) -> None:
        """What LayerNorm has gradients of, and the gradient of x W_ih^T."""
        layer, w, gates = self.layer, self.weights, len(self.layer.cell.gates)
        assert w.ln_ih_weight is not None
        found = []
        for weight, raw, given in (
            (w.ln_ih_weight, self._blocks(-2 * gates, -gates), self.dgx),
            (w.ln_hh_weight, self._blocks(-gates, 0), self.dgh),
        ):
            assert weight is not None
            found.append(normalised_backward(raw, weight.to(raw.dtype), given))
        of_x, of_h = found
        self.dx_product = of_x.dx.to(layer.x.dtype)
        for name, rows in (
            ("ln_ih_weight", of_x.dweight),
            ("ln_ih_bias", self.dgx),
            ("ln_hh_weight", of_h.dweight),
            ("ln_hh_bias", self.dgh),
        ):
            assert rows is not None
            self.of_sums[name] = partial(self._summed, rows)
        if w.ln_c_weight is not None:
            i, f, g = (self._blocks(n, n + 1) for n in range(3))
            v, weight, dinner = f * self._c_before() + i * g, w.ln_c_weight, self.own(self.rows.dinner)
            of_v = normalised_backward(v, weight.to(v.dtype), dinner).dweight
            assert of_v is not None
            self.of_sums |= {"ln_c_weight": partial(self._summed, of_v), "ln_c_bias": partial(self._summed, dinner)}

    def _c_before(self) -> Tensor:
        assert self.states.cells is not None
        assert self.states.c0 is not None
        return self.around.c_before(self.states.cells, self.states.c0)

    def _of_peepholes(self) -> Tensor:
        assert self.states.cells is not None
        di, df, _, do = self.dgx.to(self.states.cells.dtype).chunk(4, -1)
        before, after = self._c_before(), self.around.own(self.states.cells)
        return self._summed(torch.cat([di * before, df * before, do * after], -1))

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        return flat(self.layer, left).t() @ flat(self.layer, right)

    def _of_weight_hh(self) -> Tensor:
        if not self.layer.cell.resets_before:
            return self._outer(self.dproduct, self.u)
        first = 2 * self.layer.hidden
        reset_u = (self._blocks(0, 1) * self.u).to(self.u.dtype)
        return torch.cat(
            [self._outer(self.dproduct[..., :first], self.u), self._outer(self.dproduct[..., first:], reset_u)]
        )

    def gradient(self, name: str, x: Callable[[], Tensor]) -> Tensor:
        """Of one weight; x gives the rows that met W_ih."""
        if name == "weight_ih":
            return self._outer(self.dx_product, x())
        if name == "weight_hh":
            return self._of_weight_hh()
        if name == "weight_hr":
            return self._outer(self.own(self.rows.dh_projected), self.own(self.rows.unprojected))
        return self.of_sums[name]()


class Gradients:
    """The sums, as chunks add to them."""

    def __init__(self, layer: Layer, sequences: Sequences, states: States, x: bool, wanted: tuple[Weights, ...]):
        self.layer, self.sequences, self.states, self.wanted = layer, sequences, states, wanted
        self.dx: Tensor | None = None
        self.needs_x = x
        self.of_weights: dict[tuple[int, str], Tensor] = {}

    def add(self, chunk: Chunk, rows: SweepRows, dtype: torch.dtype) -> None:
        """What a chunk gives; sums of several are in `dtype`."""
        layer, met = self.layer, dict[Span, Tensor]()
        for d, span in enumerate(chunk.spans):
            at = _Direction(layer, self.sequences, rows, self.states, d, span)

            def x(at: _Direction = at, span: Span = span) -> Tensor:
                if layer.extras.input_mask is not None:
                    return at.around.x()
                if span not in met:  # both directions' is the same
                    met[span] = at.around.x()
                return met[span]

            if self.needs_x:
                self._add_input(at)
            for name, want in self.wanted[d]._asdict().items():
                if want:
                    found, key = at.gradient(name, x), (d, name)
                    before = self.of_weights.get(key)
                    self.of_weights[key] = found if before is None else before.to(dtype) + found

    def _add_input(self, at: _Direction) -> None:
        """dx += dgx W_ih, of the product's own dgx."""
        layer, d, span = self.layer, at.d, at.span
        matrix, weight, mask = flat(layer, at.dx_product), at.weights.weight_ih, layer.extras.input_mask
        if span.size == len(layer.x) and mask is None:
            if self.dx is None:
                self.dx = layer.rows(layer.x.shape[-1])
                torch.mm(matrix, weight, out=flat(layer, self.dx))
            else:
                flat(layer, self.dx).addmm_(matrix, weight)
            return
        found = unflat(layer, matrix @ weight, span.size)
        if self.dx is None:
            self.dx = layer.rows(layer.x.shape[-1]).zero_()
        span.of(self.dx).add_(found if mask is None else found * at.around.by_sequence(mask[d]))

    def weights(self) -> list[Tensor | None]:
        """Of all `Weights` of each direction in turn."""
        return [self.of_weights.get((d, name)) for d in range(len(self.wanted)) for name in Weights._fields]
