"""Every check of what a caller passes, and every message. An error of a kind that torch.nn raises has the type that
torch.nn gives it.

A message names the argument, what was expected, what came, and what to do where that is not plain.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern.cells import CellSpec, Weights, own_weight_names, weight_shapes

if TYPE_CHECKING:
    from rnnkern.layer import Operands

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def operands(cell: CellSpec, given: "Operands", weights: tuple[Weights, ...]) -> None:
    """The sizes, dtypes and devices of one layer's operands: what a kernel takes on trust."""
    x, h0, c0 = given.x, given.h0, given.c0
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"input: expected one of {', '.join(str(dtype) for dtype in DTYPES)}, got {x.dtype}; "
            "torch.nn's modules (rnnkern.to_torch) may know it"
        )
    inputs, gates = x.shape[-1], len(cell.gates)
    hidden, outputs = weights[0].weight_hh.shape[0] // gates, weights[0].weight_hh.shape[1]
    expected = tuple(weight_shapes(cell, inputs, hidden, outputs).values())
    for w in weights:
        if w.weight_hr is not None and not cell.has_c:
            raise RuntimeError(
                f"weight_hr: only an LSTM can project its state, got {_shape(w.weight_hr)} for {cell.name}"
            )
        if w.weight_hr is None and hidden != outputs:
            raise RuntimeError(
                f"weight_hh: expected ({gates}*H, H) for {cell.name}, got {_shape(w.weight_hh)}; "
                "with a projection give weight_hr too"
            )
        for name, tensor, shape in zip(Weights._fields, w, expected, strict=True):
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise RuntimeError(
                    f"{name}: expected {shape} beside weight_hh {_shape(w.weight_hh)}, got {_shape(tensor)}"
                )
            _same_kind(name, tensor, x)
    states = [("h0", h0, outputs)] + ([("c0", c0, hidden)] if c0 is not None else [])
    for name, state, units in states:
        batch = x.shape[1] if x.dim() == 3 else h0.shape[1]
        if _shape(state) != (len(weights), batch, units):
            raise RuntimeError(
                f"{name}: expected (directions, B, units) = {(len(weights), batch, units)}, got {_shape(state)}"
            )
        _same_kind(name, state, x)
    if x.dim() == 3 and x.shape[0] == 0:
        raise RuntimeError("input: expected at least one step, got a sequence of length 0")
    _masks(given, len(weights), hidden)


def _masks(given: "Operands", directions: int, hidden: int) -> None:
    """Masks and resets, which stack.py lays out."""
    x, (_, batch, outputs), rows = given.x, given.h0.shape, tuple(given.x.shape[:-1])
    expected: dict[str, list[tuple[int, ...]]] = {
        "input_mask": [(directions, batch, x.shape[-1])],
        "recurrent_mask": [(directions, batch, outputs)],
        "zoneout_mask_h": [(*rows, directions * outputs)],
        "zoneout_mask_c": [(*rows, directions * hidden)],
        "reset": [rows] if x.dim() == 3 and directions == 1 else [],
        "reset_h": [(batch, outputs), (*rows, outputs)],
        "reset_c": [(batch, hidden), (*rows, hidden)],
    }
    for name, shapes in expected.items():
        tensor = getattr(given, name)
        if tensor is None:
            continue
        if _shape(tensor) not in shapes:
            wanted = " or ".join(map(str, shapes)) or "none"
            raise RuntimeError(f"{name}: expected shape {wanted}, got {_shape(tensor)}")
        _same_kind(name, tensor, x, torch.bool if name.startswith("zoneout") or name == "reset" else x.dtype)


def _same_kind(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> None:
    if tensor.layout != torch.strided:
        raise RuntimeError(f"{name}: expected a dense tensor, got layout {tensor.layout}; use .to_dense()")
    if tensor.dtype != (dtype or x.dtype):
        raise RuntimeError(
            f"{name}: expected dtype {dtype or x.dtype}{', that of the input' if dtype is None else ''}, "
            f"got {tensor.dtype}; "
            "convert one of them with .to(dtype)"
        )
    if tensor.device != x.device:
        raise RuntimeError(
            f"{name}: expected device {x.device}, that of the input, got {tensor.device}; "
            "move one of them with .to(device)"
        )


def batch_sizes_kind(sizes: Tensor) -> None:
    """What batch_sizes of packed data must be before its numbers are looked at."""
    if sizes.device.type != "cpu" or sizes.dtype != torch.int64 or sizes.dim() != 1 or sizes.numel() == 0:
        raise RuntimeError(
            f"batch_sizes: expected a 1-D int64 tensor on the CPU with an entry for each step, "
            f"got {sizes.dtype} {_shape(sizes)} on {sizes.device}"
        )


def batch_sizes(sizes: Tensor, rows: int, batch: int) -> None:
    """The batch_sizes of packed data: a sweep reads as many rows as they say."""
    batch_sizes_kind(sizes)
    if int(sizes[0]) != batch or int(sizes.sum()) != rows or int(sizes.min()) < 1 or bool((sizes.diff() > 0).any()):
        raise RuntimeError(
            f"batch_sizes: expected a falling sequence of positive numbers from {batch} that adds up to the "
            f"{rows} rows of data, got {sizes.tolist()}; "
            "build the PackedSequence with torch.nn.utils.rnn.pack_padded_sequence"
        )


def length_values(lengths: Tensor, steps: int) -> None:
    """1 <= length <= T."""
    outside = (lengths < 1) | (lengths > steps)
    if bool(outside.any()):
        index = int(outside.nonzero()[0])
        raise ValueError(f"lengths: expected 1 <= length <= T = {steps}, got {int(lengths[index])} at index {index}")


def lengths(given: object, batch: int) -> Tensor:
    """The argument `lengths` of a batched, padded call, as int64."""
    if not isinstance(given, Tensor):
        raise TypeError(
            f"lengths: expected an int64 tensor of shape (B,) = ({batch},), got {type(given).__name__}; "
            "use torch.tensor(lengths)"
        )
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"lengths: expected dtype int64, got {given.dtype}")
    if given.dim() != 1 or given.shape[0] != batch:
        raise ValueError(
            f"lengths: expected shape (B,) = ({batch},), one length for each sequence, got {_shape(given)}"
        )
    return given.to(torch.int64)


def no_lengths(given: object, why: str) -> None:
    if given is not None:
        raise ValueError(f"lengths: {why}; leave lengths out")


def backend_name(name: object, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, known))}, got {name!r}")


def input_rank(input: Tensor, ranks: tuple[int, int], who: str) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{who}: input: expected a tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in ranks:
        raise ValueError(
            f"{who}: input: expected {ranks[0]}-D (unbatched) or {ranks[1]}-D, "
            f"got {input.dim()}-D of shape {_shape(input)}"
        )


def input_kind(input: Tensor, weight: Tensor, who: str) -> None:
    """The layout, features, dtype and device of an input (..., I) against weight_ih (G*H, I)."""
    if input.layout != torch.strided:
        raise RuntimeError(f"{who}: input: expected a dense tensor, got layout {input.layout}; use input.to_dense()")
    if input.dtype != weight.dtype:
        raise ValueError(
            f"{who}: input: expected dtype {weight.dtype}, that of the weights, got {input.dtype}; "
            f"use input.to({weight.dtype}) or model.to({input.dtype})"
        )
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"{who}: input: expected size(-1) = input_size = {weight.shape[1]}, got {input.shape[-1]}")
    if input.device != weight.device:
        raise RuntimeError(f"{who}: input: expected device {weight.device}, that of the weights, got {input.device}")


def packed(sequence: PackedSequence, who: str) -> None:
    """The parts of a PackedSequence, which anyone can put together by hand."""
    data, sizes, *orders = sequence
    if data.dim() != 2:
        raise RuntimeError(
            f"{who}: the data of a PackedSequence: expected 2-D (rows, input_size), "
            f"got {data.dim()}-D of shape {_shape(data)}"
        )
    batch_sizes_kind(sizes)
    batch = int(sizes[0])
    for name, order in zip(("sorted_indices", "unsorted_indices"), orders, strict=True):
        if order is not None and _shape(order) != (batch,):
            raise RuntimeError(f"{who}: {name}: expected shape (B,) = ({batch},), got {_shape(order)}")


def weight_lists(
    weights: Sequence[Sequence[Tensor]], directions: int, cell: CellSpec, peephole: bool, layer_norm: bool, who: str
) -> None:
    """One list of weights for each layer and direction."""
    if not weights or len(weights) % directions:
        expected = "two lists for each layer, one a direction" if directions == 2 else "a list for each layer"
        raise ValueError(f"{who}: weights: expected {expected}, got {len(weights)} list(s)")
    own = own_weight_names(cell, peephole, layer_norm)
    for index, flat in enumerate(weights):
        beside = len(flat) - len(own)
        if not 2 <= beside <= 5 or len(flat) != len(weights[0]) or not all(isinstance(w, Tensor) for w in flat):
            last = f"and {', '.join(own)} at the end, " if own else "(others only with peephole or layer_norm), "
            raise ValueError(
                f"{who}: weights[{index}]: expected tensors [w_ih, w_hh], optionally with b_ih and b_hh and with w_hr, "
                f"{last}as many as in weights[0], got {[type(w).__name__ for w in flat]}"
            )
        if beside % 2 and flat[beside - 1].dim() == 1:
            raise ValueError(
                f"{who}: weights[{index}]: with {len(flat)} tensors and peephole={peephole} the one at {beside - 1} is "
                f"weight_hr, expected (P, H), got {_shape(flat[beside - 1])}; is peephole what it was when the weights "
                "were made? peephole=True has weight_ch (3*H,) behind those of torch.nn"
            )


def _states_apart(given: Sequence[Tensor] | Tensor, who: str) -> None:
    if isinstance(given, Tensor):
        raise RuntimeError(f"{who}: hx: expected a pair (h0, c0), got one tensor of shape {_shape(given)}")
    if not isinstance(given, tuple | list):
        raise TypeError(f"{who}: hx: expected a pair of tensors (h0, c0), got {type(given).__name__}")


def states_rank(given: Sequence[Tensor], rank: int, who: str) -> None:
    _states_apart(given, who)
    for name, tensor in zip(("h0", "c0"), given, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{who}: {name}: expected a {rank}-D tensor, got {type(tensor).__name__}")
        if tensor.dim() != rank:
            raise RuntimeError(
                f"{who}: {name}: expected {rank}-D beside this input, got {tensor.dim()}-D of shape {_shape(tensor)}"
            )


def nonlinearity(name: object) -> None:
    if name not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {name!r}")


def states(given: Sequence[Tensor], expected: Sequence[tuple[int, ...]], input: Tensor, who: str) -> None:
    """hx against the shape that each of its tensors must have."""
    states_rank(given, 3, who)
    if len(given) != len(expected):
        raise RuntimeError(f"{who}: hx: expected {len(expected)} state(s), got {len(given)}")
    for name, tensor, shape in zip(("h0", "c0"), given, expected, strict=False):
        if _shape(tensor) != shape:
            raise RuntimeError(f"{who}: {name}: expected (layers*directions, B, units) = {shape}, got {_shape(tensor)}")
        _same_kind(f"{who}: {name}", tensor, input)


def reset(given: object, rows: tuple[int, ...], bidirectional: bool, input: Tensor, who: str) -> None:
    """The argument `reset` of a padded call, beside an input of the shape (*rows, I)."""
    if bidirectional:
        raise ValueError(
            f"{who}: reset: a bidirectional layer has read what comes behind a reset before it comes to it; "
            "use a layer of one direction"
        )
    if not isinstance(given, Tensor):
        raise TypeError(f"{who}: reset: expected a bool tensor of shape {rows}, got {type(given).__name__}")
    if given.dtype != torch.bool:
        raise TypeError(f"{who}: reset: expected dtype bool, got {given.dtype}; use reset.bool()")
    if _shape(given) != rows:
        raise ValueError(
            f"{who}: reset: expected shape {rows}, that of the input without its last, got {_shape(given)}"
        )
    _same_kind(f"{who}: reset", given, input, torch.bool)


def no_reset(reset: object, reset_to: object, why: str) -> None:
    if reset is not None or reset_to is not None:
        raise ValueError(f"{'reset_to' if reset is None else 'reset'}: {why}")


def tensors_of_states(name: str, given: object, count: int, who: str) -> None:
    """Whether an argument is what it has to be before anybody looks into it: `count` tensors, or None."""
    if given is None:
        return
    expected = "a pair (h, c)" if count == 2 else "one state h"
    if isinstance(given, Tensor):
        raise RuntimeError(f"{who}: {name}: expected {expected}, got one tensor of shape {_shape(given)}")
    if not isinstance(given, tuple | list):
        raise TypeError(f"{who}: {name}: expected {expected}, got {type(given).__name__}")
    if len(given) != count:
        raise RuntimeError(f"{who}: {name}: expected {expected}, got {len(given)} of them")
    for state, part in zip("hc", given, strict=False):
        if not isinstance(part, Tensor):
            raise TypeError(f"{who}: {name} {state}: expected a tensor, got {type(part).__name__}")


def reset_to_alone(reset: object, reset_to: object) -> None:
    if reset is None and reset_to is not None:
        raise ValueError("reset_to: it is what a reset sets the states to, and there is no reset; give reset too")


class ResetStates(NamedTuple):
    """What the states of `reset_to` must look like: L layers, of B sequences (none when unbatched) of T steps."""

    steps: int
    layers: int
    batch: tuple[int, ...]
    units: Sequence[int]  # of h, and of c where there is one

    def shapes(self, units: int) -> list[tuple[int, ...]]:
        """Those that there may be: one for all sequences, one for each, one for each step."""
        shared = [(self.layers, 1, units)] if self.batch else []
        each = (self.layers, *self.batch, units)
        return [*shared, each, (self.steps, *each)]


def reset_to(given: Sequence[Tensor], expected: ResetStates, input: Tensor, who: str) -> None:
    """The argument `reset_to`, after `tensors_of_states`."""
    for name, state, units in zip(("reset_to h", "reset_to c"), given, expected.units, strict=False):
        shapes = expected.shapes(units)
        if _shape(state) not in shapes:
            raise RuntimeError(
                f"{who}: {name}: expected one of the shapes (layers, 1, units), (layers, B, units) and "
                f"(T, layers, B, units), without B when unbatched, {', '.join(map(str, shapes))}, got {_shape(state)}"
            )
        _same_kind(f"{who}: {name}", state, input)


def no_projection(proj_size: int) -> None:
    if proj_size:
        raise ValueError(f"proj_size: only an LSTM can project its state, got {proj_size}; leave proj_size out")


def cell_states_rank(given: Sequence[Tensor], rank: int, who: str) -> None:
    _states_apart(given, who)
    for name, tensor in zip(("h", "c"), given, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{who}: {name}: expected a {rank}-D tensor, got {type(tensor).__name__}")
        if tensor.dim() not in (1, 2):
            raise ValueError(
                f"{who}: {name}: expected 1-D (unbatched) or 2-D, got {tensor.dim()}-D of shape {_shape(tensor)}"
            )
        if tensor.dim() != rank:
            raise RuntimeError(
                f"{who}: {name}: expected {rank}-D beside this input, got {tensor.dim()}-D of shape {_shape(tensor)}"
            )


def cell_input(input: Tensor, weight: Tensor, who: str) -> None:
    """The features, dtype and device of (B, I) against weight_ih (G*H, I)."""
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"{who}: input: expected size(-1) = input_size = {weight.shape[1]}, got {input.shape[-1]}")
    _same_kind(f"{who}: weight_ih", weight, input)


def cell_states(given: Sequence[Tensor], count: int, input: Tensor, hidden: int, who: str) -> None:
    if len(given) != count:
        raise RuntimeError(f"{who}: hx: expected {count} state(s), got {len(given)}")
    expected = (input.shape[0], hidden)
    for name, tensor in zip(("h", "c"), given, strict=False):
        if _shape(tensor) != expected:
            raise RuntimeError(f"{who}: {name}: expected (B, hidden_size) = {expected}, got {_shape(tensor)}")
        _same_kind(f"{who}: {name}", tensor, input)
