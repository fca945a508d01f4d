"""Sizes of dynamic dimensions that contradict the model: told before any build, node by node. Knows no vendor module.

The builder refuses what fails at the usual sizes only. What fails at the smallest or largest it builds with a warning,
and the engine then fails when it is given them (measured on TensorRT-RTX 1.7.1.116); here both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import numpy_helper, shape_inference

from modelforge.compilers.protocol import Refusal
from modelforge.compilers.tensorrt.preflight_model import live_nodes
from modelforge.compilers.tensorrt.product import MEASURED
from modelforge.compilers.tensorrt.skim import skim
from modelforge.graph.facts import ModelFacts
from modelforge.recipe import Dim

Shapes = Mapping[str, tuple[int | str, ...]]
SOURCE = f'"kOPT values violate shape constraints", "kMIN values are not self-consistent", {MEASURED}'

_FIX = "give bounds under [dims] that the model can have, or export it with that dimension dynamic"


def one_symbol_two_sizes(facts: ModelFacts, inputs: Shapes, dims: Mapping[str, Dim]) -> list[Refusal]:
    """Dimensions that the model knows by one name, and that the recipe gives different sizes."""
    seen: dict[str, tuple[str, int | str]] = {}
    found = []
    for tensor in facts.inputs:
        for axis, (ours, theirs) in enumerate(zip(inputs.get(tensor.name, ()), tensor.shape or (), strict=False)):
            if not isinstance(theirs, str) or theirs == "?":
                continue
            place = f"input {tensor.name}, axis {axis}"
            first, size = seen.setdefault(theirs, (place, ours))
            if _range(ours, dims) != _range(size, dims):
                what = (
                    f'the model names {first} and {place} alike, "{theirs}": they are one size, and the recipe '
                    f"gives {_spell(size, dims)} and {_spell(ours, dims)}"
                )
                source = f'"Input dimensions with this name have different constant values", {MEASURED}'
                found.append(Refusal("one-symbol", what, "give both the same size or symbol", source))
    return found


def contradictions(model: Path, inputs: Shapes, dims: Mapping[str, Dim]) -> list[Refusal]:
    """Nodes that cannot have the smallest, usual or largest sizes: by ONNX's shape inference, each time anew.

    Nothing is told of a model whose shapes cannot be inferred with its dimensions left open: what fails then is not
    the sizes.

    Raises:
        ModelError: the file is not an ONNX model.
    """
    symbols = {size for shape in inputs.values() for size in shape if isinstance(size, str)}
    if not symbols:
        return []
    bounds = tuple((symbol, dims[symbol]) for symbol in sorted(symbols))
    return list(_contradictions(model, model.stat().st_mtime_ns, tuple(sorted(inputs.items())), bounds))


@lru_cache(maxsize=64)  # a plan asks for each target, compiler and rung
def _contradictions(
    model: Path,
    _modified: int,
    inputs: tuple[tuple[str, tuple[int | str, ...]], ...],
    bounds: tuple[tuple[str, Dim], ...],
) -> tuple[Refusal, ...]:
    proto = _readied(model)
    if _fault(proto) is not None:
        return ()
    found: list[Refusal] = []
    for sizes in _corners(dict(bounds)):
        _bind(proto, dict(inputs), sizes)
        fault = _fault(proto)
        if fault is not None:
            told = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
            found.append(Refusal("sizes", f"with {told}: {fault}", _FIX, SOURCE))
    return tuple(found)


def _range(size: int | str, dims: Mapping[str, Dim]) -> tuple[int, ...] | str:
    if isinstance(size, int):
        return (size,)
    if size not in dims:
        return size
    dim = dims[size]
    gears = tuple(sorted({dim.smallest, dim.usual, dim.largest}))
    return dim.values or (gears if len(gears) > 1 else gears[:1])


def _spell(size: int | str, dims: Mapping[str, Dim]) -> str:
    if isinstance(size, int) or size not in dims:
        return str(size)
    return f"{size} ({', '.join(map(str, dims[size].gears))})"


def _corners(dims: Mapping[str, Dim]) -> Iterator[dict[str, int]]:
    """The usual sizes first: what fails there fails everywhere."""
    seen = []
    for which in ("usual", "smallest", "largest"):
        sizes = {symbol: getattr(dims[symbol], which) for symbol in dims}
        if sizes not in seen:
            seen.append(sizes)
            yield sizes


def _readied(path: Path) -> onnx.ModelProto:
    """The model without what was inferred before, its dead nodes and its large weights; every node with a name."""
    proto = skim(path)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    graph = proto.graph
    live = live_nodes(graph)
    kept = [node for position, node in enumerate(graph.node) if position in live]
    del graph.node[:]
    graph.node.extend(kept)
    for node in graph.node:
        node.name = node.name or next(filter(None, node.output), node.op_type)
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    return proto


def _bind(proto: onnx.ModelProto, inputs: Shapes, sizes: Mapping[str, int]) -> None:
    for value in proto.graph.input:
        shape = inputs.get(value.name)
        if shape is not None:
            tensor = value.type.tensor_type
            tensor.shape.Clear()
            for size in shape:
                tensor.shape.dim.add().dim_value = sizes[size] if isinstance(size, str) else size


_ERROR = re.compile(r"\(op_type:(\w+)(?:, node name: ([^)]*))?\):\s*(?:\[\w+\]\s*)?([^\n]+)")


def _fault(proto: onnx.ModelProto) -> str | None:
    """What shape inference says against the model, or None."""
    try:
        inferred = shape_inference.infer_shapes(proto, check_type=False, strict_mode=True, data_prop=True)
    except Exception as error:  # the checker raises what it likes; what it says is what there is to know
        match = _ERROR.search(str(error))
        return f"node {match[2] or '?'} ({match[1]}): {match[3].strip()}" if match else str(error).splitlines()[0]
    graph = inferred.graph
    shapes = {value.name: _static(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shapes |= {name: tuple(tensor.dims) for name, tensor in weights.items()}
    for node in graph.node:
        if (told := _negative(node, shapes) or _volume(node, shapes, weights)) is not None:
            return f"node {node.name} ({node.op_type}): {told}"
    return None


def _static(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or any(dim.WhichOneof("value") != "dim_value" for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def _negative(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...] | None]) -> str | None:
    """A window that is larger than what it goes over."""
    shape = next((shapes[name] for name in node.output if shapes.get(name)), None)
    if node.domain or shape is None or min(shape, default=0) >= 0:
        return None
    return f"its output would have the shape {list(shape)}"


def _volume(
    node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...] | None], weights: Mapping[str, onnx.TensorProto]
) -> str | None:
    """Reshape: shape inference does not count where all sizes are given."""
    if node.op_type != "Reshape" or node.domain or len(node.input) < 2:
        return None
    before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
    wanted = weights.get(node.input[1])
    if before is None or after is None or wanted is None or np.any(numpy_helper.to_array(wanted) <= 0):
        return None
    if prod(before) == prod(after):
        return None
    return f"it would make the {prod(before)} elements of {list(before)} into the {prod(after)} of {list(after)}"
