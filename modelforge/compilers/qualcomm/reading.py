"""What our own child process reads: the lowered model before a build, and the context that was saved after it.

Imports onnx; the vendor's environment has none, and what it says of itself is held against the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from modelforge.errors import BuildError
from modelforge.graph.cost import node_flops
from modelforge.graph.specialize import specialize

_BORDER = frozenset(("QuantizeLinear", "DequantizeLinear", "Constant"))
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
_EXTERNAL_ABOVE = 1_500_000_000
"""Bytes above which weights go beside the model: a protobuf message ends at 2 GiB."""
_COMPATIBILITY = "ep_compatibility_info.QNNExecutionProvider"


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """The lowered model at fixed sizes, and what it is made of.

    Request: ``model``; ``folder`` for the fixed model; ``sizes`` by symbol, empty where its shapes are fixed.

    The answer holds ``model`` (path), ``operators`` (Q/DQ and constants left out), ``macs`` of convolutions and matrix
    products, ``float_nodes`` (names of nodes that read no dequantized value and give a float one, by the FP32 tensors
    alone) and ``ports``: name, dtype and shape of inputs and outputs.
    """
    path, folder = Path(request["model"]), Path(request["folder"])
    if request["sizes"]:
        path = specialize(path, folder, request["sizes"])
    path = _with_own_constants(path, folder)
    model = onnx.load(path, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {value.name: value for group in (graph.value_info, graph.input, graph.output) for value in group}
    shapes = {name: _shape(value) for name, value in values.items()}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    types = {name: value.type.tensor_type.elem_type for name, value in values.items()}
    nodes = [node for node in graph.node if node.op_type not in _BORDER]
    weights = {tensor.name for tensor in graph.initializer}
    return {
        "model": str(path),
        "operators": len(nodes),
        "macs": sum((node_flops(node, shapes) or 0) // 2 for node in nodes if node.op_type in _WEIGHTED),
        "float_nodes": _float_nodes(graph, types),
        "inputs": [_port(value) for value in graph.input if value.name not in weights],
        "outputs": [_port(value) for value in graph.output],
    }


def _with_own_constants(path: Path, folder: Path) -> Path:
    """The model, with a copy for each DequantizeLinear of a constant that several read.

    QNN's provider makes one tensor of a constant, with the scale of its first reader: of two that are both 255, one for
    6 and one for 1/6, both become 6 (onnxruntime-qnn 2.7.0; found as a classifier at 0 dB). Simplifiers merge them.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    readers = Counter(node.input[0] for node in graph.node if node.op_type == "DequantizeLinear")
    shared = {name for name, count in readers.items() if count > 1 and name in weights}
    if not shared:
        return path
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in shared:
            continue
        name = node.input[0]
        seen[name] += 1
        if seen[name] > 1:
            own = model.graph.initializer.add()
            own.CopyFrom(tensors[name])
            own.name = node.input[0] = f"{name}/{seen[name]}/of/{node.name}"
    out = folder / "own-constants"
    out.mkdir(parents=True, exist_ok=True)
    data = model.ByteSize() > _EXTERNAL_ABOVE
    onnx.save(model, out / "model.onnx", save_as_external_data=data, location="model.onnx.data" if data else None)
    return out / "model.onnx"


def read_context(request: dict[str, Any]) -> dict[str, Any]:
    """A saved context: exactly one EPContext node and nothing else, for the chip that was asked for.

    Request: ``context`` (path), ``soc_model``, ``htp_arch``. The answer holds ``qnn`` (version), ``file`` (the binary
    beside it, or None) and ``node``.

    Raises:
        BuildError: anything else.
    """
    path = Path(request["context"])
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors, by whichever implementation is installed
        raise BuildError(f"the context cannot be read: {error}", where=path.name) from error
    nodes = list(model.graph.node)
    others = [f"{node.name or node.output[0]} ({node.op_type})" for node in nodes if node.op_type != "EPContext"]
    if len(nodes) != 1 or others:
        named = ", ".join(others[:5]) or "none"
        raise BuildError(
            f"not all of the model is on the NPU: {len(nodes) - len(others)} contexts, and these nodes beside: {named}",
            where=path.name,
            fix="split the model there, or leave what the NPU cannot do out of it",
        )
    facts = {each.name: onnx.helper.get_attribute_value(each) for each in nodes[0].attribute}
    version = re.match(r"v(\d+\.\d+\.\d+)", _text(facts.get("ep_sdk_version")))
    if version is None:
        raise BuildError("the context does not say which QNN it is for", where=path.name)
    _check_chip({each.key: each.value for each in model.metadata_props}, request, path.name)
    inside = facts.get("embed_mode", 1) == 1
    return {"qnn": version[1], "file": None if inside else _text(facts["ep_cache_context"]), "node": nodes[0].name}


def _check_chip(metadata: Mapping[str, str], request: Mapping[str, Any], where: str) -> None:
    """``v2:6:2.51.0:5.51.0:73:43:0:0``: the fifth and sixth are the Hexagon version and the SoC."""
    told = metadata.get(_COMPATIBILITY, "").split(":")
    wanted = [str(request["htp_arch"]), str(request["soc_model"])]
    if told[4:6] != wanted:
        raise BuildError(
            f"the context is for (htp_arch, soc_model) {told[4:6]}, and {wanted} was asked for", where=where
        )


def _float_nodes(graph: onnx.GraphProto, types: Mapping[str, int]) -> list[str]:
    """Nodes that compute with FP32: none of their inputs was dequantized, or their output is not quantized.

    Casts at the border and shape arithmetic on integers are none.
    """
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    found = []
    for node in graph.node:
        if node.op_type in (*_BORDER, "Cast"):
            continue
        if not any(types.get(name) in _FLOATS for name in (*node.input, *node.output)):
            continue
        reads = [producers[name].op_type for name in node.input if name in producers and types.get(name) in _FLOATS]
        gives = [reader for name in node.output for reader in readers.get(name, ["output"])]
        fused = [reader for reader in gives if reader in ("Relu", "Clip")]
        if set(reads) - {"DequantizeLinear"} or (set(gives) - {"QuantizeLinear"} and not fused) or not reads:
            found.append(f"{node.name or node.output[0]} ({node.op_type})")
    return found


def _port(value: onnx.ValueInfoProto) -> dict[str, Any]:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
    return {"name": value.name, "dtype": dtype, "shape": list(_shape(value))}


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")
