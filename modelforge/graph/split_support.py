"""Split by what a target can run: as few parts as possible, in turn supported and not, and as little between them.

Knows no target: support is a function of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelforge.errors import UnsupportedError
from modelforge.graph.mincut import FORBIDDEN, Labelling, best_labels
from modelforge.graph.split_graph import Layer, LayerGraph

Support = Callable[[Layer], bool]

_EXACT_STAGES = 8
"""With more stages than this, layers go to the earliest stage instead of where least crosses."""


def labels_by_support(
    graph: LayerGraph,
    supports: Support,
    fallback: Support | None = None,
    *,
    least_share: float = 0.0,
    max_stages: int | None = None,
) -> tuple[list[int], bool]:
    """A stage for each layer, and whether stage 0 is a supported one; they alternate from there.

    The number of stages is the least that any order of the layers allows; among splits of that many, the one where
    the fewest bytes cross.

    Args:
        supports: whether the target runs a layer.
        fallback: whether what runs the other stages does; None: it runs everything.
        least_share: a supported stage with less than this share of the FLOPs is left to the fallback.
        max_stages: no more stages than this; the fallback takes the supported layers that cost least FLOPs to lose.

    Raises:
        UnsupportedError: a layer that neither runs, or no split that ``max_stages`` allows.
    """
    kinds = [supports(layer) for layer in graph.layers]
    free = [layer.light for layer in graph.layers]
    can_fall = [fallback is None or fallback(layer) for layer in graph.layers]
    for layer, kind, falls, light in zip(graph.layers, kinds, can_fall, free, strict=True):
        if not (kind or falls or light):
            raise UnsupportedError(
                f"no target can run the stage with node {layer.name} ({layer.domain or 'ai.onnx'} {layer.op})",
                where=graph.where,
                fix="replace the operator, or add a target that runs it",
            )
    if max_stages is not None:
        return _within(graph, kinds, free, can_fall, max_stages)
    total = sum(layer.flops or 0 for layer in graph.layers)
    while True:
        labels, starts = _alternate(graph, kinds, free)
        smallest = _smallest(graph, labels, starts, kinds, can_fall)
        if smallest is None or smallest[0] >= least_share * total:
            return labels, starts
        for position in smallest[1]:
            kinds[position] = False


def _within(
    graph: LayerGraph, kinds: Sequence[bool], free: Sequence[bool], can_fall: Sequence[bool], stages: int
) -> tuple[list[int], bool]:
    """At most ``stages`` stages: the most FLOPs on the target, and of equals the fewest bytes between stages. Exact."""
    nets = _nets(graph, stages)
    heavy = 1 + sum(cost for _, _, costs in nets for cost in costs if cost > 0)
    options = []
    for starts in (True, False):
        unary = []
        for position, layer in enumerate(graph.layers):
            lost = 0 if free[position] or not kinds[position] else heavy * (1 + (layer.flops or 0))
            on_target = 0 if free[position] or kinds[position] else FORBIDDEN
            off_target = lost if free[position] or can_fall[position] else FORBIDDEN
            unary.append([on_target if (label % 2 == 0) == starts else off_target for label in range(stages)])
        found = best_labels(Labelling(stages, unary, nets))
        if found is not None:
            options.append((found[0], _count(graph, found[1]), not starts, found[1]))
    if not options:
        raise UnsupportedError(
            f"{stages} stages are too few: what the target runs and what only the others run lie in turn more often",
            where=graph.where,
            fix="allow more stages",
        )
    _, _, other, labels = min(options)
    return labels, not other


def _smallest(
    graph: LayerGraph, labels: Sequence[int], starts: bool, kinds: Sequence[bool], can_fall: Sequence[bool]
) -> tuple[int, list[int]] | None:
    """FLOPs and layers of the smallest supported stage that the fallback can take."""
    parts: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        if (label % 2 == 0) == starts and not graph.layers[position].light:
            parts.setdefault(label, []).append(position)
    movable = [
        (sum(graph.layers[position].flops or 0 for position in part), part)
        for part in parts.values()
        if all(can_fall[position] for position in part) and any(kinds[position] for position in part)
    ]
    return min(movable, key=lambda entry: entry[0], default=None)


def _alternate(graph: LayerGraph, kinds: Sequence[bool], free: Sequence[bool]) -> tuple[list[int], bool]:
    """The fewest alternating stages, starting with either kind."""
    options = []
    for starts in (True, False):
        labels = _levels(graph, kinds, free, starts)
        stages = max(labels) + 1
        cost, best = _least_bytes(graph, kinds, free, starts, stages) if stages <= _EXACT_STAGES else (0, labels)
        options.append((_count(graph, best), cost, not starts, best))
    _, _, other, labels = min(options)
    return labels, not other


def _count(graph: LayerGraph, labels: Sequence[int]) -> int:
    return len({label for label, layer in zip(labels, graph.layers, strict=True) if not layer.light})


def _levels(graph: LayerGraph, kinds: Sequence[bool], free: Sequence[bool], starts: bool) -> list[int]:
    """The earliest stage of each layer."""
    levels: list[int] = []
    for position, layer in enumerate(graph.layers):
        level = max((levels[graph.producer[name]] for name in layer.reads if name in graph.producer), default=0)
        if not free[position] and (level % 2 == 0) != (kinds[position] == starts):
            level += 1
        levels.append(level)
    return levels


def _latest(graph: LayerGraph, kinds: Sequence[bool], free: Sequence[bool], starts: bool, stages: int) -> list[int]:
    """The latest stage of each layer, of so many."""
    levels = [stages - 1] * len(graph.layers)
    for position in reversed(range(len(graph.layers))):
        after = [levels[reader] for name in graph.layers[position].writes for reader in graph.readers.get(name, ())]
        level = min(after, default=stages - 1)
        if not free[position] and (level % 2 == 0) != (kinds[position] == starts):
            level -= 1
        levels[position] = level
    return levels


def _least_bytes(
    graph: LayerGraph, kinds: Sequence[bool], free: Sequence[bool], starts: bool, stages: int
) -> tuple[int, list[int]]:
    earliest = _levels(graph, kinds, free, starts)
    latest = _latest(graph, kinds, free, starts, stages)
    unary = [
        [
            0 if low <= label <= high and (light or (label % 2 == 0) == (kind == starts)) else FORBIDDEN
            for label in range(stages)
        ]
        for low, high, kind, light in zip(earliest, latest, kinds, free, strict=True)
    ]
    found = best_labels(Labelling(stages, unary, _nets(graph, stages)))
    if found is None:  # something that cannot cross would have to: the assembly says what
        return 10**18, earliest
    return found


def _nets(graph: LayerGraph, stages: int) -> list[tuple[int, Sequence[int], list[int]]]:
    nets: list[tuple[int, Sequence[int], list[int]]] = []
    for name, position in graph.producer.items():
        tensor = graph.tensors[name]
        # One more than its bytes, so that of equals the fewer tensors win; what is not known is dear.
        cost = FORBIDDEN if not tensor.can_cross else 1 + (10**12 if tensor.bytes is None else tensor.bytes)
        nets.append((position, graph.readers.get(name, ()), [cost] * (stages - 1)))
    return nets
