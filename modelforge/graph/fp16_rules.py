"""Which nodes can compute in FP16, and which of their inputs and outputs then are FP16.

From the ONNX schemas, and a table of what the schemas allow but numbers do not bear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

FLOAT = onnx_ir.DataType.FLOAT
HALF = onnx_ir.DataType.FLOAT16

LARGEST = 65504.0
"""The largest finite FP16 number (IEEE 754-2019, binary16)."""

CARRIERS = ("If", "Loop", "Scan")
"""Operators whose own type is that of their bodies."""

_OUTPUT_BY_ATTRIBUTE = {"Cast", "ConstantOfShape"}
"""Operators whose output type is an attribute, which the conversion rewrites."""

_NO_KERNEL = "ONNX Runtime's CPU has no FP16 for it, and no FP32 input to cast"

_NO_REDUCTION = "ONNX Runtime's CPU has no FP16 for it with a reduction"

_KEPT_OPS = {
    "QuantizeLinear": "a quantization scale loses its digits in FP16",
    "DequantizeLinear": "a quantization scale loses its digits in FP16",
    "DynamicQuantizeLinear": "a quantization scale loses its digits in FP16",
    "Constant": "a constant that is itself an output",
    "BitCast": "its type is its width in bits",
    "MeanVarianceNormalization": "its definition has FP32 constants",
    "Range": "counts; FP16 has no integers above 2048",
    "CastLike": "its type is another tensor's",
    **dict.fromkeys(("EyeLike", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"), _NO_KERNEL),
    **dict.fromkeys(("Bernoulli", "Multinomial"), _NO_KERNEL),
}

_FLOAT_INPUTS = {("Resize", 1), ("Resize", 2), ("Upsample", 1)}
"""Operator and input that stay FP32 where the node is FP16: sizes are worked out from them."""


@dataclass(frozen=True)
class Plan:
    """What becomes of one node.

    Attributes:
        half: whether it computes in FP16.
        reason: why not, empty where it has no FP32 value to convert.
        half_inputs, half_outputs: which inputs and outputs are FP16, by place.
    """

    half: bool
    reason: str = ""
    half_inputs: frozenset[int] = frozenset()
    half_outputs: frozenset[int] = frozenset()


def plan_node(node: onnx_ir.Node, opset: int) -> Plan:
    """Decide from the node's operator and the types of its values alone."""
    inputs = {place for place, value in enumerate(node.inputs) if value is not None and is_float(value)}
    outputs = {place for place, value in enumerate(node.outputs) if value.name and is_float(value)}
    if not inputs and not outputs:
        return Plan(False)
    if any(value is not None and value.type is None for value in node.inputs):
        return Plan(False, "the type of an input is not known")
    if node.op_type in CARRIERS and node.domain == "":
        return Plan(True, "", frozenset(inputs), frozenset(outputs))
    if node.domain != "":
        return Plan(False, f"operator of the domain {node.domain}")
    if node.op_type in _KEPT_OPS:
        return Plan(False, _KEPT_OPS[node.op_type])
    if node.op_type in ("ScatterElements", "ScatterND") and node.attributes.get_string("reduction", "none") != "none":
        return Plan(False, _NO_REDUCTION)
    if any(not isinstance(value.type, onnx_ir.TensorType) for value in _present(node) if value.type is not None):
        return Plan(False, "a sequence or an optional keeps its element type")
    return _by_schema(node, opset, inputs, outputs)


def is_float(value: onnx_ir.Value) -> bool:
    """Whether the value is an FP32 tensor; onnx-ir gives a sequence the type of its elements."""
    return isinstance(value.type, onnx_ir.TensorType) and value.type.dtype == FLOAT


def unfit(value: onnx_ir.Value) -> str:
    """Why an initializer cannot be FP16, empty where it can. Never clamp: that gives wrong answers without a word."""
    if value.const_value is None:
        return "its value is not in the model"
    return unfit_array(value.const_value.numpy())


def unfit_array(array: NDArray[Any]) -> str:
    finite = array[np.isfinite(array)]
    if not finite.size:
        return ""
    largest = float(np.abs(finite).max())
    if largest > LARGEST:
        return f"a value of {largest:.3g} is beyond FP16's {LARGEST:.0f}"
    if largest > 0 and not np.any(finite.astype(np.float16)):
        return f"all values are 0 in FP16 (largest {largest:.3g})"
    return ""


def _by_schema(node: onnx_ir.Node, opset: int, inputs: set[int], outputs: set[int]) -> Plan:
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return Plan(False, f"not an operator of opset {opset}")
    half_inputs, half_outputs = set(), set()
    for place in inputs:
        formal = _formal(schema.inputs, place)
        if formal is None:
            return Plan(False, "more inputs than the operator has")
        if (node.op_type, place) in _FLOAT_INPUTS or _is_float_only(formal):
            continue
        if "tensor(float16)" not in formal.types:
            return Plan(False, f"opset {opset} has no FP16 for it")
        half_inputs.add(place)
    for place in outputs:
        formal = _formal(schema.outputs, place)
        if formal is None or _is_float_only(formal):
            continue
        # An output whose type follows no input and no attribute is fixed by the operator (LayerNormalization's Mean).
        follows = {_formal(schema.inputs, given).type_str for given in half_inputs}
        if formal.type_str not in follows and node.op_type not in _OUTPUT_BY_ATTRIBUTE:
            return Plan(False, "an output of it is FP32 by definition")
        if "tensor(float16)" not in formal.types:
            return Plan(False, f"opset {opset} has no FP16 for it")
        half_outputs.add(place)
    return Plan(bool(half_inputs or half_outputs), "", frozenset(half_inputs), frozenset(half_outputs))


def _formal(formals: Any, place: int) -> Any:
    """The formal parameter at a place; the last one repeats where it is variadic."""
    if place < len(formals):
        return formals[place]
    if formals and formals[-1].option.name == "Variadic":
        return formals[-1]
    return None


def _is_float_only(formal: Any) -> bool:
    """Declared as tensor(float), or as a type that has no other: a side input such as Resize's scales."""
    return bool(formal.type_str == "tensor(float)")


def _present(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
