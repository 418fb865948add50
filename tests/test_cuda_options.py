"""What torch.nn lacks, in the CUDA sweeps, their sources run on the CPU: every option, alone, in pairs and all at once,
against the oracle. test_cuda_sanitizers.py runs them under sanitizers, and with defects."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rnnkern.cells import CELLS
from tests import host
from tests.cuda_options import as_given, by_sweeps, check, cotangents
from tests.numba_support import all_needs, bitwise_equal
from tests.option_layers import FULL, Optional, optional_cases
from tests.tables import TOLERANCES

CASES = dict(optional_cases())
SCHEDULES = (0, 1, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TF32 = (2e-3, 2e-3)
# More than a tile of sequences and units, read by vectors, and more chunks than are under way.
WIDE: dict[str, Any] = {"T": 3, "B": 18, "H": 72}

# One call with everything for each cell, and for each kind of rows.
CHOSEN = [
    f"{cell}-{rows}-masks"
    for cell, rows in zip(CELLS, ("padded", "packed", "lengths", "padded", "lengths"), strict=True)
]


@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize("name", CASES)
def test_options_alone_and_in_pairs(name: str) -> None:
    check(CASES[name].layer(), TOLERANCES[torch.float64])


@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize("name", FULL)
def test_everything_at_once(name: str) -> None:
    check(FULL[name].layer(), TOLERANCES[torch.float64])


@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FULL)
def test_everything_at_once_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    check(replace(FULL[name], dtype=dtype, seed=1).layer(), TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize("name", [*CASES, *FULL])
def test_options_on_a_gpu(name: str) -> None:
    check((CASES | FULL)[name].layer(), TOLERANCES[torch.float64], "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FULL)
def test_options_on_a_gpu_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    check(replace(FULL[name], dtype=dtype, seed=1).layer(), TOLERANCES[dtype], "cuda", "cuda")


@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize("name", CHOSEN)
def test_everything_at_once_in_tf32(name: str) -> None:
    switch: Any = torch.backends.cudnn.rnn
    switch.fp32_precision = "tf32"
    check(replace(FULL[name], dtype=torch.float32, seed=1).layer(), TF32)


@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("tile", ["small", "large"])
@pytest.mark.parametrize("name", CHOSEN)
def test_over_several_tiles_in_every_schedule(name: str, tile: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.host_backend import backend

    monkeypatch.setattr(backend, "tile", tile)
    host.extension().set_schedule(seed)
    try:
        check(replace(FULL[name], **WIDE).layer(), TOLERANCES[torch.float64])
    finally:
        host.extension().set_schedule(0)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("name", CHOSEN)
def test_bitwise_the_same_in_every_schedule(name: str, dtype: torch.dtype) -> None:
    layer = replace(FULL[name], dtype=dtype, B=18).layer()
    grads = cotangents(layer)
    outcomes = []
    for seed in SCHEDULES:
        host.extension().set_schedule(seed)
        outcomes.append([t for part in by_sweeps(layer, grads) for t in part.values()])
    host.extension().set_schedule(0)
    assert all(bitwise_equal(other, outcomes[0]) for other in outcomes[1:])


@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize("name", [name for name in FULL if "packed" not in name])
def test_rows_that_are_batch_major(name: str) -> None:
    layer = FULL[name].layer()
    x = layer.x.transpose(0, 1).contiguous().transpose(0, 1)
    check(layer._replace(x=x, batch_major=True), TOLERANCES[torch.float64])


@pytest.mark.parametrize("name", FULL)
def test_masks_of_any_strides(name: str) -> None:
    """The halves of larger ones, and transposed."""
    layer = FULL[name].layer()

    def strided(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        double = torch.stack([value, value], -1)[..., 0]
        return double.transpose(0, 1).contiguous().transpose(0, 1)

    extras = layer.extras._replace(**{n: strided(value) for n, value in layer.extras._asdict().items()})
    grads = cotangents(layer)
    found, wanted = by_sweeps(layer._replace(extras=extras), grads), by_sweeps(layer, grads)
    for ours, theirs in zip(found, wanted, strict=True):
        assert bitwise_equal(list(ours.values()), list(theirs.values()))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("reset", ["zeros", "states", "steps"])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_a_state_that_is_replaced_goes_nowhere(cell: str, reset: str, layer_norm: bool) -> None:
    """Before the first step, and in the midst, where the NaN comes from the input."""
    case = Optional(cell, reset=reset, recurrent_mask=True, layer_norm=layer_norm and not CELLS[cell].resets_before)
    layer = case.layer()
    first, later = torch.zeros(5, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    first[0], later[3] = True, True
    h0 = layer.h0 * torch.nan
    c0 = None if layer.c0 is None else layer.c0 * torch.nan
    at_first = layer._replace(h0=h0, c0=c0, extras=layer.extras._replace(reset=first))
    for part in by_sweeps(at_first, cotangents(layer)):
        for name, tensor in part.items():
            assert tensor is None or not tensor.isnan().any(), name
    x = layer.x.clone()
    x[1] = torch.nan
    results, gradients = by_sweeps(layer._replace(x=x, extras=layer.extras._replace(reset=later)), cotangents(layer))
    y, dx = results["y"], gradients["x"]
    assert y is not None
    assert dx is not None
    assert y[1:3].isnan().all()
    assert not y[3:].isnan().any()
    assert not dx[3:].isnan().any()


@pytest.mark.parametrize("name", [name for name in FULL if "lengths" in name])
def test_lengths_out_of_range_on_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset does not hide that they are."""
    from tests.host_backend import backend

    monkeypatch.setattr(backend, "in_sight", lambda lengths: False)
    layer = as_given(FULL[name].layer())
    assert layer.lengths is not None
    wrong = layer.lengths.clone()
    wrong[2] = 9
    good = torch.arange(len(wrong)) != 2
    extras = layer.extras._replace(reset=torch.ones(layer.x.shape[:2], dtype=torch.bool), recompute=False)
    y, expected = (
        backend.forward(layer._replace(lengths=lengths, extras=extras), False).y for lengths in (wrong, layer.lengths)
    )
    assert torch.equal(y[:, good], expected[:, good])
    assert y[:, 2].isnan().all()


class _Storages(TorchDispatchMode):
    """How many numbers the largest tensor has that is made within."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = function(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return found


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("rows", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if CELLS[cell].saved])
def test_recomputing_takes_memory_for_a_chunk(cell: str, rows: str, recompute: bool) -> None:
    """Beside the gradient of the input, no number of rows that backward makes grows with all steps."""
    from tests.host_backend import backend

    steps, batch, hidden = 400, 2, 8
    layer = as_given(Optional(cell, T=steps, B=batch, I=1, H=hidden, rows=rows, recompute=recompute).layer())
    grads = cotangents(layer)
    states = backend.forward(layer, True)
    assert (states.gates is None) is recompute
    with _Storages() as made:
        backend.backward(layer, states.saved, grads, all_needs(layer))
    chunk = math.isqrt(steps) * batch * len(CELLS[cell].saved) * hidden
    assert (made.largest <= max(chunk, steps * batch)) is recompute
