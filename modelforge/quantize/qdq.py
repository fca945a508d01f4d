"""Write a prepared FP32 model as QDQ: QuantizeLinear and DequantizeLinear around what a dialect quantizes.

Ranges come from a calibration, rules from a dialect; nothing here measures, and no compiler is known.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray

from modelforge.errors import BuildError, InputError, UnsupportedError, nearest
from modelforge.graph.load import load, save
from modelforge.graph.passes import InferShapes, RemoveDeadNodes, run_passes
from modelforge.quantize.dialects import Dialect, get_dialect
from modelforge.quantize.placement import Placement, constant, is_weighted, place
from modelforge.quantize.ranges import RangeTable, TensorRange
from modelforge.quantize.thresholds import METHODS, Method, clip_range
from modelforge.quantize.weights import (
    SMALLEST_HALF_SCALE,
    SMALLEST_SCALE,
    half_up,
    least_weight_scale,
    quantize_bias,
    quantize_weight,
    weight_axis,
)

Array = NDArray[Any]

REDUCED = 64
"""Largest int8 weight where a kernel adds two uint8 x int8 products in 16 bits: 255 * 64 * 2 < 2 ** 15."""


@dataclass(frozen=True)
class Parameters:
    """Of one quantized activation: ``x = (q - zero_point) * scale``."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class QuantizeReport:
    """What was written; JSON-able by ``dataclasses.asdict``.

    Attributes:
        quantized: names of the nodes that compute in INT8, in graph order.
        kept: why a node stays in float, by its name: those with a weight, and those the dialect quantizes otherwise.
        mixed: Concat nodes whose inputs hold different meanings, with the ratio of their largest values.
        tensors: scale and zero point of each quantized activation; ``name (as other)`` where it has another's.
        quantize_nodes, dequantize_nodes: how many were added.
        opset: of the result; ``opset_raised`` is None, or what it was raised from.
    """

    dialect: str
    method: str
    quantized: tuple[str, ...]
    kept: Mapping[str, str]
    mixed: Mapping[str, float]
    tensors: Mapping[str, Parameters]
    quantize_nodes: int
    dequantize_nodes: int
    opset: int
    opset_raised: int | None


def quantize_model(
    model: Path,
    table: RangeTable,
    folder: Path,
    *,
    dialect: str,
    method: str = "auto",
    exclude: Collection[str] = (),
    reduce_range: bool = False,
) -> QuantizeReport:
    """Write ``folder/model.onnx``: the model with Q/DQ as the dialect wants it; the same input gives the same bytes.

    Args:
        model: what :func:`modelforge.graph.prepare.prepare` wrote.
        table: ranges of its activations.
        method: of :func:`modelforge.quantize.thresholds.clip_range`.
        exclude: names of nodes that stay in float.
        reduce_range: 7-bit weights, for x86 without VNNI.

    Raises:
        InputError: no such dialect or method, or ``exclude`` names a node that the model does not have.
        UnsupportedError: the model has no weight that the dialect quantizes, or its opset cannot be raised to 13.
        BuildError: the result is refused by onnx.checker.
    """
    model, folder = Path(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    placed = place_model(model, table, dialect=dialect, exclude=exclude)
    emitted = placed.emit(table, method, reduce_range)
    graph, placement = placed.graph, placed.placement
    run_passes(graph, [RemoveDeadNodes()], str(model))
    graph.graph.sort()
    write_checked(graph, folder, model)
    order = {node: place for place, node in enumerate(graph.graph)}
    quantized = sorted(placement.quantized, key=lambda node: order[node])
    return QuantizeReport(
        dialect=placed.rules.name,
        method=method,
        quantized=tuple(str(node.name) for node in quantized),
        kept=placement.left,
        mixed=placement.mixed,
        tensors=emitted.tensors,
        quantize_nodes=emitted.quantize_nodes,
        dequantize_nodes=emitted.dequantize_nodes,
        opset=graph.opset_imports[""],
        opset_raised=placed.opset_raised,
    )


@dataclass(frozen=True)
class PlacedModel:
    """A model in memory, and what of it a dialect quantizes: not written yet.

    Attributes:
        opset_raised: None, or what it was raised from.
    """

    graph: onnx_ir.Model
    placement: Placement
    rules: Dialect
    opset_raised: int | None

    def emit(self, table: RangeTable, method: str = "auto", reduce_range: bool = False) -> _Emitter:
        """Write the Q/DQ into the graph. What it does not read any more is left in it, and its nodes are not sorted.

        Raises:
            InputError: no such clip method.
        """
        if method not in METHODS:
            raise InputError(f'there is no clip method "{method}"', fix=nearest(method, METHODS))
        emitter = _Emitter(self.graph.graph, table, self.rules, method, REDUCED if reduce_range else 127)
        emitter.emit(self.placement)
        return emitter


def place_model(model: Path, table: RangeTable, *, dialect: str, exclude: Collection[str] = ()) -> PlacedModel:
    """Load a prepared model and decide what of it is quantized; arguments and errors as :func:`quantize_model`."""
    rules = get_dialect(dialect)
    graph, raised = _load_raised(Path(model), rules)
    if any(output.shape is None for node in graph.graph for output in node.outputs):  # else it was prepared
        run_passes(graph, [InferShapes()], str(model))
    _check_excluded(graph, exclude, model)
    placement = place(graph.graph, table, rules, exclude)
    if not placement.weighted:
        raise UnsupportedError(
            f"the dialect {rules.name} quantizes no node of this model",
            where=str(model),
            fix="; ".join(list(placement.left.values())[:3]) or "the model has no Conv, Gemm or MatMul with a weight",
        )
    return PlacedModel(graph, placement, rules, raised)


def activation_parameters(found: TensorRange, rules: Dialect, method: str, floor: float = -np.inf) -> Parameters:
    """Scale and zero point of an activation: zero is exact, and the scale a normal number.

    Args:
        floor: what is below may be clipped to it: see :attr:`Placement.floors`.
    """
    low, high = clip_range(found, cast(Method, method), symmetric=rules.symmetric, signed=rules.signed)
    return parameters_of(low if rules.symmetric else max(low, floor), high, rules)


def parameters_of(low: float, high: float, rules: Dialect) -> Parameters:
    """Scale and zero point that hold ``[low, high]`` and zero (ONNX QuantizeLinear, Jacob et al. 2018)."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    smallest, largest = rules.bounds
    if rules.symmetric:
        scale = max(-low, high) / largest
        return Parameters(_normal(scale, rules), 0 if rules.signed else (largest + 1) // 2)
    scale = _normal((high - low) / (largest - smallest), rules)
    return Parameters(scale, int(np.clip(round(smallest - low / scale), smallest, largest)))


def write_checked(graph: onnx_ir.Model, folder: Path, source: Path) -> None:
    """Write ``folder/model.onnx`` once onnx.checker has accepted it.

    Raises:
        BuildError: it did not.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".qdq-") as temporary:
        files = save(graph, Path(temporary))
        try:
            onnx.checker.check_model(str(files[0]))
        except onnx.checker.ValidationError as error:
            raise BuildError(
                f"the quantized model is not valid: {' '.join(str(error).split())[:400]}",
                where=str(source),
                fix="this is a fault of ModelForge: report it with the model",
            ) from None
        for file in reversed(files):  # the model last: it is what says that its data is complete
            shutil.move(file, folder / file.name)


@dataclass
class _Emitter:
    """Adds the nodes; each Q/DQ pair, weight and bias once, whoever reads it."""

    graph: onnx_ir.Graph
    table: RangeTable
    rules: Dialect
    method: str
    largest: int
    tensors: dict[str, Parameters] = field(default_factory=dict)
    quantize_nodes: int = 0
    dequantize_nodes: int = 0
    _initializers: dict[tuple[Any, ...], onnx_ir.Value] = field(default_factory=dict)
    _parameters: dict[onnx_ir.Value, Parameters] = field(default_factory=dict)
    _floors: dict[onnx_ir.Value, float] = field(default_factory=dict)
    _quantizes: dict[tuple[onnx_ir.Value, onnx_ir.Value], onnx_ir.Node] = field(default_factory=dict)

    def emit(self, placement: Placement) -> None:
        order = {node: place for place, node in enumerate(self.graph)}
        self._floors = placement.floors
        for node in placement.weighted:
            self._weight(node, self._input_parameters(node, placement))
        for node, index in sorted(placement.constants, key=lambda edge: (order[edge[0]], edge[1])):
            self._constant(node, index)
        for (value, like), edges in placement.reads.items():
            if edges:
                self._pair(value, like, sorted(edges, key=lambda edge: (order[edge[0]], edge[1])))
        for like in placement.outputs.values():
            self._of(like)  # by its name, which changes below
        for value, like in placement.outputs.items():
            self._output(value, like)

    def _input_parameters(self, node: onnx_ir.Node, placement: Placement) -> Parameters:
        like = next(like for (_, like), edges in placement.reads.items() if (node, 0) in edges)
        return self._of(like)

    def _of(self, value: onnx_ir.Value) -> Parameters:
        if value not in self._parameters:
            found = self.table[str(value.name)]
            self._parameters[value] = activation_parameters(
                found, self.rules, self.method, self._floors.get(value, -np.inf)
            )
        return self._parameters[value]

    def _pair(self, value: onnx_ir.Value, like: onnx_ir.Value, edges: list[tuple[onnx_ir.Node, int]]) -> None:
        """``value -> Q -> DQ ->`` the inputs given."""
        base = _base(value, like)
        output = self._dequantize(self._quantize(value, like), f"{base}/dequantized", f"{base}/DequantizeLinear")
        for node, index in edges:
            node.replace_input_with(index, output)

    def _output(self, value: onnx_ir.Value, like: onnx_ir.Value) -> None:
        """``value -> Q -> DQ ->`` the model's output of that name; its other readers share the Q."""
        name = str(value.name)
        quantize = self._quantizes.get((value, like)) or self._quantize(value, like)
        value.name = f"{name}/float"
        output = self._dequantize(quantize, name, f"{name}/output/DequantizeLinear")
        self.graph.outputs[list(self.graph.outputs).index(value)] = output

    def _quantize(self, value: onnx_ir.Value, like: onnx_ir.Value) -> onnx_ir.Node:
        parameters, base = self._of(like), _base(value, like)
        self.tensors[str(value.name) if like is value else f"{value.name} (as {like.name})"] = parameters
        zero = np.array(parameters.zero_point, np.int8 if self.rules.signed else np.uint8)
        scale = self._initializer(np.array(parameters.scale, np.float32), f"{base}/scale")
        zero_point = self._initializer(zero, f"{base}/zero_point")
        node = onnx_ir.node("QuantizeLinear", [value, scale, zero_point], name=f"{base}/QuantizeLinear")
        _name(node, f"{base}/quantized", zero_point.dtype, value)
        self.graph.append(node)
        self.quantize_nodes += 1
        self._quantizes[value, like] = node
        return node

    def _dequantize(self, quantize: onnx_ir.Node, output: str, name: str) -> onnx_ir.Value:
        node = onnx_ir.node("DequantizeLinear", [quantize.outputs[0], *quantize.inputs[1:]], name=name)
        value = quantize.inputs[0]
        self.graph.append(node)
        self.dequantize_nodes += 1
        return _name(node, output, onnx_ir.DataType.FLOAT, value)

    def _weight(self, node: onnx_ir.Node, parameters: Parameters) -> None:
        value = node.inputs[1]
        weight = _array(value)
        per_channel = node.op_type in self.rules.per_channel
        trans_b = bool(node.attributes.get_int("transB", 0))
        axis = weight_axis(node.op_type, weight.ndim, trans_b) if per_channel else None
        if node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) != 1:
            axis = None  # channel c of the weight is channel c of every group
        bias = self._bias_of(node, weight)
        least = None if bias is None else least_weight_scale(bias, parameters.scale)
        if least is not None and axis is None:
            least = least.max(initial=0.0)
        quantized = quantize_weight(weight, axis, largest=self.largest, half_scales=self.rules.half_scales, least=least)
        assert value is not None
        node.replace_input_with(1, self._dequantized(str(value.name), quantized.values, quantized.scale, axis))
        if bias is not None:
            values, scale = quantize_bias(bias, parameters.scale, quantized.scale)
            bias_value = node.inputs[2]
            assert bias_value is not None
            # Its scale follows from the input's, so a bias that two nodes share is written for each.
            output = self._dequantized(f"{bias_value.name}/of/{node.name}", values, scale, 0)
            node.replace_input_with(2, output)

    def _bias_of(self, node: onnx_ir.Node, weight: Array) -> Array | None:
        """The bias ``[channels]`` where it becomes int32."""
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if self.rules.bias != "int32" or node.op_type == "MatMul" or not constant(value):
            return None
        bias = _array(value)
        if node.op_type == "Gemm":
            channels = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
            # C may be [M, N] or a scalar, too; only one number for each column is a bias.
            if node.attributes.get_float("beta", 1.0) != 1.0 or bias.size != channels or bias.shape[-1:] != (channels,):
                return None
        return bias.reshape(-1)

    def _constant(self, node: onnx_ir.Node, index: int) -> None:
        """A constant operand of an elementwise operator: quantized as an activation is, one scale."""
        value = node.inputs[index]
        array = _array(value)
        parameters = parameters_of(float(array.min(initial=0.0)), float(array.max(initial=0.0)), self.rules)
        low, high = self.rules.bounds
        dtype = np.int8 if self.rules.signed else np.uint8
        values = np.clip(np.rint(array / np.float32(parameters.scale)) + parameters.zero_point, low, high).astype(dtype)
        zero_point = np.array(parameters.zero_point, dtype)
        assert value is not None
        output = self._dequantized(
            str(value.name),
            values,
            np.array(parameters.scale, np.float32),
            None,
            zero_point,
        )
        node.replace_input_with(index, output)

    def _dequantized(
        self,
        base: str,
        values: Array,
        scale: Array,
        axis: int | None,
        zero_point: Array | None = None,
    ) -> onnx_ir.Value:
        """A DequantizeLinear of a constant; one for all nodes that want the same numbers of the same weight."""
        key = (base, values.dtype.str, values.tobytes(), scale.tobytes(), axis)
        if key in self._initializers:
            return self._initializers[key]
        same = sum(1 for known in self._initializers if known[0] == base)
        base = base if not same else f"{base}/{same}"
        inputs = [self._initializer(values, f"{base}/quantized"), self._initializer(scale, f"{base}/scale")]
        # A zero point of int32 has to be absent or zero.
        if values.dtype != np.int32 or self.rules.bias_zero_point:
            zeros = np.zeros(scale.shape, values.dtype) if zero_point is None else zero_point
            inputs.append(self._initializer(zeros, f"{base}/zero_point"))
        attributes = {} if axis is None or scale.ndim == 0 else {"axis": axis}
        node = onnx_ir.node("DequantizeLinear", inputs, attributes, name=f"{base}/DequantizeLinear")
        output = _name(node, f"{base}/dequantized", onnx_ir.DataType.FLOAT, None)
        output.shape = onnx_ir.Shape(values.shape)
        self.graph.append(node)
        self.dequantize_nodes += 1
        self._initializers[key] = output
        return output

    def _initializer(self, array: Array, name: str) -> onnx_ir.Value:
        return add_initializer(self.graph, array, name)


def add_initializer(graph: onnx_ir.Graph, array: Array, name: str) -> onnx_ir.Value:
    """A constant of the graph. (``onnx_ir.tensor`` tells arrays by ``isinstance`` of a protocol, which is slow.)"""
    tensor = onnx_ir.Tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _base(value: onnx_ir.Value, like: onnx_ir.Value) -> str:
    """What the tensors of a Q/DQ pair are named after."""
    return str(value.name) if like is value else f"{value.name}/as/{like.name}"


def _name(node: onnx_ir.Node, name: str, dtype: onnx_ir.DataType | None, like: onnx_ir.Value | None) -> onnx_ir.Value:
    output = node.outputs[0]
    output.name = name
    if dtype is not None:
        output.dtype = dtype
    if like is not None:
        output.shape = like.shape
    return output


def _normal(scale: float, rules: Dialect) -> float:
    """As float32, and no denormal; an activation that is always zero gets 1."""
    if scale <= 0:
        return 1.0
    if rules.half_scales:
        return float(half_up(np.maximum(scale, SMALLEST_HALF_SCALE)))
    return float(np.float32(max(scale, SMALLEST_SCALE)))


def _array(value: onnx_ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _check_excluded(graph: onnx_ir.Model, exclude: Collection[str], model: Path) -> None:
    names = {str(node.name) for node in onnx_ir.traversal.RecursiveGraphIterator(graph.graph)}
    for name in sorted(exclude):
        if name not in names:
            weighted = [str(node.name) for node in graph.graph if is_weighted(node)]
            raise InputError(
                f'there is no node "{name}" to keep in float', where=str(model), fix=nearest(name, weighted)[:400]
            )


def _load_raised(model: Path, rules: Dialect) -> tuple[onnx_ir.Model, int | None]:
    """The model, at an opset that has what the dialect writes."""
    graph = load(model)
    opset = graph.opset_imports.get("", 1)
    if opset >= rules.lowest_opset:
        return graph, None
    from onnx import version_converter

    try:
        converted = version_converter.convert_version(onnx.load(model), max(rules.lowest_opset, 17))
        return onnx_ir.serde.deserialize_model(converted), opset
    except Exception as error:  # its C++ raises RuntimeError and others
        raise UnsupportedError(
            f"opset {opset} has no per-channel quantization, and the model cannot be raised to {rules.lowest_opset}: "
            f"{' '.join(str(error).split())[:300]}",
            where=str(model),
            fix=f"export the model at opset {rules.lowest_opset} or later",
        ) from None
