"""rnnkern's modules give what torch.nn's give, results and every gradient: defaults, each option alone, and pairs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence

import rnnkern
from rnnkern.cells import TORCH_CELLS
from tests.tables import KERNEL_BACKENDS, Case, Outcome, assert_close, cases, cell_class, nonlinearity, relative_rms

ALL = dict(cases())


def has_twin(case: Case) -> bool:
    """Whether torch.nn in float64 is the judge: not of low precision, nor of dropout masks drawn for padded rows."""
    return case.dtype in (torch.float32, torch.float64) and not (case.rows == "lengths" and case.dropout)


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if has_twin(case)])
def test_parity(name: str) -> None:
    case = ALL[name]
    outcome = case.run(case.module())
    assert {tensor.dtype for tensor in outcome.results.values()} == {case.dtype}
    assert_close(outcome, case.by_torch(), case.dtype)


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if not has_twin(case)])
def test_against_the_oracle(name: str) -> None:
    case = ALL[name]
    outcome = case.run(case.module())
    assert {tensor.dtype for tensor in outcome.results.values()} == {case.dtype}
    assert_close(outcome, case.by_oracle(), case.dtype)


# A case in which everything is at work.
FULL = {
    cell: Case(cell, layers=2, bidirectional=True, hx=True, proj_size=3 if cell == "lstm" else 0)
    for cell in TORCH_CELLS
}
every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)


@every_cell
@pytest.mark.parametrize("rows", ["packed", "sorted"])
def test_packed_output_has_the_form_of_its_input(cell: str, rows: str) -> None:
    case = replace(FULL[cell], rows=rows)
    ours, theirs = (case.call(module, *case.inputs())[0] for module in (case.module(), case.torch_module()))
    assert type(ours) is PackedSequence
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        assert own is other is None or (own is not None and other is not None and torch.equal(own, other))


@every_cell
def test_lengths_keep_the_padded_size(cell: str) -> None:
    """No sequence is as long as the input; outputs past a length are zero."""
    case = replace(FULL[cell], rows="lengths", lengths=(1, 3, 2, 3, 1))
    outcome = case.run(case.module())
    assert outcome.results["output"].shape[:2] == (case.T, case.B)
    for b, length in enumerate(case.lengths):
        assert not outcome.results["output"][length:, b].any()
    assert_close(outcome, case.by_torch(), case.dtype)


@every_cell
def test_what_lies_past_a_length_is_not_read(cell: str) -> None:
    case = replace(FULL[cell], rows="lengths")
    x, states = case.inputs()
    dirty = x.detach().clone()
    for b, length in enumerate(case.lengths):
        dirty[length:, b] = torch.nan
    module = case.module()
    _, clean = case.call(module, x, states)
    dirty.requires_grad_()
    _, found = case.call(module, dirty, states)
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    sum(t.sum() for t in found.values()).backward()  # type: ignore[union-attr]
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@every_cell
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("given", [None, torch.float32], ids=["float64", "float32"])
def test_cells(cell: str, backend: str, given: torch.dtype | None) -> None:
    """One step, batched and not, with states and without."""
    dtype = given or torch.float64
    torch.manual_seed(1)
    ours = cell_class(rnnkern, cell)(3, 7, dtype=dtype, backend=backend, **nonlinearity(cell))
    theirs = cell_class(nn, cell)(3, 7, dtype=torch.float64, **nonlinearity(cell))
    theirs.load_state_dict(ours.state_dict())
    for shape in ((5,), ()):
        leaves = [torch.randn(*shape, n, dtype=dtype, requires_grad=True) for n in (3, 7, 7)]
        for with_states in (True, False):
            outcomes = []
            for module in (ours, theirs):
                x, *states = (leaf.detach().to(module.weight_ih.dtype).requires_grad_() for leaf in leaves)
                hx = tuple(states) if TORCH_CELLS[cell].has_c else states[0]
                found = module(x, hx if with_states else None)
                found = found if isinstance(found, tuple) else (found,)
                module.zero_grad()
                sum((t * t).sum() for t in found).backward()
                gradients = {"x": x.grad, "h": states[0].grad, "c": states[1].grad}
                gradients |= {name: p.grad for name, p in module.named_parameters()}
                outcomes.append(Outcome({str(i): t.detach() for i, t in enumerate(found)}, gradients))
            assert_close(outcomes[0], outcomes[1], dtype)


@every_cell
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_cells_without_a_sequence(cell: str, backend: str) -> None:
    """B = 0, where torch.nn's GRUCell and RNNCell fail."""
    module = cell_class(rnnkern, cell)(3, 7, backend=backend, **nonlinearity(cell))
    x = torch.randn(0, 3, requires_grad=True)
    found = module(x)
    found = found if isinstance(found, tuple) else (found,)
    assert [tuple(t.shape) for t in found] == [(0, 7)] * TORCH_CELLS[cell].states
    found[0].sum().backward()
    assert x.grad is not None
    assert not any(p.grad.any() for p in module.parameters())


# Each takes a tensor to one of another layout in memory and the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "batch_last": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda t: torch.cat([t, t], -1)[..., t.shape[-1] :],
    "gaps": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}
BROADCASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_features": lambda t: t[..., :1].expand_as(t),
    "expanded_batch": lambda t: t[:, :1].expand_as(t),
    "expanded_first": lambda t: t[:1].expand_as(t),
}


@every_cell
@pytest.mark.parametrize("layout", [*LAYOUTS, *BROADCASTS])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layout_in_memory(cell: str, layout: str, batch_first: bool) -> None:
    """The input, the states and the incoming gradients in `layout`, against the same numbers in one block."""
    change = (LAYOUTS | BROADCASTS)[layout]
    case = replace(FULL[cell], batch_first=batch_first)
    x, states = case.inputs()
    module = case.module()
    outcomes = []
    for bring in (change, lambda t: change(t).contiguous()):
        leaves = [bring(t.detach()).requires_grad_() for t in (x, *states)]
        assert bring is not change or not leaves[0].is_contiguous()
        _, results = case.call(module, leaves[0], tuple(leaves[1:]))
        torch.manual_seed(5)
        cotangents = [bring(torch.randn_like(r, memory_format=torch.contiguous_format)) for r in results.values()]
        module.zero_grad()
        torch.autograd.backward(list(results.values()), cotangents)
        gradients = {str(i): leaf.grad for i, leaf in enumerate(leaves)}
        gradients |= {name: p.grad for name, p in module.named_parameters()}
        outcomes.append(Outcome({n: r.detach() for n, r in results.items()}, gradients))
    assert_close(outcomes[0], outcomes[1], case.dtype)


@every_cell
@pytest.mark.parametrize("rows", ["padded", "packed", "lengths"])
def test_parts_of_the_results_alone(cell: str, rows: str) -> None:
    """Gradients of the output alone, or of one final state alone."""
    case = replace(FULL[cell], rows=rows)
    for name in ("output", "h_n", "c_n")[: 1 + case.states]:
        found = []
        for module in (case.module(), case.torch_module()):
            x, states = case.inputs()
            _, results = case.call(module, x, states)
            leaves = [x, *states, *module.parameters()]
            found.append(torch.autograd.grad((results[name] ** 2).sum(), leaves, allow_unused=True))
        for own, other in zip(*found, strict=True):
            expected = torch.zeros_like(own) if other is None and own is not None else other
            assert own is expected is None or relative_rms(own, expected) < 1e-12


@every_cell
def test_frozen_parameters(cell: str) -> None:
    """Each leaf frozen by itself: its gradient is None, the others' are the same to the bit."""
    case = FULL[cell]
    everything = case.run(case.module()).gradients
    for frozen in everything:
        module = case.module()
        x, states = case.inputs()
        leaves = {"input": x, **dict(zip(("h0", "c0"), states, strict=False)), **dict(module.named_parameters())}
        leaves[frozen].requires_grad_(False)
        _, results = case.call(module, x, states)
        generator = torch.Generator().manual_seed(4)
        cotangents = [torch.randn(r.shape, dtype=torch.float64, generator=generator) for r in results.values()]
        torch.autograd.backward(list(results.values()), cotangents)
        for name, leaf in leaves.items():
            expected = everything[name]
            assert expected is not None
            if name == frozen:
                assert leaf.grad is None
            else:
                assert leaf.grad is not None, name
                assert torch.equal(leaf.grad, expected), name


@every_cell
def test_no_gradient_wanted(cell: str) -> None:
    case = FULL[cell]
    module = case.module().requires_grad_(False)
    x, states = case.inputs()
    _, expected = case.call(case.module(), x, states)
    _, found = case.call(module, x.detach(), tuple(s.detach() for s in states))
    assert not any(t.requires_grad for t in found.values())
    assert all(relative_rms(found[name], expected[name].detach()) < 1e-12 for name in found)


@every_cell
def test_tied_weights(cell: str) -> None:
    case = replace(FULL[cell], proj_size=0)

    def tie(module: Any) -> Any:
        module.weight_hh_l1 = module.weight_hh_l0
        module.bias_hh_l0 = module.bias_ih_l0
        module.weight_hh_l0_reverse = module.weight_hh_l0
        return module

    assert_close(case.run(tie(case.module())), case.run(tie(case.torch_module())), case.dtype)


@every_cell
def test_weight_norm(cell: str) -> None:
    case = FULL[cell]

    def norm(module: Any) -> Any:
        for name in ("weight_ih_l0", "weight_hh_l1_reverse"):
            weight_norm(module, name)
        return module

    outcomes = []
    for build in (case.module, case.torch_module):
        module = norm(build())
        before = case.run(module)
        with torch.no_grad():
            module.parametrizations.weight_ih_l0.original0.mul_(2)  # seen at the next call
        after = case.run(module)
        assert relative_rms(after.results["output"], before.results["output"]) > 1e-3
        outcomes.append(after)
    assert_close(outcomes[0], outcomes[1], case.dtype)


@every_cell
def test_functional(cell: str) -> None:
    case = FULL[cell]
    module = case.module()
    function = getattr(rnnkern.functional, cell.partition("_")[0])
    x, states = case.inputs()
    hx = states if len(states) > 1 else states[0]
    output, finals = function(x, hx, module.all_weights, bidirectional=True, backend="numba", **nonlinearity(cell))
    expected, expected_finals = module(x, hx)
    for own, other in ((output, expected), *zip(finals, expected_finals, strict=True)):
        assert torch.equal(own, other)
