"""Small graphs, range tables made by hand, and what tests ask of a QDQ model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from modelforge.quantize.ranges import Histogram, RangeTable, TensorRange

Array = NDArray[Any]


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    weights: Mapping[str, Array],
    opset: int = 17,
) -> Path:
    for index, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}_{index}"
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, feed: Mapping[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return list(
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, dict(feed))
    )


def observe(path: Path, feed: Mapping[str, Array]) -> RangeTable:
    """Ranges of every value in one run: what calibration gives, for graphs of a few nodes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(
        value
        for value in model.graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in known
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = {**feed, **dict(zip(names, session.run(names, dict(feed)), strict=True))}
    return RangeTable({name: range_of(name, array) for name, array in values.items()}, 1, "sha256:d", "sha256:m")


def range_of(name: str, array: Array) -> TensorRange:
    low, high = float(array.min()), float(array.max())
    axis = (1 if array.ndim == 4 else array.ndim - 1) if array.ndim > 1 else None
    others = tuple(place for place in range(array.ndim) if place != axis)
    return TensorRange(
        name=name,
        shape_rank=array.ndim,
        count=array.size,
        minimum=low,
        maximum=high,
        zeros=int((array == 0).sum()),
        nans=0,
        infs=0,
        bins=Histogram.spanning(low, high).plus(array),
        channel_absmax=None if axis is None else np.abs(array).max(axis=others).astype(np.float32),
        channel_axis=axis,
    )


class Qdq:
    """Questions about a written QDQ model."""

    def __init__(self, folder: Path) -> None:
        self.model = onnx.load(folder / "model.onnx")
        self.nodes = {node.name: node for node in self.model.graph.node}
        self.producer = {name: node for node in self.model.graph.node for name in node.output}
        self.values = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}

    def reads(self, node: str, index: int) -> onnx.NodeProto | None:
        """The DequantizeLinear that this input reads."""
        name = self.nodes[node].input[index]
        producer = self.producer.get(name)
        return producer if producer is not None and producer.op_type == "DequantizeLinear" else None

    def scale(self, node: str, index: int) -> Array:
        found = self.reads(node, index)
        assert found is not None, f"{node} reads input {index} in float"
        return self.values[found.input[1]]

    def zero_point(self, node: str, index: int) -> Array:
        found = self.reads(node, index)
        assert found is not None
        return self.values[found.input[2]]

    def constant(self, node: str, index: int) -> Array:
        found = self.reads(node, index)
        assert found is not None
        return self.values[found.input[0]]

    def quantized_values(self) -> set[str]:
        return {node.input[0] for node in self.model.graph.node if node.op_type == "QuantizeLinear"}
