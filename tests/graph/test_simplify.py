"""onnxsim, held to operators that other runtimes have, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from modelforge.graph.simplify import simplify

TOKENS, WIDTH, HEADS = 8, 16, 2


def attention(path: Path) -> Path:
    """Self-attention as exporters write it: three products, reshapes, transposes, softmax."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.normal(size=(WIDTH, WIDTH)).astype(np.float32), f"{part}.w") for part in "qkvo"
    ]
    weights += [numpy_helper.from_array(random.normal(size=WIDTH).astype(np.float32), f"{part}.b") for part in "qkvo"]
    weights += [
        numpy_helper.from_array(np.array([1, TOKENS, HEADS, WIDTH // HEADS]), "heads"),
        numpy_helper.from_array(np.array([1, TOKENS, WIDTH]), "joined"),
        numpy_helper.from_array(np.array((WIDTH // HEADS) ** -0.5, np.float32), "scale"),
    ]
    nodes = []
    for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", ["x", f"{part}.w"], [f"{part}0"]),
            helper.make_node("Add", [f"{part}0", f"{part}.b"], [f"{part}1"]),
            helper.make_node("Reshape", [f"{part}1", "heads"], [f"{part}2"]),
            helper.make_node("Transpose", [f"{part}2"], [f"{part}3"], perm=perm),
        ]
    nodes += [
        helper.make_node("MatMul", ["q3", "k3"], ["s0"]),
        helper.make_node("Mul", ["s0", "scale"], ["s1"]),
        helper.make_node("Softmax", ["s1"], ["s2"], axis=-1),
        helper.make_node("MatMul", ["s2", "v3"], ["o0"]),
        helper.make_node("Transpose", ["o0"], ["o1"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["o1", "joined"], ["o2"]),
        helper.make_node("MatMul", ["o2", "o.w"], ["o3"]),
        helper.make_node("Add", ["o3", "o.b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, TOKENS, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, TOKENS, WIDTH])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def test_attention_stays_in_the_standard_domain(tmp_path: Path) -> None:
    """onnxsim fuses it into com.microsoft's Attention, which no compiler but ONNX Runtime reads."""
    simplify(attention(tmp_path / "model.onnx"), tmp_path / "out.onnx")
    nodes = onnx.load(tmp_path / "out.onnx").graph.node
    assert {node.domain for node in nodes} == {""}
    assert "Softmax" in {node.op_type for node in nodes}
