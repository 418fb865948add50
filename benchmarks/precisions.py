"""In which arithmetic a row is computed: the dtype of its tensors, and whether float32 may be multiplied as TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """What the column `dtype` of a record says."""

    dtype: torch.dtype
    # largest relative RMS difference of two implementations at default initialisation: a few times what each may err
    tolerance: float
    tf32: bool = False


PRECISIONS = {
    "float64": Precision(torch.float64, 1e-11),
    "float32": Precision(torch.float32, 1e-5),
    "tf32": Precision(torch.float32, 5e-3, tf32=True),
    "bfloat16": Precision(torch.bfloat16, 5e-2),
    "float16": Precision(torch.float16, 1e-2),
}
ON_CPU = ("float64", "float32", "bfloat16")
ON_GPU = ("float32", "tf32", "bfloat16", "float16")


@contextmanager
def fp32_products(switch: Any, tf32: bool) -> Iterator[None]:
    """Products of float32 in TF32 or not, by one of torch's switches (`torch.backends.cudnn.rnn`,
    `torch.backends.cuda.matmul`), which is set back."""
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
