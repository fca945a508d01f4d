"""Better quantized models, chosen by measurement on calibration samples: equalization, bias correction, the method.

Evaluation data never comes here. A candidate is kept where its outputs are nearer to FP32's than the plain one's.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray

from modelforge.graph.compare import open_session
from modelforge.graph.load import load
from modelforge.graph.output_groups import Group, find_output_groups
from modelforge.quantize.dialects import WEIGHTED, get_dialect
from modelforge.quantize.equalize import equalize
from modelforge.quantize.qdq import QuantizeReport, quantize_model, write_checked
from modelforge.quantize.ranges import RangeTable

Array = NDArray[Any]
Feeds = Callable[[], Iterable[Mapping[str, Array]]]
"""Gives the calibration samples anew each time it is called: arrays by input name, batched as the model takes them."""

CEILING_DB = 120.0

PLAIN, EQUALIZED = "plain", "equalized"


@dataclass(frozen=True)
class Candidate:
    """One way to quantize, and what it reached: ``closeness_db`` on the calibration samples, see :func:`closeness`."""

    start: str
    method: str
    corrected: bool
    closeness_db: float


@dataclass(frozen=True)
class CorrectReport:
    """JSON-able.

    Attributes:
        corrected: largest mean error of a channel that was taken back, relative to its layer's output, by node.
        skipped: why a quantized node was left alone, by its name.
    """

    corrected: Mapping[str, float]
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class ImproveReport:
    """JSON-able.

    Attributes:
        chosen: what ``folder/model.onnx`` is.
        candidates: all that were measured, in order.
        quantize: what was written.
        equalized: spread between channels before, by activation; empty where equalization was not chosen.
        corrected: see :class:`CorrectReport`; empty where it was not chosen.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    quantize: QuantizeReport
    equalized: Mapping[str, float]
    corrected: Mapping[str, float]


def quantize_best(
    model: Path,
    table: RangeTable,
    folder: Path,
    *,
    dialect: str,
    feeds: Feeds,
    calibrate: Callable[[Path], RangeTable],
    methods: Sequence[str] = ("auto", "minmax"),
    strengths: Sequence[float] = (0.7,),
    bias_correction: bool = True,
    exclude: Collection[str] = (),
    reduce_range: bool = False,
) -> ImproveReport:
    """Write ``folder/model.onnx``: of the ways asked for, the one nearest to FP32 on the calibration samples.

    Args:
        model: what :func:`modelforge.graph.prepare.prepare` wrote; ``table`` are its ranges.
        feeds: the calibration samples. Never evaluation data: what is chosen here is judged by those afterwards.
        calibrate: gives the ranges of an equalized model, on the same samples.
        methods: clip methods to compare.
        strengths: of equalization, see :func:`modelforge.quantize.equalize.equalize`; empty: none is tried.
        bias_correction: whether that is tried.

    Raises:
        As :func:`modelforge.quantize.qdq.quantize_model`.
    """
    model, folder = Path(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".improve-") as temporary:
        work = Path(temporary)
        starts = {PLAIN: _Start(model, table, {})}
        for strength in strengths if get_dialect(dialect).equalize else ():
            name = f"{EQUALIZED} {strength:g}"
            found = equalize(model, table, work / name, strength=strength).equalized
            if found:
                even = work / name / "model.onnx"
                starts[name] = _Start(even, calibrate(even), found)
        tried = [
            _try(work, name, starts[name], method, bias_correction, feeds, dialect, exclude, reduce_range)
            for name, method in itertools.product(starts, methods)
        ]
        reached = closeness(model, [trial.model for trial in tried], feeds)
        best = max(range(len(tried)), key=lambda index: reached[index])
        if bias_correction:  # it nearly always helps: only the best one is looked at without
            bare = replace(tried[best], model=tried[best].uncorrected, correction=None)
            tried.append(bare)
            reached += closeness(model, [bare.model], feeds)
            best = len(tried) - 1 if reached[-1] > reached[best] else best
        chosen = tried[best]
        for file in sorted(chosen.model.parent.iterdir(), reverse=True):  # model.onnx.data first
            shutil.move(file, folder / file.name)
    candidates = tuple(
        Candidate(trial.start, trial.method, trial.correction is not None, round(db, 3))
        for trial, db in zip(tried, reached, strict=True)
    )
    return ImproveReport(
        chosen=candidates[best],
        candidates=candidates,
        quantize=chosen.report,
        equalized=starts[chosen.start].equalized,
        corrected={} if chosen.correction is None else chosen.correction.corrected,
    )


@dataclass(frozen=True)
class _Start:
    """An FP32 model to quantize, with its ranges."""

    model: Path
    table: RangeTable
    equalized: Mapping[str, float]


@dataclass(frozen=True)
class _Trial:
    start: str
    method: str
    model: Path
    uncorrected: Path
    report: QuantizeReport
    correction: CorrectReport | None


def _try(
    work: Path,
    name: str,
    start: _Start,
    method: str,
    correct: bool,
    feeds: Feeds,
    dialect: str,
    exclude: Collection[str],
    reduce_range: bool,
) -> _Trial:
    place = work / f"{name} {method}"
    report = quantize_model(
        start.model, start.table, place, dialect=dialect, method=method, exclude=exclude, reduce_range=reduce_range
    )
    plain = place / "model.onnx"
    if not correct:
        return _Trial(name, method, plain, plain, report, None)
    corrected = work / f"{name} {method} corrected"
    correction = correct_biases(start.model, plain, corrected, feeds)
    return _Trial(name, method, corrected / "model.onnx", plain, report, correction)


def correct_biases(reference: Path, quantized: Path, folder: Path, feeds: Feeds) -> CorrectReport:
    """Write ``folder/model.onnx``: ``quantized`` with biases that take back the mean error of each layer's channels.

    Rounding of weights and inputs shifts means, and a shift of a whole channel does not average out as noise does
    (Nagel et al. 2019, section 4.2, measured). Each layer is measured on its own, on FP32 inputs, all in one pass: a
    quantized copy stands beside each in the FP32 graph. Measured in the quantized model, each layer would take back
    its predecessors' shifts too, which these take back themselves.

    Args:
        reference: the FP32 model that ``quantized`` was made of; node and value names are the same.
        feeds: streamed once.
    """
    reference, quantized, folder = Path(reference), Path(quantized), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    graph = load(quantized)
    layers, skipped = _correctable(graph.graph)
    corrected: dict[str, float] = {}
    shifts = _mean_errors(reference, layers, feeds) if layers else {}
    for node in layers:
        shift, spread = shifts[str(node.name)]
        _add_to_bias(node, shift)
        corrected[str(node.name)] = round(float(np.abs(shift).max() / max(spread, 1e-12)), 5)
    write_checked(graph, folder, quantized)
    return CorrectReport(corrected, skipped)


def closeness(reference: Path, candidates: Sequence[Path], feeds: Feeds) -> list[float]:
    """How near each candidate's outputs are to the reference's, in dB: SQNR of every output, averaged.

    An output of several meanings counts once for each, as its boxes of hundreds would hide its scores below 1; they are
    what the gate looks at, too. Not by single channel: what a class says that is never seen would count as much as what
    the others say. A part that is silent in the reference does not count, and none counts above :data:`CEILING_DB`.
    """
    exact, others = open_session(reference), [open_session(candidate) for candidate in candidates]
    names = [output.name for output in exact.get_outputs() if output.type == "tensor(float)"]
    groups = find_output_groups(reference)
    parts = {name: [group for group in groups if group.output == name] for name in names}
    signal = {name: np.zeros(max(len(parts[name]), 1)) for name in names}
    noise = {(index, name): np.zeros_like(signal[name]) for index in range(len(others)) for name in names}
    for feed in feeds():
        wanted = [array.astype(np.float64) for array in exact.run(names, dict(feed))]
        for name, array in zip(names, wanted, strict=True):
            signal[name] += _energies(array, parts[name])
        for index, session in enumerate(others):
            for name, array, got in zip(names, wanted, session.run(names, dict(feed)), strict=True):
                noise[index, name] += _energies(array - got, parts[name])
    return [_mean_db([(signal[name], noise[index, name]) for name in names]) for index in range(len(others))]


def _mean_db(pairs: Sequence[tuple[Array, Array]]) -> float:
    least = 10.0 ** (-CEILING_DB / 10)
    ratios = [
        10 * np.log10(signal[signal > 0] / np.maximum(noise[signal > 0], signal[signal > 0] * least))
        for signal, noise in pairs
    ]
    found = np.concatenate(ratios) if ratios else np.zeros(0)
    return float(found.mean()) if found.size else 0.0


def _energies(values: Array, groups: Sequence[Group]) -> Array:
    """Sum of squares of each group of channels; of all where there are none."""
    squares = np.square(values)
    if not groups:
        return np.array([squares.sum()])
    return np.array([squares[(slice(None),) * each.axis + (slice(each.start, each.stop),)].sum() for each in groups])


def _correctable(graph: onnx_ir.Graph) -> tuple[list[onnx_ir.Node], dict[str, str]]:
    """Quantized layers that have, or can have, a bias."""
    layers, skipped = [], {}
    for node in graph:
        if node.op_type not in WEIGHTED or node.domain != "" or _dequantized(node.inputs[1]) is None:
            continue
        if node.op_type == "MatMul":
            skipped[str(node.name)] = "MatMul has no bias"
        elif len(node.inputs) < 3 or node.inputs[2] is None:
            skipped[str(node.name)] = "no bias"
        elif _bias(node) is None:
            skipped[str(node.name)] = "its bias is not constant"
        else:
            layers.append(node)
    return layers, skipped


def _axis(node: onnx_ir.Node) -> int:
    return -1 if node.op_type in ("Gemm", "MatMul") else 1


def _dequantized(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """The DequantizeLinear of a constant that gives the value."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    source = producer.inputs[0]
    return producer if source is not None and source.is_initializer() else None


def _bias(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The initializer that holds the bias: int32 behind a DequantizeLinear, or float."""
    value = node.inputs[2]
    source = _dequantized(value)
    held = value if source is None else source.inputs[0]
    return held if held is not None and held.is_initializer() and held.const_value is not None else None


def _add_to_bias(node: onnx_ir.Node, shift: Array) -> None:
    held = _bias(node)
    assert held is not None
    assert held.const_value is not None
    array = held.const_value.numpy()
    source = _dequantized(node.inputs[2])
    if source is None:
        new = (array.astype(np.float64) + shift.reshape(array.shape)).astype(np.float32)
        name = f"{held.name}/of/{node.name}/corrected" if len(list(held.uses())) > 1 else str(held.name)
        if name != held.name:  # another layer reads it, too
            fresh = onnx_ir.val(name, dtype=held.dtype, shape=array.shape, const_value=onnx_ir.tensor(new, name=name))
            assert node.graph is not None
            node.graph.register_initializer(fresh)
            node.replace_input_with(2, fresh)
            return
    else:
        scale = source.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        steps = np.rint(shift / scale.const_value.numpy().astype(np.float64))
        bounds = np.iinfo(np.int32)
        new = np.clip(array.astype(np.int64) + steps, bounds.min, bounds.max).astype(np.int32)
    held.const_value = onnx_ir.tensor(new, name=str(held.name))


def _mean_errors(reference: Path, layers: Sequence[onnx_ir.Node], feeds: Feeds) -> dict[str, tuple[Array, float]]:
    """Mean of FP32 minus quantized for each channel of each layer, and the root mean square of its FP32 output."""
    session = _shadowed(reference, layers)
    errors = {str(node.name): np.zeros(1) for node in layers}
    squares = dict.fromkeys(errors, 0.0)
    counts = dict.fromkeys(errors, 0)
    wanted = [f"{name}{suffix}" for name in errors for suffix in (_ERROR, _SQUARE, _SIZE)]
    for feed in feeds():
        found = dict(zip(wanted, session.run(wanted, dict(feed)), strict=True))
        for name, error in list(errors.items()):
            errors[name] = error + found[name + _ERROR].astype(np.float64)
            squares[name] += float(found[name + _SQUARE])
            counts[name] += int(found[name + _SIZE])
    return {
        name: (errors[name] * len(errors[name]) / counts[name], float(np.sqrt(squares[name] / counts[name])))
        for name in errors
    }


_ERROR, _SQUARE, _SIZE = "/shadow/error", "/shadow/square", "/shadow/size"


def _shadowed(reference: Path, layers: Sequence[onnx_ir.Node]) -> Any:
    """A session of the FP32 model with a quantized copy beside each layer, and the sums of the differences as outputs.

    The sums are small, so memory is that of the FP32 model whatever the number of layers.
    """
    import onnxruntime

    proto = onnx.load(reference)
    del proto.graph.output[:]
    known: set[str] = set()
    given = {node.name: list(node.output) for node in proto.graph.node}
    for layer in layers:
        name, exact = str(layer.name), _exact(layer.outputs[0], given)
        inputs = [_copy(value, proto.graph, known, given) for value in layer.inputs if value is not None]
        copy = onnx_ir.serde.serialize_node(layer)
        del copy.input[:], copy.output[:]
        copy.input.extend(inputs)
        copy.output.append(f"{name}/shadow")
        copy.name = f"{name}/shadow"
        rank = 4 if layer.outputs[0].shape is None else len(layer.outputs[0].shape)
        channel = rank - 1 if layer.op_type == "Gemm" else 1
        axes = np.array([place for place in range(rank) if place != channel], np.int64)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(axes, f"{name}/shadow/axes"))
        make = onnx.helper.make_node
        proto.graph.node.extend(
            [
                copy,
                make("Sub", [exact, f"{name}/shadow"], [f"{name}/shadow/difference"]),
                make("ReduceSum", [f"{name}/shadow/difference", f"{name}/shadow/axes"], [name + _ERROR], keepdims=0),
                make("ReduceSumSquare", [exact], [name + _SQUARE], keepdims=0),
                make("Size", [exact], [name + _SIZE]),
            ]
        )
        for suffix, kind in ((_ERROR, onnx.TensorProto.FLOAT), (_SQUARE, onnx.TensorProto.FLOAT)):
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name + suffix, kind, None))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name + _SIZE, onnx.TensorProto.INT64, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _exact(value: onnx_ir.Value, given: Mapping[str, Sequence[str]]) -> str:
    """The value's name in the FP32 model: one that is quantized as the model's output has another in the QDQ model."""
    producer, place = value.producer(), value.index()
    if producer is None or place is None or str(producer.name) not in given:
        return str(value.name)
    return given[str(producer.name)][place]


def _copy(value: onnx_ir.Value, graph: onnx.GraphProto, known: set[str], given: Mapping[str, Sequence[str]]) -> str:
    """Copy the Q and DQ nodes that give a value, with their constants, into the graph; say what to read there."""
    if value.is_initializer() and value.const_value is not None:
        copied = f"{value.name}/shadow"
        if copied not in known:
            known.add(copied)
            graph.initializer.append(onnx.numpy_helper.from_array(value.const_value.numpy(), copied))
        return copied
    producer = value.producer()
    if producer is None or producer.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return _exact(value, given)
    copied = f"{value.name}/shadow"
    if copied not in known:
        known.add(copied)
        inputs = [_copy(source, graph, known, given) for source in producer.inputs if source is not None]
        node = onnx_ir.serde.serialize_node(producer)
        del node.input[:], node.output[:]
        node.input.extend(inputs)
        node.output.append(copied)
        node.name = f"{producer.name}/shadow"
        graph.node.append(node)
    return copied
