"""Read what a model is, as :class:`ModelFacts`. `plan` calls it on every run: it imports only `onnx`, loads no weights.

Knows no target: what a compiler cannot have is the compiler's own table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from modelforge.graph.cost import flops, peak_activation_bytes
from modelforge.graph.facts import ModelFacts, OpFacts, TensorFacts
from modelforge.graph.load import parse
from modelforge.graph.shape_values import MOST_ELEMENTS, known_values
from modelforge.graph.shapes import Shape, bind_shapes, dimension
from modelforge.graph.walk import STANDARD_DOMAINS, graphs, subgraphs, tensors

_ROUNDS = 6
"""Shape arithmetic feeds shapes that feed shape arithmetic; real models settle in two or three rounds."""

_NOT_FOLDABLE = frozenset(
    {
        # No two runs alike.
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
        # Folding these would undo a quantization.
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    }
)


def inspect_model(
    path: Path,
    bound: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    *,
    cost: bool = True,
) -> ModelFacts:
    """Read the facts of a model.

    Args:
        bound: sizes of symbols for the FLOPs and the peak of the activations. A symbol or unnamed size that is not
            given counts as 1; the result's ``bound`` lists all, an unnamed one as ``input[axis]``.
        shapes: shape by input name, as in the recipe; the other inputs keep what the model declares.
        cost: False leaves FLOPs and peak as None, which is faster.

    Raises:
        ModelError: the file is not a model, or ``shapes`` does not fit it.
    """
    return inspect_proto(parse(Path(path)), bound, shapes, where=str(path), cost=cost)


def inspect_proto(
    model: onnx.ModelProto,
    bound: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    *,
    where: str,
    cost: bool = True,
) -> ModelFacts:
    """As :func:`inspect_model`, of a model in memory, which is changed. ``where`` names it in errors."""
    parameters = [(prod(tensor.dims), _tensor_bytes(tensor)) for tensor in _parameters(model)]
    nodes = sum(len(graph.node) for graph in graphs(model.graph))
    _strip_weights(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _set_shapes(model.graph, shapes or {}, where)
    inputs = tuple(_facts(value) for value in _inputs(model.graph))
    declared = tuple(_facts(value) for value in model.graph.output)
    _forget_shapes(model.graph)
    symbolic = _settle(model)
    sizes: dict[str, int] = {}
    figures: tuple[int | None, int | None] = (None, None)
    if cost:
        sizes = _sizes(inputs, bound or {})
        figures = _figures(_settle(_bind(model, sizes)) if sizes else symbolic)
    symbols = {size for value in inputs for size in value.shape or ()}
    return ModelFacts(
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        ir_version=model.ir_version,
        opsets={_domain(item.domain): item.version for item in model.opset_import},
        inputs=inputs,
        outputs=tuple(
            _merged(old, _facts(new), symbols) for old, new in zip(declared, symbolic.graph.output, strict=True)
        ),
        ops=_count_ops(model.graph, symbolic.foldable),
        nodes=nodes,
        parameters=sum(count for count, _ in parameters),
        parameter_bytes=sum(size for _, size in parameters),
        flops=figures[0],
        peak_activation_bytes=figures[1],
        bound=sizes,
    )


@dataclass(frozen=True)
class Settled:
    """A graph after shape inference: shape and bytes per element by tensor name, and what need not run."""

    graph: onnx.GraphProto
    shapes: Mapping[str, Shape]
    item_bytes: Mapping[str, int]
    foldable: frozenset[str]


def settle(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int | str]], bound: Mapping[str, int], where: str
) -> tuple[Settled, Settled, dict[str, int]]:
    """The shapes of all tensors: in symbols, and at ``bound`` sizes; and the sizes, as :func:`inspect_model` has them.

    Drops the data of large weights from ``model``, which it changes. Outputs keep their declared shapes nowhere.
    """
    _strip_weights(model)
    _set_shapes(model.graph, shapes, where)
    sizes = _sizes(tuple(_facts(value) for value in _inputs(model.graph)), bound)
    _forget_shapes(model.graph)
    symbolic = _settle(model)
    return symbolic, _settle(_bind(model, sizes)) if sizes else symbolic, sizes


def _settle(model: onnx.ModelProto) -> Settled:
    """Infer shapes, work out the arithmetic on them, and again until nothing more follows."""
    known: dict[str, NDArray[Any]] = {}
    inferred = _infer(model)
    for _ in range(_ROUNDS):
        shapes = {name: _shape(value) for name, value in _typed_values(inferred.graph)}
        static = {name: shape for name, shape in shapes.items() if shape is not None}
        before = len(known)
        for graph in graphs(inferred.graph):
            known_values(graph, static, known)
        if len(known) == before:
            break
        inferred = _infer(_with_constants(model, known))
    item_bytes = {name: _item_bytes(value.type.tensor_type.elem_type) for name, value in _typed_values(inferred.graph)}
    foldable = frozenset(_foldable(model.graph, static, set(known)))
    return Settled(inferred.graph, static, item_bytes, foldable)


def _infer(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=True)
    except Exception:  # an operator that is unknown, or a graph that contradicts itself: shapes stay unknown
        return model


def _with_constants(model: onnx.ModelProto, known: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """A copy in which every node whose output is known is that value: what shape inference can read."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = max(copy.ir_version, 4)  # before, an initializer had to be an input as well
    for graph in graphs(copy.graph):
        if graph is not copy.graph:
            _show_captured(graph, known)
        kept = []
        for node in graph.node:
            if len(node.output) == 1 and node.output[0] in known and not _is_output(node.output[0], graph):
                graph.initializer.append(numpy_helper.from_array(known[node.output[0]], node.output[0]))
            else:
                kept.append(node)
        if len(kept) < len(graph.node):
            kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
            del graph.node[:]
            graph.node.extend(kept)
    return copy


def _show_captured(body: onnx.GraphProto, known: Mapping[str, NDArray[Any]]) -> None:
    """Shape inference of a body sees the types of what it captures, but not the values: so give it those."""
    own = {tensor.name for tensor in body.initializer} | {name for node in body.node for name in node.output}
    captured = sorted({name for node in body.node for name in node.input if name in known} - own)
    body.initializer.extend(numpy_helper.from_array(known[name], name) for name in captured)


def _is_output(name: str, graph: onnx.GraphProto) -> bool:
    return any(value.name == name for value in graph.output)


def _foldable(graph: onnx.GraphProto, shapes: Mapping[str, Shape], constant: set[str]) -> set[str]:
    """Names whose value does not depend on an input: weights, constants, shapes that are static, and what follows."""
    constant |= {tensor.name for tensor in graph.initializer} - {value.name for value in _inputs(graph)}
    for node in graph.node:
        inner = set()
        for body in subgraphs(node):
            inner |= _foldable(body, shapes, set(constant))
        constant |= inner
        if _is_constant(node, shapes, constant):
            constant |= set(node.output)
    return constant


def _is_constant(node: onnx.NodeProto, shapes: Mapping[str, Shape], constant: set[str]) -> bool:
    if node.domain not in STANDARD_DOMAINS or node.op_type in _NOT_FOLDABLE or any(subgraphs(node)):
        return False
    if node.op_type in ("Shape", "Size") and node.input[0] in shapes:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        shape = shapes[node.input[0]]
        part = shape[attributes.get("start", 0) : attributes.get("end", len(shape))]
        return not any(isinstance(size, str) for size in part)
    return all(name in constant for name in node.input if name)


def _count_ops(graph: onnx.GraphProto, foldable: frozenset[str]) -> tuple[OpFacts, ...]:
    found: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for inner in graphs(graph):
        for node in inner.node:
            if set(filter(None, node.output)) <= foldable:
                continue
            example = node.name or next(filter(None, node.output), "")
            found.setdefault((_domain(node.domain), node.op_type), []).append((example, inner is not graph))
    return tuple(
        OpFacts(domain, op, len(places), places[0][0], any(inside for _, inside in places))
        for (domain, op), places in sorted(found.items())
    )


def _figures(settled: Settled) -> tuple[int | None, int | None]:
    skip = set(settled.foldable)
    return (
        flops(settled.graph, settled.shapes, skip),
        peak_activation_bytes(settled.graph, settled.shapes, settled.item_bytes, skip),
    )


def _sizes(inputs: tuple[TensorFacts, ...], bound: Mapping[str, int]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value in inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, str):
                key = f"{value.name}[{axis}]" if size == "?" else size
                sizes[key] = bound.get(key, 1)
    return sizes


def _bind(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in _inputs(copy.graph):
        shape = _shape(value)
        if shape is not None:
            _write_shape(
                value,
                tuple(
                    size if isinstance(size, int) else sizes[f"{value.name}[{axis}]" if size == "?" else size]
                    for axis, size in enumerate(shape)
                ),
            )
    return copy


def _set_shapes(graph: onnx.GraphProto, wanted: Mapping[str, Sequence[int | str]], where: str) -> None:
    declared = {value.name: _shape(value) for value in _inputs(graph)}
    shapes, renamed = bind_shapes(declared, wanted, where)
    for value in _inputs(graph):
        shape = shapes[value.name]
        if shape is not None:
            _write_shape(value, shape)
    for value in graph.output:
        shape = _shape(value)
        if shape is not None:
            _write_shape(value, tuple(renamed.get(str(size), size) for size in shape))


def _forget_shapes(graph: onnx.GraphProto) -> None:
    """Drop what the exporter wrote about shapes: it holds for its own sizes. Only custom operators need it."""
    custom = {name for node in graph.node if node.domain not in STANDARD_DOMAINS for name in node.output}
    kept = [value for value in graph.value_info if value.name in custom]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for value in graph.output:
        shape = _shape(value)
        if shape is not None:
            _write_shape(value, tuple(size if isinstance(size, int) else "?" for size in shape))


def _merged(declared: TensorFacts, inferred: TensorFacts, symbols: set[int | str]) -> TensorFacts:
    """An output as inferred; where inference made a name up, what the model declares."""
    if inferred.shape is None or declared.shape is None or len(inferred.shape) != len(declared.shape):
        return inferred if inferred.shape is not None and declared.shape is None else declared
    shape = tuple(
        new if isinstance(new, int) or new in symbols - {"?"} else old
        for old, new in zip(declared.shape, inferred.shape, strict=True)
    )
    return TensorFacts(declared.name, declared.dtype, shape)


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The graph's inputs without the weights, which IR version 3 lists among them."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _typed_values(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.ValueInfoProto]]:
    for inner in graphs(graph):
        for tensor in inner.initializer:
            yield tensor.name, helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for values in (inner.input, inner.value_info, inner.output):
            for value in values:
                yield value.name, value


def _facts(value: onnx.ValueInfoProto) -> TensorFacts:
    kind = value.type.WhichOneof("value")
    dtype = _dtype_name(value.type.tensor_type.elem_type) if kind == "tensor_type" else (kind or "?").split("_")[0]
    return TensorFacts(value.name, dtype, _shape(value))


def _shape(value: onnx.ValueInfoProto) -> Shape | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dimension(_dim(dim)) for dim in tensor.shape.dim)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    return int(dim.dim_value) if dim.WhichOneof("value") == "dim_value" else str(dim.dim_param)


def _write_shape(value: onnx.ValueInfoProto, shape: Shape) -> None:
    tensor = value.type.tensor_type
    tensor.shape.Clear()
    tensor.shape.SetInParent()  # a scalar has a shape too, of no dimensions
    for size in shape:
        dim = tensor.shape.dim.add()
        if isinstance(size, int):
            dim.dim_value = size
        elif size != "?":
            dim.dim_param = size


def _parameters(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and Constant nodes: some exporters keep all weights there."""
    for graph in graphs(model.graph):
        yield from graph.initializer
        for node in graph.node:
            if node.op_type == "Constant":
                yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _strip_weights(model: onnx.ModelProto) -> None:
    """Drop the data of large tensors: shape inference over 2 GiB gives an empty graph without a word (onnx #6150)."""
    for tensor in tensors(model):
        if prod(tensor.dims) > MOST_ELEMENTS:
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(field)


def _domain(domain: str) -> str:
    return "" if domain in STANDARD_DOMAINS else domain


def _dtype_name(elem_type: int) -> str:
    if elem_type == TensorProto.STRING:
        return "string"
    return str(helper.tensor_dtype_to_np_dtype(elem_type).name) if elem_type else "?"


def _item_bytes(elem_type: int) -> int:
    if elem_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return 0
    return int(helper.tensor_dtype_to_np_dtype(elem_type).itemsize)


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4}
    return int(-(-prod(tensor.dims) * bits.get(tensor.data_type, 8 * _item_bytes(tensor.data_type)) // 8))
