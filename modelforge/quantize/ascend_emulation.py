"""A model of AscendQuant and AscendDequant in plain ONNX operators, so that ONNX Runtime gives what the NPU should.

By the documented formulas: ``AscendQuant: round(x * scale + offset)``, half to even, saturated to int8;
``AscendDequant: x * scale`` per output channel, the scale being the low 32 bits of deq_scale
(hiascend.com, aclnnAscendQuant and the AscendQuant and AscendDequant operators). The rest, which ATC makes FP16, is
rounded to FP16. Not modelled: what the chip's vector unit loses inside AscendQuant, and sums beyond int32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from modelforge.errors import BuildError
from modelforge.graph.fp16 import convert_fp16
from modelforge.graph.fp16_emulation import emulate_fp16
from modelforge.graph.load import model_files, parse
from modelforge.quantize.dialects.ascend import KEEP_FP32

NOTE = (
    "INT8 was emulated: AscendQuant and AscendDequant by their documented formulas in ONNX Runtime, "
    "everything else rounded to FP16"
)

_LOWEST, _LARGEST = -128.0, 127.0


def has_ascend_nodes(model: Path) -> bool:
    """Whether ONNX Runtime needs :func:`emulate_ascend` to run the model."""
    return any(node.op_type == "AscendQuant" and not node.domain for node in parse(Path(model)).graph.node)


def emulate_ascend(model: Path, folder: Path, *, half: bool = True) -> Path:
    """Write ``folder/model.onnx``: the same model for ONNX Runtime; gives its path.

    Args:
        half: round the float rest to FP16, as ATC's force_fp16 does.

    Raises:
        BuildError: an AscendQuant or AscendDequant that is not as :func:`to_ascend` writes them.
    """
    model, folder = Path(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    proto = onnx.load(model) if len(model_files(model)) > 1 else parse(model)
    kept = next((entry.value for entry in proto.metadata_props if entry.key == KEEP_FP32), "").splitlines()
    exact = _Emulation(proto, half, frozenset(kept)).rewrite()
    path = folder / "model.onnx"
    if not half:
        onnx.save(proto, path)
        return path
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ascend-") as temporary:
        plain, rounded = Path(temporary) / "plain.onnx", Path(temporary) / "half"
        onnx.save(proto, plain)
        convert_fp16(plain, rounded, keep_fp32={*exact, *kept})
        if emulate_fp16(rounded / "model.onnx", folder) is None:  # nothing is left to round, or too large to rewrite
            onnx.save(proto, path)
    return path


class _Emulation:
    """Rewrites one graph; ``kept`` are nodes that compute in FP32 even where the rest is FP16."""

    def __init__(self, proto: ModelProto, half: bool, kept: frozenset[str]) -> None:
        self.proto, self.half, self.kept = proto, half, kept
        self.weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.quantized: set[str] = set()
        """Outputs of AscendQuant."""
        self.ranks: dict[str, int] = {}
        """Of the outputs of int8 layers: that of the weight, as a convolution's is."""
        self.exact: list[str] = []
        """Names of the nodes that stand for int8 and int32 arithmetic: FP32 holds that, FP16 would not."""

    def rewrite(self) -> list[str]:
        graph = self.proto.graph
        nodes: list[NodeProto] = []
        for node in list(graph.node):
            if node.op_type == "AscendQuant":
                nodes += self._quant(node)
            elif node.op_type == "AscendDequant":
                nodes += self._dequant(node)
            elif node.input and node.input[0] in self.quantized:
                nodes += self._layer(node)
            else:
                nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        # Integers are held in FP32 now: their declared types are gone, shape inference finds the new ones.
        del graph.value_info[:]
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in self.weights.values() if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return self.exact

    def _quant(self, node: NodeProto) -> Iterable[NodeProto]:
        """clip(round(x * scale + offset)) - offset: the layer behind it multiplies what the offset left."""
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if attributes.get("round_mode", b"Round") != b"Round" or attributes.get("sqrt_mode", 0):
            raise BuildError("an AscendQuant with another rounding is not emulated", where=f"node {node.name}")
        scale, offset = float(attributes["scale"]), float(attributes.get("offset", 0.0))
        output = node.output[0]
        self.quantized.add(output)
        base = node.name or output
        given = f"{base}/fp16" if self._is_rounded(node) else node.input[0]
        rounding = self._rounding(node.input[0], given) if self._is_rounded(node) else []
        factor, shift = self._constant(f"{base}/scale", scale), self._constant(f"{base}/offset", offset)
        low, high = self._constant(f"{base}/low", _LOWEST), self._constant(f"{base}/high", _LARGEST)
        return [
            *rounding,
            self._node("Mul", [given, factor], f"{base}/scaled"),
            self._node("Add", [f"{base}/scaled", shift], f"{base}/shifted"),
            self._node("Round", [f"{base}/shifted"], f"{base}/rounded"),
            self._node("Clip", [f"{base}/rounded", low, high], f"{base}/clipped"),
            self._node("Sub", [f"{base}/clipped", shift], output, f"{base}/centred"),
        ]

    def _layer(self, node: NodeProto) -> Iterable[NodeProto]:
        """The int8 layer in FP32, which holds its products exactly and its sums up to 2 ** 24."""
        weight = self.weights.get(node.input[1])
        if weight is None or weight.data_type != TensorProto.INT8:
            raise BuildError("a layer with int8 input has no int8 weight", where=f"node {node.name}")
        for place, name in enumerate(node.input):
            if place and name:
                node.input[place] = self._float_copy(name)
        self.exact.append(node.name)
        self.ranks[node.output[0]] = len(weight.dims)
        return [node]

    def _dequant(self, node: NodeProto) -> Iterable[NodeProto]:
        packed = numpy_helper.to_array(self.weights[node.input[1]])
        if packed.dtype != np.uint64:
            raise BuildError("deq_scale is not uint64", where=f"node {node.name}")
        scale = packed.astype(np.uint32).view(np.float32)
        if scale.size > 1:  # channels lie along axis 1 of a convolution's output
            scale = scale.reshape(-1, *[1] * (self.ranks[node.input[0]] - 2))
        name = f"{node.name}/factor"
        self.weights[name] = numpy_helper.from_array(scale, name)
        if not self._is_rounded(node):
            return [self._node("Mul", [node.input[0], name], node.output[0], node.name)]
        product = f"{node.name}/product"
        multiply = self._node("Mul", [node.input[0], name], product, node.name)
        return [multiply, *self._rounding(product, node.output[0])]

    def _is_rounded(self, node: NodeProto) -> bool:
        """Whether the floats that the node reads or gives are FP16."""
        return self.half and node.name not in self.kept

    def _rounding(self, source: str, target: str) -> list[NodeProto]:
        half = f"{target}/rounded-to-fp16"
        return [self._node("Cast", [source], half, to=TensorProto.FLOAT16),
                self._node("Cast", [half], target, to=TensorProto.FLOAT)]  # fmt: skip

    def _float_copy(self, name: str) -> str:
        copy = f"{name}/as-float"
        if copy not in self.weights:
            array = numpy_helper.to_array(self.weights[name]).astype(np.float32)
            self.weights[copy] = numpy_helper.from_array(array, copy)
        return copy

    def _constant(self, name: str, value: float) -> str:
        self.weights[name] = numpy_helper.from_array(np.array(value, np.float32), name)
        return name

    def _node(self, op: str, inputs: list[str], output: str, name: str = "", **attributes: int) -> NodeProto:
        made = helper.make_node(op, inputs, [output], name=f"{name or output}/{op}", **attributes)
        self.exact.append(made.name)
        return made
