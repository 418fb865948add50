"""The same layers as an ONNX model, made node by node, for onnxruntime. Inference in float32 only.

ONNX has other gate orders than torch (LSTM i o f g, GRU z r n), one vector for both biases, and puts the direction
before the batch in a layer's output: Y is (T, D, B, H).
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks.rivals import CELLS, Problem, named_states

# torch's gates in ONNX's order
GATE_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
STATES = {"lstm": ("h", "c"), "gru": ("h",), "rnn": ("h",)}


def reorder(cell: str, rows: Tensor) -> NDArray[np.float32]:
    """(G*H, ...) with the gates in torch's order -> the same in ONNX's."""
    gates = rows.detach().chunk(len(GATE_ORDER[cell]))
    return torch.cat([gates[gate] for gate in GATE_ORDER[cell]]).numpy()


def layer_weights(cell: str, module: nn.Module, layer: int, directions: int) -> dict[str, NDArray[np.float32]]:
    """W (D, G*H, I), R (D, G*H, H) and B (D, 2*G*H) of one layer."""
    ends = ["", "_reverse"][:directions]

    def rows(name: str, end: str) -> NDArray[np.float32]:
        return reorder(cell, getattr(module, f"{name}_l{layer}{end}"))

    return {
        "W": np.stack([rows("weight_ih", end) for end in ends]),
        "R": np.stack([rows("weight_hh", end) for end in ends]),
        "B": np.stack([np.concatenate([rows("bias_ih", end), rows("bias_hh", end)]) for end in ends]),
    }


def make_model(problem: Problem) -> onnx.ModelProto:
    """A model from x (T, B, I) and, if ragged, lengths (B,) to output (T, B, D*H) and the states (layers*D, B, H)."""
    cell, shape = problem.cell, problem.shape
    directions = 2 if shape.bidirectional else 1
    states = STATES[cell]
    attributes: dict[str, Any] = {
        "hidden_size": shape.H,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if cell == "gru":
        attributes["linear_before_reset"] = 1
    nodes = []
    # what Squeeze or Reshape is told: the axis D, or (T, B, D*H)
    constants = {"joined": np.array([0, 0, -1] if shape.bidirectional else [1])}
    flow = "x"
    for layer in range(shape.layers):
        weights = layer_weights(cell, problem.module, layer, directions)
        constants |= {f"{name}{layer}": value for name, value in weights.items()}
        inputs = [flow, *(f"{name}{layer}" for name in weights), "lengths" if shape.ragged else ""]
        outputs = [f"Y{layer}", *(f"{state}{layer}" for state in states)]
        nodes.append(helper.make_node(CELLS[cell], inputs, outputs, **attributes))
        flow = "output" if layer == shape.layers - 1 else f"x{layer + 1}"
        if directions == 1:
            nodes.append(helper.make_node("Squeeze", [f"Y{layer}", "joined"], [flow]))
        else:  # (T, D, B, H) -> (T, B, D, H) -> (T, B, D*H)
            nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"swapped{layer}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"swapped{layer}", "joined"], [flow]))
    for state in states:
        parts = [f"{state}{layer}" for layer in range(shape.layers)]
        nodes.append(helper.make_node("Concat", parts, [f"{state}_n"], axis=0))
    ins = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [shape.T, shape.B, shape.I])]
    if shape.ragged:
        ins.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [shape.B]))
    sizes = {"output": [shape.T, shape.B, directions * shape.H]}
    sizes |= {f"{state}_n": [directions * shape.layers, shape.B, shape.H] for state in states}
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    graph = helper.make_graph(
        nodes, cell, ins, outs, [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model


class OnnxRival:
    """onnxruntime on the problem's padded input, with the lengths if ragged."""

    def __init__(self, problem: Problem, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A pool that spins between calls would take the processor from the rival that is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = make_model(problem).SerializeToString()
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.problem = problem
        self.feed = {"x": problem.x.numpy()}
        if problem.shape.ragged:
            self.feed["lengths"] = problem.lengths.int().numpy()

    def __call__(self) -> Any:
        """Output and final states as arrays."""
        return self.session.run(None, self.feed)

    def results(self) -> dict[str, Tensor]:
        """Output and final states by name."""
        output, *states = (torch.from_numpy(value) for value in self())
        return {"output": self.problem.real(output)} | named_states(tuple(states))
