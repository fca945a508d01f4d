"""Ascend: ATC takes no QDQ, but AscendQuant, an int8 layer with an int32 bias, and AscendDequant.

Calibration and choice work on the QDQ form, which has the same arithmetic; what ships, and what accuracy is measured
on (:mod:`modelforge.quantize.ascend_emulation`), is what :func:`to_ascend` writes from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

from modelforge.errors import BuildError
from modelforge.graph.load import load, save
from modelforge.graph.passes import RemoveDeadNodes, run_passes
from modelforge.quantize.dialects.rules import Dialect

KEEP_FP32 = "modelforge.keep_fp32"
"""Metadata key: names of nodes that must not become FP16, one a line; ATC's --keep_dtype is made of it."""

_LOWEST_OPSET = 13
"""What Q/DQ with one scale a channel need. Every CANN from 5.0 on takes it, and its AscendQuant too."""

_NEWEST_OPSET = 16
"""AscendQuant is documented up to opset 13 before CANN 8.0, to 16 in 8.0 and to 22 from 9.0 on (its page in the ONNX
operator list)."""

# Operators whose newer versions only take more types (ONNX Changelog.md): FP32 in opset 13 is the same.
_MORE_TYPES = frozenset(
    "Add CumSum Div GreaterOrEqual Identity LeakyRelu LessOrEqual Mul PRelu Pow Relu Sub Where".split()
)
# ... or have one more attribute, whose default is what the operator did before.
_MORE_ATTRIBUTES = {"Reshape": "allowzero", "Shape": "start"}

_GEMM_INPUTS = 3


def write_native(qdq: Path, folder: Path, keep: Mapping[str, str]) -> dict[str, Any]:
    """:func:`to_ascend` as :attr:`Dialect.native`."""
    return {"ascend_layers": to_ascend(qdq, folder, keep=keep)}


def to_ascend(qdq: Path, folder: Path, *, keep: Mapping[str, str] | None = None) -> int:
    """Write ``folder/model.onnx`` for ATC from a model in the ``ascend`` dialect; say how many layers are int8.

    ``x -> AscendQuant(scale=1/s, offset=z) -> Conv(int8 weight, int32 bias) -> AscendDequant(deq_scale) -> y``, where
    deq_scale is uint64 ``[channels]`` or ``[1]`` with float32(s * s_w) in its low 32 bits. Nodes stay as they are; the
    opset is said as the lowest in which all of them mean the same, which more CANN releases take. onnx.checker and ONNX
    Runtime refuse such a model, as they know neither these operators nor an int8 Conv.

    Args:
        keep: why nodes must stay FP32, by name: kept as metadata of the model.

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
    parts = _open_layer_norms(model)
    model.graph.sort()
    restate_opset(model)
    if keep:
        beyond = {*keep, *(part for name in keep for part in parts.get(name, ()))}
        model.metadata_props[KEEP_FP32] = "\n".join(_kept(model.graph, beyond))
    save(model, folder)
    return len(layers)


DIALECT = Dialect(
    name="ascend",
    title="Ascend ATC",
    signed=True,
    # AMCT's own default is an offset; GE folds it into the bias as it compiles.
    symmetric=False,
    per_channel=frozenset({"Conv", "ConvTranspose"}),
    bias="int32",
    matmul_rank=2,
    remainder="compiler",
    native=write_native,
    sources=(
        "https://www.hiascend.com/document/detail/en/canncommercial/850/devaids/amct/atlasamct_16_0148.html",
        "AscendQuant and AscendDequant plugins of the open ops-nn repository",
    ),
)


def _rewrite(
    graph: onnx_ir.Graph, layer: onnx_ir.Node, quants: dict[onnx_ir.Value, onnx_ir.Value], where: Path
) -> None:
    dequantize = layer.inputs[0].producer() if layer.inputs[0] is not None else None
    weight = _constant_source(layer.inputs[1])
    bias = _constant_source(layer.inputs[2]) if len(layer.inputs) > 2 else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or weight is None:
        raise BuildError("the layer's input is not quantized", where=f"{where}: node {layer.name}")
    addend = layer.inputs[2] if len(layer.inputs) > 2 and bias is None else None
    if addend is not None and layer.op_type != "Gemm":
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
    result = _dequantize_output(graph, layer, _array(scale).reshape(()) * _array(weight.inputs[1]).reshape(-1))
    if addend is not None:
        _add_after(graph, layer, result, addend)


def _dequantize_output(graph: onnx_ir.Graph, layer: onnx_ir.Node, scale: np.ndarray) -> onnx_ir.Value:
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
    return result


def _add_after(graph: onnx_ir.Graph, layer: onnx_ir.Node, result: onnx_ir.Value, addend: onnx_ir.Value) -> None:
    """Gemm's C that is no bias of one number a column: ``beta * C`` is added in float, behind AscendDequant."""
    layer.resize_inputs(_GEMM_INPUTS - 1)
    beta = layer.attributes.get_float("beta", 1.0)
    layer.attributes.pop("beta", None)
    if beta != 1.0:
        factor = onnx_ir.tensor(np.array(beta, np.float32), name=f"{layer.name}/beta")
        held = onnx_ir.val(f"{layer.name}/beta", dtype=factor.dtype, shape=(), const_value=factor)
        graph.register_initializer(held)
        times = onnx_ir.node("Mul", [addend, held], name=f"{layer.name}/Mul")
        times.outputs[0].name, times.outputs[0].dtype = f"{layer.name}/scaled", onnx_ir.DataType.FLOAT
        graph.append(times)
        addend = times.outputs[0]
    name = str(result.name)
    node = onnx_ir.node("Add", [result, addend], name=f"{layer.name}/Add")
    summed = node.outputs[0]
    summed.dtype, summed.shape = onnx_ir.DataType.FLOAT, result.shape
    graph.append(node)
    result.replace_all_uses_with(summed, replace_graph_outputs=True)
    node.replace_input_with(0, result)
    result.name, summed.name = f"{name}/product", name


def restate_opset(model: onnx_ir.Model, newest: int = _NEWEST_OPSET) -> bool:
    """Say the lowest opset that all nodes bear, and drop imports of domains that no node is of.

    Returns:
        whether it is ``newest`` or lower now; if not, it is left as it was.
    """
    used = {node.domain for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph)}
    for domain in [each for each in model.opset_imports if each and each not in used]:
        del model.opset_imports[domain]
    opset = model.opset_imports[""]
    versions = [_since(node, opset) for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph)]
    if any(version is None or version > newest for version in versions):
        return opset <= newest
    model.opset_imports[""] = min(opset, max(_LOWEST_OPSET, *(version for version in versions if version)))
    return True


def _open_layer_norms(model: onnx_ir.Model) -> dict[str, list[str]]:
    """LayerNormalization, of opset 17, as the operators that its definition gives; ATC fuses them again.

    Without that, no CANN before 9.0 takes an INT8 model with one. Gives the names of the parts by the node's.
    """
    graph, parts = model.graph, {}
    for node in list(graph):
        if node.op_type != "LayerNormalization" or node.domain or any(each.uses() for each in node.outputs[1:]):
            continue
        axes = _normalized_axes(node)
        if axes is None:
            continue
        base = str(node.name)
        made: list[onnx_ir.Node] = []

        def add(
            op: str, *inputs: onnx_ir.Value | None, made: list[onnx_ir.Node] = made, base: str = base, **attributes: Any
        ) -> onnx_ir.Value:
            part = onnx_ir.node(op, list(inputs), attributes, name=f"{base}/{op}_{len(made)}")
            part.outputs[0].name, part.outputs[0].dtype = f"{base}/{op}_{len(made)}:0", onnx_ir.DataType.FLOAT
            made.append(part)
            return part.outputs[0]

        def constant(name: str, number: float, base: str = base) -> onnx_ir.Value:
            tensor = onnx_ir.tensor(np.array(number, np.float32), name=f"{base}/{name}")
            held = onnx_ir.val(f"{base}/{name}", dtype=tensor.dtype, shape=(), const_value=tensor)
            graph.register_initializer(held)
            return held

        x, scale = node.inputs[0], node.inputs[1]
        centred = add("Sub", x, add("ReduceMean", x, axes=axes, keepdims=1))
        spread = add("ReduceMean", add("Pow", centred, constant("two", 2.0)), axes=axes, keepdims=1)
        epsilon = constant("epsilon", node.attributes.get_float("epsilon", 1e-5))
        result = add("Mul", add("Div", centred, add("Sqrt", add("Add", spread, epsilon))), scale)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = add("Add", result, node.inputs[2])
        output = node.outputs[0]
        result.shape = output.shape
        graph.extend(made)
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        name = output.name
        graph.remove(node, safe=True)
        result.name = name
        parts[base] = [str(part.name) for part in made]
    return parts


def _normalized_axes(node: onnx_ir.Node) -> list[int] | None:
    """The axes that are normalized, counted from the end; None where the rank that they follow from is unknown."""
    axis = node.attributes.get_int("axis", -1)
    if axis < 0:
        return list(range(axis, 0))
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    return list(range(axis - len(value.shape), 0))


def _since(node: onnx_ir.Node, opset: int) -> int | None:
    """The lowest opset in which the node means the same; None where that is not known."""
    if node.op_type in ("AscendQuant", "AscendDequant"):
        return 1
    if node.op_type in _MORE_TYPES or (
        node.op_type in _MORE_ATTRIBUTES and not {_MORE_ATTRIBUTES[node.op_type], "end"} & set(node.attributes)
    ):
        return _LOWEST_OPSET
    try:
        return int(onnx.defs.get_schema(node.op_type, opset, "").since_version)
    except onnx.defs.SchemaError:
        return None


def _kept(graph: onnx_ir.Graph, keep: Collection[str]) -> list[str]:
    """The nodes to keep, in order, with the AscendQuant and AscendDequant that read and write the same values."""
    names = []
    for node in graph:
        name = str(node.name)
        beside = [use.node for value in node.outputs for use in value.uses() if use.node.op_type == "AscendQuant"]
        if name in keep:
            names += [name, *(str(each.name) for each in beside)]
        elif node.op_type == "AscendDequant" and name.removesuffix("/AscendDequant") in keep:
            names.append(name)
    return list(dict.fromkeys(names))


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
