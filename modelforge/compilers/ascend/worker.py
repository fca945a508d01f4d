"""The child's side: what ATC must be told about a lowered model, read with onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from modelforge.compilers.ascend.limits import UNPARSED
from modelforge.graph.load import parse
from modelforge.quantize.dialects.ascend import KEEP_FP32, restate_opset

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Facts of ``request["model"]``, as :class:`modelforge.compilers.ascend.recipe.LoweredFacts` holds them."""
    model = parse(Path(request["model"]))
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    integers = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    products = [node for node in graph.node if node.op_type in _PRODUCTS and node.domain in ("", "ai.onnx")]
    wide = [node for node in products if not halves.intersection(node.input) and not integers.intersection(node.input)]
    kept = next((entry.value for entry in model.metadata_props if entry.key == KEEP_FP32), "")
    return {
        "inputs": [{"name": value.name, "dtype": _dtype(value), "rank": _rank(value)} for value in inputs],
        "outputs": [value.name for value in graph.output],
        "opset": next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0),
        "domains": sorted({each.domain for each in model.opset_import if each.domain not in ("", "ai.onnx")}),
        "quantized": [node.name for node in graph.node if node.op_type == "AscendQuant"],
        "unparsed": sorted({node.op_type for node in graph.node if node.op_type in UNPARSED}),
        "half": bool(halves),
        "wide_products": [node.name for node in wide if _is_float32(node, model)],
        "keep_fp32": [name for name in kept.splitlines() if name],
    }


def restate(request: dict[str, Any]) -> dict[str, Any]:
    """Write ``request["model"]`` into ``folder`` with an opset of at most ``newest``, where all its nodes bear that.

    Returns:
        ``opset`` of what was written; None where it cannot be had.
    """
    from modelforge.graph.load import load, save

    model = load(Path(request["model"]))
    if not restate_opset(model, request["newest"]):
        return {"opset": None}
    save(model, Path(request["folder"]))
    return {"opset": model.opset_imports[""]}


def _is_float32(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether the product's own inputs are FP32: by its weight, else by what shape inference says of its input."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    known = [types[name] for name in node.input if name in types]
    if known:
        return TensorProto.FLOAT in known
    values = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    return bool(values.get(node.input[0], TensorProto.FLOAT) == TensorProto.FLOAT)


def _dtype(value: onnx.ValueInfoProto) -> str:
    return str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)
