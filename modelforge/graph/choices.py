"""Which numbers of its inputs a model chooses its way by: those that an If's condition compares an input with.

A random number takes one way only, and often one that cannot run: no sampling rate is 1. Runs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from modelforge.graph.load import parse
from modelforge.graph.walk import STANDARD_DOMAINS

_MOST = 8
"""Combinations at most; each is a run of the model or two."""

_CARRIES = frozenset(("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Not"))
_BESIDE = {"Equal": (0,), "Greater": (0, 1), "GreaterOrEqual": (-1, 0), "Less": (-1, 0), "LessOrEqual": (0, 1)}
"""What to add to the constant so that a comparison is met once and missed once; a random number misses Equal."""

_INTEGERS = frozenset(
    (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32, TensorProto.UINT32)
) | {TensorProto.INT64, TensorProto.UINT64, TensorProto.BOOL}


def deciding_values(model: Path) -> list[Mapping[str, int]]:
    """Values for inputs of one integer or bool, by name: one entry for each way to try.

    The first is empty, which leaves all inputs to chance; it is the only one where no input decides anything.
    """
    graph = parse(Path(model)).graph
    options = _Reader(graph).options
    if not options:
        return [{}]
    names = sorted(options)
    ways = itertools.product(*([None, *sorted(options[name])] for name in names))
    found = ({name: value for name, value in zip(names, way, strict=True) if value is not None} for way in ways)
    return list(itertools.islice(found, _MOST))


class _Reader:
    """Follows each input of one element to the comparisons, in bodies too."""

    def __init__(self, graph: GraphProto) -> None:
        self._constants: dict[str, int] = {}
        self._inputs = {name: name for name in _deciders(graph)}
        self.options: dict[str, set[int]] = {}
        if self._inputs:
            self._read(graph)

    def _read(self, graph: GraphProto) -> None:
        numbers = {tensor.name: _number(tensor) for tensor in graph.initializer}
        self._constants |= {name: number for name, number in numbers.items() if number is not None}
        for node in graph.node:
            self._node(node)
            for attribute in node.attribute:
                for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    self._read(body)

    def _node(self, node: NodeProto) -> None:
        if node.domain not in STANDARD_DOMAINS:
            return
        if node.op_type == "Constant":
            for attribute in node.attribute:
                held = helper.get_attribute_value(attribute)
                number = _number(held) if isinstance(held, TensorProto) else held
                if isinstance(number, int):
                    self._constants[node.output[0]] = number
        elif node.op_type in _CARRIES and node.input[0] in self._inputs:
            self._inputs[node.output[0]] = self._inputs[node.input[0]]
        elif node.op_type in _BESIDE:
            for given, other in (tuple(node.input), tuple(node.input)[::-1]):
                if given in self._inputs and other in self._constants:
                    numbers = {self._constants[other] + more for more in _BESIDE[node.op_type]}
                    self.options.setdefault(self._inputs[given], set()).update(numbers)
        elif node.op_type == "If" and node.input[0] in self._inputs:
            self.options.setdefault(self._inputs[node.input[0]], set()).update((0, 1))


def _deciders(graph: GraphProto) -> Iterator[str]:
    """Inputs of one integer or bool."""
    constants = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        tensor = value.type.tensor_type
        single = tensor.HasField("shape") and all(size.dim_value == 1 for size in tensor.shape.dim)
        if value.name not in constants and tensor.elem_type in _INTEGERS and single:
            yield value.name


def _number(tensor: TensorProto) -> int | None:
    """The one whole number that a tensor holds."""
    kinds = (*_INTEGERS, TensorProto.FLOAT, TensorProto.DOUBLE)
    if prod(tensor.dims) != 1 or tensor.data_type not in kinds or tensor.data_location == TensorProto.EXTERNAL:
        return None
    number = float(numpy_helper.to_array(tensor).reshape(()))
    return int(number) if number.is_integer() else None
