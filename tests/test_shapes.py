"""Sizes from 1 up, drawn at random: the kernels against torch.nn in float64, results and every gradient."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rnnkern.cells import TORCH_CELLS
from tests.tables import Case, assert_close

ODD = (1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33, 37)


@st.composite
def shapes(draw: st.DrawFn) -> Case:
    """A case of any cell and size."""
    cell = draw(st.sampled_from(list(TORCH_CELLS)))
    T, B = draw(st.integers(1, 12)), draw(st.sampled_from(ODD))
    I, H = draw(st.sampled_from(ODD)), draw(st.sampled_from((*ODD, 61, 67)))  # noqa: E741
    rows = draw(st.sampled_from(["padded", "unbatched", "packed", "sorted", "lengths"]))
    lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    if rows == "packed":
        lengths[draw(st.integers(0, B - 1))] = T
    return Case(
        cell, T, B, I, H,
        layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bias=draw(st.booleans()),
        proj_size=draw(st.integers(0, H - 1)) if cell == "lstm" else 0,
        hx=draw(st.booleans()),
        rows=rows,
        lengths=tuple(lengths),
    )  # fmt: skip


@given(shapes())
@settings(max_examples=120)
def test_any_size(case: Case) -> None:
    assert_close(case.run(case.module()), case.by_torch(), case.dtype)
