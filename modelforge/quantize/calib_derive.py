"""Which activations follow, element by element, from others: a Relu's output need not be measured if its input is.

Works on protobufs; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from modelforge.graph.walk import STANDARD_DOMAINS

Floats = NDArray[np.float32]

SAME_NUMBERS = frozenset(("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"))
"""Operators that only give a tensor another shape or order."""


@dataclass(frozen=True)
class Derived:
    """A tensor whose every element is ``function`` of one element of ``source``, monotone or the identity (None)."""

    source: str
    function: Callable[[Floats], Floats] | None


def derive_rules(model: onnx.ModelProto, names: Sequence[str], allowed: Collection[str]) -> dict[str, Derived]:
    """What follows from what, each from the root of its chain.

    Args:
        names: the activations, in graph order.
        allowed: those that may be derived; the others are roots or nothing.
    """
    scalars = {
        tensor.name: float(numpy_helper.to_array(tensor).reshape(-1)[0])
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and prod(tensor.dims) == 1
        and len(tensor.dims) <= 1
        and tensor.data_location != TensorProto.EXTERNAL
    }
    producers = {name: node for node in model.graph.node for name in node.output[:1]}
    known = set(names)
    rules: dict[str, Derived] = {}
    for name in names:  # graph order: a source's own rule is there before it is asked for
        node = producers.get(name)
        rule = None if node is None or name not in allowed else _rule(node, scalars)
        if rule is not None and rule.source in known:
            rules[name] = _through(rules.get(rule.source), rule)
    return rules


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes by name, as Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _through(before: Derived | None, rule: Derived) -> Derived:
    """The rule from the root of the chain on."""
    if before is None:
        return rule
    first, then = before.function, rule.function
    if first is None or then is None:
        return Derived(before.source, first or then)
    return Derived(before.source, lambda x: then(first(x)))


def _rule(node: onnx.NodeProto, scalars: Mapping[str, float]) -> Derived | None:
    """How the output follows, element by element, from one input. IEEE arithmetic in float32: the same bits."""
    if node.domain not in STANDARD_DOMAINS:
        return None
    source, attributes = node.input[0] if node.input else "", attributes_of(node)
    if node.op_type in SAME_NUMBERS:
        return Derived(source, None)
    if node.op_type == "Relu":
        return Derived(source, lambda x: np.maximum(x, np.float32(0)))
    if node.op_type == "Clip":
        return _clip(node, attributes, scalars)
    if node.op_type == "HardSigmoid":
        alpha, beta = np.float32(attributes.get("alpha", 0.2)), np.float32(attributes.get("beta", 0.5))
        return Derived(source, lambda x: np.clip(alpha * x + beta, np.float32(0), np.float32(1)))
    if node.op_type == "LeakyRelu" and attributes.get("alpha", 0.01) >= 0:
        slope = np.float32(attributes.get("alpha", 0.01))
        return Derived(source, lambda x: np.where(x < 0, slope * x, x))
    if node.op_type in _ARITHMETIC and len(node.input) == 2:
        return _arithmetic(node, scalars)
    return None


def _clip(node: onnx.NodeProto, attributes: Mapping[str, Any], scalars: Mapping[str, float]) -> Derived | None:
    bounds = []
    for place, key, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        name = node.input[place] if len(node.input) > place else ""
        if name and name not in scalars:
            return None
        bounds.append(np.float32(scalars[name] if name else attributes.get(key, default)))
    low, high = bounds
    return Derived(node.input[0], lambda x: np.minimum(np.maximum(x, low), high))


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}


def _arithmetic(node: onnx.NodeProto, scalars: Mapping[str, float]) -> Derived | None:
    """With a constant scalar on one side; rounding keeps the order, so the extremes stay extremes."""
    compute = _ARITHMETIC[node.op_type]
    left, right = node.input
    if right in scalars and left not in scalars and not (node.op_type == "Div" and scalars[right] == 0):
        number = np.float32(scalars[right])
        return Derived(left, lambda x: compute(x, number))
    if left in scalars and right not in scalars and node.op_type != "Div":
        number = np.float32(scalars[left])
        return Derived(right, lambda x: compute(number, x))
    return None
