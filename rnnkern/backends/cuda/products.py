"""torch's products around the sweeps, and the precision that they have."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any

import torch
from torch import Tensor


def tf32_allowed() -> bool:
    """Whether torch's switches for recurrent layers allow products of float32 in TF32."""
    cudnn = torch.backends.cudnn
    for switch in (cudnn.rnn.fp32_precision, cudnn.fp32_precision, torch.backends.fp32_precision):  # type: ignore[attr-defined]
        if switch != "none":
            return bool(switch == "tf32")
    return False


def precision(dtype: torch.dtype) -> str:
    """The sweeps' name for it."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else str(dtype).removeprefix("torch.")


class ProductSwitch:
    """torch's switch for its own products of float32 on a GPU, set as the sweeps are for the time of a call. It is one
    for all threads: calls that want the same share it, and the last one out puts back what was there before."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.users, self.wanted = 0, ""
        self.before: str | None = None  # None where nothing had to be changed

    @contextmanager
    def as_in_sweeps(self, x: Tensor) -> Iterator[None]:
        """Products in TF32 or not, as is allowed for recurrent layers."""
        if not (x.is_cuda and x.dtype == torch.float32):
            yield
            return
        wanted = "tf32" if tf32_allowed() else "ieee"
        with self.changed:
            self.changed.wait_for(lambda: self.users == 0 or self.wanted == wanted)
            if self.users == 0:
                self.wanted, self.before = wanted, self._change(wanted)
            self.users += 1
        try:
            yield
        finally:
            with self.changed:
                self.users -= 1
                if self.users == 0:
                    if self.before is not None:
                        matmul: Any = torch.backends.cuda.matmul
                        matmul.fp32_precision = self.before
                    self.changed.notify_all()

    @staticmethod
    def _change(wanted: str) -> str | None:
        """Sets the switch where it has to be, and returns what it was: "none" for what came from the switch for all."""
        matmul: Any = torch.backends.cuda.matmul
        everything: Any = torch.backends
        now = str(matmul.fp32_precision)
        if now == wanted or {now, wanted} == {"none", "ieee"}:  # "none" is float32 as well
            return None
        matmul.fp32_precision = wanted
        return "none" if now == everything.fp32_precision else now


products = ProductSwitch()


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed up and kept in out's dtype, which may be wider."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        out.copy_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
