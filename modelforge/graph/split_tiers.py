"""Split over two or three tiers and the links between them, so that one inference takes least time: exact, by min-cut.

The model of time: layers run one after the other, each on one tier; a tensor that leaves a tier is sent once, over
each link on its way, for bytes / bandwidth; a link that is used at all costs its latency once. Data flows from the
first tier to the last and never back, but for the outputs. Knows no target: times are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import inf, isfinite

from modelforge.errors import UnsupportedError
from modelforge.graph import cuts
from modelforge.graph.mincut import FORBIDDEN, Labelling, best_labels
from modelforge.graph.roofline import weight_bytes
from modelforge.graph.split_graph import LayerGraph

TRANSPORTS = ("fp32", "fp16", "int8")
_TICKS = 1e12
"""Costs are whole picoseconds: the cut is exact, and rounding a layer's time moves it by half of one."""

Links = Mapping[tuple[str, str], "Link"]


@dataclass(frozen=True)
class Tier:
    """Where layers can run.

    Attributes:
        seconds: of each layer there; infinite where it cannot run.
        memory: bytes that weights may take there, None for no limit.
        float_bytes: of one floating point weight at the precision that it runs.
    """

    name: str
    seconds: Sequence[float]
    memory: int | None = None
    float_bytes: float = 4


@dataclass(frozen=True)
class Link:
    """From one tier to the next and back: ``latency`` in seconds, ``bandwidth`` in bytes per second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class TierCut:
    """One way to place the layers, with what it costs; JSON-able by ``dataclasses.asdict``.

    Attributes:
        kind: ``all on TIER``, ``send the input to TIER``, or ``cut``.
        labels: for each layer the index of its tier.
        route: the tiers that data passes.
        crossing: for each link on the way (``"device-cloud"``) the tensors that are sent over it.
        bytes: of all that is sent forwards, in each of :data:`TRANSPORTS`.
        tier_seconds, link_seconds: by tier and by link; the way back is under ``"cloud-device"``.
        fits: whether each tier's weights fit its memory.
    """

    kind: str
    labels: tuple[int, ...]
    route: tuple[str, ...]
    crossing: Mapping[str, tuple[str, ...]]
    bytes: Mapping[str, int]
    tier_seconds: Mapping[str, float]
    link_seconds: Mapping[str, float]
    seconds: float
    fits: bool


@dataclass(frozen=True)
class TierProblem:
    """A model, its tiers in order, and the links between them.

    Attributes:
        links: by names of tiers, earlier first. Data goes over a chain of them; a direct one may skip a tier.
        transport: how floats are sent: ``fp32``, ``fp16`` or ``int8``.
        return_outputs: whether outputs go back to the first tier, where inputs come from.
    """

    graph: LayerGraph
    tiers: tuple[Tier, ...]
    links: Links
    transport: str = "fp32"
    return_outputs: bool = True

    def with_bandwidth(self, factor: float) -> TierProblem:
        """The same with every link's bandwidth times ``factor``."""
        links = {ends: Link(link.latency, link.bandwidth * factor) for ends, link in self.links.items()}
        return replace(self, links=links)


def best_cut(problem: TierProblem) -> TierCut:
    """The fastest placement.

    Exact: for each route one minimum cut over its tiers (:func:`best_labels`), latencies added as the fixed charge
    that they are. Where the fastest does not fit a tier's memory, the fastest of :func:`top_cuts` that does.

    Raises:
        UnsupportedError: a layer that no tier runs, or no placement that fits the tiers' memory.
    """
    _check_runnable(problem)
    found: list[TierCut] = []
    for route in _routes(problem):
        labels = _solve(problem, route)
        if labels is not None:
            found.append(evaluate(problem, labels))
    best = min(found, key=lambda cut: cut.seconds)
    if best.fits:
        return best
    fitting = [cut for cut in (*found, *_lined_up(problem)) if cut.fits]
    if not fitting:
        need = weight_bytes(problem.graph, set(problem.graph.weights), min(tier.float_bytes for tier in problem.tiers))
        raise UnsupportedError(
            f"no placement fits the tiers' memory: the weights take {need} bytes at the narrowest precision, and the "
            f"tiers have {', '.join(f'{tier.name} {tier.memory}' for tier in problem.tiers)}",
            where=problem.graph.where,
            fix="add a tier with more memory, or lower the precision",
        )
    return min(fitting, key=lambda cut: cut.seconds)


def top_cuts(problem: TierProblem, count: int = 10) -> list[TierCut]:
    """The fastest ways that differ in what crosses, fastest first: cuts along the model's order, and the best one.

    "All on the first tier" and "send the input" are among them even where they are slow.
    """
    best = best_cut(problem)
    listed: dict[tuple[object, ...], TierCut] = {}
    for cut in (best, *_lined_up(problem)):
        key = (cut.kind if cut.kind != "cut" else "", tuple(sorted(cut.crossing.items())))
        if key not in listed or cut.seconds < listed[key].seconds:
            listed[key] = cut
    ranked = sorted(listed.values(), key=lambda cut: cut.seconds)
    kept = ranked[:count]
    kept += [cut for cut in ranked[count:] if cut.kind != "cut"]
    return kept


def sweep(problem: TierProblem, factors: Sequence[float]) -> list[tuple[float, TierCut]]:
    """The best cut where every link's bandwidth is multiplied by each factor."""
    return [(factor, best_cut(problem.with_bandwidth(factor))) for factor in factors]


def evaluate(problem: TierProblem, labels: Sequence[int]) -> TierCut:
    """What a placement costs. Labels must not fall along any tensor."""
    graph, tiers = problem.graph, problem.tiers
    route = _cheapest_route(problem, labels)
    sent: dict[str, list[str]] = {f"{a}-{b}": [] for a, b in _pairs(problem, route)}
    back: dict[str, float] = {}
    link_seconds: dict[str, float] = {}
    for name, source, target in _journeys(problem, labels):
        for one, other in _pairs(problem, route):
            if source < _index(problem, other) <= target:
                sent[f"{one}-{other}"].append(name)
    for one, other in _pairs(problem, route):
        link = problem.links[one, other]
        key = f"{one}-{other}"
        size = sum(_sent_bytes(problem, name) for name in sent[key])
        link_seconds[key] = link.latency + size / link.bandwidth
        if problem.return_outputs:
            back[f"{other}-{one}"] = link.latency + _returned(problem, labels, _index(problem, other)) / link.bandwidth
    link_seconds |= back
    tier_seconds = {
        tier.name: sum(tier.seconds[position] for position, label in enumerate(labels) if label == index)
        for index, tier in enumerate(tiers)
    }
    crossing = {key: tuple(names) for key, names in sent.items()}
    everything = {name for names in sent.values() for name in names}
    return TierCut(
        kind=_kind(problem, labels, everything),
        labels=tuple(labels),
        route=route,
        crossing=crossing,
        bytes={
            transport: sum(graph.tensors[name].transport_bytes(transport) or 0 for name in everything)
            for transport in TRANSPORTS
        },
        tier_seconds=tier_seconds,
        link_seconds=link_seconds,
        seconds=sum(tier_seconds.values()) + sum(link_seconds.values()),
        fits=_fits(problem, labels),
    )


def _routes(problem: TierProblem) -> Iterator[tuple[int, ...]]:
    """Rising chains of tiers from the first one whose neighbours have a link."""
    names = [tier.name for tier in problem.tiers]
    for length in range(len(names)):
        for rest in combinations(range(1, len(names)), length):
            route = (0, *rest)
            if all((names[a], names[b]) in problem.links for a, b in pairwise(route)):
                yield route


def _solve(problem: TierProblem, route: Sequence[int]) -> list[int] | None:
    """Labels of the fastest placement on a route, its latencies left out; None where a layer runs nowhere on it."""
    graph = problem.graph
    tiers = [problem.tiers[index] for index in route]
    links = [problem.links[a.name, b.name] for a, b in pairwise(tiers)]
    unary: list[list[int]] = []
    outputs = set(graph.outputs)
    for position, layer in enumerate(graph.layers):
        returned = sum(_sent_bytes(problem, name) for name in layer.writes if name in outputs)
        costs, extra = [], 0.0
        for index, tier in enumerate(tiers):
            if index and problem.return_outputs:
                extra += returned / links[index - 1].bandwidth
            seconds = tier.seconds[position]
            costs.append(round((seconds + extra) * _TICKS) if isfinite(seconds) else FORBIDDEN)
        unary.append(costs)
    nets = []
    for name, readers in graph.readers.items():
        producer = graph.producer.get(name)
        if producer is None:  # an input: a node of its own, held on the first tier
            producer = len(unary)
            unary.append([0] + [FORBIDDEN] * (len(tiers) - 1))
        can = graph.tensors[name].can_cross
        costs = [round(_sent_bytes(problem, name) / link.bandwidth * _TICKS) if can else FORBIDDEN for link in links]
        nets.append((producer, readers, costs))
    found = best_labels(Labelling(len(tiers), unary, nets))
    return None if found is None else [route[label] for label in found[1][: len(graph.layers)]]


def _lined_up(problem: TierProblem) -> Iterator[TierCut]:
    """Placements that cut the model's own order of layers, one at each boundary (three tiers: the best of each)."""
    graph, tiers = problem.graph, problem.tiers
    count = len(graph.layers)
    sums = [_sums(tier.seconds) for tier in tiers]
    if len(tiers) == 1:
        if isfinite(sums[0][-1]):
            yield evaluate(problem, [0] * count)
        return
    bytes_at = cuts.boundary_costs(graph, lambda name: _sent_bytes(problem, name), inputs_from_start=True)
    first = _first_link(problem)
    scored = []
    if len(tiers) == 2:
        for at in range(count + 1):
            time = sums[0][at] + (sums[1][-1] - sums[1][at])
            scored.append((time + (bytes_at[at] / first.bandwidth if at < count else 0.0), (at, count)))
    else:
        second = problem.links.get((tiers[1].name, tiers[2].name), first)
        best = (inf, 0)
        for at in range(count + 1):
            # Boundary ``at`` is where the last tier begins; the best earlier one for the middle tier goes with it.
            best = min(best, (sums[0][at] - sums[1][at] + (bytes_at[at] / first.bandwidth if at < count else 0), at))
            send = bytes_at[at] / second.bandwidth if at < count else 0.0
            scored.append((best[0] + sums[1][at] + send + sums[2][-1] - sums[2][at], (best[1], at)))
            two = sums[0][at] + (bytes_at[at] / first.bandwidth if at < count else 0.0) + sums[1][-1] - sums[1][at]
            scored.append((two, (at, count)))
    scored = [entry for entry in scored if isfinite(entry[0])]
    extremes = [entry for entry in scored if entry[1] in ((count, count), (0, count), (0, 0))]
    for _, (one, two) in sorted({*sorted(scored)[:_CONSIDERED], *extremes}):
        yield evaluate(problem, [0] * one + [1] * (two - one) + [2] * (count - two))


_CONSIDERED = 60


def _first_link(problem: TierProblem) -> Link:
    names = [tier.name for tier in problem.tiers]
    return next(problem.links[names[0], name] for name in names[1:] if (names[0], name) in problem.links)


def _sums(values: Sequence[float]) -> list[float]:
    total, found = 0.0, [0.0]
    for value in values:
        total += value if isfinite(value) else 1e30
        found.append(total)
    return found


def _cheapest_route(problem: TierProblem, labels: Sequence[int]) -> tuple[str, ...]:
    """The route over all tiers that have layers; of several, the one that takes least time."""
    used = set(labels)
    names = [tier.name for tier in problem.tiers]
    options = [route for route in _routes(problem) if used <= set(route)]
    if used == {0}:
        return (names[0],)
    furthest = max(used)
    options = [route for route in options if route[-1] == furthest]
    journeys = list(_journeys(problem, labels))

    def cost(route: Sequence[int]) -> float:
        total = 0.0
        for one, other in pairwise(route):
            link = problem.links[names[one], names[other]]
            size = sum(_sent_bytes(problem, name) for name, source, target in journeys if source < other <= target)
            if problem.return_outputs:
                size += _returned(problem, labels, other)
                total += link.latency
            total += link.latency + size / link.bandwidth
        return total

    return tuple(names[index] for index in min(options, key=cost))


def _journeys(problem: TierProblem, labels: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Each tensor that leaves its tier: from where, and to which tier at the furthest."""
    graph = problem.graph
    for name, readers in graph.readers.items():
        producer = graph.producer.get(name)
        source = 0 if producer is None else labels[producer]
        furthest = max(labels[reader] for reader in readers)
        if furthest > source:
            yield name, source, furthest


def _returned(problem: TierProblem, labels: Sequence[int], tier: int) -> float:
    """Bytes of the outputs that come back from ``tier`` or from behind it."""
    graph = problem.graph
    made = [name for name in graph.outputs if name in graph.producer and labels[graph.producer[name]] >= tier]
    return sum(_sent_bytes(problem, name) for name in dict.fromkeys(made))


def _pairs(problem: TierProblem, route: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise(route))


def _index(problem: TierProblem, name: str) -> int:
    return next(index for index, tier in enumerate(problem.tiers) if tier.name == name)


def _sent_bytes(problem: TierProblem, name: str) -> float:
    size = problem.graph.tensors[name].transport_bytes(problem.transport)
    return cuts.UNKNOWN if size is None else float(size)


def _kind(problem: TierProblem, labels: Sequence[int], sent: set[str]) -> str:
    names = [tier.name for tier in problem.tiers]
    used = {label for label, layer in zip(labels, problem.graph.layers, strict=True) if not layer.light}
    if len(used) == 1:
        (only,) = used
        if only == 0:
            return f"all on {names[0]}"
        if sent <= set(problem.graph.inputs) or all(
            name in problem.graph.inputs or problem.graph.is_light(name) for name in sent
        ):
            return f"send the input to {names[only]}"
    return "cut"


def _fits(problem: TierProblem, labels: Sequence[int]) -> bool:
    graph = problem.graph
    for index, tier in enumerate(problem.tiers):
        if tier.memory is None:
            continue
        names = {
            name for label, layer in zip(labels, graph.layers, strict=True) if label == index for name in layer.weights
        }
        if weight_bytes(graph, names, tier.float_bytes) > tier.memory:
            return False
    return True


def _check_runnable(problem: TierProblem) -> None:
    for position, layer in enumerate(problem.graph.layers):
        if not any(isfinite(tier.seconds[position]) for tier in problem.tiers):
            raise UnsupportedError(
                f"no tier can run the stage with node {layer.name} ({layer.op})",
                where=problem.graph.where,
                fix="add a tier whose target runs it, or replace the operator",
            )
