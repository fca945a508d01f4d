"""Which channels of an output mean different things: an output that a Concat makes, such as boxes beside scores.

Read off any form of the model, lowered ones too. What a group must reach is for the gate to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, helper

_CARRIES = frozenset({"Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Dropout"})
"""Operators that leave every element where it is."""
_MOVES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split"})
"""Operators that move elements: what computed them stands before."""


@dataclass(frozen=True)
class Group:
    """A run of an output's channels that one tensor gave.

    Attributes:
        output: name of the model's output.
        name: of the tensor that was concatenated.
        axis: of the output that the channels lie along; ``rank`` is the output's.
        start, stop: the channels, ``stop`` not among them.
        alike: all groups of this output come from the same kind of operator, as the scales of a detector do: they may
            well mean the same.
    """

    output: str
    name: str
    axis: int
    rank: int
    start: int
    stop: int
    alike: bool


def find_output_groups(model: Path) -> tuple[Group, ...]:
    """The groups of all outputs that end in a Concat; weights in files of their own are not read.

    A nested Concat along the same axis is taken apart. Where all parts are a Concat of equal parts themselves (the
    scales of a detector, each of boxes and scores), the groups are those. An output with a part of unknown size has
    none.
    """
    proto = onnx.load(model, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(proto).graph
    reader = _Reader(graph)
    return tuple(group for output in graph.output for group in reader.groups(output.name))


@dataclass(frozen=True)
class _Concatenated:
    """The inputs of a Concat, along an axis of the output that is looked at."""

    parts: tuple[tuple[str, int], ...]
    axis: int


class _Reader:
    def __init__(self, graph: GraphProto) -> None:
        self._producers = {name: node for node in graph.node for name in node.output}
        self._shapes: dict[str, tuple[int | None, ...]] = {
            value.name: tuple(
                size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim
            )
            for value in [*graph.input, *graph.value_info, *graph.output]
            if value.type.tensor_type.HasField("shape")
        } | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}

    def groups(self, output: str) -> list[Group]:
        found = self._concatenated(output)
        if found is None:
            return []
        alike = self._alike(found)
        inner = [self._concatenated(name) for name, _ in found.parts] if alike else []
        if inner and inner[0] is not None and inner[0].axis != found.axis and self._equal(inner):
            found, alike = inner[0], self._alike(inner[0])
        places = [0]
        for _, size in found.parts:
            places.append(places[-1] + size)
        return [
            Group(output, name, found.axis, len(self._shapes[output]), start, start + size, alike)
            for (name, size), start in zip(found.parts, places, strict=False)
        ]

    def _concatenated(self, value: str) -> _Concatenated | None:
        """Follow a value back to the Concat that made it; None where there is none, or its parts are not known."""
        axes: list[int | None] = list(range(len(self._shapes.get(value, ()))))
        node = self._producers.get(value)
        while node is not None and node.op_type != "Concat":
            moved = self._before(node, axes)
            if moved is None:
                return None
            axes, node = moved, self._producers.get(node.input[0])
        rank = 0 if node is None else len(self._shapes.get(node.output[0], ()))
        if node is None or not rank:
            return None
        inner = _integer(node, "axis", 0) % rank
        if inner not in axes:
            return None
        parts = self._flattened(node, inner)
        return None if parts is None or len(parts) < 2 else _Concatenated(tuple(parts), axes.index(inner))

    def _before(self, node: NodeProto, axes: list[int | None]) -> list[int | None] | None:
        """For each axis of the output, the axis at this node's input that it is; None: not one that can be followed."""
        if node.op_type in _CARRIES:
            return axes
        rank = len(self._shapes.get(node.input[0], ())) if node.input else 0
        if node.op_type == "Transpose":
            order = _integers(node, "perm") or list(range(rank))[::-1]
            return [None if axis is None else order[axis] for axis in axes]
        if node.op_type == "Reshape":
            old, new = self._shapes.get(node.input[0], ()), self._shapes.get(node.output[0], ())
            if not old or not new or old[-1] is None or old[-1] != new[-1]:
                return None
            return [len(old) - 1 if axis == len(new) - 1 else None for axis in axes]
        return None

    def _flattened(self, node: NodeProto, axis: int) -> list[tuple[str, int]] | None:
        parts: list[tuple[str, int]] = []
        for name in node.input:
            producer = self._carried(name)
            shape = self._shapes.get(name, ())
            inner = None
            if producer is not None and producer.op_type == "Concat" and axis < len(shape):
                own = _integer(producer, "axis", 0) % len(shape)
                inner = self._flattened(producer, axis) if own == axis else None
            if inner is not None:
                parts += inner
                continue
            size = shape[axis] if axis < len(shape) else None
            if size is None:
                return None
            if size:
                parts.append((name, size))
        return parts

    def _carried(self, value: str) -> NodeProto | None:
        node = self._producers.get(value)
        while node is not None and node.op_type in _CARRIES:
            node = self._producers.get(node.input[0])
        return node

    def _alike(self, found: _Concatenated) -> bool:
        return len({self._origin(name) for name, _ in found.parts}) == 1

    def _origin(self, value: str) -> str:
        """The operator that computed the value, behind those that only move it."""
        node = self._carried(value)
        while node is not None and node.op_type in _MOVES:
            node = self._carried(node.input[0])
        return "" if node is None else node.op_type

    def _equal(self, found: Sequence[_Concatenated | None]) -> bool:
        sizes = {None if each is None else (each.axis, tuple(size for _, size in each.parts)) for each in found}
        return len(sizes) == 1


def _integer(node: NodeProto, name: str, default: int) -> int:
    return next((each.i for each in node.attribute if each.name == name), default)


def _integers(node: NodeProto, name: str) -> list[int]:
    return next((list(helper.get_attribute_value(each)) for each in node.attribute if each.name == name), [])
