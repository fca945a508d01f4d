"""Floating point operations and live memory of a graph whose shapes are known. Counts; runs nothing.

A multiply-add counts as two, as in the usual model tables; data movement counts as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import onnx
from onnx import helper

from modelforge.graph.walk import subgraphs

Shapes = Mapping[str, tuple[int | str, ...]]


class UnknownShape(Exception):
    """A shape that the count needs is not known."""


def flops(graph: onnx.GraphProto, shapes: Shapes, skip: set[str]) -> int | None:
    """Floating point operations of one run, None where a shape is unknown.

    Args:
        shapes: shape by tensor name, of subgraphs too.
        skip: outputs of nodes that do not run (foldable).
    """
    try:
        return _graph_flops(graph, shapes, skip)
    except UnknownShape:
        return None


def node_flops(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Floating point operations of one run of one node and its bodies, None where a shape is unknown."""
    try:
        return _node_flops(node, shapes, set())
    except UnknownShape:
        return None


def peak_activation_bytes(
    graph: onnx.GraphProto, shapes: Shapes, item_bytes: Mapping[str, int], skip: set[str]
) -> int | None:
    """The largest sum of live activations in bytes over the graph's own order, None where a shape is unknown.

    Inputs live until their last use, outputs until the end; weights and foldable values are not activations.
    What a subgraph needs inside is not counted.
    """
    last_use: dict[str, int] = {}
    for step, node in enumerate(graph.node):
        for name in reads(node):
            last_use[name] = step
    for value in graph.output:
        last_use[value.name] = len(graph.node)
    weights = {tensor.name for tensor in graph.initializer}
    try:
        live = {
            value.name: _bytes(value.name, shapes, item_bytes) for value in graph.input if value.name not in weights
        }
        total = sum(live.values())
        peak = total
        for step, node in enumerate(graph.node):
            for name in node.output:
                if name and name not in skip and name in last_use:
                    live[name] = _bytes(name, shapes, item_bytes)
                    total += live[name]
            peak = max(peak, total)
            for name in {*reads(node), *node.output}:
                if last_use.get(name, -1) <= step:
                    total -= live.pop(name, 0)
    except UnknownShape:
        return None
    return peak


def reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that its bodies capture from outside included (and those of the bodies' own)."""
    names = {name for name in node.input if name}
    for body in subgraphs(node):
        for inner in body.node:
            names |= reads(inner)
        names |= {value.name for value in body.output}
    return names


def _bytes(name: str, shapes: Shapes, item_bytes: Mapping[str, int]) -> int:
    # A string or a sequence has no fixed size: it counts as nothing.
    return _elements(name, shapes) * item_bytes[name] if item_bytes.get(name) else 0


def _elements(name: str, shapes: Shapes) -> int:
    return prod(_static(name, shapes))


def _static(name: str, shapes: Shapes) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or any(isinstance(size, str) for size in shape):
        raise UnknownShape(name)
    return tuple(int(size) for size in shape)


def _graph_flops(graph: onnx.GraphProto, shapes: Shapes, skip: set[str]) -> int:
    return sum(_node_flops(node, shapes, skip) for node in graph.node if not set(node.output) <= skip)


def _node_flops(node: onnx.NodeProto, shapes: Shapes, skip: set[str]) -> int:
    bodies = [_graph_flops(body, shapes, skip) for body in subgraphs(node)]
    if node.op_type == "If":
        return max(bodies, default=0)
    if bodies and any(bodies):
        return bodies[0] * _trips(node, shapes)
    rule = _RULES.get(node.op_type)
    if rule is not None:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        return rule(node, attributes, shapes)
    per_element = _PER_OUTPUT.get(node.op_type, 0)
    return per_element * _elements(node.output[0], shapes) if per_element else 0


def _trips(node: onnx.NodeProto, shapes: Shapes) -> int:
    """How often a body runs: a Scan's length; a Loop's is data, so it is not known."""
    if node.op_type != "Scan":
        raise UnknownShape(node.op_type)
    scanned = next(attribute.i for attribute in node.attribute if attribute.name == "num_scan_inputs")
    return _static(node.input[len(node.input) - scanned], shapes)[0]


def _conv(node: onnx.NodeProto, _: Mapping[str, Any], shapes: Shapes) -> int:
    # Each output element sums over the weight of one output channel: [M, C/group, k...].
    per_output = prod(_static(node.input[1], shapes)[1:])
    bias = 1 if len(node.input) > 2 and node.input[2] else 0
    return _elements(node.output[0], shapes) * (2 * per_output + bias)


def _conv_transpose(node: onnx.NodeProto, _: Mapping[str, Any], shapes: Shapes) -> int:
    # Each input element is spread over the weight of one input channel: [C, M/group, k...].
    spread = prod(_static(node.input[1], shapes)[1:])
    bias = _elements(node.output[0], shapes) if len(node.input) > 2 and node.input[2] else 0
    return 2 * _elements(node.input[0], shapes) * spread + bias


def _matmul(node: onnx.NodeProto, _: Mapping[str, Any], shapes: Shapes) -> int:
    return 2 * _elements(node.output[0], shapes) * _static(node.input[0], shapes)[-1]


def _gemm(node: onnx.NodeProto, attributes: Mapping[str, Any], shapes: Shapes) -> int:
    inner = _static(node.input[0], shapes)[0 if attributes.get("transA") else 1]
    bias = 1 if len(node.input) > 2 and node.input[2] else 0
    return _elements(node.output[0], shapes) * (2 * inner + bias)


def _einsum(node: onnx.NodeProto, attributes: Mapping[str, Any], shapes: Shapes) -> int:
    """Two operations for each point of the space that all the letters span (one contraction, not a path of them)."""
    equation = attributes["equation"].decode().replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if "." in equation or len(terms) > 2:
        raise UnknownShape("Einsum")
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        sizes.update(zip(term, _static(name, shapes), strict=True))
    return len(terms) * prod(sizes.values())


def _recurrent(gates: int) -> Callable[[onnx.NodeProto, Mapping[str, Any], Shapes], int]:
    def count(node: onnx.NodeProto, _: Mapping[str, Any], shapes: Shapes) -> int:
        # X: [steps, batch, input] (layout 1 swaps the first two); R: [directions, gates * hidden, hidden].
        steps, batch, size = _static(node.input[0], shapes)
        directions, _rows, hidden = _static(node.input[2], shapes)
        # Two matrix products and about four element-wise operations for each gate.
        return directions * steps * batch * gates * hidden * (2 * (size + hidden) + 4)

    return count


def _pool(node: onnx.NodeProto, attributes: Mapping[str, Any], shapes: Shapes) -> int:
    return _elements(node.output[0], shapes) * prod(int(size) for size in attributes["kernel_shape"])


def _by_input(per_element: int) -> Callable[[onnx.NodeProto, Mapping[str, Any], Shapes], int]:
    return lambda node, _, shapes: per_element * _elements(node.input[0], shapes)


_RULES: dict[str, Callable[[onnx.NodeProto, Mapping[str, Any], Shapes], int]] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
    "AveragePool": _pool,
    "MaxPool": _pool,
    "LpPool": _pool,
    "Sum": lambda node, _, shapes: (len(node.input) - 1) * _elements(node.output[0], shapes),
    **{name: _by_input(1) for name in ("GlobalAveragePool", "GlobalMaxPool", "ReduceMax", "ReduceMean", "ReduceMin")},
    **{name: _by_input(1) for name in ("ReduceSum", "ReduceProd", "ArgMax", "ArgMin", "CumSum")},
    **{name: _by_input(2) for name in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")},
}

_PER_OUTPUT: dict[str, int] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log"), 1),
    **dict.fromkeys(("Max", "Min", "Relu", "Clip", "Floor", "Ceil", "Round", "Sin", "Cos", "Erf", "Mod"), 1),
    **dict.fromkeys(("LeakyRelu", "PRelu", "ThresholdedRelu", "Sign", "QuantizeLinear", "DequantizeLinear"), 2),
    **dict.fromkeys(("HardSigmoid", "Elu", "Selu", "Celu", "Softplus", "Softsign", "BatchNormalization"), 3),
    **dict.fromkeys(("Sigmoid", "Tanh", "HardSwish", "Mish", "Swish"), 4),
    # max, subtract, exp, sum, divide
    **dict.fromkeys(("Softmax", "LogSoftmax"), 5),
    # mean, subtract, square, mean, rsqrt, scale, shift
    **dict.fromkeys(("InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"), 7),
    **dict.fromkeys(("MeanVarianceNormalization", "LRN", "Gelu", "Resize", "GridSample"), 7),
}
"""Operations for each output element; what is not here moves data and counts as nothing."""
