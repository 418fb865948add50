"""Huge pages are asked for where they pay, and only inside the tensor."""

import ctypes

import pytest
import torch

from rnnkern.backends import pages


@pytest.mark.parametrize(("size", "asked"), [(pages.LEAST_BYTES, True), (pages.LEAST_BYTES - 1, False)])
def test_whole_pages_inside_a_large_tensor(size: int, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[ctypes.c_void_p, ctypes.c_size_t, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda *arguments: calls.append(arguments))
    tensor = torch.empty(size, dtype=torch.uint8)
    assert pages.in_huge_pages(tensor) is tensor
    assert len(calls) == asked
    for first, length, advice in calls:
        assert first.value is not None
        assert first.value % pages.HUGE_PAGE == length.value % pages.HUGE_PAGE == 0
        assert tensor.data_ptr() <= first.value
        assert first.value + length.value <= tensor.data_ptr() + size
        assert advice == pages.MADV_HUGEPAGE
