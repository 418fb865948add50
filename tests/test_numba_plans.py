"""How a call is cut, into blocks of sequences and chunks of steps, weights packed or in place: results do not tell."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rnnkern.backends import Cotangents, Layer, States, numba_cpu
from rnnkern.backends.numba_cpu import plans
from rnnkern.backends.numba_cpu.backward import UNITS_PART
from rnnkern.backends.numba_cpu.sweep import DEPTH_PART, ROWS_THAT_STAY
from rnnkern.backends.numba_cpu.vector import VECTOR_BYTES
from rnnkern.cells import TORCH_CELLS
from rnnkern.packing import positions
from tests.numba_support import (
    LIMIT,
    ODD,
    Parts,
    all_needs,
    bitwise_equal,
    but_weights,
    difference,
    layer_forms,
    oracle,
    plan_constants,
    random_gradients,
    random_layer,
    sweeps,
)

every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)
every_dtype = pytest.mark.parametrize("dtype", list(LIMIT), ids=str)

MOST, CHUNK, BACKWARD_CHUNK = 4, 9, 14
SMALL = {"MOST_SEQUENCES": MOST, "CHUNK_ROWS": CHUNK, "BACKWARD_CHUNK_ROWS": BACKWARD_CHUNK}
BATCHES = (1, 2, MOST - 1, MOST, MOST + 1, 2 * MOST + 3)


def spread_lengths(steps: int, batch: int) -> list[int]:
    """Lengths in no order, from 1 to all steps."""
    return [1 + (b * 7 + 3) % steps for b in range(batch - 1)] + [steps]


def in_every_form(cell: str, steps: int, batch: int, **sizes: Any) -> Iterator[Layer]:
    """Padded, with lengths, and packed; an LSTM with a projection too."""
    projections = (None, sizes["hidden"] - 2) if TORCH_CELLS[cell].has_c else (None,)
    lengths = spread_lengths(steps, batch)
    counts = [sum(n > t for n in lengths) for t in range(steps)]
    forms: tuple[dict[str, Any], ...] = ({}, {"lengths": lengths}, {"batch_sizes": counts})
    for outputs, form in product(projections, forms):
        yield random_layer(cell, steps=steps, batch=batch, outputs=outputs, **form, **sizes)


def chunk_edges(batch: int) -> list[int]:
    """Numbers of steps around one chunk and two."""
    block = -(-batch // -(-batch // MOST))
    found = {1, 2}
    for rows in (CHUNK, BACKWARD_CHUNK):
        chunk = max(1, rows // block)
        found |= {chunk - 1, chunk, chunk + 1, 2 * chunk + 1} - {0}
    return sorted(found)


def check(layer: Layer) -> None:
    dtype = layer.x.dtype
    assert difference(sweeps(layer), oracle(layer)) < LIMIT[dtype], f"{tuple(layer.x.shape)}, order {layer.order}"


@every_dtype
@every_cell
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.usefixtures("nan_buffers")
def test_sizes_around_blocks_and_chunks(cell: str, dtype: torch.dtype, batch: int) -> None:
    with plan_constants(**SMALL):
        for steps in chunk_edges(batch):
            for layer in in_every_form(cell, steps, batch, inputs=3, hidden=5, dtype=dtype):
                check(layer)


@every_dtype
@every_cell
@pytest.mark.usefixtures("nan_buffers")
def test_sizes_around_the_blocks_there_are(cell: str, dtype: torch.dtype) -> None:
    most = plans.MOST_SEQUENCES
    for steps, batch in ((1, 1), (2, 2), (1, most - 1), (3, most), (2, most + 1), (3, 2 * most + 3)):
        for layer in in_every_form(cell, steps, batch, inputs=3, hidden=5, dtype=dtype):
            check(layer)


@every_dtype
@every_cell
@pytest.mark.usefixtures("nan_buffers")
def test_numbers_of_rows_around_weights_in_place(cell: str, dtype: torch.dtype) -> None:
    """Of sizes that are whole vectors, where backward reads in place too, and of others."""
    lanes, most = 8 * VECTOR_BYTES // torch.finfo(dtype).bits, plans.FEW_ROWS_IN_PLACE
    backward = plans.BACKWARD_ROWS_IN_PLACE
    sizes = [(lanes, 2 * lanes, lanes), (lanes, lanes + 1, lanes), (lanes + 1, 5 * lanes, 3), (3, 5, 2)]
    rows = [(1, 1), (1, most), (1, most + 1), (most, 1), (most + 1, 1), (most // 2, 2), (most // 2 + 1, 2)]
    rows += [(1, backward), (1, backward + 1), (backward // 2, 2), (backward // 2 + 1, 2)]
    for (steps, batch), (inputs, hidden, outputs) in product(rows, sizes):
        for projected in {None, outputs if TORCH_CELLS[cell].has_c else None}:
            layer = random_layer(
                cell, steps=steps, batch=batch, inputs=inputs, hidden=hidden, outputs=projected, dtype=dtype,
                scale=hidden**-0.5,
            )  # fmt: skip
            check(layer)
    for one in (1, 2):
        lengths = [most // 3, one, most - 1 - most // 3]
        few: dict[str, Any] = {"steps": max(lengths), "batch": 3, "inputs": lanes, "hidden": lanes}
        check(random_layer(cell, **few, lengths=lengths, scale=lanes**-0.5, dtype=dtype))


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("most", [plans.FEW_ROWS_IN_PLACE, plans.ROWS_IN_PLACE, plans.BACKWARD_ROWS_IN_PLACE])
def test_where_weights_are_read_in_place(most: int, more: int) -> None:
    """What the sizes above rest on."""
    rows = most + more
    lanes = VECTOR_BYTES // 8
    layer = random_layer("lstm", steps=rows, batch=1, inputs=lanes, hidden=2 * lanes, outputs=lanes, directions=1)
    states = numba_cpu.forward(layer, save=True)
    forward = plans.ForwardPlan(layer, states)
    assert forward.packs == (rows > plans.FEW_ROWS_IN_PLACE)
    with plan_constants(MANY_WEIGHTS=1):
        assert plans.ForwardPlan(layer, states).packs == (rows > plans.ROWS_IN_PLACE)
    names: dict[str, Tensor | None] = dict.fromkeys(("dy", "dh_n", "dc_n", "dh0", "dc0", "dx0"))
    names |= dict.fromkeys(f"d{name}0" for name in plans.WEIGHTS)
    backward = plans.BackwardPlan(layer, states.saved, names)
    assert backward.packs == (rows > plans.BACKWARD_ROWS_IN_PLACE)
    with plan_constants(TOO_MANY_WEIGHTS=1):
        assert plans.BackwardPlan(layer, states.saved, names).packs == (rows > plans.BACKWARD_FEW_ROWS_IN_PLACE)
    odd = layer._replace(
        x=layer.x[..., :-1], weights=tuple(w._replace(weight_ih=w.weight_ih[:, :-1]) for w in layer.weights)
    )
    assert plans.BackwardPlan(odd, states.saved, names).packs


@every_cell
def test_layers_whose_products_are_taken_in_parts(cell: str) -> None:
    """Of more pre-activations than a part of a product or of an outer product holds, whole vectors of them and not;
    rows that stay while they meet all panels, and rows that do not; in panels and in place."""
    gates = len(TORCH_CELLS[cell].gates)
    for hidden in (-(-max(DEPTH_PART, UNITS_PART) // gates // 16) * 16 + 16, max(DEPTH_PART, UNITS_PART) // gates + 5):
        for steps, batch in ((3, 3), (2, ROWS_THAT_STAY + 3), (2, plans.MOST_SEQUENCES), (3, 50)):
            check(random_layer(cell, steps=steps, batch=batch, inputs=24, hidden=hidden, scale=hidden**-0.5))


CUTS = [
    {"MOST_SEQUENCES": most, "CHUNK_ROWS": chunk, "BACKWARD_CHUNK_ROWS": backward}
    for most, chunk, backward in (
        (64, 1, 1),
        (1, 1, 1),
        (1, 3, 7),
        (2, 64, 64),
        (3, 9, 4),
        (5, 5, 20),
        (64, 1000, 1000),
    )
]


@every_dtype
@every_cell
def test_a_cut_changes_no_bit(cell: str, dtype: torch.dtype) -> None:
    """Of anything but the gradients of weights, which are added up chunk by chunk."""
    wide = random_layer(cell, steps=7, batch=9, inputs=20, hidden=35, dtype=dtype)
    for layer in (*layer_forms(cell, dtype), *in_every_form(cell, 7, 13, inputs=7, hidden=19, dtype=dtype), wide):
        whole = sweeps(layer)
        for constants in CUTS:
            with plan_constants(**constants):
                cut = sweeps(layer)
                assert bitwise_equal(but_weights(cut), but_weights(whole)), constants
                assert difference(cut, whole) < LIMIT[dtype], constants
                assert bitwise_equal(sweeps(layer), cut), constants


@every_cell
def test_a_plan_serves_calls_that_look_alike(cell: str) -> None:
    """The second call's numbers and addresses are its own; calls of other sizes have plans of their own."""
    layers = [random_layer(cell, **ODD, seed=seed) for seed in range(3)]
    expected = []
    for layer in layers:
        numba_cpu._plans.clear()
        expected.append(sweeps(layer))
    numba_cpu._plans.clear()
    for layer, want in [*zip(layers, expected, strict=True)] * 2:
        assert bitwise_equal(sweeps(layer), want)
    count = len(numba_cpu._plans)
    sweeps(layers[0])
    assert len(numba_cpu._plans) == count
    for change in ({"steps": 3}, {"batch": 12}, {"inputs": 6}, {"hidden": 18}, {"directions": 1}, {"bias": False}):
        other = random_layer(cell, **(ODD | change))
        assert difference(sweeps(other), oracle(other)) < LIMIT[torch.float64]
        assert bitwise_equal(sweeps(layers[0]), expected[0])


def test_plans_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_cpu, "MOST_PLANS", 5)
    for hidden in (*range(1, 9), *range(1, 9)):
        layer = random_layer("rnn_tanh", hidden=hidden)
        assert difference(sweeps(layer), oracle(layer)) < LIMIT[torch.float64]
        assert len(numba_cpu._plans) <= 5


# Lengths


def packed_twin(layer: Layer) -> Layer:
    """The packed call of a call with lengths."""
    assert layer.order is not None
    assert layer.batch_sizes is not None
    step, b = positions(layer.batch_sizes)
    order = layer.order
    return layer._replace(
        x=layer.x[step, order[b]],
        h0=layer.h0[:, order],
        c0=None if layer.c0 is None else layer.c0[:, order],
        order=None,
    )


def packed_results(layer: Layer, results: Parts) -> list[Tensor | None]:
    """What a call with lengths gives as the packed call gives it."""
    assert layer.order is not None
    assert layer.batch_sizes is not None
    step, b = positions(layer.batch_sizes)
    order = layer.order
    y, h_n, c_n, gates, cells, dx, dh0, dc0, *of_weights = results
    rows = [None if t is None else t[step, order[b]] for t in (y, dx)]
    h_n, c_n, dh0, dc0 = (None if t is None else t[:, order] for t in (h_n, c_n, dh0, dc0))
    return [rows[0], h_n, c_n, gates, cells, rows[1], dh0, dc0, *of_weights]


@every_dtype
@every_cell
def test_lengths_in_place_are_the_packed_call(cell: str, dtype: torch.dtype) -> None:
    """To the bit, gradients of weights included; and rows past an end are zero, whatever the gradient there."""
    cases = [([2, 5, 1, 5, 3], 5), ([1], 1), ([3, 3], 4), ([1, 1, 7], 9), (spread_lengths(6, 70), 6)]
    for (lengths, steps), constants in product(cases, ({}, SMALL)):
        layer = random_layer(cell, steps=steps, batch=len(lengths), lengths=lengths, hidden=11, dtype=dtype)
        past = torch.arange(steps)[:, None] >= torch.tensor(lengths)
        layer.x[past] = torch.nan  # not read
        twin = packed_twin(layer)
        with plan_constants(**constants):
            states, of_twin = numba_cpu.forward(layer, save=True), numba_cpu.forward(twin, save=True)
            dy, dh_n, dc_n, _ = random_gradients(states)
            assert dy is not None
            dy[past] = torch.nan
            grads = numba_cpu.backward(layer, states.saved, Cotangents(dy, dh_n, dc_n), all_needs(layer))
            assert layer.order is not None
            packed_dy = packed_results(layer, (dy, *[None] * 7))[0]
            packed_h, packed_c = (None if g is None else g[:, layer.order] for g in (dh_n, dc_n))
            of_twin_grads = numba_cpu.backward(
                twin, of_twin.saved, Cotangents(packed_dy, packed_h, packed_c), all_needs(twin)
            )
        results = (*states, *grads)
        assert bitwise_equal(packed_results(layer, results), (*of_twin, *of_twin_grads))
        for rows in (states.y, grads[0]):
            assert rows is not None
            assert not rows[past].any()


@every_cell
def test_equal_lengths_are_none(cell: str) -> None:
    """All sequences as long as the input: the padded call, to the bit."""
    layer = random_layer(cell, steps=6, batch=7, lengths=[6] * 7)
    plain = layer._replace(batch_sizes=None, order=None)
    found, want = sweeps(layer), sweeps(plain)
    flat = [t.flatten(0, 1) if i in (3, 4) and t is not None else t for i, t in enumerate(want)]  # gates and cells
    assert bitwise_equal(found, flat)


def test_states_of_a_call_name_what_backward_reads() -> None:
    states = States(*map(torch.tensor, range(5)))
    assert [t.item() for t in states.saved if t is not None] == [0, 3, 4]
