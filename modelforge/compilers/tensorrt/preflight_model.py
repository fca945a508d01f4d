"""A lowered model as the preflight reads it: every node with the type, shape and origin of each of its tensors.

Reads the ONNX file alone, loads no large weight, and knows nothing of TensorRT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.tensorrt.skim import skim
from modelforge.graph.shape_values import MOST_ELEMENTS, known_values
from modelforge.graph.walk import STANDARD_DOMAINS, graphs, subgraphs, tensors

Shape = tuple[int | str, ...]

# What reads the shape of its input and not its numbers.
_SHAPE_ONLY = frozenset({"Shape", "Size"})
# What stays a weight when it is done to a weight; the parser looks through these two only.
_SEEN_THROUGH = frozenset({"Identity", "Cast"})
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Tensor:
    """A value of the graph.

    Attributes:
        dtype: NumPy's (or ml_dtypes') name, ``string``, a container's kind such as ``sequence``, or "" if unknown.
        shape: None where the rank is unknown; a size may be a symbol, ``"?"`` where it has no name.
        value: its numbers, where they are few and follow from constants and static shapes.
        is_weight: an initializer or Constant, as it stands or behind Identity and Cast.
        from_input: its numbers depend on a number that the caller gives (not only on a shape).
    """

    name: str
    dtype: str = ""
    shape: Shape | None = None
    value: NDArray[Any] | None = None
    is_weight: bool = False
    from_input: bool = False

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)


@dataclass(frozen=True)
class Node:
    """A node, of the graph or of a body in it.

    Attributes:
        name: its own, or its first output's where it has none.
        inputs: None where an optional input is left out.
        is_live: an output of the model depends on it.
        owners: the nodes whose bodies hold it, outermost first.
        bodies: outputs of its bodies, in the order of its attributes.
    """

    op: str
    domain: str
    opset: int
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, Any]
    is_live: bool
    owners: tuple[str, ...]
    bodies: tuple[tuple[Tensor, ...], ...]

    def input(self, index: int) -> Tensor | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def text(self, attribute: str, default: str) -> str:
        value = self.attributes.get(attribute, default)
        return value.decode() if isinstance(value, bytes) else str(value)


@dataclass(frozen=True)
class Model:
    """Attributes:
    inputs: of the graph, without the weights.
    outputs: of the graph; one that the file gives no type has none here either.
    weights: the initializers of the graph and of its bodies.
    nodes: of the graph and of its bodies, a node before those of its bodies.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    nodes: tuple[Node, ...]

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that take a tensor, by its name."""
        found: dict[str, tuple[Node, ...]] = {}
        for node in self.nodes:
            for tensor in node.inputs:
                if tensor is not None:
                    found[tensor.name] = (*found.get(tensor.name, ()), node)
        return found

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that makes a tensor, by its name."""
        return {tensor.name: node for node in self.nodes for tensor in node.outputs if tensor.name}

    @cached_property
    def named(self) -> Mapping[str, tuple[Node, ...]]:
        """Nodes by their name: the parser wants some to be unique."""
        found: dict[str, tuple[Node, ...]] = {}
        for node in self.nodes:
            found[node.name] = (*found.get(node.name, ()), node)
        return found


def read_model(path: Path) -> Model:
    """Read a model with what shape inference and constants tell of it; model-local functions are inlined.

    Raises:
        ModelError: the file is not an ONNX model.
    """
    proto = skim(path)
    untyped = {value.name for value in proto.graph.output if value.type.WhichOneof("value") is None}
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    scales = _quantization_parameters(proto)
    for tensor in tensors(proto):
        if prod(tensor.dims) > MOST_ELEMENTS:
            tensor.ClearField("raw_data")
            for data in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"):
                tensor.ClearField(data)
    # An unknown operator, or a graph that contradicts itself, raises almost anything: what it leaves stays unknown.
    with contextlib.suppress(Exception):
        proto = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    return _Reader(proto, scales, untyped).read()


def dtype_name(elem_type: int) -> str:
    """ONNX's element type as a name: ``float32``, ``bfloat16``, ``float8_e4m3fn``, ``string``; "" if unknown."""
    if elem_type == TensorProto.STRING:
        return "string"
    if elem_type not in TensorProto.DataType.values() or elem_type == TensorProto.UNDEFINED:
        return ""
    return str(helper.tensor_dtype_to_np_dtype(elem_type).name)


def _quantization_parameters(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Scales and zero points, also those of many channels: they are small, and each element matters."""
    wanted = {
        name
        for graph in graphs(proto.graph)
        for node in graph.node
        if node.op_type in _QUANTIZERS
        for name in node.input[1:]
    }
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for graph in graphs(proto.graph)
        for tensor in graph.initializer
        if tensor.name in wanted and tensor.data_location != TensorProto.EXTERNAL
    }


class _Reader:
    """Walks the graph and its bodies with the names that are in scope."""

    def __init__(self, proto: onnx.ModelProto, scales: Mapping[str, NDArray[Any]], untyped: set[str]) -> None:
        self._graph = proto.graph
        self._untyped = untyped
        self._opsets = {item.domain: item.version for item in proto.opset_import}
        self._scales = scales
        self._nodes: list[Node] = []
        self._weights: list[Tensor] = []

    def read(self) -> Model:
        graph = self._graph
        initialized = {tensor.name for tensor in graph.initializer}
        inputs = [_declared(value, from_input=True) for value in graph.input if value.name not in initialized]
        live = live_nodes(graph)
        scope, _ = self._walk(graph, {tensor.name: tensor for tensor in inputs}, {}, (), live)
        outputs = [
            Tensor(value.name) if value.name in self._untyped else scope.get(value.name, _declared(value))
            for value in graph.output
        ]
        return Model(
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            weights=tuple(self._weights),
            nodes=tuple(self._nodes),
        )

    def _walk(
        self,
        graph: onnx.GraphProto,
        outer: Mapping[str, Tensor],
        values: Mapping[str, NDArray[Any]],
        owners: tuple[str, ...],
        live: set[int] | None,
    ) -> tuple[dict[str, Tensor], dict[str, NDArray[Any]]]:
        """Read one graph. ``live``: positions of the live nodes; None: all of them are."""
        scope = dict(outer)
        typed = {value.name: _declared(value) for values_ in (graph.value_info, graph.output) for value in values_}
        for tensor in graph.initializer:
            value = self._scales.get(tensor.name)
            weight = Tensor(tensor.name, dtype_name(tensor.data_type), tuple(tensor.dims), value, is_weight=True)
            scope[tensor.name] = weight
            self._weights.append(weight)
        shapes = {name: tensor.shape for name, tensor in {**outer, **typed}.items() if tensor.shape is not None}
        known = known_values(graph, shapes, dict(values))
        for name, value in known.items():
            if name in scope and scope[name].value is None:
                scope[name] = _with_value(scope[name], value)
        for position, node in enumerate(graph.node):
            is_live = live is None or position in live
            self._node(node, scope, typed, known, owners, is_live)
        return scope, known

    def _node(
        self,
        node: onnx.NodeProto,
        scope: dict[str, Tensor],
        typed: Mapping[str, Tensor],
        known: dict[str, NDArray[Any]],
        owners: tuple[str, ...],
        is_live: bool,
    ) -> None:
        inputs = tuple(scope.get(name, Tensor(name)) if name else None for name in node.input)
        name = node.name or next(filter(None, node.output), node.op_type)
        at = len(self._nodes)
        bodies = tuple(
            self._body(node, body, inputs, scope, known, (*owners, name), None if is_live else set())
            for body in subgraphs(node)
        )
        outputs = tuple(self._output(node, each, inputs, bodies, typed, known) for each in node.output)
        self._nodes.insert(
            at,  # before the nodes of its bodies
            Node(
                op=node.op_type,
                domain="" if node.domain in STANDARD_DOMAINS else node.domain,
                opset=self._opsets.get(node.domain, self._opsets.get("", 0)),
                name=name,
                inputs=inputs,
                outputs=outputs,
                attributes=dict(_attributes(node)),
                is_live=is_live,
                owners=owners,
                bodies=bodies,
            ),
        )
        scope.update({tensor.name: tensor for tensor in outputs if tensor.name})

    def _body(
        self,
        node: onnx.NodeProto,
        body: onnx.GraphProto,
        inputs: tuple[Tensor | None, ...],
        scope: Mapping[str, Tensor],
        known: Mapping[str, NDArray[Any]],
        owners: tuple[str, ...],
        live: set[int] | None,
    ) -> tuple[Tensor, ...]:
        """Read a body; its own inputs take their origin from what the node hands them."""
        own = {}
        for position, value in enumerate(body.input):
            counts = node.op_type == "Loop" and position < 2  # the iteration's number and its condition
            source = inputs[position] if position < len(inputs) and not counts else None
            own[value.name] = _declared(value, from_input=source is not None and source.from_input)
        inner, _ = self._walk(body, {**scope, **own}, known, owners, live)
        return tuple(inner.get(value.name, _declared(value)) for value in body.output)

    def _output(
        self,
        node: onnx.NodeProto,
        name: str,
        inputs: tuple[Tensor | None, ...],
        bodies: tuple[tuple[Tensor, ...], ...],
        typed: Mapping[str, Tensor],
        known: Mapping[str, NDArray[Any]],
    ) -> Tensor:
        found = typed.get(name, Tensor(name))
        value = known.get(name)
        if node.op_type == "Constant":
            constant = _constant(node)
            return Tensor(name, constant.dtype or found.dtype, constant.shape, value, is_weight=True)
        given = [tensor for tensor in inputs if tensor is not None]
        reads = node.op_type not in _SHAPE_ONLY
        return Tensor(
            name,
            found.dtype,
            found.shape,
            value,
            is_weight=node.op_type in _SEEN_THROUGH and bool(given) and given[0].is_weight,
            from_input=value is None
            and reads
            and any(tensor.from_input for tensor in (*given, *(each for body in bodies for each in body))),
        )


def live_nodes(graph: onnx.GraphProto) -> set[int]:
    """Positions of the nodes that an output depends on."""
    needed = {value.name for value in graph.output}
    live = set()
    for position in range(len(graph.node) - 1, -1, -1):
        node = graph.node[position]
        if not needed & set(node.output):
            continue
        live.add(position)
        if node.op_type not in _SHAPE_ONLY:
            needed.update(node.input)
        for body in subgraphs(node):
            needed.update(name for inner in graphs(body) for each in inner.node for name in each.input)
            needed.update(value.name for inner in graphs(body) for value in inner.output)
    return live


def _declared(value: onnx.ValueInfoProto, *, from_input: bool = False) -> Tensor:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return Tensor(value.name, (kind or "").removesuffix("_type"), None, from_input=from_input)
    tensor = value.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            int(dim.dim_value) if dim.WhichOneof("value") == "dim_value" else str(dim.dim_param) or "?"
            for dim in tensor.shape.dim
        )
    return Tensor(value.name, dtype_name(tensor.elem_type), shape, from_input=from_input)


def _constant(node: onnx.NodeProto) -> Tensor:
    for attribute in node.attribute:
        if attribute.name == "value":
            return Tensor("", dtype_name(attribute.t.data_type), tuple(attribute.t.dims))
        if attribute.name.startswith("value_"):
            kinds = {"f": "float32", "i": "int64", "s": "string"}
            kind = kinds[attribute.name.removeprefix("value_")[0]]
            plural = attribute.name.endswith("s")
            size = len(np.atleast_1d(helper.get_attribute_value(attribute))) if plural else 0
            return Tensor("", kind, (size,) if plural else ())
        if attribute.name == "sparse_value":
            return Tensor("", "sparse_tensor")
    return Tensor("")


def _with_value(tensor: Tensor, value: NDArray[Any]) -> Tensor:
    return Tensor(tensor.name, tensor.dtype, tensor.shape, value, tensor.is_weight, tensor.from_input)


def _attributes(node: onnx.NodeProto) -> Iterator[tuple[str, Any]]:
    for attribute in node.attribute:
        if attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            yield attribute.name, helper.get_attribute_value(attribute)
