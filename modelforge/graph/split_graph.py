"""What splitting looks at: a model's layers and the tensors between them, as plain values. Loads no external weights.

A *layer* is a node that does work on data. Constants are not layers: each stage gets its own copy of those that it
needs. Arithmetic on shapes is marked ``light``: it is repeated rather than shipped where its stage can do so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, helper

from modelforge.errors import ModelError
from modelforge.graph.cost import node_flops
from modelforge.graph.inspect import Settled, settle
from modelforge.graph.load import parse
from modelforge.graph.shape_values import MOST_ELEMENTS, known_values
from modelforge.graph.shapes import Shape
from modelforge.graph.walk import STANDARD_DOMAINS, graphs, subgraphs

_RANDOM = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli Dropout".split()
)
_FLOATS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16},
)
_BITS = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4}


@dataclass(frozen=True)
class Tensor:
    """A tensor between layers, an input or an output.

    Attributes:
        shape: in the model's symbols, ``"?"`` where a size has no name; None where the rank is unknown.
        elements: at the graph's ``sizes``, None where that is not known.
        bytes: as the model has it, likewise.
    """

    name: str
    elem_type: int
    shape: Shape | None
    elements: int | None
    bytes: int | None

    @property
    def can_cross(self) -> bool:
        """Whether it can be a stage's input: a dense tensor (no sequence, no optional) of known type and rank."""
        return self.elem_type != TensorProto.UNDEFINED and self.shape is not None

    @property
    def dtype(self) -> str:
        """NumPy's name, as in :class:`modelforge.graph.facts.TensorFacts`."""
        if self.elem_type in (TensorProto.STRING, TensorProto.UNDEFINED):
            return "string" if self.elem_type else "?"
        return str(helper.tensor_dtype_to_np_dtype(self.elem_type).name)

    @property
    def is_float(self) -> bool:
        return self.elem_type in _FLOATS

    def transport_bytes(self, transport: str) -> int | None:
        """Bytes on a link at ``fp32``, ``fp16`` or ``int8``; what is no float, or is smaller, goes as it is."""
        if self.bytes is None or self.elements is None or not self.is_float:
            return self.bytes
        return min(self.bytes, self.elements * {"fp32": 4, "fp16": 2, "int8": 1}[transport])


@dataclass(frozen=True)
class Weight:
    """An initializer, the tensor of a Constant node, or one that ConstantOfShape fills."""

    elements: int
    bytes: int
    is_float: bool


@dataclass(frozen=True)
class Layer:
    """One node that does work on data.

    Attributes:
        node: its index among the graph's nodes, model-local functions inlined.
        reads: tensors that it reads, captures of its bodies included, each once; no weights or constants.
        weights: weights that it reads, through constant nodes too.
        constants: indices of the nodes that make its constants.
        flops: of one run at the graph's sizes; None where a shape is unknown.
        light: arithmetic on shapes: a handful of numbers that follow from shapes alone.
    """

    node: int
    name: str
    op: str
    domain: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[str, ...]
    constants: tuple[int, ...]
    flops: int | None
    light: bool


@dataclass(frozen=True)
class LayerGraph:
    """A model as layers in the order of its nodes, which is topological.

    Attributes:
        where: the model's path, for messages.
        outputs: in the model's order; one may be an input, or a constant.
        known: values of light tensors that follow from the declared shapes at any size of the symbols.
        sizes: what open sizes were bound to for bytes and FLOPs; an unnamed one is called ``input[axis]``.
        constant_outputs: graph outputs that no layer makes, with the weights and the nodes that make them.
        inner: names of tensors inside bodies, with the layer that owns the body: they cannot be cut.
    """

    where: str
    layers: tuple[Layer, ...]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Weight]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    known: Mapping[str, NDArray[Any]]
    sizes: Mapping[str, int]
    constant_outputs: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
    inner: Mapping[str, str]

    @cached_property
    def producer(self) -> Mapping[str, int]:
        """Position in ``layers`` of what writes a tensor; inputs have none."""
        return {name: position for position, layer in enumerate(self.layers) for name in layer.writes}

    @cached_property
    def readers(self) -> Mapping[str, tuple[int, ...]]:
        """Positions in ``layers`` of what reads a tensor."""
        found: dict[str, list[int]] = {}
        for position, layer in enumerate(self.layers):
            for name in layer.reads:
                found.setdefault(name, []).append(position)
        return {name: tuple(positions) for name, positions in found.items()}

    def is_light(self, name: str) -> bool:
        """Whether a tensor is the result of arithmetic on shapes."""
        position = self.producer.get(name)
        return position is not None and self.layers[position].light


def read_layers(
    path: Path, sizes: Mapping[str, int] | None = None, shapes: Mapping[str, Sequence[int | str]] | None = None
) -> LayerGraph:
    """Read a model's layers. External data is neither read nor needed.

    Args:
        sizes: sizes of symbols for bytes and FLOPs; one that is not given counts as 1.
        shapes: shape by input name in place of what the model declares.

    Raises:
        ModelError: the file is not a model, or ``shapes`` does not fit it.
    """
    model = inlined(parse(Path(path)))
    weights = dict(_weights(model.graph))
    symbolic, bound, bound_sizes = settle(model, shapes or {}, sizes or {}, str(path))
    return _Reader(str(path), model.graph, weights, symbolic, bound, bound_sizes).read()


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its local functions inlined, so that its nodes are the same for planning and for writing."""
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def captures(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads from outside: its inputs, and what its bodies take from the graphs around them."""
    yield from filter(None, node.input)
    for body in subgraphs(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own |= {sparse.values.name for sparse in body.sparse_initializer}
        own |= {name for inner in body.node for name in inner.output}
        for inner in body.node:
            yield from (name for name in captures(inner) if name not in own)
        yield from (value.name for value in body.output if value.name not in own)


class _Reader:
    """Turns a settled graph into layers, one node after the other."""

    def __init__(
        self,
        where: str,
        graph: onnx.GraphProto,
        weights: dict[str, Weight],
        symbolic: Settled,
        bound: Settled,
        sizes: Mapping[str, int],
    ) -> None:
        self.where, self.graph, self.sizes = where, graph, sizes
        self.symbolic, self.bound = symbolic, bound
        self.weights = weights
        self.types = _elem_types(symbolic.graph)
        # name -> (weights, constant nodes) behind a value that does not depend on any input
        self.fixed: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            name: ((name,), ()) for name in _initializer_names(graph)
        }
        self.light: set[str] = set()
        self.inner: dict[str, str] = {}

    def read(self) -> LayerGraph:
        layers = [layer for index, node in enumerate(self.graph.node) for layer in self._read(index, node)]
        inputs = tuple(value.name for value in self.graph.input if value.name not in self.fixed)
        outputs = tuple(value.name for value in self.graph.output)
        if not layers:
            raise ModelError("the model has no layer: nothing in it depends on an input", where=self.where)
        names = dict.fromkeys((*inputs, *(name for layer in layers for name in layer.writes), *outputs))
        values = known_values(self.graph, self.symbolic.shapes, {})
        return LayerGraph(
            where=self.where,
            layers=tuple(layers),
            tensors={name: self._tensor(name) for name in names},
            weights=self.weights,
            inputs=inputs,
            outputs=outputs,
            known={name: values[name] for name in self.light if self._is_sure(name, values.get(name))},
            sizes=self.sizes,
            constant_outputs={name: self.fixed[name] for name in outputs if name in self.fixed},
            inner=self.inner,
        )

    def _read(self, index: int, node: onnx.NodeProto) -> Iterator[Layer]:
        reads = list(dict.fromkeys(captures(node)))
        data = tuple(name for name in reads if name not in self.fixed)
        parts = [self.fixed[name] for name in reads if name in self.fixed]
        weights = tuple(dict.fromkeys(name for names, _ in parts for name in names))
        constants = tuple(sorted({node for _, nodes in parts for node in nodes}))
        writes = tuple(filter(None, node.output))
        has_body = any(subgraphs(node))
        standard = node.domain in STANDARD_DOMAINS
        if not data and not has_body and not (standard and node.op_type in _RANDOM):
            if node.op_type == "ConstantOfShape" and standard:
                self._note_filled(writes[0])
            own = tuple(name for name in writes if name in self.weights)
            for name in writes:
                self.fixed[name] = ((*weights, *own), (*constants, index))
            return
        name = node.name or (writes[0] if writes else f"{node.op_type}_{index}")
        if has_body:
            weights = (*weights, *self._note_bodies(node, f"bodies of {name} (node {index})", name))
        light = standard and not has_body and self._is_light(node, data, writes)
        if light:
            self.light.update(writes)
        yield Layer(
            node=index,
            name=name,
            op=node.op_type,
            domain="" if standard else node.domain,
            reads=data,
            writes=writes,
            weights=weights,
            constants=constants,
            flops=node_flops(node, self.bound.shapes),
            light=light,
        )

    def _is_light(self, node: onnx.NodeProto, data: tuple[str, ...], writes: tuple[str, ...]) -> bool:
        if node.op_type in ("Shape", "Size"):
            return True
        small = all(
            (shape := self.bound.shapes.get(name)) is not None
            and all(isinstance(size, int) for size in shape)
            and prod(int(size) for size in shape) <= MOST_ELEMENTS
            for name in writes
        )
        return small and node.op_type not in _RANDOM and all(name in self.light for name in data)

    def _note_filled(self, name: str) -> None:
        """A tensor that a node fills with one value takes memory as any weight does."""
        tensor = self._tensor(name)
        if tensor.elements and tensor.bytes and tensor.elements > MOST_ELEMENTS:
            self.weights[name] = Weight(tensor.elements, tensor.bytes, tensor.is_float)

    def _note_bodies(self, node: onnx.NodeProto, key: str, owner: str) -> tuple[str, ...]:
        """Remember the names inside a node's bodies, and what their weights take under one name."""
        found = [weight for body in subgraphs(node) for graph in graphs(body) for _, weight in _weights(graph)]
        for body in subgraphs(node):
            self._note_inner(body, owner)
        if not found:
            return ()
        elements, size = sum(weight.elements for weight in found), sum(weight.bytes for weight in found)
        self.weights[key] = Weight(elements, size, all(weight.is_float for weight in found))
        return (key,)

    def _note_inner(self, body: onnx.GraphProto, owner: str) -> None:
        for node in body.node:
            self.inner.update(dict.fromkeys(filter(None, node.output), owner))
            for inner in subgraphs(node):
                self._note_inner(inner, owner)

    def _tensor(self, name: str) -> Tensor:
        elem_type = self.types.get(name, TensorProto.UNDEFINED)
        sizes = self.bound.shapes.get(name)
        elements = None
        if sizes is not None and all(isinstance(size, int) for size in sizes):
            elements = prod(int(size) for size in sizes)
        size = None if elements is None or not _bits(elem_type) else -(-elements * _bits(elem_type) // 8)
        shape = self.symbolic.shapes.get(name)
        if shape is None and sizes is not None:  # inference finds the rank, at least, where sizes are known
            shape = ("?",) * len(sizes)
        return Tensor(name, elem_type, shape, elements, size)

    def _is_sure(self, name: str, value: NDArray[Any] | None) -> bool:
        """Whether a value that was worked out is of the type and shape that inference gives, and can be written."""
        if value is None or value.dtype.kind not in "iubf" or not np.isfinite(value).all():
            return False
        elem_type = self.types.get(name, TensorProto.UNDEFINED)
        if elem_type == TensorProto.UNDEFINED or helper.np_dtype_to_tensor_dtype(value.dtype) != elem_type:
            return False
        return self.symbolic.shapes.get(name) == value.shape


def _weights(graph: onnx.GraphProto) -> Iterator[tuple[str, Weight]]:
    for tensor in graph.initializer:
        yield tensor.name, _weight(tensor)
    for sparse in graph.sparse_initializer:
        yield sparse.values.name, _weight(sparse.values)
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in STANDARD_DOMAINS:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield node.output[0], _weight(attribute.t)


def _weight(tensor: TensorProto) -> Weight:
    elements = prod(tensor.dims)
    return Weight(elements, -(-elements * _bits(tensor.data_type) // 8), tensor.data_type in _FLOATS)


def _initializer_names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)


def _bits(elem_type: int) -> int:
    if elem_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return 0
    return _BITS.get(elem_type) or 8 * int(helper.tensor_dtype_to_np_dtype(elem_type).itemsize)


def _elem_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element type by tensor name; a sequence, an optional or an unknown type is left out."""
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for values in (graph.input, graph.value_info, graph.output):
        for value in values:
            if value.type.WhichOneof("value") == "tensor_type" and value.type.tensor_type.elem_type:
                found[value.name] = value.type.tensor_type.elem_type
    return found
