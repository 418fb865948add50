"""The masks of dropout and zoneout, drawn outside the kernels by torch's generator on the device of the input.

A call draws layer by layer, in each layer in this order: dropout of what the layer before gave (as torch.nn draws it),
then the fields of `Masks`; nothing where a probability is 0. An element is 16 random bits, four of them from one draw,
which takes a sixth of the time of torch's dropout; so these probabilities are rounded to multiples of 2**-16.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

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


def _words(shape: tuple[int, ...], like: Tensor, drawn: bool) -> Tensor:
    """Numbers of 16 bits, all of them equally likely; or any, of the same look, for a call that is only laid out."""
    count = prod(shape)
    whole = shape[-1] % 4 == 0  # no draw reaches from one row into the next: two views less
    draws = (*shape[:-1], shape[-1] // 4) if whole else ((count + 3) // 4,)
    if drawn:
        words = torch.randint(-(2**63), 2**63 - 1, draws, device=like.device)
    else:
        words = torch.empty(draws, dtype=torch.int64, device=like.device)
    words = words.view(torch.int16)
    return words if whole else words[:count].view(shape)


def _last(p: float) -> int:
    """The share p of all words, rounded, are this one and those below."""
    return round(p * LEVELS) - LEVELS // 2 - 1


def choose(words: Tensor, last: int, scale: float | None, like: Tensor) -> Tensor:
    """Bools, true for words up to the `last`; with a scale 0 there and the scale elsewhere, in the dtype of `like`. In
    the operations of torch, which all of its tools can follow; a backend may have a quicker way."""
    return words <= last if scale is None else (words > last).to(like.dtype).mul_(scale)


Choose = Callable[[Tensor, int, float | None, Tensor], Tensor]


def chance(p: float, shape: tuple[int, ...], like: Tensor, drawn: bool, choose: Choose = choose) -> Tensor | None:
    """Bools that are true with probability p; None where that is 0."""
    return None if round(p * LEVELS) == 0 else choose(_words(shape, like, drawn), _last(p), None, like)


def factors(p: float, shape: tuple[int, ...], like: Tensor, drawn: bool, choose: Choose = choose) -> Tensor | None:
    """0 with probability p, else 1/(1-p), in the dtype of `like`; None where p is 0."""
    if round(p * LEVELS) == 0:
        return None
    return choose(_words(shape, like, drawn), _last(p), 0.0 if p == 1 else 1 / (1 - p), like)


def drop_between(p: float, x: Tensor, batch_first: bool, drawn: bool = True) -> Tensor:
    """Dropout of what one layer gives the next, (T, B, n) or packed (N, n), drawn in this order whatever the layout in
    memory: the same mask as torch.nn's for a seed."""
    if batch_first:
        return x * drop(torch.ones_like(x, memory_format=torch.contiguous_format), p, training=drawn)
    return drop(x, p, training=drawn)


class Wanted(NamedTuple):
    """A mask before it is drawn."""

    kind: Callable[[float, tuple[int, ...], Tensor, bool, Choose], Tensor | None]
    p: float
    shape: tuple[int, ...]


def wanted(cell: CellSpec, options: Options, x: Tensor, batch: int, weights: Sequence[Weights]) -> list[Wanted]:
    """The masks of a layer in training, in their order; x (T, B, I) or packed rows (N, I)."""
    directions, rows, (gates, outputs) = len(weights), x.shape[:-1], weights[0].weight_hh.shape
    zone_h, zone_c = options.zones(cell)
    return [
        Wanted(factors, options.input_dropout, (directions, batch, x.shape[-1])),
        Wanted(factors, options.recurrent_dropout, (directions, batch, outputs)),
        *(Wanted(factors, options.weight_dropout, tuple(w.weight_hh.shape)) for w in weights),
        Wanted(chance, zone_h, (*rows, directions * outputs)),
        Wanted(chance, zone_c, (*rows, directions * (gates // len(cell.gates)))),
    ]


def draw(wanted: Sequence[Wanted], like: Tensor, drawn: bool = True, choose: Choose = choose) -> Masks:
    """Masks on the device of `like`. Not `drawn`, they only look like masks, and no generator is touched."""
    found = [None if p == 0 else kind(p, shape, like, drawn, choose) for kind, p, shape in wanted]
    return Masks(found[0], found[1], tuple(found[2:-2]), found[-2], found[-1])


def drop_weights(weights: Sequence[Weights], drawn: Masks) -> list[Weights]:
    """The weights of a layer under weight dropout."""
    return [
        w if mask is None else w._replace(weight_hh=w.weight_hh * mask)
        for w, mask in zip(weights, drawn.weights, strict=True)
    ]
