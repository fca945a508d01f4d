"""What FP16 would overflow stays in FP32, by the ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.half import float_activations, overflowing


def layer_norm_like(folder: Path) -> Path:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"], "square"),
        helper.make_node("ReduceSum", ["square", "axes"], ["sum"], "sum"),
        helper.make_node("Mul", ["sum", "share"], ["mean"], "mean"),
        helper.make_node("Sqrt", ["mean"], ["y"], "root"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [
            numpy_helper.from_array(np.array([1], np.int64), "axes"),
            numpy_helper.from_array(np.array([1 / 512], np.float32), "share"),
        ],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_who_makes_and_who_reads_a_large_value_stays(tmp_path: Path) -> None:
    model = layer_norm_like(tmp_path)
    assert float_activations(model) == ["x", "square", "sum", "mean", "y"]
    dice = np.random.RandomState(0)
    for scale, kept in ((20.0, {"sum", "mean"}), (1.0, set())):
        np.savez(tmp_path / "data.npz", x=(dice.randn(4, 512) * scale).astype(np.float32))
        table = calibrate(model, tmp_path / "data.npz", tensors=float_activations(model))
        found = overflowing(model, table)
        assert set(found) == kept
        assert all("sum reaches" in reason for reason in found.values())
