"""Which nodes FP16 would overflow, from the ranges of a calibration: they stay in FP32."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

from modelforge.quantize.ranges import RangeTable

LARGEST = 32752.0
"""Half of the largest FP16 number: the samples do not show the largest value there is."""


def float_activations(model: Path) -> list[str]:
    """Names of all FP32 values of a prepared model that depend on its inputs, in graph order."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(model, load_external_data=False)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output, *graph.input]}
    constants = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in constants]
    varying = set(names)
    for node in graph.node:
        if varying.intersection(node.input):
            varying.update(node.output)
            names += node.output
    return [name for name in names if types.get(name) == TensorProto.FLOAT]


def overflowing(model: Path, table: RangeTable) -> dict[str, str]:
    """Why nodes of a prepared model must stay in FP32, by node name: a value they read or make is beyond FP16."""
    found: dict[str, str] = {}
    for node in onnx.load(model, load_external_data=False).graph.node:
        for name in [*node.input, *node.output]:
            if name in table.tensors and table.tensors[name].absmax > LARGEST:
                found[node.name] = f"{name} reaches {table.tensors[name].absmax:.4g}, beyond half of what FP16 holds"
                break
    return found
