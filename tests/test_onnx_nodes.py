"""Our results are what ONNX says that its nodes LSTM, GRU and RNN give: the node tests of the package onnx, whose
weights are mostly all alike, and random nodes with all inputs, which onnxruntime runs."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.backend.test.case import node as node_cases
from onnx.helper import get_attribute_value, make_graph, make_model_gen_version, make_node, make_opsetid
from onnx.helper import make_tensor_value_info as value_info
from torch import Tensor

from rnnkern import functional
from tests.option_layers import OPTION_BACKENDS
from tests.tables import TOLERANCES, relative_rms

OPERATORS = ("LSTM", "GRU", "RNN")
# The blocks of W, R and B, and of P, that are ours in our order: ONNX has i o f c, z r h, and i o f.
GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
PEEPHOLES = (0, 2, 1)

MAPPED = {"hidden_size", "direction", "layout", "linear_before_reset"}
# No node with one of these is run.
UNSUPPORTED = {
    "activations": "a cell's activations are its own, but for the relu of a plain RNN",
    "activation_alpha": "only other activations have parameters",
    "activation_beta": "only other activations have parameters",
    "clip": "pre-activations are not clipped",
    "input_forget": "input and forget gate are not coupled",
}

every_backend = pytest.mark.parametrize("backend", OPTION_BACKENDS)


def packaged_cases() -> dict[str, Any]:
    """The package's node tests of recurrent layers, by name.

    A module of theirs adds its own to one list when it is imported. `collect_testcases` imports those of all operators,
    which takes ten seconds and warns of overflows."""
    for operator in OPERATORS:
        importlib.import_module(f"{node_cases.__name__}.{operator.lower()}")
    found = {}
    for case in node_cases._NodeTestCases:
        if any(node.op_type in OPERATORS for node in case.model.graph.node):
            found[case.name] = case
    return found


def attributes(node: Any) -> dict[str, Any]:
    found = {a.name: get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


CASES = packaged_cases()
RUN = [
    name for name, case in CASES.items() if not any(attributes(n).keys() & UNSUPPORTED for n in case.model.graph.node)
]


def reordered(rows: Tensor, order: Sequence[int]) -> Tensor:
    blocks = rows.chunk(len(order))
    return torch.cat([blocks[k] for k in order])


def weights_of(operator: str, given: dict[str, Tensor], direction: int) -> list[Tensor]:
    """What `rnnkern.functional` takes for a direction, from W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H), P (D, 3*H)."""
    order = GATES[operator]
    found = [reordered(given[name][direction], order) for name in ("W", "R")]
    if "B" in given:
        found += [reordered(b, order) for b in given["B"][direction].chunk(2)]
    if "P" in given:
        found.append(reordered(given["P"][direction], PEEPHOLES))
    return found


def ours(node: Any, inputs: Sequence[Any], backend: str) -> dict[str, Tensor]:
    """All outputs of a node by the names of its specification, in float64; `inputs` are those that it has, in order."""
    formal = [i.name for i in onnx.defs.get_schema(node.op_type).inputs]
    present = [name for name, own in zip(formal, node.input, strict=False) if own]
    given = {name: torch.from_numpy(np.array(array)) for name, array in zip(present, inputs, strict=True)}
    given = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
    settings = attributes(node)
    batch_first, direction = bool(settings.get("layout", 0)), settings.get("direction", "forward")
    weights = [weights_of(node.op_type, given, d) for d in range(len(given["W"]))]
    states = [given[name] for name in ("initial_h", "initial_c") if name in given]
    if batch_first:
        states = [s.transpose(0, 1) for s in states]
    if direction == "reverse":  # we have it as the second of two
        weights, states = weights * 2, [s.repeat(2, 1, 1) for s in states]
    options: dict[str, Any] = {"lengths": given["sequence_lens"].long()} if "sequence_lens" in given else {}
    if node.op_type == "GRU":
        options["reset_after"] = bool(settings.get("linear_before_reset", 0))
    if "P" in given:
        options["peephole"] = True
    call: Callable[..., Any] = getattr(functional, node.op_type.lower())
    hx = None if not states else tuple(states) if node.op_type == "LSTM" else states[0]
    y, finals = call(
        given["X"], hx, weights, bidirectional=len(weights) == 2, batch_first=batch_first, backend=backend, **options
    )
    y = y.unflatten(-1, (len(weights), -1))  # (T, B, D, H) or (B, T, D, H)
    finals = finals if isinstance(finals, tuple) else (finals,)
    if direction == "reverse":
        y, finals = y[:, :, 1:], [s[1:] for s in finals]
    if batch_first:
        finals = [s.transpose(0, 1) for s in finals]
    else:
        y = y.transpose(1, 2)
    return dict(zip(("Y", "Y_h", "Y_c"), (y, *finals), strict=False))


def check(node: Any, found: dict[str, Tensor], expected: Sequence[Any]) -> None:
    """`expected` are the outputs that a node has, in order, in float32: the error is theirs alone."""
    names = [name for name, own in zip(("Y", "Y_h", "Y_c"), node.output, strict=False) if own]
    for name, array in zip(names, expected, strict=True):
        error = relative_rms(torch.from_numpy(np.array(array)), found[name])
        assert error <= TOLERANCES[torch.float32].forward, f"{name}: relative RMS error {error:.2e}"


@every_backend
@pytest.mark.parametrize("name", RUN)
def test_packaged_nodes(name: str, backend: str) -> None:
    (node,) = CASES[name].model.graph.node
    for inputs, expected in CASES[name].data_sets:
        check(node, ours(node, inputs, backend), expected)


def test_every_case_is_run_or_says_why_not() -> None:
    """By the attributes of its nodes, each of which is either mapped or has a reason in the table."""
    for operator in OPERATORS:
        assert set(onnx.defs.get_schema(operator).attributes) <= MAPPED | UNSUPPORTED.keys()
        assert sum(case.model.graph.node[0].op_type == operator for case in CASES.values()) >= 5
    for name in CASES.keys() - set(RUN):
        assert any(attributes(node).keys() & UNSUPPORTED for node in CASES[name].model.graph.node), name
    assert {"test_lstm_with_peepholes", "test_gru_batchwise", "test_lstm_bidirectional"} <= set(RUN)


T, B, I, H = 5, 4, 3, 6  # noqa: E741
LENGTHS = (5, 2, 1, 4)


def random_nodes() -> Iterator[Any]:
    """Each operator in each direction, with all inputs and outputs that it can have."""
    before_or_after: list[dict[str, Any]] = [{"linear_before_reset": value} for value in (0, 1)]
    for operator in OPERATORS:
        schema = onnx.defs.get_schema(operator)
        names = [i.name for i in schema.inputs], [o.name for o in schema.outputs]
        for direction in ("forward", "reverse", "bidirectional"):
            for extra in before_or_after if operator == "GRU" else [{}]:
                label = "-".join((operator, direction, *(f"{k}={v}" for k, v in extra.items())))
                node = make_node(operator, *names, hidden_size=H, direction=direction, **extra)
                yield pytest.param(node, id=label)


def random_inputs(node: Any) -> dict[str, Any]:
    """Those of a node by name."""
    directions, rows = 1 + (attributes(node)["direction"] == "bidirectional"), len(GATES[node.op_type]) * H
    shapes = {
        "X": (T, B, I), "W": (directions, rows, I), "R": (directions, rows, H), "B": (directions, 2 * rows),
        "initial_h": (directions, B, H), "initial_c": (directions, B, H), "P": (directions, 3 * H),
    }  # fmt: skip
    draw = np.random.default_rng(0)
    found: dict[str, Any] = {name: draw.normal(size=shape, scale=0.7).astype("f4") for name, shape in shapes.items()}
    found["sequence_lens"] = np.array(LENGTHS, "i4")
    return {name: found[name] for name in node.input}


@every_backend
@pytest.mark.parametrize("node", list(random_nodes()))
def test_random_nodes_by_onnxruntime(node: Any, backend: str) -> None:
    inputs = random_inputs(node)
    types = {"f": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT32}
    graph = make_graph(
        [node],
        node.op_type,
        [value_info(name, types[array.dtype.kind], array.shape) for name, array in inputs.items()],
        [value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output],
    )
    model = make_model_gen_version(graph, opset_imports=[make_opsetid("", 14)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    check(node, ours(node, list(inputs.values()), backend), session.run(None, inputs))
