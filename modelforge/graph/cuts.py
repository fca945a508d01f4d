"""Cuts along a model's own order of layers: what crosses at each boundary, and the best few boundaries to cut at.

Boundary ``j`` lies before layer ``j``; 0 is before all of them. A prefix of a topological order is always a legal
first stage, so a cut may cross several tensors. Works on plain numbers and a :class:`LayerGraph`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf

from modelforge.graph.split_graph import LayerGraph

UNKNOWN = 1e15
"""Counts for a tensor of unknown size: dearer than any that is known, and still legal."""


def spans(graph: LayerGraph, *, inputs_from_start: bool) -> dict[str, tuple[int, int]]:
    """The boundaries at which each tensor crosses: from the first to the last, both included.

    Args:
        inputs_from_start: an input is there before the first layer and must be carried to whoever reads it; else it
            enters at its first reader, from outside.
    """
    found = {}
    for name, readers in graph.readers.items():
        producer = graph.producer.get(name)
        first = producer + 1 if producer is not None else (0 if inputs_from_start else readers[0] + 1)
        if first <= readers[-1]:
            found[name] = (first, readers[-1])
    return found


def crossing(graph: LayerGraph, boundary: int, *, inputs_from_start: bool = False) -> list[str]:
    """Names of the tensors that cross a boundary."""
    everything = spans(graph, inputs_from_start=inputs_from_start).items()
    return [name for name, (first, last) in everything if first <= boundary <= last]


def boundary_costs(graph: LayerGraph, cost: Callable[[str], float], *, inputs_from_start: bool = False) -> list[float]:
    """For each boundary 0..layers the summed cost of what crosses it; infinite where something cannot cross."""
    change = [0.0] * (len(graph.layers) + 2)
    blocked = [0] * (len(graph.layers) + 2)
    for name, (first, last) in spans(graph, inputs_from_start=inputs_from_start).items():
        if graph.tensors[name].can_cross:
            amount = cost(name)
            change[first] += amount
            change[last + 1] -= amount
        else:
            blocked[first] += 1
            blocked[last + 1] -= 1
    totals, blocks = accumulate(change[:-1]), accumulate(blocked[:-1])
    return [inf if block else total for total, block in zip(totals, blocks, strict=True)]


def crossing_bytes(graph: LayerGraph, name: str) -> float:
    """What a tensor costs to cross, in bytes; see :data:`UNKNOWN`."""
    size = graph.tensors[name].bytes
    return UNKNOWN if size is None else float(size)


def cheapest(graph: LayerGraph, count: int) -> list[tuple[int, list[str]]]:
    """The boundaries at which least crosses, each set of tensors once: boundary and names, fewest bytes first."""
    costs = boundary_costs(graph, lambda name: crossing_bytes(graph, name))
    done = list(accumulate((float(layer.flops or 0) for layer in graph.layers), initial=0.0))
    # A cut before the first or after the last hundredth of the work splits nothing.
    inner = [at for at in range(1, len(graph.layers)) if 0.01 <= done[at] / (done[-1] or 1.0) <= 0.99]
    found: dict[tuple[str, ...], int] = {}
    for boundary in sorted((each for each in inner if costs[each] < inf), key=lambda each: costs[each]):
        names = tuple(name for name in crossing(graph, boundary) if not graph.is_light(name))
        found.setdefault(names, boundary)
        if len(found) == count:
            break
    return [(boundary, list(names)) for names, boundary in found.items()]


def balanced(costs: Sequence[float], crossings: Sequence[float], stages: int, tolerance: float) -> list[int] | None:
    """The boundaries that make ``stages`` parts of like cost, and cross least among those.

    The costliest part is at most ``1 + tolerance`` times the least that is possible for this order of layers.

    Args:
        costs: of each layer.
        crossings: of each boundary, layers + 1 of them; infinite where no cut may be.

    Returns:
        ``stages - 1`` rising boundaries, or None where there is no such cut.
    """
    total = [0.0, *accumulate(costs)]
    allowed = [j for j in range(1, len(costs)) if crossings[j] < inf]
    if len(allowed) < stages - 1:
        return None
    limit = _least_limit(total, [*allowed, len(costs)], stages)
    slack = limit * (1 + tolerance) + 1e-9 * max(total[-1], 1e-30)
    start = [bisect_left(total, total[end] - slack) for end in range(len(costs) + 1)]
    return least_crossing(start, crossings, stages)


def least_crossing(start: Sequence[int], crossings: Sequence[float], stages: int) -> list[int] | None:
    """Boundaries that cross least: ``stages`` parts, of which one that ends at ``i`` begins at ``start[i]`` or later.

    Dynamic programming with a sliding minimum: stages x layers steps.
    """
    ends = len(crossings) - 1
    best = [0.0 if end and start[end] == 0 else inf for end in range(ends + 1)]
    choice: list[list[int]] = []
    for _ in range(stages - 1):
        following, chosen = [inf] * (ends + 1), [0] * (ends + 1)
        window: deque[int] = deque()
        for end in range(1, ends + 1):
            reached = best[end - 1] + crossings[end - 1]
            while window and best[window[-1]] + crossings[window[-1]] >= reached:
                window.pop()
            window.append(end - 1)
            while window and window[0] < start[end]:
                window.popleft()
            if window and (least := best[window[0]] + crossings[window[0]]) < inf:
                following[end], chosen[end] = least, window[0]
        best = following
        choice.append(chosen)
    if best[ends] == inf:
        return None
    cuts, end = [], ends
    for chosen in reversed(choice):
        end = chosen[end]
        cuts.append(end)
    return cuts[::-1]


def fewest_parts(start: Sequence[int], crossings: Sequence[float]) -> int | None:
    """The fewest parts that :func:`least_crossing` can make; None where none will do."""
    ends = len(crossings) - 1
    parts: list[float] = [0.0] + [inf] * ends
    window: deque[int] = deque()
    for end in range(1, ends + 1):
        latest = end - 1
        reached = parts[latest] if latest == 0 or crossings[latest] < inf else inf
        while window and parts[window[-1]] > reached:
            window.pop()
        if reached < inf:
            window.append(latest)
        while window and window[0] < start[end]:
            window.popleft()
        if window:
            parts[end] = parts[window[0]] + 1
    return None if parts[ends] == inf else int(parts[ends])


def memory_starts(graph: LayerGraph, limit: int, *, activations: bool) -> tuple[list[int], int]:
    """For each end the earliest start of a part whose weights (and live activations) fit ``limit`` bytes.

    A part's activations are at most what is live in the whole model while it runs. Weights that several layers share
    count once in a part.

    Returns:
        ``start`` as :func:`least_crossing` takes it (``end`` itself where not even one layer fits), and the least
        limit that any cut can meet.
    """
    live = live_bytes(graph) if activations else [0] * len(graph.layers)
    held: Counter[str] = Counter()
    weights, begin, least = 0, 0, 0
    peaks: deque[int] = deque()
    start = [0]
    for end, layer in enumerate(graph.layers, start=1):
        least = max(least, sum(graph.weights[name].bytes for name in set(layer.weights)) + live[end - 1])
        for name in set(layer.weights):
            held[name] += 1
            weights += graph.weights[name].bytes if held[name] == 1 else 0
        while peaks and live[peaks[-1]] <= live[end - 1]:
            peaks.pop()
        peaks.append(end - 1)
        while begin < end and weights + live[peaks[0]] > limit:
            for name in set(graph.layers[begin].weights):
                held[name] -= 1
                weights -= graph.weights[name].bytes if held[name] == 0 else 0
            if peaks[0] == begin:
                peaks.popleft()
            begin += 1
            if not peaks:
                break
        start.append(begin)
    return start, least


def live_bytes(graph: LayerGraph) -> list[int]:
    """Bytes of the activations that are live while each layer runs, in the model's own order."""
    change = [0] * (len(graph.layers) + 1)
    outputs = set(graph.outputs)
    for name, tensor in graph.tensors.items():
        readers = graph.readers.get(name, ())
        first = graph.producer.get(name, 0)
        last = len(graph.layers) - 1 if name in outputs else max(readers, default=first)
        change[first] += tensor.bytes or 0
        change[last + 1] -= tensor.bytes or 0
    return list(accumulate(change[:-1]))


def _least_limit(total: Sequence[float], allowed: Sequence[int], stages: int) -> float:
    """The least possible cost of the costliest part, by bisection; ``allowed`` are the boundaries, the end included."""
    low, high = 0.0, total[-1]
    reach = [total[j] for j in allowed]
    for _ in range(60):
        middle = (low + high) / 2
        done, at, parts = 0.0, 0, 0
        while at < len(reach) and parts < stages:
            following = bisect_right(reach, done + middle + 1e-12 * total[-1], at)
            if following == at:
                break
            done, at, parts = reach[following - 1], following, parts + 1
        if at == len(reach):
            high = middle
        else:
            low = middle
        if high - low <= 1e-9 * max(total[-1], 1e-30):
            break
    return high
