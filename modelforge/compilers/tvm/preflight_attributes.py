"""What TVM's importer makes wrong of single nodes by what their attributes say, silently. Found by ONNX's node cases.

A row is an operator, what of it is misread, and how to see that. Needs onnx; imports no vendor module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto

from modelforge.compilers.protocol import Refusal

_IMPORTER: Final = "the ONNX importer of TVM 0.27 (relax/frontend/onnx/onnx_frontend.py)"
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_SIGNED: Final = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)

Attributes = Mapping[str, Any]
_ROWS: Final[Mapping[str, tuple[str, str, Callable[[Attributes, int], bool]]]] = {
    "IsInf": (
        "looks for one infinity only, and the importer for both",
        "write it as IsInf and a comparison with 0",
        lambda said, _: not (said.get("detect_positive", 1) and said.get("detect_negative", 1)),
    ),
    "ConvTranspose": (
        "has an output_shape, which the importer leaves out",
        "give its `pads` and `output_padding` instead",
        lambda said, _: "output_shape" in said,
    ),
    "Mod": (
        "has fmod = 0 with floating point numbers, whose edge cases the importer makes NaN",
        "give it fmod = 1, or write it as x - y * Floor(x / y)",
        lambda said, kind: not said.get("fmod", 0) and kind in _FLOATS,
    ),
    "BitShift": (
        "shifts signed integers, of which the importer does not make 0 where all bits are shifted out",
        "shift unsigned ones",
        lambda _, kind: kind in _SIGNED,
    ),
}


def refusals(path: Path) -> list[Refusal]:
    """All that stands against nodes of a model, and names them."""
    return list(found_in(onnx.load(path, load_external_data=False)))


def found_in(model: Any) -> Iterator[Refusal]:
    """As :func:`refusals`, of a loaded model; types that it does not say are taken for others."""
    if not any(node.op_type in _ROWS for node in model.graph.node):
        return
    typed = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in typed}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and node.op_type in _ROWS:
            what, fix, is_misread = _ROWS[node.op_type]
            said = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            if is_misread(said, kinds.get(node.input[0], 0)):
                shown = f"{node.op_type} (node {node.name or node.output[0]}) {what}"
                yield Refusal("attributes", shown, fix, _IMPORTER)
