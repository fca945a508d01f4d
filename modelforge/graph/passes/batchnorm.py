"""Fold BatchNormalization into the Conv, ConvTranspose or Gemm before it, in float64, written as the weight's own type.

Statistics such as a variance of 9.8e7 (PP-OCRv4 det) have no place in FP16: folded here, they never get there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

Array = NDArray[Any]

_FOLDED_INTO = ("Conv", "ConvTranspose", "Gemm")


class FoldBatchNormalization(InPlacePass):
    """``y = scale * (conv(x) - mean) / sqrt(var + epsilon) + bias`` becomes one Conv (Ioffe and Szegedy 2015).

    Left alone: training mode, statistics that are not initializers, and a Conv whose output something else reads.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        nodes = [
            node
            for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph)
            if node.op_type == "BatchNormalization" and node.domain == ""
        ]
        folded = [_fold(node) for node in nodes]  # all of them: `any` would stop at the first
        return PassResult(model, any(folded))


def _fold(norm: onnx_ir.Node) -> bool:
    source = norm.inputs[0]
    layer = source.producer() if source is not None else None
    if source is None or layer is None or layer.graph is not norm.graph or norm.graph is None:
        return False
    if layer.op_type not in _FOLDED_INTO or layer.domain != "" or not _is_inference(norm):
        return False
    if len(source.uses()) != 1 or source.is_graph_output():
        return False
    statistics = [_constant(value) for value in norm.inputs[1:5]]
    weight = _constant(layer.inputs[1])
    bias_value = layer.inputs[2] if len(layer.inputs) > 2 else None
    bias = None if bias_value is None else _constant(bias_value)
    if weight is None or any(value is None for value in statistics) or (bias_value is not None and bias is None):
        return False
    # A Gemm's C may also be [M, N] or [M, 1]: then it differs by row, and no bias by channel stands for it.
    if bias is not None and not (bias.size == 1 or bias.shape[-1] == bias.size):
        return False
    scale, shift, mean, variance = (np.asarray(value, np.float64) for value in statistics)
    factor = scale / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    folded = _scaled_weight(layer, weight.astype(np.float64), factor)
    if folded is None:
        return False
    offset = np.zeros(1) if bias is None else bias.astype(np.float64).reshape(-1) * _beta(layer)
    folded_bias = (offset - mean) * factor + shift
    with np.errstate(over="ignore"):  # looked at in the next line
        arrays = [folded.astype(weight.dtype), folded_bias.astype(weight.dtype)]
    if not all(np.isfinite(array).all() for array in arrays):
        return False
    _replace(norm, layer, source, arrays)
    return True


def _is_inference(norm: onnx_ir.Node) -> bool:
    extra = [value for value in norm.outputs[1:] if value.uses() or value.is_graph_output()]
    # Before opset 14 there was no training_mode; before 9, `spatial=0` meant statistics per element.
    return not extra and norm.attributes.get_int("training_mode", 0) == 0 and norm.attributes.get_int("spatial", 1) == 1


def _scaled_weight(layer: onnx_ir.Node, weight: Array, factor: Array) -> Array | None:
    """The weight times the factor of its output channel; None where the channels do not fit."""
    if layer.op_type == "Conv":  # [M, C/group, k...]
        axis, channels = 0, weight.shape[0]
    elif layer.op_type == "Gemm":  # [K, N], or [N, K] with transB
        axis = 0 if layer.attributes.get_int("transB", 0) else 1
        channels = weight.shape[axis]
    else:  # ConvTranspose [C, M/group, k...]: the group of an output channel follows from the input channel
        groups = layer.attributes.get_int("group", 1)
        if weight.shape[0] % groups or weight.shape[1] * groups != factor.size:
            return None
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        by_group = factor.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        return np.asarray((grouped * by_group).reshape(weight.shape))
    if channels != factor.size:
        return None
    return np.asarray(weight * factor.reshape([-1 if place == axis else 1 for place in range(weight.ndim)]))


def _beta(layer: onnx_ir.Node) -> float:
    return layer.attributes.get_float("beta", 1.0) if layer.op_type == "Gemm" else 1.0


def _replace(norm: onnx_ir.Node, layer: onnx_ir.Node, source: onnx_ir.Value, arrays: list[Array]) -> None:
    """Give the layer its own new weight and bias (the old may be shared), and take the normalization's place."""
    graph = norm.graph
    assert graph is not None
    output = norm.outputs[0]
    new = []
    for array, suffix in zip(arrays, ("weight", "bias"), strict=True):
        name = f"{output.name}/folded_{suffix}"
        tensor = onnx_ir.tensor(array, name=name)
        value = onnx_ir.val(name, dtype=tensor.dtype, shape=array.shape, const_value=tensor)
        graph.register_initializer(value)
        new.append(value)
    layer.resize_inputs(3)
    layer.replace_input_with(1, new[0])
    layer.replace_input_with(2, new[1])
    if layer.op_type == "Gemm":
        layer.attributes.pop("beta", None)
    output_name, shape, kind = output.name, output.shape, output.type
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    output.name = None
    source.name, source.shape, source.type = output_name, shape, kind


def _constant(value: onnx_ir.Value | None) -> Array | None:
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    array = value.const_value.numpy()
    return array if array.dtype.kind == "f" else None
