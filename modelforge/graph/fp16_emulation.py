"""An FP16 model as FP32 arithmetic with every FP16 tensor rounded: what FP16 hardware gives, run on a CPU.

ONNX Runtime's CPU kernels compute an FP16 model in FP32 and leave out the rounding in between, overflow included: its
outputs say nothing of what FP16 does (github.com/NVIDIA/TensorRT issue 4355 met the same). Here each tensor that is
FP16 in the model goes through explicit casts, which ONNX Runtime keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from modelforge.graph.load import INLINE_BYTES, model_files, parse

_HALF, _FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def emulate_fp16(model: Path, folder: Path) -> Path | None:
    """Write ``folder/model.onnx``: ``model`` in FP32, every FP16 tensor of it rounded to FP16 where it is made.

    Inputs and outputs keep their types if they are FP32, as :func:`modelforge.graph.fp16.convert_fp16` writes them.
    A sum inside one operator is still FP32, as in the fused kernels of GPUs.

    Returns:
        the model's path, or None where the model has no FP16 tensor (it runs as it is) or is too large for one file.
    """
    if sum(file.stat().st_size for file in model_files(model)) > INLINE_BYTES // 2:
        return None
    proto = onnx.load(model) if len(model_files(model)) > 1 else parse(model)
    if not _has_half(proto.graph):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(emulated(proto), path)
    return path


def emulated(proto: ModelProto) -> ModelProto:
    """The same in memory; takes no external data, and a model without an FP16 tensor comes back as it was."""
    proto = onnx.shape_inference.infer_shapes(proto)
    _Emulation(proto).rewrite(proto.graph)
    return proto


class _Emulation:
    """Rewrites a graph and the bodies in it."""

    def __init__(self, proto: ModelProto) -> None:
        self._half: set[str] = set()
        self._collect(proto.graph)

    def rewrite(self, graph: GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.data_type == _HALF:
                tensor.CopyFrom(_as_float(tensor))
        nodes: list[NodeProto] = []
        for node in list(graph.node):
            nodes += self._node(node)
        del graph.node[:]
        graph.node.extend(nodes)
        # What comes in through an FP16 input was rounded by who made it.
        for value in [*graph.input, *graph.output]:
            if value.type.tensor_type.elem_type == _HALF:
                value.type.tensor_type.elem_type = _FLOAT
        del graph.value_info[:]

    def _node(self, node: NodeProto) -> Iterable[NodeProto]:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                self.rewrite(attribute.g)
            elif attribute.type == AttributeProto.GRAPHS:
                for body in attribute.graphs:
                    self.rewrite(body)
            elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type == _HALF:
                attribute.t.CopyFrom(_as_float(attribute.t))
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i == _HALF:
                attribute.i = _FLOAT
        rounded = [name for name in node.output if name in self._half]
        if not rounded:
            return [node]
        nodes = [node]
        for place, name in enumerate(node.output):
            if name in self._half:
                raw, half = f"{name}/fp32", f"{name}/fp16"
                node.output[place] = raw
                nodes.append(helper.make_node("Cast", [raw], [half], f"{half}/cast", to=_HALF))
                nodes.append(helper.make_node("Cast", [half], [name], f"{raw}/cast", to=_FLOAT))
        return nodes

    def _collect(self, graph: GraphProto) -> None:
        """Names of all FP16 values that nodes make; names are unique over the bodies as well."""
        for value in [*graph.value_info, *graph.output]:
            if value.type.tensor_type.elem_type == _HALF:
                self._half.add(value.name)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    self._collect(attribute.g)
                for body in attribute.graphs:
                    self._collect(body)


def _has_half(graph: GraphProto) -> bool:
    if any(tensor.data_type == _HALF for tensor in graph.initializer):
        return True
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == _HALF:
                return True
            if attribute.type == AttributeProto.GRAPH and _has_half(attribute.g):
                return True
    return False


def _as_float(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
