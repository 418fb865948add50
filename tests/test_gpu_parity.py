"""Layers by the CUDA backend on a GPU: against the float64 oracle on the CPU, and against torch.nn on the same GPU."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rnnkern.cells import TORCH_CELLS
from tests.gpu_support import (
    CUDA,
    TF32,
    Target,
    assert_same_bits,
    drop_as_on_the_cpu,
    fp32_precision,
    misalign_parameters,
    misaligned,
    on_both,
    on_cuda,
    tile_of,
)
from tests.tables import TOLERANCES, Case, Outcome, assert_close, cases, relative_rms

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_tiles = pytest.mark.parametrize("tile", ["small", "large"])


@pytest.fixture(autouse=True)
def same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's dropout masks on every device."""
    monkeypatch.setattr("rnnkern.masks.drop", drop_as_on_the_cpu)


@cache
def oracle(case: Case) -> Outcome:
    """What is right for a case, whichever backend and device it names."""
    return case.by_oracle()


def exact(case: Case) -> Outcome:
    return oracle(replace(case, backend="reference", device="cpu"))


def check(case: Case) -> None:
    found = case.run(case.module())
    assert {tensor.dtype for tensor in found.results.values()} == {case.dtype}
    assert_close(found, exact(case), case.dtype)


# The whole table on a GPU; its defaults, since test_cuda_sweeps.py has the rest, on the host.
ALL = dict(cases())
COMMON: dict[str, Any] = {"bidirectional": True, "hx": True}


@both_tiles
@pytest.mark.parametrize(
    ("target", "name"),
    [pytest.param(*CUDA.values, name, marks=pytest.mark.gpu, id=f"cuda-{name}") for name in ALL]
    + [pytest.param(Target("host", "cpu"), cell, id=f"host-{cell}") for cell in TORCH_CELLS],
)
def test_parity(target: Target, name: str, tile: str) -> None:
    with tile_of(target, tile):
        check(target.of(ALL[name]))


@on_both
@every_cell
@both_tiles
def test_tf32(target: Target, cell: str, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = target.of(Case(cell, B=20, H=40, dtype=torch.float32, **COMMON))
    with fp32_precision("tf32"), tile_of(target, tile):
        found = case.run(case.module())
    with pytest.raises(AssertionError):  # it is another precision indeed
        assert_close(found, exact(case), case.dtype)
    monkeypatch.setitem(TOLERANCES, case.dtype, TF32)
    assert_close(found, exact(case), case.dtype)


@on_cuda
def test_the_switch_for_products_is_left_as_it_was(target: Target) -> None:
    case = target.of(Case(dtype=torch.float32))
    before = torch.backends.cuda.matmul.fp32_precision
    for precision in ("tf32", "ieee"):
        with fp32_precision(precision):
            case.run(case.module())
        assert torch.backends.cuda.matmul.fp32_precision == before


def beside_torch(case: Case, wanted: Outcome, change: Callable[[Any], Any] = lambda module: module) -> None:
    """No worse than torch.nn on the same device, by modules that `change` has been done to.

    Not the gradients of relu in 16 bits: the rounding of h decides on which side of zero a unit near it is, and one
    unit more or less is more than every tolerance.
    """
    ours, theirs = (case.run(change(module)) for module in (case.module(), case.torch_module()))
    if case.cell == "rnn_relu" and case.dtype in (torch.float16, torch.bfloat16):
        ours, theirs, wanted = (Outcome(outcome.results, {}) for outcome in (ours, theirs, wanted))
    assert_close(ours, wanted, case.dtype, theirs)


def changed(case: Case, change: Callable[[Any], Any]) -> None:
    """The same of a case whose weights are not the default ones."""
    there = replace(case, backend="reference", device="cpu")
    beside_torch(case, there.run(change(there.module(torch.float64))), change)


SIZES: dict[str, dict[str, Any]] = {
    "B129 H257": {"T": 7, "B": 129, "I": 65, "H": 257},
    "B67 H333": {"T": 17, "B": 67, "I": 31, "H": 333},
    "B1030 H17": {"T": 3, "B": 1030, "I": 5, "H": 17},
    "B3 H1025": {"T": 5, "B": 3, "I": 700, "H": 1025},
    "B64 H512": {"T": 4, "B": 64, "I": 256, "H": 512},
}


@on_cuda
@every_cell
@every_dtype
@both_tiles
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_large_sizes(target: Target, sizes: dict[str, Any], cell: str, dtype: torch.dtype, tile: str) -> None:
    with tile_of(target, tile):
        case = target.of(Case(cell, dtype=dtype, **COMMON, **sizes))
        beside_torch(case, exact(case))


@on_both
@every_cell
@every_dtype
def test_large_weights(target: Target, cell: str, dtype: torch.dtype) -> None:
    """Gates saturate, and a plain RNN is chaotic."""

    def enlarge(module: Any) -> Any:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(4)
        return module

    changed(target.of(Case(cell, T=12, B=9, I=33, H=40, dtype=dtype)), enlarge)


@on_both
@every_cell
@every_dtype
def test_small_inputs(target: Target, cell: str, dtype: torch.dtype) -> None:
    """About 1e-4, through the input weights: no bias, or it would be all that counts."""

    def shrink(module: Any) -> Any:
        with torch.no_grad():
            module.weight_ih_l0.mul_(2.0**-13)
        return module

    changed(target.of(Case(cell, T=12, B=9, I=33, H=40, dtype=dtype, bias=False)), shrink)


@on_both
@every_cell
@every_dtype
def test_nan_and_inf_travel_as_in_torch(target: Target, cell: str, dtype: torch.dtype) -> None:
    case = target.of(Case(cell, T=6, B=4, H=16, dtype=dtype))
    x, states = case.inputs()
    x = x.detach()
    x[2, 1, 0] = torch.nan
    x[1, 2, 1] = torch.inf
    x[3, 3, 2] = -torch.inf
    with torch.no_grad():
        found = case.call(case.module(), x, states)[1]
        wanted = case.call(case.torch_module(), x, states)[1]
    for name, tensor in wanted.items():
        assert torch.equal(found[name].isnan(), tensor.isnan()), name
        assert torch.equal(found[name].isinf(), tensor.isinf()), name
    assert not found["output"][:, 0].isnan().any()


@on_cuda
@every_cell
def test_more_steps_than_a_grid_has_rows(target: Target, cell: str) -> None:
    """T over 65,535; the judge is the CPU backend, which the oracle judges elsewhere and which takes no minutes."""
    case = target.of(Case(cell, T=66_001, B=3, I=2, H=5, rows="lengths", lengths=(66_001, 40_000, 65_536)))
    there = replace(case, backend="numba", device="cpu")
    assert_close(case.run(case.module()), there.run(there.module()), case.dtype)


GIB = 1 << 30


@on_cuda
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
def test_offsets_past_32_bits(target: Target, cell: str) -> None:
    """Pre-activations, and of the plain RNN outputs too, beyond 2^31 numbers: the first and the last sequences."""
    B, H = 1 << 16, 128
    T = (1 << 31) // (B * H * len(TORCH_CELLS[cell].gates)) + 1
    numbers = T * B * H * len(TORCH_CELLS[cell].gates)
    assert numbers > 1 << 31
    needed = 12 * numbers + 4 * GIB  # gx, the product that it is copied from, outputs
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of free memory on the device, which has {free / GIB:.0f}")
    case = target.of(Case(cell, T=T, B=B, I=2, H=H, dtype=torch.bfloat16))
    module, x = case.module(), torch.randn(T, B, 2, device=target.device, dtype=torch.bfloat16)
    some = torch.tensor([0, 1, 32_768, B - 2, B - 1])
    with torch.no_grad():
        found = module(x)[0][:, some].cpu()
        there = replace(case, device="cpu").module(torch.float64, "reference")
        wanted = there(x[:, some].cpu().double())[0]
    assert relative_rms(found, wanted) <= TOLERANCES[torch.bfloat16].forward


@on_both
@every_cell
def test_lengths_out_of_range(target: Target, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device nobody looks at them: that sequence is NaN, all others are as ever."""
    if target.device == "cpu":
        monkeypatch.setattr(target.sweeps, "in_sight", lambda lengths: False)
    module = target.layer(cell, 3, 7, bidirectional=True, dtype=torch.float64)
    x = target.random(5, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([3, 0, 5, -2, 6, 1], device=target.device)
    good = (lengths >= 1) & (lengths <= 5)

    def tensors(x: Tensor, lengths: Tensor) -> list[Tensor]:
        output, finals = module(x, lengths=lengths)
        return [output, *(finals if isinstance(finals, tuple) else (finals,))]

    for found, wanted in zip(tensors(x, lengths), tensors(x[:, good], lengths[good]), strict=True):
        assert relative_rms(found[:, good], wanted) <= TOLERANCES[torch.float64].forward
        assert found[:, ~good].isnan().all()


@on_both
@every_cell
def test_lengths_from_the_cpu_are_checked(target: Target, cell: str) -> None:
    module, x = target.layer(cell, 3, 7), target.random(5, 3, 3)
    lengths = torch.tensor([2, 5, 1])
    assert torch.equal(module(x, lengths=lengths)[0], module(x, lengths=lengths.to(target.device))[0])
    with pytest.raises(ValueError, match="lengths: expected 1 <= length <= T = 5, got 6 at index 1"):
        module(x, lengths=torch.tensor([2, 6, 1]))


@on_both
@every_cell
@every_dtype
@both_tiles
def test_bitwise_reproducible(target: Target, cell: str, dtype: torch.dtype, tile: str) -> None:
    case = target.of(Case(cell, T=9, B=33, I=17, H=65, layers=2, dtype=dtype, **COMMON))
    if target.device == "cpu":
        case = replace(case, T=2, B=5, H=9)
    with tile_of(target, tile):
        first = case.run(case.module())
        for _ in range(3):
            assert_same_bits(case.run(case.module()), first)


@on_both
@every_dtype
@both_tiles
@pytest.mark.parametrize("proj_size", [0, 8])
def test_misaligned_views(target: Target, dtype: torch.dtype, tile: str, proj_size: int) -> None:
    """Sizes that could be read by vectors, at addresses that could not."""
    case = target.of(Case(B=3, I=8, H=32, dtype=dtype, proj_size=proj_size, hx=True))
    module = case.module()
    misalign_parameters(module)
    with tile_of(target, tile):
        assert_close(case.run(module), exact(case), dtype)
        x, states = case.inputs()
        with torch.no_grad():
            expected = case.call(module, x, states)[1]
            found = case.call(module, misaligned(x), tuple(misaligned(s) for s in states))[1]
    for name, tensor in expected.items():
        assert relative_rms(found[name], tensor) <= TOLERANCES[dtype].forward


@on_both
@pytest.mark.usefixtures("nan_buffers")
@pytest.mark.parametrize(("cell", "proj_size"), [*((cell, 0) for cell in TORCH_CELLS), ("lstm", 3)])
@pytest.mark.parametrize("rows", ["padded", "packed", "lengths"])
def test_every_buffer_is_written(target: Target, cell: str, rows: str, proj_size: int) -> None:
    """What torch allocates is NaN until then."""
    check(target.of(Case(cell, layers=2, rows=rows, proj_size=proj_size, **COMMON)))
