"""Which quantized layers INT8 makes slower than float: runs of layers between float operators, looked at as one.

A run pays for two conversions and for its depthwise layers, and gains by its long sums. Reads a dialect's rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import onnx_ir

from modelforge.quantize.dialects.rules import Dialect

_KEEPS_INTEGERS = frozenset({"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"})


def slower_in_int8(tails: Mapping[onnx_ir.Node, onnx_ir.Value], rules: Dialect) -> dict[onnx_ir.Node, str]:
    """Why nodes are not worth quantizing; all of a run, or none of it.

    A run is what hands INT8 on without a float operator in between. It gains where its multiplications in long sums
    (at least ``rules.shortest_sum`` terms) outweigh the others, a depthwise one counted ``rules.depthwise_cost`` times.

    Args:
        tails: the layers with a weight that the dialect would quantize, in graph order, and where each one's INT8 is
            handed on: its output, or that of what is fused into it.
    """
    if not rules.shortest_sum:
        return {}
    found: dict[onnx_ir.Node, str] = {}
    for run in _runs(tails):
        gain = cost = 0.0
        for node in run:
            terms, depthwise = _terms(node)
            work = terms * _elements(node.outputs[0])
            if depthwise:
                cost += work * rules.depthwise_cost
            elif terms < rules.shortest_sum:
                cost += work
            else:
                gain += work
        if cost > gain:
            reason = (
                f"INT8 is no faster here: short sums, {cost / (cost + gain):.0%} of the work between float operators"
            )
            found.update(dict.fromkeys(run, reason))
    # An INT8 model was asked for: where none would be left, it is a slow one, and the race says so.
    return found if len(found) < len(tails) else {}


def _runs(tails: Mapping[onnx_ir.Node, onnx_ir.Value]) -> list[list[onnx_ir.Node]]:
    """The quantized layers by the run that they stand in, in graph order."""
    heads = {node: node for node in tails}

    def head(node: onnx_ir.Node) -> onnx_ir.Node:
        while heads[node] is not node:
            node = heads[node]
        return node

    for node, tail in tails.items():
        for reader in _readers(tail):
            if reader in heads:
                heads[head(reader)] = head(node)
    runs: dict[onnx_ir.Node, list[onnx_ir.Node]] = {}
    for node in tails:
        runs.setdefault(head(node), []).append(node)
    return list(runs.values())


def _readers(value: onnx_ir.Value) -> list[onnx_ir.Node]:
    """What reads the value as it is, behind operators that hand integers on."""
    found: list[onnx_ir.Node] = []
    for use in value.uses():
        if use.idx == 0 and use.node.op_type in _KEEPS_INTEGERS and use.node.domain == "":
            found += _readers(use.node.outputs[0])
        elif use.idx == 0:
            found.append(use.node)
    return found


def _terms(node: onnx_ir.Node) -> tuple[int, bool]:
    """How many products each output element sums up, and whether the layer is a depthwise Conv."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    shape = weight.const_value.numpy().shape
    if node.op_type == "Conv":
        return prod(shape[1:]), shape[1] == 1 and node.attributes.get_int("group", 1) == shape[0]
    if node.op_type == "ConvTranspose":
        return shape[0] // node.attributes.get_int("group", 1), False
    trans_b = node.attributes.get_int("transB", 0)
    return (shape[-1] if trans_b else shape[-2] if len(shape) > 1 else shape[0]), False


def _elements(value: onnx_ir.Value) -> int:
    """Of the output, sizes that are open left out: they are the same for all layers of a run."""
    count = 1
    for size in [] if value.shape is None else list(value.shape):
        count *= size if isinstance(size, int) else 1
    return count
