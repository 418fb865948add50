"""Layer calls with everything that torch.nn lacks, by the CUDA sweeps and by the oracle, and how they compare."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkern import reference
from rnnkern.backends import Cotangents, Layer, States, select
from tests.numba_support import all_needs, random_gradients
from tests.option_layers import in_double, mapped
from tests.tables import relative_rms

Parts = tuple[dict[str, Tensor | None], dict[str, Tensor | None]]  # results and gradients, by name


def as_given(layer: Layer) -> Layer:
    """The call with lengths where they are, as the CUDA backend takes it."""
    if layer.order is None or layer.batch_sizes is None:
        return layer
    of_sorted = (layer.batch_sizes[:, None] > torch.arange(len(layer.order))).sum(0)
    lengths = torch.empty_like(layer.order).scatter_(0, layer.order, of_sorted)
    return layer._replace(batch_sizes=None, order=None, lengths=lengths)


def cotangents(layer: Layer) -> Cotangents:
    """Random ones, of values that the layer's dtype can hold."""
    exact = random_gradients(reference.forward(in_double(layer)), layer.extras.states)
    return exact.map(lambda g: g.to(layer.x.dtype))


def _parts(layer: Layer, states: States, gradients: Sequence[Tensor | None]) -> Parts:
    names = ["x", "h0", "c0", "reset_h", "reset_c"]
    names += [f"{name}[{d}]" for d, w in enumerate(layer.weights) for name in w._fields]
    results = {"y": states.y, "h_n": states.h_n, "c_n": states.c_n}
    results |= {"cells": states.cells} if layer.extras.states else {}
    return results, dict(zip(names, gradients, strict=True))


def by_sweeps(layer: Layer, grads: Cotangents, backend: str = "host", device: str = "cpu") -> Parts:
    """Results and gradients of the sweeps, on the CPU, wherever they ran."""
    sweeps = select(backend, torch.device(device))
    there, grads = mapped(as_given(layer), lambda t: t.to(device)), grads.map(lambda t: t.to(device))
    states = sweeps.forward(there, True)
    gradients = sweeps.backward(there, states.saved, grads, all_needs(there))
    results, found = _parts(there, states, gradients)
    return tuple({n: None if t is None else t.cpu() for n, t in part.items()} for part in (results, found))  # type: ignore[return-value]


def by_oracle(layer: Layer, grads: Cotangents) -> Parts:
    """The same of the oracle, in the layer's dtype."""
    states = reference.forward(layer)
    return _parts(layer, states, reference.backward(layer, states.saved, grads, all_needs(layer)))


def assert_close(found: Parts, wanted: Parts, most: Sequence[float], rival: Parts | None = None) -> None:
    """Every result within `most`, or within three times the largest error of the rival's results; gradients likewise.
    The largest, since where rounding is amplified it lands now in this gradient and now in that."""
    for limit, ours, theirs, others in zip(most, found, wanted, rival or ({}, {}), strict=True):
        errors = [relative_rms(o, theirs[n]) for n, o in others.items() if o is not None]  # type: ignore[arg-type]
        allowed = max(limit, 3 * max(errors, default=0.0))
        for name, expected in theirs.items():
            own = ours[name]
            if expected is None or own is None:
                assert own is expected, f"{name}: expected {expected}, got {own}"
                continue
            error = relative_rms(own, expected)
            assert error <= allowed, f"{name}: relative RMS error {error:.2e} over {allowed:.0e}"


def check(layer: Layer, most: Sequence[float], backend: str = "host", device: str = "cpu") -> None:
    """The sweeps give what the oracle gives. Below float64 some cases amplify the rounding of their operands; there the
    oracle in the layer's own dtype is the rival."""
    grads = cotangents(layer)
    rival = None if layer.x.dtype == torch.float64 else by_oracle(layer, grads)
    wanted = by_oracle(in_double(layer), grads.map(Tensor.double))
    assert_close(by_sweeps(layer, grads, backend, device), wanted, most, rival)
