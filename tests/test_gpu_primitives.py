"""Every primitive of csrc/prims.cuh on a GPU against its twin on the host, by the kernels of csrc/selftest.cu."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rnnkern.backends.cuda import extension
from tests import host
from tests.gpu_support import Target, on_both

# Zeros, ones, what is not finite; where float16 overflows; subnormal numbers of every type; halfway between two.
SPECIAL = torch.tensor(
    [
        *(0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan),
        *(65504.0, 65519.9, 65520.0, 65536.0, 3.4028e38, -3.4028e38),
        *(2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-126, 2.0**-133, 2.0**-149, 1e-40),
        *(1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-10, 2 - 2.0**-23),
    ]
)


def floats(count: int) -> Tensor:
    """Of every size, the special ones first."""
    drawn = torch.randn(count) * 2.0 ** torch.randint(-30, 30, (count,))
    drawn[: min(count, len(SPECIAL))] = SPECIAL[:count]
    return drawn


def whole_numbers(count: int) -> Tensor:
    """So small that every sum of products of them is exact, in every type."""
    return torch.randint(-8, 9, (count,)).float()


class Check(NamedTuple):
    """A self-test: what goes in, and what comes out of each kind (csrc/selftest.h)."""

    given: Callable[[], Tensor]
    size: int
    dtype: torch.dtype
    tolerance: float = 0.0  # relative to the largest; 0: equal to the bit


MMA_16, MMA_8 = 16 * 16 + 16 * 8 + 16 * 8, 16 * 8 + 8 * 8 + 16 * 8
CHECKS = {
    "indices": Check(lambda: torch.zeros(1), 3 * 2 * 2 * 2 * 4 * 8, torch.int32),
    "barrier": Check(lambda: floats(256), 256, torch.float32),
    "large_shared": Check(lambda: floats(256), 256, torch.float32),
    "syncwarp": Check(lambda: floats(32), 32, torch.float32),
    "shuffle_float": Check(lambda: floats(32), 64, torch.float32),
    "shuffle_double": Check(lambda: floats(32).double(), 64, torch.float64),
    "shuffle_int": Check(lambda: torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32), 64, torch.int32),
    "bfloat16": Check(lambda: floats(256), 256, torch.float32),
    "float16": Check(lambda: floats(256), 256, torch.float32),
    "to_tf32": Check(lambda: floats(256), 256, torch.float32),
    "copy_async": Check(lambda: floats(128), 128, torch.float32),
    "copy_async_groups": Check(lambda: floats(1024), 1024, torch.float32),
    "load_matrix_x4": Check(lambda: torch.randint(-(2**15), 2**15, (256,), dtype=torch.int16), 128, torch.int32),
    "load_matrix_x2": Check(lambda: torch.randint(-(2**15), 2**15, (128,), dtype=torch.int16), 64, torch.int32),
    "mma_bf16": Check(lambda: whole_numbers(MMA_16), 128, torch.float32),
    "mma_f16": Check(lambda: whole_numbers(MMA_16), 128, torch.float32),
    "mma_tf32": Check(lambda: whole_numbers(MMA_8), 128, torch.float32),
}
# Tensor cores add in an order of their own, and cut off what lies some bits behind the largest term.
ROUNDED = {
    "mma_bf16": Check(lambda: torch.randn(MMA_16), 128, torch.float32, 2e-6),
    "mma_f16": Check(lambda: torch.randn(MMA_16), 128, torch.float32, 2e-6),
    "mma_tf32": Check(lambda: torch.randn(MMA_8), 128, torch.float32, 2e-6),
}
ALL = {name: (name, check) for name, check in CHECKS.items()}
ALL |= {f"{name}-rounded": (name, check) for name, check in ROUNDED.items()}


def result(module: ModuleType, device: str, name: str, check: Check, given: Tensor) -> Tensor:
    """What the kernel of a module leaves, on the CPU."""
    source = given.to(device)
    out = torch.full((check.size,), -1, device=device).to(check.dtype)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    module.selftest(name, source.data_ptr(), out.data_ptr(), stream)
    return out.cpu()


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that -0.0 is not 0.0; but one NaN is as good as another."""
    if not tensor.is_floating_point():
        return tensor
    same = torch.where(tensor.isnan(), torch.nan, tensor)
    return same.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)


@on_both
@pytest.mark.parametrize("case", ALL)
def test_as_its_twin(target: Target, case: str) -> None:
    name, check = ALL[case]
    kernels = extension.load() if target.device == "cuda" else host.extension()
    given = check.given()
    found = result(kernels, target.device, name, check, given)
    wanted = result(host.extension(), "cpu", name, check, given)
    if check.tolerance:
        assert (found - wanted).abs().max() <= check.tolerance * wanted.abs().max()
    else:
        assert torch.equal(bits(found), bits(wanted))


def test_every_kernel_is_checked() -> None:
    """The table of csrc/selftest.h, by the names that its comment lists."""
    source = (host.ROOT / "csrc" / "selftest.cu").read_text()
    table = source[source.index("kSelfTests[]") :]
    named = {line.split('"')[1] for line in table.splitlines() if line.strip().startswith('{"')}
    assert named == set(CHECKS)
