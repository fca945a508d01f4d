"""Which layers INT8 hurts most: the local error of every quantized layer, from one pass over a few samples.

The quantized model is turned back into the FP32 one, each quantized layer kept beside its FP32 twin as a shadow, which
reads the FP32 activations through the Q/DQ pairs that :func:`~modelforge.quantize.qdq.quantize_model` wrote. Squared
differences are summed inside the graph, so that no activation leaves it. Knows no metric and no gate.

Together with :mod:`modelforge.quantize.search`, the smallest set of layers to keep in float::

    ranked = rank_layers(model, table, samples, dialect="onnxruntime-x86")

    def evaluate(exclude: tuple[str, ...]) -> tuple[bool, dict[str, float]]:
        quantize_model(model, table, folder, dialect="onnxruntime-x86", exclude=exclude)
        verdict = judge(...)             # of the outputs of folder/model.onnx beside the FP32 ones
        return verdict.passed, {"value": verdict.value, "drop": verdict.drop}

    found = search_exclusions(ranked.blocks, evaluate, limit=16)
    if found.exclude is not None:
        quantize_model(model, table, folder, dialect="onnxruntime-x86", exclude=found.exclude)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelforge.errors import BuildError, DataError
from modelforge.quantize.blocks import find_blocks
from modelforge.quantize.placement import fused_tail
from modelforge.quantize.qdq import add_initializer, place_model
from modelforge.quantize.ranges import RangeTable
from modelforge.quantize.weights import along
from modelforge.samples import is_batched, stream_samples

Array = NDArray[Any]

LARGEST_DB = 200.0
"""An SQNR is cut to +-200 dB, so that it stays a JSON number where there is no noise, or nothing but noise."""


COPIED_BYTES = 1024
"""Constants up to this size stay in the protobuf: ONNX Runtime looks into shapes and the like as it loads it."""


@dataclass(frozen=True)
class Layer:
    """One quantized node.

    Attributes:
        sqnr_db: ``10 log10(sum y^2 / sum (y - q)^2)`` over all samples, y its FP32 output (behind a fused Relu or
            Clip) and q what it gives where only its own inputs, weight and bias are quantized, and its output too where
            that is quantized on its account; within +-:data:`LARGEST_DB`.
    """

    node: str
    op: str
    sqnr_db: float


@dataclass(frozen=True)
class Sensitivity:
    """Quantized nodes, worst first.

    Attributes:
        ranking: nodes of one block stand together, so that any number of first blocks is a prefix of it, too.
        blocks: names of the nodes that stay in float together, by their worst node, worst first: see
            :func:`~modelforge.quantize.blocks.find_blocks`.
        samples: how many were run.
    """

    ranking: tuple[Layer, ...]
    blocks: tuple[tuple[str, ...], ...]
    samples: int

    def facts(self) -> list[dict[str, Any]]:
        """``ranking`` of sensitivity.json."""
        return [{"node": each.node, "op": each.op, "sqnr_db": round(each.sqnr_db, 3)} for each in self.ranking]


def rank_layers(
    model: Path,
    table: RangeTable,
    samples: Path,
    *,
    dialect: str,
    method: str = "auto",
    count: int = 16,
    exclude: Collection[str] = (),
    reduce_range: bool = False,
    threads: int = 1,
) -> Sensitivity:
    """Run the first ``count`` samples once and rank what the dialect quantizes; the same input, the same result.

    Args:
        model: what :func:`modelforge.graph.prepare.prepare` wrote.
        table: ranges of its activations.
        samples: an .npz with one array by input name, samples along the first axis.
        method, exclude, reduce_range: as :func:`~modelforge.quantize.qdq.quantize_model` takes them.
        threads: of ONNX Runtime, within one operator.

    Raises:
        InputError, UnsupportedError, BuildError: as quantize_model does.
        DataError: no samples, or an array is missing or does not fit the model.
        BuildError: ONNX Runtime refuses the model.
    """
    model = Path(model)
    placed = place_model(model, table, dialect=dialect, exclude=exclude)
    shadowed = placed.graph
    quantized = [str(node.name) for node in shadowed.graph if node in placed.placement.quantized]
    blocks = find_blocks(shadowed.graph, quantized)
    exact = {str(node.name): tuple(node.inputs) for node in shadowed.graph}
    placed.emit(table, method, reduce_range)
    shadows = _Shadows(exact, shadowed, quantized).write()
    shadowed.graph.sort()
    _drop_unread(shadowed.graph)
    weights = _by_reference(shadowed)  # ONNX Runtime does not own them: they must live as long as the session
    session = _session(shadowed, weights, threads, str(model))
    sums, seen = _run(session, samples, count)
    ranking = [
        Layer(each.node, each.op, _sqnr_db(sums[each.signal], sum(sums[name] for name in each.noise)))
        for each in shadows
    ]
    by_name = {layer.node: layer for layer in ranking}
    ordered = [
        sorted((by_name[name] for name in block if name in by_name), key=lambda each: each.sqnr_db) for block in blocks
    ]
    # Sorting is stable: equal ones stay in graph order.
    ordered = sorted((block for block in ordered if block), key=lambda block: block[0].sqnr_db)
    return Sensitivity(
        ranking=tuple(layer for block in ordered for layer in block),
        blocks=tuple(tuple(layer.node for layer in block) for block in ordered),
        samples=seen,
    )


@dataclass(frozen=True)
class _Shadow:
    """Names of the graph outputs that sum up one node's signal and its noise."""

    node: str
    op: str
    signal: str
    noise: tuple[str, ...]


@dataclass(frozen=True)
class _Tail:
    """Where a quantized node's error is looked at.

    Attributes:
        value: its output, or that of the Relu or Clip that is fused into it.
        fused: the node that gives ``value``, where it is another one.
        rounded: ``value`` behind a Q/DQ pair, where something reads it so that is not quantized itself: that noise is
            this node's doing. Elsewhere it is counted with the node that reads it.
    """

    value: onnx_ir.Value
    fused: onnx_ir.Node | None
    rounded: onnx_ir.Value | None


class _Shadows:
    """Rewrites the quantized model: FP32 again, a shadow beside every quantized node, and the error sums as outputs."""

    def __init__(
        self, exact: Mapping[str, tuple[onnx_ir.Value | None, ...]], model: onnx_ir.Model, quantized: Collection[str]
    ) -> None:
        self._graph = model.graph
        self._exact = exact  # what each node of the FP32 model reads
        self._quantized = frozenset(quantized)
        self._constants: dict[onnx_ir.Node, onnx_ir.Value] = {}

    def write(self) -> list[_Shadow]:
        nodes = [node for node in self._graph if node.name in self._exact]
        # All is read off the quantized graph before any of it is changed.
        tails = {
            node: self._tail(node)
            for node in nodes
            if node.name in self._quantized and any(_dequantize(value) is not None for value in node.inputs)
        }
        copies = {node: self._copies(node, tail) for node, tail in tails.items()}
        for node in nodes:
            for index, value in enumerate(node.inputs):
                dequantize = _dequantize(value)
                if dequantize is not None:
                    node.replace_input_with(index, self._restored(dequantize, self._exact[str(node.name)][index]))
        self._graph.outputs.clear()
        return [self._measured(node, tail, copies[node]) for node, tail in tails.items()]

    def _tail(self, node: onnx_ir.Node) -> _Tail:
        value = fused_tail(node)
        fused = value.producer() if value is not node.outputs[0] else None
        if fused is not None and fused.name in self._quantized:
            value, fused = node.outputs[0], None  # has a shadow of its own
        for use in value.uses():
            if use.node.op_type != "QuantizeLinear" or use.idx != 0:
                continue
            for other in use.node.outputs[0].uses():
                rounded = other.node.outputs[0]
                if any(reader.node.name not in self._quantized for reader in rounded.uses()):
                    return _Tail(value, fused, rounded)
        return _Tail(value, fused, None)

    def _copies(self, node: onnx_ir.Node, tail: _Tail) -> list[onnx_ir.Node]:
        """The node as it computes when quantized, and what is fused behind it."""
        copies = [_copy(node, [self._folded(value) for value in node.inputs])]
        if tail.fused is not None:
            copies.append(_copy(tail.fused, [copies[0].outputs[0], *tail.fused.inputs[1:]]))
        return copies

    def _measured(self, node: onnx_ir.Node, tail: _Tail, copies: list[onnx_ir.Node]) -> _Shadow:
        """Add the copies, and the sums as graph outputs."""
        added = list(copies)

        def energy(value: onnx_ir.Value) -> str:
            # Over all axes: over the inner ones alone it takes seven times as long in ONNX Runtime 1.32, and the sum is
            # right to 1e-5 as it is: of one sample only, as samples are added up in float64, outside.
            added.append(onnx_ir.node("ReduceSumSquare", [value], {"keepdims": 0}))
            output = added[-1].outputs[0]
            output.name = f"{node.name}/shadow/sum/{len(added)}"
            self._graph.outputs.append(output)
            return output.name

        signal, noise = energy(tail.value), []
        # Rounding the output is independent of what is wrong with it: their energies add up, and the pair is there.
        for other in (copies[-1].outputs[0], tail.rounded):
            if other is not None:
                added.append(onnx_ir.node("Sub", [tail.value, other]))
                noise.append(energy(added[-1].outputs[0]))
        for place, each in enumerate(added):
            for index, output in enumerate(each.outputs):
                output.name = output.name or f"{node.name}/shadow/{place}/{index}"
        self._graph.extend(added)
        return _Shadow(str(node.name), node.op_type, signal, tuple(noise))

    def _folded(self, value: onnx_ir.Value | None) -> onnx_ir.Value | None:
        """A dequantized constant as the float32 numbers it is: ONNX Runtime would compute them anew in every run."""
        node = _dequantize(value)
        if node is None or node.inputs[0] is None or node.inputs[0].const_value is None:
            return value
        if node not in self._constants:
            quantized, scale, *zero = (_array(each) for each in node.inputs if each is not None)
            axis = node.attributes.get_int("axis", 1) if scale.ndim else None
            zeros = along(zero[0], axis, quantized.ndim).astype(np.int32) if zero else np.int32(0)
            numbers = (quantized.astype(np.int32) - zeros).astype(np.float32) * along(scale, axis, quantized.ndim)
            self._constants[node] = add_initializer(self._graph, numbers, f"{node.name}/folded")
        return self._constants[node]

    def _restored(self, dequantize: onnx_ir.Node, exact: onnx_ir.Value | None) -> onnx_ir.Value | None:
        """What the FP32 model has in place of a dequantized value."""
        source = dequantize.inputs[0]
        assert source is not None
        quantize = source.producer()
        return exact if quantize is None else quantize.inputs[0]


def _array(value: onnx_ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _copy(node: onnx_ir.Node, inputs: Sequence[onnx_ir.Value | None]) -> onnx_ir.Node:
    return onnx_ir.node(node.op_type, inputs, node.attributes, domain=node.domain, num_outputs=len(node.outputs))


def _dequantize(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """The DequantizeLinear that gives the value."""
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _run(session: Any, samples: Path, count: int) -> tuple[dict[str, float], int]:
    """Every output, added up over the first ``count`` samples, and how many there were."""
    # ONNX Runtime says None of a size without a name.
    inputs = {each.name: tuple(size or "?" for size in each.shape) for each in session.get_inputs()}
    outputs = [each.name for each in session.get_outputs()]
    total = np.zeros(len(outputs))
    seen = 0
    for number, rows in stream_samples(Path(samples), list(inputs)):
        if seen == count:
            break
        feeds = {name: array if is_batched(inputs[name]) else array[0, ...] for name, array in rows.items()}
        try:
            found = session.run(outputs, feeds)
        except Exception as error:  # its exceptions share no base class but this one
            raise DataError(
                f"the model fails on this sample: {' '.join(str(error).split())[:300]}",
                where=f"{Path(samples).name}: sample {seen}",
                fix="give samples of the type and shape that the model's inputs have",
            ) from error
        total += np.array(found, np.float64)
        seen += number
    if not seen:
        raise DataError("there is no sample to measure with", where=Path(samples).name, fix="give some")
    return dict(zip(outputs, total.tolist(), strict=True)), seen


def _session(shadowed: onnx_ir.Model, weights: Mapping[str, Any], threads: int, where: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.enable_mem_pattern = False  # to plan memory ahead costs more than a few samples win by it
    options.log_severity_level = 4
    # Q/DQ is to round, not to be fused into integer kernels of this machine.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # In the order of the nodes a shadow is summed up right behind its layer, and freed; the default order sums up last.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    try:
        for node in shadowed.graph:
            for output in node.outputs:  # ONNX Runtime infers them anyway: what is not there is not written and read
                output.type = output.shape = None
        options.add_external_initializers(list(weights), list(weights.values()))
        source = onnx_ir.to_proto(shadowed).SerializeToString()
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # likewise
        text = " ".join(str(error).split())
        raise BuildError(f"ONNX Runtime refuses to measure sensitivity: {text[:300]}", where=where) from error


def _drop_unread(graph: onnx_ir.Graph) -> None:
    """Remove nodes of a sorted graph whose outputs nothing reads, and constants of which no node is left."""
    outputs = set(graph.outputs)
    for node in reversed(graph):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _by_reference(shadowed: onnx_ir.Model) -> dict[str, Any]:
    """Take large weights out of the model, as what ONNX Runtime reads where they lie: they need not be copied into a
    protobuf and out of it, nor fit the 2 GiB that one may have."""
    import onnxruntime as ort

    weights = {}
    for value in shadowed.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > COPIED_BYTES:
            weights[str(value.name)] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()))
            shape = onnx_ir.Shape(tensor.shape.numpy())
            value.const_value = onnx_ir.ExternalTensor(
                "in memory", 0, tensor.nbytes, tensor.dtype, shape=shape, name=str(value.name)
            )
    return weights


def _sqnr_db(signal: float, noise: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return -LARGEST_DB
    if noise <= 0:
        return LARGEST_DB
    ratio = signal / noise
    return min(max(10 * math.log10(ratio), -LARGEST_DB), LARGEST_DB) if ratio > 0 else -LARGEST_DB
