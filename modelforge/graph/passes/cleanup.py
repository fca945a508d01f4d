"""Passes that tidy a graph and leave what it computes alone: constants, names, identities, dead nodes, opsets, shapes.

Where onnx-ir has the pass, it is used; each class here says what it adds.
"""

from __future__ import annotations

import onnx
import onnx.shape_inference
import onnx_ir
from onnx_ir.passes import InPlacePass, PassResult, common

_LARGE = 8192
"""Bytes; what shape arithmetic reads is far smaller."""


class LiftConstants(InPlacePass):
    """Turn Constant nodes into initializers, in bodies too.

    paddle2onnx keeps all weights in Constant nodes; a quantizer takes those for activations, and accuracy goes to
    nothing without an error. A Constant that is itself a graph output has to stay.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        return common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


class RemoveInitializerInputs(InPlacePass):
    """Take weights out of the graph's inputs, where IR version 3 wanted them, and raise the IR version for it."""

    MINIMUM_IR = 8
    """The oldest version in use; 4 was the first where an initializer need not be an input."""

    def call(self, model: onnx_ir.Model) -> PassResult:
        modified = common.RemoveInitializersFromInputsPass()(model).modified
        if model.ir_version < self.MINIMUM_IR:
            model.ir_version = self.MINIMUM_IR
            modified = True
        return PassResult(model, modified)


class RemoveIdentities(InPlacePass):
    """Remove Identity nodes, and Dropout nodes that do nothing at inference.

    One stays where its input is a graph input, an initializer, a value of an outer graph or an output already: an
    output needs a producer of its own.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        nodes = list(onnx_ir.traversal.RecursiveGraphIterator(model.graph))
        removed = [_remove_identity(node) for node in nodes]  # all of them: `any` would stop at the first
        return PassResult(model, any(removed))


class RemoveDeadNodes(InPlacePass):
    """Remove nodes and initializers whose value nothing reads, in bodies too."""

    def call(self, model: onnx_ir.Model) -> PassResult:
        modified = common.RemoveUnusedNodesPass()(model).modified
        modified |= common.RemoveUnusedFunctionsPass()(model).modified  # type: ignore[no-untyped-call]  # onnx-ir
        for graph in model.graphs():
            outputs = set(graph.outputs)
            for name, value in list(graph.initializers.items()):
                if not value.uses() and value not in outputs and value not in graph.inputs:
                    del graph.initializers[name]
                    modified = True
        return PassResult(model, modified)


class RemoveUnusedOpsets(InPlacePass):
    """Drop operator domains that no node uses: a compiler that does not know one refuses the model."""

    def call(self, model: onnx_ir.Model) -> PassResult:
        return common.RemoveUnusedOpsetsPass()(model)


class UniqueNames(InPlacePass):
    """Give every node a name, and make names of nodes and values unique over the model and its bodies.

    Inputs and outputs keep theirs. A nameless node is called after its first output, so the name says where it is.
    """

    def call(self, model: onnx_ir.Model) -> PassResult:
        modified = False
        for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
            if not node.name:
                node.name = f"{node.op_type}/{node.outputs[0].name if node.outputs else ''}"
                modified = True
        modified |= common.NameFixPass()(model).modified
        return PassResult(model, _unique_node_names(model) or modified)

    def ensures(self, model: onnx_ir.Model) -> None:
        names = [node.name for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph)]
        if len(set(names)) != len(names) or not all(names):
            raise onnx_ir.passes.PostconditionError("node names are not unique")


class InferShapes(InPlacePass):
    """Write down every shape that follows from the inputs'. Where onnx cannot tell, the shape stays open."""

    def call(self, model: onnx_ir.Model) -> PassResult:
        try:
            inferred = onnx.shape_inference.infer_shapes(
                _without_weights(model), check_type=False, strict_mode=False, data_prop=True
            )
        except Exception:  # an operator that is unknown, or a graph that contradicts itself: shapes stay open
            return PassResult(model, False)
        result = onnx_ir.serde.deserialize_model(inferred)
        modified = [_take_types(old, new) for old, new in zip(model.graphs(), result.graphs(), strict=True)]
        return PassResult(model, any(modified))


def _without_weights(model: onnx_ir.Model) -> onnx.ModelProto:
    """The protobuf with large weights as references to nowhere: inference over 2 GiB gives an empty graph (#6150)."""
    large = {
        value: value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > _LARGE
    }
    try:
        for value, tensor in large.items():
            value.const_value = onnx_ir.ExternalTensor(
                "none",
                0,
                0,
                onnx_ir.DataType(tensor.dtype),
                shape=onnx_ir.Shape(list(tensor.shape.numpy())),
                name=str(value.name),
            )
        return onnx_ir.to_proto(model)
    finally:
        for value, tensor in large.items():
            value.const_value = tensor


def _take_types(graph: onnx_ir.Graph, inferred: onnx_ir.Graph) -> bool:
    """Take shapes and types over by name. (onnx-ir's own pass makes a tensor of an inferred sequence.)"""
    modified = False
    known = {value.name: value for value in _values(inferred)}
    for value in _values(graph):
        new = known.get(value.name)
        if new is None or not value.name:
            continue
        if new.shape is not None and value.shape != new.shape:
            value.shape, modified = new.shape, True
        if new.type is not None and value.type != new.type:
            value.type, modified = new.type, True
    return modified


def _values(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _remove_identity(node: onnx_ir.Node) -> bool:
    if node.domain != "" or not (node.op_type == "Identity" or _is_idle_dropout(node)):
        return False
    source, target = node.inputs[0], node.outputs[0]
    if source is None or node.graph is None:
        return False
    if target.is_graph_output():
        producer = source.producer()
        if producer is None or producer.graph is not node.graph or source.is_graph_output():
            return False
        name, shape, kind = target.name, target.shape, target.type
        target.replace_all_uses_with(source, replace_graph_outputs=True)
        target.name = None
        source.name = name
        # The signature of the model is the output's, not what was known inside.
        source.shape, source.type = shape, kind
    else:
        target.replace_all_uses_with(source)
    node.graph.remove(node, safe=True)
    return True


def _is_idle_dropout(node: onnx_ir.Node) -> bool:
    """Dropout without a training flag whose mask nobody reads."""
    training = len(node.inputs) > 2 and node.inputs[2] is not None
    mask = len(node.outputs) > 1 and (bool(node.outputs[1].uses()) or node.outputs[1].is_graph_output())
    return node.op_type == "Dropout" and not training and not mask


def _unique_node_names(model: onnx_ir.Model) -> bool:
    """Names over all bodies: a list of layers to keep in FP32 must not mean two nodes."""
    seen: set[str] = set()
    modified = False
    nodes = list(onnx_ir.traversal.RecursiveGraphIterator(model.graph))
    taken = {str(node.name) for node in nodes}
    for node in nodes:
        name, number = str(node.name), 1
        while name in seen:
            name = f"{node.name}_{number}"
            if name in taken and name not in seen:
                seen.add(name)
            number += 1
        if name != node.name:
            node.name = name
            modified = True
        seen.add(name)
    return modified
