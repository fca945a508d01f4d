"""What TVM's importer makes wrong of single nodes, silently: outputs that it only pretends to give, training, and
attributes (:mod:`.preflight_attributes`).

Its converters give constants in the place of optional outputs, or fewer outputs than the node has. Those that nothing
reads are left out before the import; a node of which one is read is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import numpy_helper

from modelforge.compilers.protocol import Refusal
from modelforge.compilers.tvm import preflight_attributes

_IMPORTER: Final = "the ONNX importer of TVM 0.27 (relax/frontend/onnx/onnx_frontend.py)"
_GIVEN: Final = {
    ("", "Dropout"): 1,  # a mask of floats
    ("", "LayerNormalization"): 1,  # the scalar 0 for Mean and InvStdDev
    ("", "MaxPool"): 1,  # no Indices
    ("com.microsoft", "Attention"): 1,  # the scalar 0 for `present`
    ("com.microsoft", "EmbedLayerNormalization"): 2,  # no embedding_sum
    ("com.microsoft", "SkipLayerNormalization"): 1,  # the scalar 0 for mean and inv_std_var, no input_skip_bias_sum
}
"""By domain and operator: so many outputs are what ONNX says they are."""


def refusals(path: Path) -> list[Refusal]:
    """All that stands against nodes of a model, and names them."""
    return found_in(onnx.load(path, load_external_data=False))


def found_in(model: Any) -> list[Refusal]:
    """As :func:`refusals`, of a loaded model."""
    nodes, read = _live(model.graph)
    constants = _constants(model.graph)
    found = []
    for node in nodes:
        for position, name in enumerate(node.output):
            if position >= _given(node) and name in read:
                what = f"output {position + 1} of {node.op_type} (node {_name(node)}) is read; the importer has none"
                found.append(Refusal("output", what, "compute it by other operators", _IMPORTER))
        if _trains(node, constants):
            fix = "export the model for inference (training_mode 0)"
            what = f"{node.op_type} (node {_name(node)}) is in training mode, and the importer takes it for inference"
            found.append(Refusal("training", what, fix, _IMPORTER))
    return [*found, *preflight_attributes.found_in(model)]


def without_unread_outputs(model: Any) -> None:
    """Take from the nodes of a loaded model the outputs that the importer cannot give, where nothing reads them."""
    _, read = _live(model.graph)
    for node in model.graph.node:
        while len(node.output) > _given(node) and node.output[-1] not in read:
            del node.output[-1]


def _given(node: Any) -> int:
    return _GIVEN.get((_domain(node), node.op_type), len(node.output))


def _live(graph: Any) -> tuple[list[Any], set[str]]:
    """The nodes that an output of the graph depends on, and the names that they or the graph's outputs read."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if any(name in read for name in node.output):
            nodes.append(node)
            read.update(_reads(node))
    read.discard("")
    return nodes[::-1], read


def _reads(node: Any) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from _reads(inner)
            yield from (value.name for value in body.output)


def _trains(node: Any, constants: dict[str, Any]) -> bool:
    if _domain(node):
        return False
    if node.op_type == "BatchNormalization":  # before opset 14, its outputs say so
        return len(list(filter(None, node.output))) > 1 or any(
            attribute.name == "training_mode" and attribute.i for attribute in node.attribute
        )
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        mode = constants.get(node.input[2])
        return mode is None or bool(numpy_helper.to_array(mode).any())
    return False


def _constants(graph: Any) -> dict[str, Any]:
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def _domain(node: Any) -> str:
    return "" if node.domain == "ai.onnx" else str(node.domain)


def _name(node: Any) -> str:
    return str(node.name or node.output[0])
