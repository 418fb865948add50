"""Numbers too small for a full mantissa: sweeps take them for zero, and leave the caller's way with them alone."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch

import rnnkern
from rnnkern import reference
from rnnkern.backends import numba_cpu
from rnnkern.backends.numba_cpu import jit, team
from rnnkern.backends.numba_cpu.choice import put_number
from rnnkern.backends.numba_cpu.vector import FLUSH_BITS, ON_X86, flush_denormals, restore_mode
from rnnkern.cells import TORCH_CELLS
from tests.numba_support import LIMIT, difference, layer_forms, oracle, random_layer, sweeps
from tests.tables import layer_class, nonlinearity

pytestmark = pytest.mark.skipif(not ON_X86, reason="only x86 has a mode for this that sweeps set")

SMALLEST = {torch.float32: 1e-42, torch.float64: 5e-320}  # both denormal


@numba.njit
def mode():  # type: ignore[no-untyped-def]
    """MXCSR of this thread."""
    before = flush_denormals()
    restore_mode(before)
    return before


@jit.kernel
def keep_mode(modes, share, c, d, zero):  # type: ignore[no-untyped-def]
    """As a share of a call: its thread's mode goes to the share's place among float64 (shares)."""
    put_number(modes, share, zero + mode())


@numba.njit
def mode_between():  # type: ignore[no-untyped-def]
    before = flush_denormals()
    within = flush_denormals()
    restore_mode(before)
    return within


@pytest.fixture(params=[False, True], ids=["kept", "flushed"])
def flushing(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The caller's own way with denormals, set either way."""
    flag: bool = request.param
    assert torch.set_flush_denormal(flag)
    yield flag
    torch.set_flush_denormal(False)


def test_the_mode_is_what_torch_sets(flushing: bool) -> None:
    assert bool(mode() & FLUSH_BITS) == flushing
    assert mode_between() & FLUSH_BITS == FLUSH_BITS
    assert bool(mode() & FLUSH_BITS) == flushing


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_a_sweep_restores_the_callers_mode(cell: str, flushing: bool) -> None:
    before = mode()
    for layer in layer_forms(cell):
        states = numba_cpu.forward(layer, save=True)
        assert mode() == before
        sweeps(layer._replace(x=layer.x))
        assert mode() == before
        assert states.y.isfinite().all()
    module = layer_class(rnnkern, cell)(3, 5, **nonlinearity(cell))
    for _ in range(3):
        module(torch.randn(4, 2, 3))[0].sum().backward()
        with torch.no_grad():
            module(torch.randn(4, 2, 3))
        assert mode() == before
    # and it works: half of the smallest normal number
    half = torch.full((), torch.finfo(torch.float32).tiny) / 2
    assert (half == 0) == flushing


def flush_bits_of_the_team() -> set[int]:
    modes = torch.full((300,), -1.0, dtype=torch.float64)
    work = team.Work(keep_mode, [(modes.data_ptr(), share, 0, 0) for share in range(300)], np.float64(0))
    team.run(work, 0, work.integers.buffer_info()[0], modes)
    return {int(mode) & FLUSH_BITS for mode in modes.tolist()}


def test_so_do_sweeps_on_other_threads(flushing: bool, threads: Callable[[int], None], always_split: list[int]) -> None:
    """Those of the team and those of any other."""
    threads(3)
    layer = random_layer("gru", batch=9)
    with ThreadPoolExecutor(1) as executor:
        before = executor.submit(mode).result()
        executor.submit(sweeps, layer).result()
        assert executor.submit(mode).result() == before
    assert always_split[0] > 1
    for _ in range(3):
        sweeps(layer)
        # those of the caller, and of threads on which nobody has set any
        assert flush_bits_of_the_team() <= {FLUSH_BITS * flushing, 0}


@pytest.mark.parametrize("dtype", SMALLEST)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_denormal_operands_count_as_zeros(cell: str, dtype: torch.dtype, flushing: bool) -> None:
    """Inputs, states and weights among them: what comes out is that of zeros in their place."""
    for layer in layer_forms(cell, dtype):
        few = layer._replace(x=layer.x.clone(), h0=layer.h0.clone())
        few.x[..., 0] = SMALLEST[dtype]
        few.h0[..., 1] = -SMALLEST[dtype]
        zeros = few._replace(x=few.x.clone(), h0=few.h0.clone())
        zeros.x[..., 0] = 0
        zeros.h0[..., 1] = 0
        assert difference(sweeps(few), oracle(zeros)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", SMALLEST)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_denormals_alone_come_out_as_next_to_nothing(cell: str, dtype: torch.dtype) -> None:
    """Everything denormal, gradients too: as near to the oracle as zeros are."""
    tiny, smallest = torch.finfo(dtype).tiny, SMALLEST[dtype]
    layer = random_layer(cell, steps=3, dtype=dtype)
    small = layer._replace(
        x=layer.x * smallest,
        h0=layer.h0 * smallest,
        c0=None if layer.c0 is None else layer.c0 * smallest,
        weights=tuple(w.map(lambda t: t * smallest) for w in layer.weights),
    )
    found, wanted = numba_cpu.forward(small, save=True), reference.forward(small, save=True)
    for own, other in zip(found, wanted, strict=True):
        assert own is other is None or (own is not None and other is not None and (own - other).abs().max() <= tiny)
    assert difference(sweeps(layer), oracle(layer)) < LIMIT[dtype]


def test_a_state_that_decays_costs_no_more_than_another() -> None:
    """A linear recurrence halves its state at each step, far into the denormals and out below them."""
    module = rnnkern.RNN(1, 4, nonlinearity="relu", bias=False)
    with torch.no_grad():
        module.get_parameter("weight_hh_l0").copy_(torch.eye(4) / 2)
        y, h_n = module(torch.zeros(200, 1, 1), torch.ones(1, 1, 4))
    expected = torch.ones(200) * 0.5 ** torch.arange(1, 201, dtype=torch.float64)
    flushed = torch.where(expected < torch.finfo(torch.float32).tiny, 0, expected).float()
    assert torch.equal(y[:, 0, 0], flushed)
    assert not h_n.any()
