"""Split a model into stages: at named tensors, into balanced or bounded parts, by support, or over tiers and links.

:func:`plan_split` is pure; :func:`modelforge.graph.split_write.write_split` writes what it planned, and
:func:`modelforge.graph.split_chain.compare_chain` holds the chain of stages against the whole model. Knows no target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from modelforge.errors import InputError, ModelError
from modelforge.graph import cuts
from modelforge.graph.split_at import labels_at
from modelforge.graph.split_graph import Layer, LayerGraph
from modelforge.graph.split_plan import SplitPlan, assemble
from modelforge.graph.split_support import labels_by_support
from modelforge.graph.split_tiers import TierCut, TierProblem, best_cut

Balance = Literal["flops", "bytes", "time"]
BALANCES: tuple[Balance, ...] = ("flops", "bytes", "time")
TOLERANCE = 0.1
"""How much longer than the best possible the longest stage may be, for fewer bytes between the stages."""


@dataclass(frozen=True)
class At:
    """Cut at named tensors: one tuple of names for each cut, in the order in which data passes them."""

    cuts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Balanced:
    """``stages`` parts of like cost, and of those the ones between which least crosses.

    Attributes:
        by: ``flops``, ``bytes`` (weights and activations that move) or ``time``.
        seconds: of each layer, for ``time``: estimated (:mod:`modelforge.graph.roofline`) or measured.
    """

    stages: int
    by: Balance = "flops"
    seconds: Sequence[float] | None = None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Bounded:
    """As few parts as possible, each with at most ``max_bytes`` of weights, and of activations while it runs."""

    max_bytes: int
    activations: bool = False


@dataclass(frozen=True)
class BySupport:
    """Parts that a target supports, and the others between them; see :func:`labels_by_support`."""

    supports: Callable[[Layer], bool]
    fallback: Callable[[Layer], bool] | None = None
    names: tuple[str, str] = ("supported", "fallback")
    least_share: float = 0.0
    max_stages: int | None = None


@dataclass(frozen=True)
class OverTiers:
    """The fastest placement, or the one given: one stage for each tier that has layers."""

    problem: TierProblem
    cut: TierCut | None = None


Way = At | Balanced | Bounded | BySupport | OverTiers


@dataclass(frozen=True)
class _Labels:
    labels: Sequence[int]
    names: Sequence[str]
    method: str
    seconds: Sequence[Sequence[float]] | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def plan_split(graph: LayerGraph, way: Way, shapes: Mapping[str, Sequence[int | str]] | None = None) -> SplitPlan:
    """Decide the stages of a model. Reads no file and writes none.

    Args:
        graph: of :func:`modelforge.graph.split_graph.read_layers`.
        shapes: the input shapes that the graph was read with, where they are not the model's own.

    Raises:
        ModelError, InputError: what was asked for is impossible, with the reason and what would do.
        UnsupportedError: a stage that nothing can run, or that fits nowhere.
    """
    if isinstance(way, At):
        found = _at(graph, way)
    elif isinstance(way, Balanced):
        found = _balanced(graph, way)
    elif isinstance(way, Bounded):
        found = _bounded(graph, way)
    elif isinstance(way, BySupport):
        found = _by_support(graph, way)
    else:
        found = _over_tiers(way)
    return assemble(
        graph,
        found.labels,
        found.names,
        method=found.method,
        shapes=shapes,
        seconds=found.seconds,
        notes=found.notes,
    )


def _at(graph: LayerGraph, way: At) -> _Labels:
    return _Labels(labels_at(graph, way.cuts), _numbered(len(way.cuts) + 1), "at")


def _balanced(graph: LayerGraph, way: Balanced) -> _Labels:
    if way.stages < 1:
        raise InputError(f"{way.stages} stages cannot be", where="--stages", fix="give 2 or more")
    costs = _costs(graph, way)
    crossings = _crossings(graph)
    boundaries = cuts.balanced(costs, crossings, way.stages, way.tolerance)
    if boundaries is None:
        raise ModelError(
            f"the model cannot be cut into {way.stages} stages: it has {len(graph.layers)} layers, and "
            f"{sum(1 for cost in crossings[1:-1] if cost < float('inf'))} places to cut",
            where=graph.where,
            fix="ask for fewer stages",
        )
    labels = _labels(graph, boundaries)
    seconds = None if way.by != "time" else [costs] * way.stages
    return _Labels(labels, _numbered(way.stages), "balance", seconds)


def _costs(graph: LayerGraph, way: Balanced) -> list[float]:
    if way.by == "time":
        if way.seconds is None or len(way.seconds) != len(graph.layers):
            raise InputError(
                "balancing by time needs the time of each layer",
                where="--balance time",
                fix="give --target TAG for an estimate, or --profile FILE with measured milliseconds by node",
            )
        return list(way.seconds)
    if way.by == "bytes":
        sizes = {name: tensor.bytes or 0 for name, tensor in graph.tensors.items()}
        return [
            float(
                sum(graph.weights[name].bytes for name in layer.weights)
                + sum(sizes[name] for name in (*layer.reads, *layer.writes))
            )
            for layer in graph.layers
        ]
    costs = [float(layer.flops or 0) for layer in graph.layers]
    if not any(costs):
        raise ModelError(
            "the operations of no layer are known, so stages cannot be balanced by FLOPs",
            where=graph.where,
            fix="give the sizes of open dimensions (--size NAME=N), or --balance bytes",
        )
    return costs


def _bounded(graph: LayerGraph, way: Bounded) -> _Labels:
    start, least = cuts.memory_starts(graph, way.max_bytes, activations=way.activations)
    if way.max_bytes < least:
        raise ModelError(
            f"no stage can have less than {least} bytes: one layer alone needs them, and {way.max_bytes} are allowed",
            where=graph.where,
            fix=f"--max-stage-bytes {least} or more",
        )
    crossings = _crossings(graph)
    stages = cuts.fewest_parts(start, crossings)
    boundaries = None if stages is None else cuts.least_crossing(start, crossings, stages)
    if stages is None or boundaries is None:
        raise ModelError(
            f"no cut gives stages of at most {way.max_bytes} bytes: tensors that cannot cross lie between",
            where=graph.where,
            fix="allow more bytes",
        )
    return _Labels(_labels(graph, boundaries), _numbered(stages), "memory")


def _by_support(graph: LayerGraph, way: BySupport) -> _Labels:
    labels, starts = labels_by_support(
        graph, way.supports, way.fallback, least_share=way.least_share, max_stages=way.max_stages
    )
    used = sorted({label for label, layer in zip(labels, graph.layers, strict=True) if not layer.light})
    names = [""] * (max(labels) + 1)
    for index, label in enumerate(used, start=1):
        names[label] = f"stage{index}-{way.names[0] if (label % 2 == 0) == starts else way.names[1]}"
    return _Labels(labels, names, "support")


def _over_tiers(way: OverTiers) -> _Labels:
    cut = way.cut or best_cut(way.problem)
    tiers = way.problem.tiers
    links = sum(cut.link_seconds.values())
    notes = (f"{cut.kind}: {cut.seconds * 1e3:.3f} ms in all, of which links {links * 1e3:.3f} ms",)
    return _Labels(cut.labels, [tier.name for tier in tiers], "tiers", [tier.seconds for tier in tiers], notes)


def _crossings(graph: LayerGraph) -> list[float]:
    return cuts.boundary_costs(graph, lambda name: cuts.crossing_bytes(graph, name))


def _labels(graph: LayerGraph, boundaries: Sequence[int]) -> list[int]:
    return [sum(position >= boundary for boundary in boundaries) for position in range(len(graph.layers))]


def _numbered(stages: int) -> list[str]:
    return [f"stage{index + 1}" for index in range(stages)]
