"""TensorRT and TensorRT-RTX: explicit quantization, symmetric int8; everything else FP16, strongly typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir

from modelforge.errors import BuildError
from modelforge.graph.load import load, save
from modelforge.graph.passes import RemoveDeadNodes, run_passes
from modelforge.quantize.dialects.rules import Dialect

DIALECT = Dialect(
    name="tensorrt",
    title="TensorRT",
    signed=True,
    symmetric=True,
    # The parser refuses an int32 DequantizeLinear, so biases stay float.
    bias="float",
    residual_add=True,
    shared_concat=True,
    skip_gemv=True,
    # Tensor cores take channels in packs of 32; below half a pack INT8 has nothing over FP16.
    fewest_channels=16,
    half_scales=True,
    remainder="fp16",
    sources=(
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
        "quantized-types-explicit-quantization.html",
        "https://github.com/NVIDIA/Model-Optimizer (modelopt/onnx/quantization/int8.py)",
    ),
)

_HALF_OPSET = 19
"""The first where QuantizeLinear and DequantizeLinear take FP16."""


def merge_casts(model: Path, folder: Path) -> int:
    """Write ``folder/model.onnx``: Q/DQ that take and give FP16 themselves; say how many casts went.

    :func:`modelforge.graph.fp16.convert_fp16` leaves Q/DQ in FP32 between casts. A Cast between DequantizeLinear and
    its Conv hides the pattern that TensorRT makes an int8 kernel of, so the casts go into the pair; this dialect's
    scales are FP16 numbers, so nothing is rounded. Raises the opset to 19.

    Raises:
        BuildError: a scale is no FP16 number, or onnx.checker refuses the result.
    """
    model, folder = Path(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    graph = _raised(model)
    merged = 0
    for node in list(graph.graph):
        if node.op_type == "QuantizeLinear":
            merged += _merge_before(graph.graph, node)
        elif node.op_type == "DequantizeLinear":
            merged += _merge_after(graph.graph, node)
    run_passes(graph, [RemoveDeadNodes()], str(model))
    path = save(graph, folder)[0]
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise BuildError(f"the model with merged casts is not valid: {error}", where=str(model)) from None
    return merged


def _raised(model: Path) -> onnx_ir.Model:
    graph = load(model)
    if graph.opset_imports.get("", 1) >= _HALF_OPSET:
        return graph
    from onnx import version_converter

    return onnx_ir.serde.deserialize_model(version_converter.convert_version(onnx.load(model), _HALF_OPSET))


def _merge_before(graph: onnx_ir.Graph, node: onnx_ir.Node) -> int:
    source = node.inputs[0]
    cast = None if source is None else source.producer()
    if cast is None or cast.op_type != "Cast":
        return 0
    half = cast.inputs[0]
    if half is None or half.dtype != onnx_ir.DataType.FLOAT16:
        return 0
    node.replace_input_with(0, half)
    node.replace_input_with(1, _half(graph, node.inputs[1]))
    return 1


def _merge_after(graph: onnx_ir.Graph, node: onnx_ir.Node) -> int:
    output = node.outputs[0]
    casts = [use.node for use in output.uses()]
    halves = [cast for cast in casts if cast.op_type == "Cast" and cast.outputs[0].dtype == onnx_ir.DataType.FLOAT16]
    if not halves or len(halves) != len(casts) or output.is_graph_output():
        return 0
    node.replace_input_with(1, _half(graph, node.inputs[1]))
    output.dtype = onnx_ir.DataType.FLOAT16
    for cast in halves:
        cast.outputs[0].replace_all_uses_with(output)
    return len(halves)


def _half(graph: onnx_ir.Graph, scale: onnx_ir.Value | None) -> onnx_ir.Value:
    assert scale is not None
    assert scale.const_value is not None
    name = f"{scale.name}/half"
    if name in graph.initializers:
        return graph.initializers[name]
    array = scale.const_value.numpy()
    half = array.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), array):
        raise BuildError("the scale is no FP16 number", where=f"tensor {scale.name}")
    tensor = onnx_ir.tensor(half, name=name)
    value = onnx_ir.val(name, dtype=tensor.dtype, shape=half.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
