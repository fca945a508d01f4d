"""What TVM's importer makes wrong of single nodes by what their attributes say, silently. Found by ONNX's node cases.

A row is an operator, what of it is misread, and how to see that. Needs onnx; imports no vendor module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx
from onnx import TensorProto, numpy_helper

from modelforge.compilers.protocol import Refusal

_IMPORTER: Final = "the ONNX importer of TVM 0.27 (relax/frontend/onnx/onnx_frontend.py)"
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_SIGNED: Final = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)
_BOOL: Final = TensorProto.BOOL


@dataclass(frozen=True)
class _Node:
    """What a rule sees of a node: attributes, type and shape of its first input, and which of its inputs are constants,
    as far as they are small, and which come from outside."""

    said: Mapping[str, Any]
    kind: int
    shape: tuple[int | None, ...] | None
    constants: tuple[Any, ...]
    fed: tuple[bool, ...]

    def word(self, name: str) -> str:
        value = self.said.get(name, b"")
        return value.decode() if isinstance(value, bytes) else str(value)


def _scales_past_pixels(node: _Node) -> bool:
    """Scales that do not give whole sizes: the importer makes sizes of them, and goes by the ratio of these."""
    scales = node.constants[2] if len(node.constants) > 2 else None
    if scales is None or node.shape is None or len(scales) != len(node.shape):
        return False
    sizes = [float(scale) * size for scale, size in zip(scales, node.shape, strict=True) if size]
    return any(abs(size - round(size)) > 1e-4 * size for size in sizes)


_Row = tuple[str, str, Callable[[_Node], bool]]
_ROWS: Final[Mapping[str, tuple[_Row, ...]]] = {
    "IsInf": (
        (
            "looks for one infinity only, and the importer for both",
            "write it as IsInf and a comparison with 0",
            lambda node: not (node.said.get("detect_positive", 1) and node.said.get("detect_negative", 1)),
        ),
    ),
    "ConvTranspose": (
        (
            "has an output_shape, which the importer leaves out",
            "give its `pads` and `output_padding` instead",
            lambda node: "output_shape" in node.said,
        ),
        (
            "gets its weight as an input of the model, for which TVM has no kernel",
            "make the weight a constant",
            lambda node: node.fed[1],
        ),
    ),
    "Mod": (
        (
            "has fmod = 0 with floating point numbers, whose edge cases the importer makes NaN",
            "give it fmod = 1, or write it as x - y * Floor(x / y)",
            lambda node: not node.said.get("fmod", 0) and node.kind in _FLOATS,
        ),
    ),
    "BitShift": (
        (
            "shifts signed integers, of which the importer does not make 0 where all bits are shifted out",
            "shift unsigned ones",
            lambda node: node.kind in _SIGNED,
        ),
    ),
    "Resize": (
        (
            "has antialias, which the importer leaves out",
            "resize outside of the model, or without antialias",
            lambda node: bool(node.said.get("antialias", 0)),
        ),
        (
            "has scales that do not give whole sizes; the importer goes by the ratio of rounded ones",
            "give `sizes` instead of scales",
            _scales_past_pixels,
        ),
        (
            "has axes, which the importer leaves out",
            "give scales or sizes for all dimensions",
            lambda node: "axes" in node.said or node.word("keep_aspect_ratio_policy") not in ("", "stretch"),
        ),
        (
            "maps coordinates by half_pixel_symmetric, which TVM does not have",
            "half_pixel is the same where sizes are whole",
            lambda node: node.word("coordinate_transformation_mode") == "half_pixel_symmetric",
        ),
    ),
    "SpaceToDepth": (
        (
            "has mode CRD, and the importer orders channels as DCR does",
            "write it as Reshape, Transpose and Reshape",
            lambda node: node.word("mode") not in ("", "DCR"),
        ),
    ),
    "Trilu": (
        (
            "is of matrices of one row, for which TVM generates no code",
            "multiply by a constant of zeros and ones",
            lambda node: node.shape is not None and node.shape[-2:-1] == (1,) and not any(node.fed[1:]),
        ),
    ),
    "RMSNormalization": (
        (
            "normalizes over all dimensions, which TVM cannot schedule",
            "put a dimension of 1 in front",
            lambda node: node.shape is not None and node.said.get("axis", -1) in (0, -len(node.shape)),
        ),
    ),
    **{
        name: (("is of booleans, of which TVM knows no least", "cast to integers", lambda node: node.kind == _BOOL),)
        for name in ("ReduceMax", "ReduceMin")
    },
}


def found_in(model: Any) -> Iterator[Refusal]:
    """What stands against nodes of a loaded model; types and shapes that it does not say are taken for others."""
    graph = model.graph
    if not any(node.op_type in _ROWS for node in graph.node):
        return
    typed = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    fed = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        for what, fix, is_misread in _ROWS.get(node.op_type, ()):
            if is_misread(_seen(node, typed, tensors, fed)):
                shown = f"{node.op_type} (node {node.name or node.output[0]}) {what}"
                yield Refusal("attributes", shown, fix, _IMPORTER)


def _seen(node: Any, typed: Mapping[str, Any], tensors: Mapping[str, Any], fed: set[str]) -> _Node:
    said = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    first = typed.get(node.input[0])
    sizes = None
    if first is not None and first.HasField("shape"):
        sizes = tuple(size.dim_value if size.HasField("dim_value") else None for size in first.shape.dim)
    constants = tuple(_array(tensors[name]) if name in tensors else None for name in node.input)
    kind = first.elem_type if first is not None else 0
    return _Node(said, kind, sizes, constants, tuple(name in fed for name in node.input))


def _array(tensor: Any) -> Any:
    """Small ones only: shapes, scales, axes. Weights may lie in a file that is not read here."""
    if tensor.data_location == TensorProto.EXTERNAL or sum(tensor.dims) > 64:
        return None
    return numpy_helper.to_array(tensor)
