"""Move the spread between channels out of the activations that will be quantized, into constants around them.

One int8 scale serves all channels of an activation, so the loudest channel sets the step of the quietest. Dividing each
channel by a factor and multiplying the weights that read it by the same changes nothing in FP32 (Nagel et al. 2019,
"Data-Free Quantization"; Xiao et al. 2023, "SmoothQuant"), costs no node, and a depthwise Conv takes all of it for
nothing, as each channel has a weight scale of its own there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelforge.graph.load import load
from modelforge.graph.passes import InferShapes, RemoveDeadNodes, run_passes
from modelforge.quantize.placement import constant, is_weighted
from modelforge.quantize.qdq import write_checked
from modelforge.quantize.ranges import RangeTable

Array = NDArray[Any]

LARGEST_FACTOR = 2.0**10
"""Between channels: keeps scaled weights within FP16."""

_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
"""``f(c * x) == c * f(x)`` for each channel and ``c > 0``."""


@dataclass(frozen=True)
class EqualizeReport:
    """JSON-able. ``equalized``: spread between channels (largest by median), before, by activation."""

    equalized: dict[str, float]


@dataclass(frozen=True)
class _Move:
    """Multiply ``node``'s constant input by the factors (or their inverse) along the channels of the activation."""

    node: onnx_ir.Node
    index: int
    inverse: bool
    kind: str


def equalize(model: Path, table: RangeTable, folder: Path, *, strength: float = 0.5) -> EqualizeReport:
    """Write ``folder/model.onnx``: the same function in FP32, with more even channels before the weighted operators.

    Calibrate the result anew: the ranges of ``table`` are those of ``model``.

    Args:
        table: with ``channel_absmax`` of the activations; those without are left alone.
        strength: how much of the spread moves into a dense weight, 0..1 (SmoothQuant's alpha); a depthwise Conv
            takes all of it.

    Raises:
        BuildError: the result is refused by onnx.checker.
    """
    model, folder = Path(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    graph = load(model)
    run_passes(graph, [InferShapes()], str(model))
    equalized: dict[str, float] = {}
    for value in _candidates(graph.graph):
        channels = _channel_absmax(table, value)
        if channels is None:
            continue
        readers = _readers(value)
        writers = _writers(value, len(channels)) if readers else None
        if not readers or writers is None:
            continue
        factors = _factors(channels, readers, strength)
        if factors is None:
            continue
        for move in (*readers, *writers):
            _apply(graph.graph, move, factors, value)
        used = channels[channels > 0]
        equalized[str(value.name)] = round(float(used.max() / np.median(used)), 2)
    run_passes(graph, [RemoveDeadNodes()], str(model))
    write_checked(graph, folder, model)
    return EqualizeReport(equalized)


def _candidates(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    """What weighted operators read, in graph order, each once."""
    found: dict[onnx_ir.Value, None] = {}
    for node in graph:
        value = node.inputs[0] if is_weighted(node) else None
        if value is not None and value.producer() is not None:
            found[value] = None
    return list(found)


def weighted_inputs(model: Path) -> list[str]:
    """What Conv, Gemm and MatMul with a weight read: where equalization wants to know each channel."""
    return sorted({str(node.inputs[0].name) for node in load(model).graph if is_weighted(node) and node.inputs[0]})


def _channel_absmax(table: RangeTable, value: onnx_ir.Value) -> Array | None:
    name = str(value.name)
    if name not in table or table[name].channel_absmax is None:
        return None
    rank = table[name].shape_rank
    channels = table[name].channel_absmax
    axis = 1 if rank == 4 else rank - 1
    if channels is None or table[name].channel_axis != axis or value.is_graph_output():
        return None
    return np.asarray(channels, np.float64)


def _readers(value: onnx_ir.Value) -> list[_Move]:
    """The weights that read the value; none where something reads it that cannot take a factor."""
    moves: list[_Move] = []
    for use in value.uses():
        node = use.node
        if use.idx != 0 or not is_weighted(node) or node.op_type == "ConvTranspose":
            return []
        if node.op_type == "Conv":
            group = node.attributes.get_int("group", 1)
            weight = node.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            shape = weight.const_value.numpy().shape
            depthwise = group > 1 and shape[:2] == (group, 1)
            if group != 1 and not depthwise:
                return []
            moves.append(_Move(node, 1, False, "depthwise" if depthwise else "conv"))
        elif node.op_type == "Gemm":
            if node.attributes.get_int("transA", 0):
                return []
            moves.append(_Move(node, 1, False, "gemm-t" if node.attributes.get_int("transB", 0) else "gemm"))
        else:
            moves.append(_Move(node, 1, False, "matmul"))
    return moves


def _writers(value: onnx_ir.Value, channels: int) -> list[_Move] | None:  # noqa: PLR0912  # one rule an operator
    """The constants to divide so that the value is divided; None where there are none.

    Upstream through what commutes with a factor, as long as nothing else reads what changes.
    """
    moves: list[_Move] = []
    rank = 0 if value.shape is None else len(value.shape)
    current: onnx_ir.Value | None = value
    while current is not None:
        node = current.producer()
        if node is None or node.domain != "" or current.is_graph_output():
            return None
        if current is not value and len(list(current.uses())) != 1:
            return None
        if node.op_type in _HOMOGENEOUS:
            current = node.inputs[0]
        elif node.op_type in ("Mul", "Div", "Add", "Sub"):
            index = next((index for index, operand in enumerate(node.inputs) if constant(operand)), None)
            if index is None or (node.op_type in ("Div", "Sub") and index == 0):
                return None
            if not _fits_channels(node.inputs[index], rank, channels):
                return None
            # x / k: dividing the quotient is multiplying k.
            moves.append(_Move(node, index, node.op_type != "Div", "broadcast"))
            if node.op_type in ("Mul", "Div"):
                return moves
            current = node.inputs[1 - index]
        elif node.op_type == "Conv" and is_weighted(node):
            moves.append(_Move(node, 1, True, "output-0"))
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                if not constant(node.inputs[2]):
                    return None
                moves.append(_Move(node, 2, True, "output-0"))
            return moves
        elif node.op_type == "LayerNormalization" and len(node.inputs) > 1 and constant(node.inputs[1]):
            if node.attributes.get_int("axis", -1) not in (-1, rank - 1):
                return None
            moves.extend(_Move(node, index, True, "broadcast") for index in range(1, len(node.inputs)))
            return moves
        else:
            return None
    return None


def _fits_channels(value: onnx_ir.Value | None, rank: int, channels: int) -> bool:
    """Whether the constant is one number, or one for each channel in the place where they lie."""
    assert value is not None
    assert value.const_value is not None
    shape = value.const_value.numpy().shape
    size = int(np.prod(shape)) if shape else 1
    if size == 1:
        return True
    place = len(shape) - (3 if rank == 4 else 1)
    return size == channels and place >= 0 and shape[place] == channels


def _factors(channels: Array, readers: Sequence[_Move], strength: float) -> Array | None:
    """By what each channel is divided; around 1, and 1 for channels that are always zero."""
    dense = [move for move in readers if move.kind != "depthwise"]
    used = channels > 0
    if not used.any() or channels[used].size < 2:
        return None
    largest = channels[used].max()
    absmax = np.where(used, np.maximum(channels, largest / LARGEST_FACTOR), largest)
    if dense:
        weights = np.max([_reader_absmax(move, len(channels)) for move in dense], axis=0)
        top = weights.max()
        if top <= 0:
            return None
        weights = np.maximum(weights, top / LARGEST_FACTOR)
        factors = absmax**strength / weights ** (1 - strength)
    else:
        factors = absmax
    factors = np.where(used, factors, np.exp(np.mean(np.log(factors[used]))))
    factors = factors / np.exp(np.mean(np.log(factors)))
    return np.asarray(np.clip(factors, 1 / LARGEST_FACTOR, LARGEST_FACTOR))


def _reader_absmax(move: _Move, channels: int) -> Array:
    weight = np.abs(_array(move.node.inputs[move.index]))
    axis = _input_axis(move.kind, weight.ndim)
    others = tuple(place for place in range(weight.ndim) if place != axis)
    found = np.asarray(weight.max(axis=others), np.float64)
    return found if found.size == channels else np.full(channels, found.max())


def _input_axis(kind: str, rank: int) -> int:
    return {"conv": 1, "depthwise": 0, "gemm": 0, "gemm-t": 1, "matmul": rank - 2, "output-0": 0}[kind]


def _apply(graph: onnx_ir.Graph, move: _Move, factors: Array, value: onnx_ir.Value) -> None:
    old = move.node.inputs[move.index]
    array = _array(old).astype(np.float64)
    factor = 1 / factors if move.inverse else factors
    if move.kind == "broadcast":
        rank = 0 if value.shape is None else len(value.shape)
        if move.node.op_type == "LayerNormalization":
            new = array * factor
        else:
            new = array * factor.reshape((-1, 1, 1) if rank == 4 else (-1,))
    else:
        axis = _input_axis(move.kind, array.ndim)
        new = array * factor.reshape([-1 if place == axis else 1 for place in range(array.ndim)])
    # Its own name: others may read the old one.
    name = f"{old.name}/equalized/{value.name}/{move.node.name}"  # type: ignore[union-attr]  # a constant input
    tensor = onnx_ir.tensor(new.astype(np.float32), name=name)
    fresh = onnx_ir.val(name, dtype=tensor.dtype, shape=new.shape, const_value=tensor)
    graph.register_initializer(fresh)
    move.node.replace_input_with(move.index, fresh)


def _array(value: onnx_ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
