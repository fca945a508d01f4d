"""Ascend: ATC takes no QDQ, but AscendQuant, an int8 layer with an int32 bias, and AscendDequant.

:data:`DIALECT` gives the same arithmetic as QDQ, which runs in ONNX Runtime for the accuracy figure;
:func:`to_ascend` writes from it what ATC reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir

from modelforge.errors import BuildError
from modelforge.graph.load import load, save
from modelforge.graph.passes import RemoveDeadNodes, run_passes
from modelforge.quantize.dialects.rules import Dialect

DIALECT = Dialect(
    name="ascend",
    title="Ascend ATC",
    signed=True,
    # AMCT's own default is an offset; GE folds it into the bias as it compiles.
    symmetric=False,
    per_channel=frozenset({"Conv", "ConvTranspose"}),
    bias="int32",
    matmul_rank=2,
    remainder="fp16",
    sources=(
        "https://www.hiascend.com/document/detail/en/canncommercial/850/devaids/amct/atlasamct_16_0148.html",
        "AscendQuant and AscendDequant plugins of the open ops-nn repository",
    ),
)


def to_ascend(qdq: Path, folder: Path) -> int:
    """Write ``folder/model.onnx`` for ATC from a model in the ``ascend`` dialect; say how many layers are int8.

    ``x -> AscendQuant(scale=1/s, offset=z) -> Conv(int8 weight, int32 bias) -> AscendDequant(deq_scale) -> y``, where
    deq_scale is uint64 ``[channels]`` or ``[1]`` with float32(s * s_w) in its low 32 bits. onnx.checker and ONNX
    Runtime refuse such a model, as they know neither these operators nor an int8 Conv.

    Raises:
        BuildError: not a model in the ascend dialect.
    """
    qdq, folder = Path(qdq), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = load(qdq)
    layers = [node for node in model.graph if node.op_type in DIALECT.weighted and _constant_source(node.inputs[1])]
    if not layers:
        raise BuildError("the model has no quantized layer in the ascend dialect", where=str(qdq))
    quants: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for layer in layers:
        _rewrite(model.graph, layer, quants, qdq)
    run_passes(model, [RemoveDeadNodes()], str(qdq))
    left = [str(node.name) for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if left:
        raise BuildError("a Q/DQ pair feeds no quantized layer, which ATC does not take", where=f"node {left[0]}")
    model.graph.sort()
    save(model, folder)
    return len(layers)


def _rewrite(
    graph: onnx_ir.Graph, layer: onnx_ir.Node, quants: dict[onnx_ir.Value, onnx_ir.Value], where: Path
) -> None:
    dequantize = layer.inputs[0].producer() if layer.inputs[0] is not None else None
    weight = _constant_source(layer.inputs[1])
    bias = _constant_source(layer.inputs[2]) if len(layer.inputs) > 2 else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or weight is None:
        raise BuildError("the layer's input is not quantized", where=f"{where}: node {layer.name}")
    if len(layer.inputs) > 2 and layer.inputs[2] is not None and bias is None:
        raise BuildError("the layer's bias is not int32", where=f"{where}: node {layer.name}")
    quantized, scale, zero_point = dequantize.inputs[:3]
    if quantized not in quants:
        assert quantized is not None
        quantize = quantized.producer()
        assert quantize is not None
        attributes = {"scale": 1.0 / _number(scale), "offset": _number(zero_point)}
        node = onnx_ir.node("AscendQuant", [quantize.inputs[0]], attributes, name=f"{quantize.name}/AscendQuant")
        node.outputs[0].name, node.outputs[0].dtype = f"{quantized.name}/ascend", onnx_ir.DataType.INT8
        node.outputs[0].shape = quantized.shape
        graph.append(node)
        quants[quantized] = node.outputs[0]
    layer.replace_input_with(0, quants[quantized])
    layer.replace_input_with(1, weight.inputs[0])
    if bias is not None:
        layer.replace_input_with(2, bias.inputs[0])
    _dequantize_output(graph, layer, _array(scale).reshape(()) * _array(weight.inputs[1]).reshape(-1))


def _dequantize_output(graph: onnx_ir.Graph, layer: onnx_ir.Node, scale: np.ndarray) -> None:
    """Put AscendDequant behind the layer; it takes over the output's name."""
    output = layer.outputs[0]
    name, base = str(output.name), f"{layer.name}/AscendDequant"
    packed = np.asarray(scale, np.float32).view(np.uint32).astype(np.uint64)
    tensor = onnx_ir.tensor(packed, name=f"{base}/deq_scale")
    held = onnx_ir.val(f"{base}/deq_scale", dtype=tensor.dtype, shape=packed.shape, const_value=tensor)
    graph.register_initializer(held)
    node = onnx_ir.node("AscendDequant", [output, held], name=base)
    result = node.outputs[0]
    result.dtype, result.shape = onnx_ir.DataType.FLOAT, output.shape
    graph.append(node)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    node.replace_input_with(0, output)
    output.name, output.dtype = f"{name}/int32", onnx_ir.DataType.INT32
    result.name = name


def _constant_source(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """The DequantizeLinear of a constant that gives the value."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    source = node.inputs[0]
    return node if source is not None and source.is_initializer() else None


def _array(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _number(value: onnx_ir.Value | None) -> float:
    return float(_array(value).reshape(()))
