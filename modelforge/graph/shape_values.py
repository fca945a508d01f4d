"""Shape arithmetic worked out on known shapes: what onnx's own data propagation leaves open (Div, Range, Where, Floor).

Looks at small integer and float tensors only; a weight never passes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from modelforge.graph.walk import STANDARD_DOMAINS

Array = NDArray[Any]

MOST_ELEMENTS = 1024
"""Shape arithmetic is a handful of numbers; anchors and masks beyond this size are not worth working out."""


def known_values(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int | str, ...]], values: dict[str, Array]
) -> dict[str, Array]:
    """Every small tensor of ``graph`` that follows from ``values`` and from the shapes known so far, by name.

    ``values`` (initializers that are already known) is extended and returned.
    """
    for tensor in graph.initializer:
        _remember(values, tensor.name, partial(_read, tensor))
    for node in graph.node:
        if len(node.output) != 1 or node.output[0] in values or not _has_rule(node):
            continue
        if node.op_type == "Shape":
            _remember(values, node.output[0], partial(_shape_of, node, shapes))
        elif node.op_type == "Constant":
            _remember(values, node.output[0], partial(_constant, node))
        elif all(name in values or not name for name in node.input):
            inputs = [values.get(name) for name in node.input]
            _remember(values, node.output[0], partial(_RULES[node.op_type], inputs, _attrs(node)))
    return values


def _has_rule(node: onnx.NodeProto) -> bool:
    return node.domain in STANDARD_DOMAINS and (node.op_type in _RULES or node.op_type in ("Shape", "Constant"))


def _remember(values: dict[str, Array], name: str, compute: Callable[[], Array | None]) -> None:
    try:
        value = compute()
    except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError, AttributeError):
        return  # a form of the operator that the rules below do not know: then the value is not known
    if value is not None and value.size <= MOST_ELEMENTS:
        values[name] = value


def _read(tensor: onnx.TensorProto) -> Array | None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL or int(np.prod(tensor.dims)) > MOST_ELEMENTS:
        return None
    return np.asarray(numpy_helper.to_array(tensor))


def _shape_of(node: onnx.NodeProto, shapes: Mapping[str, tuple[int | str, ...]]) -> Array | None:
    shape = shapes.get(node.input[0])
    if shape is None:
        return None
    attributes = _attrs(node)
    part = shape[attributes.get("start", 0) : attributes.get("end", len(shape))]
    return None if any(isinstance(size, str) for size in part) else np.array(part, np.int64)


def _constant(node: onnx.NodeProto) -> Array | None:
    (attribute,) = node.attribute
    if attribute.name == "value":
        return _read(attribute.t)
    dtype = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    return np.array(helper.get_attribute_value(attribute), dtype[attribute.name])


def _attrs(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _axes(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Axes as an attribute (before opset 13) or as the second input."""
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(int(axis) for axis in inputs[1])
    return tuple(attributes["axes"]) if "axes" in attributes else None


def _slice(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array:
    data = inputs[0]
    if "starts" in attributes:
        starts, ends = attributes["starts"], attributes["ends"]
        axes, steps = attributes.get("axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = inputs[1].tolist(), inputs[2].tolist()
        axes = inputs[3].tolist() if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
        steps = inputs[4].tolist() if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    window = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        window[axis] = slice(start, None if step < 0 and end < -data.shape[axis] else end, step)
    return np.asarray(data[tuple(window)])


def _unsqueeze(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array:
    axes = _axes(inputs, attributes)
    return np.asarray(np.expand_dims(inputs[0], axes if axes is not None else ()))


def _divide(inputs: Sequence[Any], _: Mapping[str, Any]) -> Array:
    left, right = inputs
    if left.dtype.kind == "f":
        return np.asarray(left / right)
    # ONNX divides integers as C does, towards zero.
    return np.asarray(np.trunc(left / right).astype(left.dtype))


def _cast(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array:
    return np.asarray(inputs[0].astype(helper.tensor_dtype_to_np_dtype(attributes["to"])))


def _constant_of_shape(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array | None:
    if int(np.prod(inputs[0])) > MOST_ELEMENTS:
        return None
    fill = numpy_helper.to_array(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    return np.full(inputs[0], fill.reshape(-1)[0], fill.dtype)


def _reduce_prod(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array:
    keep = bool(attributes.get("keepdims", 1))
    return np.asarray(np.prod(inputs[0], axis=_axes(inputs, attributes), keepdims=keep, dtype=inputs[0].dtype))


_RULES: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], Array | None]] = {
    "Add": lambda x, _: np.asarray(x[0] + x[1]),
    "Sub": lambda x, _: np.asarray(x[0] - x[1]),
    "Mul": lambda x, _: np.asarray(x[0] * x[1]),
    "Div": _divide,
    "Cast": _cast,
    "Ceil": lambda x, _: np.asarray(np.ceil(x[0])),
    "Concat": lambda x, a: np.concatenate(x, axis=a["axis"]),
    "ConstantOfShape": _constant_of_shape,
    "Equal": lambda x, _: np.asarray(x[0] == x[1]),
    "Floor": lambda x, _: np.asarray(np.floor(x[0])),
    "Gather": lambda x, a: np.asarray(np.take(x[0], x[1], axis=a.get("axis", 0))),
    "Identity": lambda x, _: np.asarray(x[0]),
    "Range": lambda x, _: np.arange(x[0].item(), x[1].item(), x[2].item(), dtype=x[0].dtype),
    "ReduceProd": _reduce_prod,
    "Reshape": lambda x, _: np.asarray(x[0].reshape(x[1])),
    "Slice": _slice,
    "Squeeze": lambda x, a: np.asarray(np.squeeze(x[0], _axes(x, a))),
    "Transpose": lambda x, a: np.asarray(np.transpose(x[0], a.get("perm"))),
    "Unsqueeze": _unsqueeze,
    "Where": lambda x, _: np.where(x[0], x[1], x[2]),
}
