"""Small ONNX models, and targets, for the tests of Ascend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from modelforge.target import Registry, Target


def target(tag: str = "ascend-310p3") -> Target:
    return Registry().get(tag)


def conv_model(
    path: Path, batch: int | str = 1, *, opset: int = 13, half: bool = False, qdq: bool = False, name: str = "x"
) -> Path:
    """``x [batch, 3, 8, 8] -> Conv -> y``, in FP16 inside if asked for."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 3, 3, 3)).astype(np.float16 if half else np.float32)
    nodes, source = [], name
    if qdq:
        nodes += [
            helper.make_node("QuantizeLinear", [source, "s"], ["q"], name="quantize"),
            helper.make_node("DequantizeLinear", ["q", "s"], ["d"], name="dequantize"),
        ]
        source = "d"
    if half:
        nodes.append(helper.make_node("Cast", [source], ["h"], name="in", to=TensorProto.FLOAT16))
        source = "h"
    nodes.append(helper.make_node("Conv", [source, "w"], ["c" if half else "y"], name="conv", pads=[1, 1, 1, 1]))
    if half:
        nodes.append(helper.make_node("Cast", ["c"], ["y"], name="out", to=TensorProto.FLOAT))
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(0.1, np.float32), "s")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4, 8, 8])],
        weights if qdq else weights[:1],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path
