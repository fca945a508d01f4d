"""How long layers take on a machine, by the roofline model: an estimate from operations and bytes, never a measurement.

Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009. Knows no target: a machine is
a few rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelforge.graph.split_graph import Layer, LayerGraph

KINDS = ("conv", "matmul", "other")
"""Kinds of arithmetic that machines do at different rates."""

_KIND = {
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "QLinearConv"), "conv"),
    **dict.fromkeys(("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "Einsum", "Attention"), "matmul"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "matmul"),
}
_LOOKUPS = frozenset(("Gather", "GatherElements", "GatherND"))
"""They read the rows that they give, not the table."""

_FUSED = frozenset(
    "Relu LeakyRelu PRelu Clip Sigmoid HardSigmoid HardSwish Tanh Erf Gelu Mish Softplus Elu Selu Celu Add Sub Mul Div "
    "Pow Sqrt Neg Abs Exp Log Min Max Where Cast BatchNormalization Reshape Flatten Squeeze Unsqueeze Identity Dropout "
    "QuantizeLinear DequantizeLinear".split()
)
"""What compilers run together with the layer before it: neither written out and read again nor started on its own."""


@dataclass(frozen=True)
class Machine:
    """What a machine does at one precision, losses included.

    Attributes:
        rates: operations per second of each of :data:`KINDS` (a multiply-add counts as two).
        bandwidth: bytes per second between memory and arithmetic.
        float_bytes: what one floating point element takes at the precision: 4, 2 or 1.
        overhead: seconds to start a layer.
    """

    rates: Mapping[str, float]
    bandwidth: float
    float_bytes: float
    overhead: float = 0.0


@dataclass(frozen=True)
class LayerTime:
    """What a layer's seconds go to; arithmetic and memory traffic overlap, so its time is the longer of the two."""

    compute: float
    memory: float
    overhead: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.overhead


@dataclass(frozen=True)
class LayerWork:
    """What a layer asks of any machine, where floats have so many bytes.

    Attributes:
        kind: one of :data:`KINDS`.
        activations, weights: bytes that move between memory and arithmetic.
        starts: whether it starts a kernel; else it runs in that of the layer before it.
    """

    kind: str
    flops: float
    activations: float
    weights: float
    starts: bool


def layer_seconds(graph: LayerGraph, machine: Machine, batch: int = 1) -> list[float]:
    """Estimated seconds of each layer, in the order of ``graph.layers``; see :func:`layer_times`."""
    return [time.seconds for time in layer_times(layer_work(graph, machine.float_bytes), machine, batch)]


def layer_times(work: Sequence[LayerWork], machine: Machine, batch: int = 1) -> list[LayerTime]:
    """What each layer takes on a machine.

    Args:
        work: of :func:`layer_work`, for the machine's ``float_bytes``.
        batch: how many times the graph's own batch goes through at once: operations and activations grow with it,
            weights do not.
    """
    return [
        LayerTime(
            compute=each.flops * batch / machine.rates[each.kind],
            memory=(each.activations * batch + each.weights) / machine.bandwidth,
            overhead=machine.overhead if each.starts else 0.0,
        )
        for each in work
    ]


def layer_work(graph: LayerGraph, float_bytes: float) -> list[LayerWork]:
    """What each layer asks for, in the order of ``graph.layers``. Arithmetic on shapes counts as nothing."""
    groups = fused_groups(graph)
    return [_work(graph, position, layer, float_bytes, groups) for position, layer in enumerate(graph.layers)]


def bottleneck(times: Sequence[LayerTime]) -> str:
    """Where most of the time goes: ``compute``, ``memory`` or ``overhead``."""
    totals = {
        "compute": sum(time.compute for time in times if time.compute >= time.memory),
        "memory": sum(time.memory for time in times if time.compute < time.memory),
        "overhead": sum(time.overhead for time in times),
    }
    return max(totals, key=lambda kind: totals[kind])


def fused_groups(graph: LayerGraph) -> list[int]:
    """For each layer the one that starts the kernel that it runs in; itself where it starts one.

    An element-wise layer joins the layer that makes its first input, if nothing but element-wise layers reads that.
    """
    groups: list[int] = []
    for position, layer in enumerate(graph.layers):
        first = graph.producer.get(layer.reads[0]) if layer.reads else None
        joins = first is not None and _is_elementwise(layer) and all(
            _is_elementwise(graph.layers[reader]) for reader in graph.readers[layer.reads[0]]
        )  # fmt: skip
        groups.append(groups[first] if joins and first is not None else position)
    return groups


def _is_elementwise(layer: Layer) -> bool:
    return not layer.domain and layer.op in _FUSED


def weight_bytes(graph: LayerGraph, names: frozenset[str] | set[str], float_bytes: float) -> int:
    """What weights take in memory where floats have ``float_bytes``; a smaller type stays as it is."""
    total = 0.0
    for name in names:
        weight = graph.weights[name]
        total += min(weight.bytes, weight.elements * float_bytes) if weight.is_float else weight.bytes
    return int(total)


def tensor_bytes(graph: LayerGraph, name: str, float_bytes: float) -> float:
    """What a tensor takes likewise; nothing where its size is not known."""
    tensor = graph.tensors[name]
    if tensor.bytes is None or tensor.elements is None:
        return 0.0
    return min(float(tensor.bytes), tensor.elements * float_bytes) if tensor.is_float else float(tensor.bytes)


def unpriced(graph: LayerGraph) -> list[Layer]:
    """Layers whose operations or sizes are not known: they count as nothing, so an estimate leaves them out."""
    return [
        layer
        for layer in graph.layers
        if layer.flops is None or any(graph.tensors[name].bytes is None for name in layer.writes)
    ]


def _work(graph: LayerGraph, position: int, layer: Layer, float_bytes: float, groups: Sequence[int]) -> LayerWork:
    if layer.light:
        return LayerWork("other", 0.0, 0.0, 0.0, False)
    starts = groups[position] == position
    # What stays inside a kernel is neither written out nor read again.
    reads = [
        name for name in layer.reads if name not in graph.producer or groups[graph.producer[name]] != groups[position]
    ]
    moved = [*reads, *(layer.writes if starts else ())]
    if layer.op in _LOOKUPS:
        weights = sum(tensor_bytes(graph, name, float_bytes) for name in layer.writes)
    else:
        weights = weight_bytes(graph, set(layer.weights), float_bytes)
    return LayerWork(
        kind=_KIND.get(layer.op, "other") if not layer.domain else "other",
        flops=float(layer.flops or 0),
        activations=sum(tensor_bytes(graph, name, float_bytes) for name in moved),
        weights=weights,
        starts=starts,
    )
