"""A layer by the sweeps of csrc/: allocates every buffer, forms the products around the sweeps with torch, and passes
addresses, strides and the current stream. Nothing waits for the device.

Forward: gx = x W_ih^T (T, B, D, G*H) by torch, then a sweep that adds the biases, steps through the recurrence and puts
the gates in the place of gx. Backward: a sweep that turns dy into dgx and dgh, the gradients of the two
pre-activations; then by torch dx = dgx W_ih, dW_ih = dgx^T x, dW_hh = dgh^T h_prev, dW_hr = dh_projected^T h, and the
sums for the biases.

The extension is `rnnkern._cuda`, or in tests a build of the same sources that runs on the CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Condition
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import checks
from rnnkern.backends import Cotangents, Layer, Needs, Saved, States, compute_dtype, is_readable, readable
from rnnkern.cells import Weights

Layout = tuple[int, int, int, int]  # address, and what lies between steps, sequences and directions
NOTHING: Layout = (0, 0, 0, 0)


def tf32_allowed() -> bool:
    """Whether torch's switches for recurrent layers allow products of float32 in TF32."""
    cudnn = torch.backends.cudnn
    for switch in (cudnn.rnn.fp32_precision, cudnn.fp32_precision, torch.backends.fp32_precision):  # type: ignore[attr-defined]
        if switch != "none":
            return bool(switch == "tf32")
    return False


def precision(dtype: torch.dtype) -> str:
    """The sweeps' name for it."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else str(dtype).removeprefix("torch.")


class _ProductSwitch:
    """torch's switch for its own products of float32 on a GPU, set as the sweeps are for the time of a call. It is one
    for all threads: calls that want the same share it, and the last one out puts back what was there before."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.users, self.wanted = 0, ""
        self.before: str | None = None  # None where nothing had to be changed

    @contextmanager
    def as_in_sweeps(self, x: Tensor) -> Iterator[None]:
        """Products in TF32 or not, as is allowed for recurrent layers."""
        if not (x.is_cuda and x.dtype == torch.float32):
            yield
            return
        wanted = "tf32" if tf32_allowed() else "ieee"
        with self.changed:
            self.changed.wait_for(lambda: self.users == 0 or self.wanted == wanted)
            if self.users == 0:
                self.wanted, self.before = wanted, self._change(wanted)
            self.users += 1
        try:
            yield
        finally:
            with self.changed:
                self.users -= 1
                if self.users == 0:
                    if self.before is not None:
                        matmul: Any = torch.backends.cuda.matmul
                        matmul.fp32_precision = self.before
                    self.changed.notify_all()

    @staticmethod
    def _change(wanted: str) -> str | None:
        """Sets the switch where it has to be, and returns what it was: "none" for what came from the switch for all."""
        matmul: Any = torch.backends.cuda.matmul
        everything: Any = torch.backends
        now = str(matmul.fp32_precision)
        if now == wanted or {now, wanted} == {"none", "ieee"}:  # "none" is float32 as well
            return None
        matmul.fp32_precision = wanted
        return "none" if now == everything.fp32_precision else now


_products = _ProductSwitch()


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed up and kept in out's dtype, which may be wider."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        out.copy_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class _Sequences(NamedTuple):
    """Which sequences have which steps, as sweeps want to know it."""

    lengths: Tensor | None  # (B,) on the device
    order: Tensor | None  # (B,) on the device, longest first
    counts: Tensor | None  # (T,) on the CPU

    def addresses(self) -> dict[str, int]:
        return {name: 0 if t is None else t.data_ptr() for name, t in self._asdict().items()}


def _sequences(layer: Layer, in_sight: Callable[[Tensor], bool]) -> tuple[Layer, _Sequences]:
    """Those of the layer. Lengths that are not in sight never come to the host: a sequence whose length is outside 1..T
    starts from NaN, and so its outputs and states are NaN."""
    if layer.lengths is None:
        counts = None if layer.batch_sizes is None else _whole(layer.batch_sizes)
        return layer, _Sequences(None, None, counts)
    steps, lengths = layer.x.shape[0], _whole(layer.lengths)
    if in_sight(lengths):
        checks.length_values(lengths, steps)
        # of pinned memory, which the caller may fill anew, the copy must be made when this returns
        lengths = lengths.to(layer.x.device, non_blocking=not lengths.is_pinned())
    else:
        valid = (lengths >= 1) & (lengths <= steps)
        lengths = torch.where(valid, lengths, steps)
        layer = layer._replace(h0=torch.where(valid[:, None], layer.h0, torch.nan))
    return layer, _Sequences(lengths, lengths.argsort(descending=True, stable=True), None)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor as sweeps read it: one block, nothing to be negated on the way."""
    return tensor.resolve_neg().contiguous()


def _layout(rows: Tensor | None, directions: int) -> Layout:
    """Of (T, B, D*n) or packed (N, D*n), which the caller keeps."""
    if rows is None:
        return NOTHING
    assert is_readable(rows)
    sequence = rows.stride(1) if rows.dim() == 3 else rows.stride(0)
    return rows.data_ptr(), rows.stride(0), sequence, rows.shape[-1] // directions


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _flat(layer: Layer, rows: Tensor) -> Tensor:
    """Rows of a layer call as a matrix (T*B, n) or (N, n), in the order in which they lie in memory."""
    if rows.dim() == 2:
        return rows
    return (rows.transpose(0, 1) if layer.batch_major_rows else rows).flatten(0, 1)


def _part(matrix: Tensor, direction: int, directions: int) -> Tensor:
    """A direction's columns, (rows, n) of (rows, D*n)."""
    return matrix.chunk(directions, 1)[direction]


class SweepBackend:
    """A layer's forward and backward on one build of the sweeps."""

    as_given = True

    def __init__(self, extension: ModuleType) -> None:
        self.extension = extension
        self.tile = "automatic"  # or small, large: for tests
        self.in_sight: Callable[[Tensor], bool] = lambda lengths: lengths.device.type == "cpu"

    def inference_plan(self, form: object, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """There is none: every call is laid out anew."""

    layer_plan = inference_plan

    def _call(self, layer: Layer) -> Any:
        device = layer.x.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return self.extension.Call(layer.cell.name, precision(layer.x.dtype), self.tile, device.index or 0, stream)

    def forward(self, layer: Layer, save: bool) -> States:
        layer, sequences = _sequences(_prepared(layer), self.in_sight)
        cell, directions, dtype = layer.cell, len(layer.weights), compute_dtype(layer.x.dtype)
        keep = save and bool(cell.saved)
        gates = layer.saved_rows(directions, len(cell.saved) * layer.hidden, dtype=dtype) if keep else None
        cells = layer.saved_rows(directions, layer.hidden, dtype=dtype) if keep and cell.has_c else None
        width = len(cell.saved if keep else cell.gates) * layer.hidden
        # gates come where gx was, and have at least its columns
        gx = _padded(layer, gates) if gates is not None else _new_rows(layer, directions * width, dtype)
        _input_product(layer, gx)
        y = layer.rows(directions * layer.outputs)
        h_n = torch.empty_like(layer.h0)
        c = None if layer.c0 is None else layer.c0.to(dtype, copy=True)
        projects = layer.weights[0].weight_hr is not None
        unprojected = layer.h0.new_empty(*layer.h0.shape[:2], layer.hidden) if projects else None
        self.extension.forward(
            self._call(layer),
            sizes=_sizes(layer, sequences),
            **sequences.addresses(),
            gx=_layout(gx, directions),
            gates=_layout(gx, directions) if keep else NOTHING,
            cells=_layout(_padded(layer, cells), directions),
            y=_layout(y, directions),
            weight_hh=[w.weight_hh.data_ptr() for w in layer.weights],
            weight_hr=[_address(w.weight_hr) for w in layer.weights],
            bias_ih=[_address(w.bias_ih) for w in layer.weights],
            bias_hh=[_address(w.bias_hh) for w in layer.weights],
            h0=layer.h0.data_ptr(),
            h_n=h_n.data_ptr(),
            c=_address(c),
            unprojected=_address(unprojected),
        )
        return States(y, h_n, c, gates, cells)

    def backward(self, layer: Layer, saved: Saved, grads: Cotangents, needs: Needs) -> list[Tensor | None]:
        layer, sequences = _sequences(_prepared(layer), self.in_sight)
        dy, saved = None if grads.y is None else readable(grads.y), saved._replace(y=readable(saved.y))
        rows = self._sweep_backward(layer, sequences, saved, dy, grads.h_n, grads.c_n)
        with _products.as_in_sweeps(layer.x):
            real = _without_padding(layer, sequences) if any(w.weight_ih for w in needs.weights) else layer
            return [
                _input_gradient(layer, rows.dgx) if needs.x else None,
                rows.dh0 if needs.h0 else None,
                rows.dc if needs.c0 else None,
                None,
                None,
                *(
                    gradient
                    for d, wanted in enumerate(needs.weights)
                    for gradient in _weight_gradients(real, rows, d, wanted)
                ),
            ]

    def _sweep_backward(
        self,
        layer: Layer,
        sequences: _Sequences,
        saved: Saved,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
    ) -> "_Gradients":
        cell, directions, dtype = layer.cell, len(layer.weights), compute_dtype(layer.x.dtype)
        gates, cells = (_padded(layer, part) for part in (saved.gates, saved.cells))
        blocks = len(cell.gates) * layer.hidden
        projects = layer.weights[0].weight_hr is not None
        dgx = layer.rows(directions * blocks)
        rows = _Gradients(
            dgx=dgx,
            dgh=layer.rows(directions * blocks) if cell.separate else dgx,
            h_prev=layer.rows(directions * layer.outputs),
            dh_projected=layer.rows(directions * layer.outputs) if projects else None,
            unprojected=layer.rows(directions * layer.hidden) if projects else None,
            dh0=torch.empty_like(layer.h0),
            dc=_start(dc_n, layer.c0, dtype),
        )
        direct = None if projects else layer.h0.new_empty(layer.h0.shape, dtype=dtype)
        c0 = None if layer.c0 is None else layer.c0.to(dtype)
        dh_n = None if dh_n is None else _whole(dh_n)
        transposed = [w.weight_hh.t().contiguous() for w in layer.weights]
        transposed_hr = [None if w.weight_hr is None else w.weight_hr.t().contiguous() for w in layer.weights]
        self.extension.backward(
            self._call(layer),
            sizes=_sizes(layer, sequences),
            **sequences.addresses(),
            gates=_layout(gates, directions),
            cells=_layout(cells, directions),
            y=_layout(saved.y, directions),
            dy=_layout(dy, directions),
            dgx=_layout(rows.dgx, directions),
            dgh=_layout(rows.dgh, directions),
            h_prev=_layout(rows.h_prev, directions),
            dh_projected=_layout(rows.dh_projected, directions),
            unprojected=_layout(rows.unprojected, directions),
            weight_hh_t=[w.data_ptr() for w in transposed],
            weight_hr_t=[_address(w) for w in transposed_hr],
            h0=layer.h0.data_ptr(),
            c0=_address(c0),
            dh_n=_address(dh_n),
            dh0=rows.dh0.data_ptr(),
            dc=_address(rows.dc),
            direct=_address(direct),
        )
        return rows


class _Gradients(NamedTuple):
    """What a backward sweep gives; rows are (T, B, D*n) or packed (N, D*n)."""

    dgx: Tensor  # (..., D*G*H)
    dgh: Tensor  # (..., D*G*H), dgx itself where the cell's two are the same
    h_prev: Tensor  # (..., D*P): what met W_hh
    dh_projected: Tensor | None  # (..., D*P)
    unprojected: Tensor | None  # (..., D*H)
    dh0: Tensor  # (D, B, P)
    dc: Tensor | None  # (D, B, H)


def _prepared(layer: Layer) -> Layer:
    """The layer with operands as sweeps read them; x goes into torch's products alone."""
    return layer._replace(
        h0=_whole(layer.h0),
        c0=None if layer.c0 is None else _whole(layer.c0),
        weights=tuple(weights.map(_whole) for weights in layer.weights),
    )


def _without_padding(layer: Layer, sequences: _Sequences) -> Layer:
    """The layer with zeros in x past the lengths: what is there may be NaN, and must not meet the zeros of dgx."""
    if sequences.lengths is None:
        return layer
    steps = torch.arange(layer.x.shape[0], device=layer.x.device)
    return layer._replace(x=layer.x.masked_fill((steps[:, None] >= sequences.lengths).unsqueeze(2), 0))


def _sizes(layer: Layer, sequences: _Sequences) -> tuple[int, int, int, int, int]:
    """T, B, H, P, D."""
    steps = layer.x.shape[0] if sequences.counts is None else len(sequences.counts)
    return steps, layer.h0.shape[1], layer.hidden, layer.outputs, len(layer.weights)


def _new_rows(layer: Layer, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised buffer of rows, also where sequences have ended."""
    return layer._replace(lengths=None, batch_major=layer.batch_major_rows).rows(width, dtype=dtype)


def _padded(layer: Layer, saved: Tensor | None) -> Any:
    """Saved rows (T, B, D, n), (T*B, D, n) or packed (N, D, n) as (T, B, D*n) or (N, D*n)."""
    if saved is None:
        return None
    rows = readable(saved.flatten(-2))
    return rows if layer.lengths is None else rows.unflatten(0, tuple(layer.x.shape[:2]))


def _start(state: Tensor | None, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A carried gradient as it starts, where there is such a state: a copy in `dtype`, zeros for None."""
    if like is None:
        return None
    if state is None:
        return torch.zeros_like(like, dtype=dtype)
    return state.resolve_neg().to(dtype, copy=True).contiguous()


def _input_product(layer: Layer, gx: Tensor) -> None:
    """gx = x W_ih^T in the first G*H columns of each direction."""
    directions, x, matrix = len(layer.weights), _flat(layer, layer.x), _flat(layer, gx)
    with _products.as_in_sweeps(layer.x):
        for d, weights in enumerate(layer.weights):
            columns = _part(matrix, d, directions)[:, : weights.weight_ih.shape[0]]
            _product(x, weights.weight_ih.t(), out=columns)


def _input_gradient(layer: Layer, dgx: Tensor) -> Tensor:
    """dx = the sum over directions of dgx W_ih."""
    dx, matrix, directions = layer.rows(layer.x.shape[-1]), _flat(layer, dgx), len(layer.weights)
    out = _flat(layer, dx)
    for d, weights in enumerate(layer.weights):
        part = _part(matrix, d, directions)
        if d == 0:
            torch.mm(part, weights.weight_ih, out=out)
        else:
            out.addmm_(part, weights.weight_ih)
    return dx


def _weight_gradients(layer: Layer, rows: _Gradients, d: int, wanted: Weights) -> tuple[Tensor | None, ...]:
    """dW_ih, dW_hh, db_ih, db_hh, dW_hr of a direction where wanted."""

    def part(given: Tensor | None) -> Tensor:
        assert given is not None
        return _part(_flat(layer, given), d, len(layer.weights))

    return (
        part(rows.dgx).t() @ _flat(layer, layer.x) if wanted.weight_ih else None,
        part(rows.dgh).t() @ part(rows.h_prev) if wanted.weight_hh else None,
        part(rows.dgx).sum(0) if wanted.bias_ih else None,
        part(rows.dgh).sum(0) if wanted.bias_hh else None,
        part(rows.dh_projected).t() @ part(rows.unprojected) if wanted.weight_hr else None,
        *(None,) * 7,
    )
