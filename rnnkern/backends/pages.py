"""Memory pages of what a call keeps for backward.

malloc takes 32 MiB or more from the system at every call and gives it back afterwards, so that the first write to each
of its pages is a fault, and faults of 4 KiB pages can cost a quarter of a call. Linux has pages of 2 MiB for those who
ask.
"""

import ctypes
import sys

from torch import Tensor

HUGE_PAGE = 2 << 20
LEAST_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX: what is smaller comes from memory that malloc holds
MADV_HUGEPAGE = 14

_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


def in_huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, not yet written, in huge pages where the system has them. It is free to refuse: then pages are
    small, and nothing else changes."""
    if _madvise is not None and tensor.nbytes >= LEAST_BYTES:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        last = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE)
    return tensor
