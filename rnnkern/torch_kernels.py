"""A layer by torch.nn's own kernels: what backend="auto" takes on a GPU where rnnkern's were not compiled."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnkern import backends, checks
from rnnkern.layer import FIXED, Operands, Settings


def serve(settings: Settings, operands: Operands) -> bool:
    """Whether they run this call: "auto" leaves it to them, and it asks for nothing that torch.nn lacks."""
    return (
        backends.torch_serves(settings.backend, operands.x.device)
        and settings.spec.in_torch
        and not any(settings[3:])
        and all(t is None for t in operands[2:FIXED])
    )


def run_layer(settings: Settings, operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n) of one layer, as `rnnkern.autograd.apply_layer` gives them."""
    if operands.lengths is None or operands.h0.shape[1] == 0:
        return _run(settings.cell, operands)
    steps, lengths = operands.x.shape[0], operands.lengths.cpu()
    checks.length_values(lengths, steps)
    packed = pack_padded_sequence(operands.x, lengths, enforce_sorted=False)
    given, place = packed.sorted_indices, packed.unsorted_indices
    assert given is not None
    assert place is not None
    y, h_n, c_n = _run(
        settings.cell,
        operands._replace(
            x=packed.data,
            h0=operands.h0.index_select(1, given),
            c0=None if operands.c0 is None else operands.c0.index_select(1, given),
            lengths=None,
            batch_sizes=packed.batch_sizes,
        ),
    )
    padded, _ = pad_packed_sequence(PackedSequence(y, packed.batch_sizes, given, place), total_length=steps)
    return padded, h_n.index_select(1, place), None if c_n is None else c_n.index_select(1, place)


def _run(cell: str, operands: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    """A padded or packed layer. torch's functions are called as our cells are."""
    run = getattr(torch, cell)
    directions = operands.h0.shape[0]
    h0, c0 = operands.h0.contiguous(), operands.c0  # cuDNN takes no others
    states = h0 if c0 is None else (h0, c0.contiguous())
    has_biases = len(operands.weights) // directions > 3  # beside W_ih, W_hh and perhaps W_hr
    # "train" keeps what backward needs; there is no dropout in a layer
    options = {"num_layers": 1, "dropout": 0.0, "train": torch.is_grad_enabled(), "bidirectional": directions == 2}
    if operands.batch_sizes is None:
        found = run(operands.x, states, operands.weights, has_biases, **options, batch_first=False)
    else:
        found = run(operands.x, operands.batch_sizes, states, operands.weights, has_biases, **options)
    y, h_n, *rest = found
    return y, h_n, rest[0] if rest else None
