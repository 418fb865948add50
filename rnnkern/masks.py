"""The masks of dropout and zoneout, drawn outside the kernels by torch's generator on the device of the input.

A call draws layer by layer, in each layer in this order: dropout of what the layer before gave (as torch.nn draws it),
then the fields of `Masks`; nothing where a probability is 0. An element is 16 random bits, four of them from one draw,
which takes a sixth of the time of torch's dropout; so these probabilities are rounded to multiples of 2**-16.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from rnnkern import compat
from rnnkern.cells import CellSpec, Weights
from rnnkern.options import Options

LEVELS = 2**16


class Masks(NamedTuple):
    """What is drawn for one layer's call, in this order; D directions, rows (T, B) or packed (N,)."""

    input: Tensor | None = None  # (D, B, I): factors
    recurrent: Tensor | None = None  # (D, B, P): factors
    weights: tuple[Tensor | None, ...] = ()  # (G*H, P) for each direction: factors of W_hh
    zoneout_h: Tensor | None = None  # (*rows, D*P) bool: where h keeps its old value
    zoneout_c: Tensor | None = None  # (*rows, D*H) bool


class Wanted(NamedTuple):
    """A mask before it is drawn."""

    shape: tuple[int, ...]
    last: int  # the share p of all words, rounded, are this one and those below
    scale: float | None  # of factors; None: bools


def chance(p: float, shape: tuple[int, ...]) -> Wanted | None:
    """Bools that are true with probability p; None where that is 0."""
    level = round(p * LEVELS)
    return Wanted(shape, level - LEVELS // 2 - 1, None) if level else None


def factors(p: float, shape: tuple[int, ...]) -> Wanted | None:
    """0 with probability p, else 1/(1-p), of p as it was given; None where the rounded p is 0."""
    wanted = chance(p, shape)
    return wanted and wanted._replace(scale=0.0 if p == 1 else 1 / (1 - p))


def choose(draws: Tensor, shape: tuple[int, ...], last: int, scale: float | None, like: Tensor) -> Tensor:
    """Bools of a shape, true for words up to the `last`; with a scale 0 there and the scale elsewhere, in the dtype of
    `like`. A draw is four words, and a row has whole draws. In the operations of torch, which all of its tools can
    follow; a backend may have a quicker way."""
    if compat.in_jit_trace():  # which knows no view of another dtype
        of_a_draw = draws.unsqueeze(-1) >> torch.arange(0, 64, 16, device=draws.device)
        words = of_a_draw.to(torch.int16).flatten(-2)
    else:
        words = draws.view(torch.int16)
    words = words[..., : shape[-1]]
    return words <= last if scale is None else (words > last).to(like.dtype).mul_(scale)


Choose = Callable[[Tensor, tuple[int, ...], int, float | None, Tensor], Tensor]


def draw_one(wanted: Wanted, like: Tensor, drawn: bool = True, choose: Choose = choose) -> Tensor:
    """A mask on the device of `like`, factors in its dtype. Not `drawn`, it only looks like one, and no generator is
    touched."""
    shape = wanted.shape
    size = (*shape[:-1], (shape[-1] + 3) // 4)
    if drawn:
        draws = torch.randint(-(2**63), 2**63 - 1, size, device=like.device)  # 64 bits, all equally likely
    else:
        draws = torch.empty(size, dtype=torch.int64, device=like.device)
    return choose(draws, shape, wanted.last, wanted.scale, like)


def drop_between(p: float, x: Tensor, batch_first: bool, drawn: bool = True) -> Tensor:
    """Dropout of what one layer gives the next, (T, B, n) or packed (N, n), drawn in this order whatever the layout in
    memory: the same mask as torch.nn's for a seed."""
    if batch_first:
        return x * drop(torch.ones_like(x, memory_format=torch.contiguous_format), p, training=drawn)
    return drop(x, p, training=drawn)


def wanted(cell: CellSpec, options: Options, x: Tensor, batch: int, weights: Sequence[Weights]) -> list[Wanted | None]:
    """The masks of a layer in training, in their order; x (T, B, I) or packed rows (N, I)."""
    directions, rows, (gates, outputs) = len(weights), x.shape[:-1], weights[0].weight_hh.shape
    zone_h, zone_c = options.zones(cell)
    return [
        factors(options.input_dropout, (directions, batch, x.shape[-1])),
        factors(options.recurrent_dropout, (directions, batch, outputs)),
        *(factors(options.weight_dropout, tuple(w.weight_hh.shape)) for w in weights),
        chance(zone_h, (*rows, directions * outputs)),
        chance(zone_c, (*rows, directions * (gates // len(cell.gates)))),
    ]


def draw(wanted: Sequence[Wanted | None], like: Tensor, drawn: bool = True, choose: Choose = choose) -> Masks:
    """All of them, in their order; the rest as for `draw_one`."""
    found = [None if one is None else draw_one(one, like, drawn, choose) for one in wanted]
    return Masks(found[0], found[1], tuple(found[2:-2]), found[-2], found[-1])


def drop_weights(weights: Sequence[Weights], drawn: Masks) -> list[Weights]:
    """The weights of a layer under weight dropout."""
    return [
        w if mask is None else w._replace(weight_hh=w.weight_hh * mask)
        for w, mask in zip(weights, drawn.weights, strict=True)
    ]
