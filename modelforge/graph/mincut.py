"""Minimum cuts: the cheapest way to give each node of a DAG one of a few ordered labels. Whole numbers only, so exact.

Knows no model: nodes are indices, labels are tiers in their order, costs are integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

FORBIDDEN = -1
"""A unary cost that says: this node must not have this label."""


@dataclass
class Labelling:
    """Give each of ``nodes`` a label 0..labels-1; labels never fall along an edge.

    Attributes:
        unary: for each node, its cost at each label, or :data:`FORBIDDEN`.
        nets: a value that one node makes and others read, ``(producer, readers, costs)``. ``costs[k - 1]`` is paid
            once if the producer's label is below ``k`` and that of any reader is not; FORBIDDEN: it must not be.
    """

    labels: int
    unary: Sequence[Sequence[int]]
    nets: Sequence[tuple[int, Sequence[int], Sequence[int]]] = field(default_factory=tuple)


def best_labels(problem: Labelling) -> tuple[int, list[int]] | None:
    """The least total cost and a labelling that has it; None where every labelling is forbidden.

    Each boundary ``k`` between labels is a cut of its own: which nodes have a label of at least ``k``. Where the best
    cuts lie one inside the other, they are the answer; else all are found in one network that makes them so
    (Ishikawa, "Exact optimization for Markov random fields with convex priors", 2003). A net holds its readers at or
    above its producer, so that what flows back is not a case. Ties go to the smaller label.
    """
    finite = sum(max(0, *costs) for costs in problem.unary)
    finite += sum(cost for _, _, costs in problem.nets for cost in costs if cost > 0)
    never = finite + 1
    full = [[never if cost == FORBIDDEN else cost for cost in costs] for costs in problem.unary]
    base = sum(costs[0] for costs in full)
    levels = [_level(problem, full, boundary, never) for boundary in range(1, problem.labels)]
    if any(level is None for level in levels):
        return None
    known = [level for level in levels if level is not None]
    alone = [_cut([_merged(level)]) for level in known]
    above = [sides[0] for _, sides in alone]
    total = base + sum(cost for cost, _ in alone)
    if any(high and not low for lower, upper in pairwise(above) for low, high in zip(lower, upper, strict=True)):
        cost, above = _cut(known)
        total = base + cost
    if total >= never:
        return None
    return total, [sum(sides[node] for sides in above) for node in range(len(full))]


@dataclass
class _Level:
    """One boundary: which nodes lie above it.

    Attributes:
        step: what it costs more, or less, to lie above than below.
        side: of each node whose side is fixed, whether that is above.
        nets: ``(producer, readers, cost)``.
        leader: nodes with the same leader lie on the same side.
        infinite: above any sum of costs.
    """

    step: list[int]
    side: dict[int, bool]
    nets: list[tuple[int, Sequence[int], int]]
    leader: list[int]
    infinite: int


def _level(problem: Labelling, full: Sequence[Sequence[int]], boundary: int, never: int) -> _Level | None:
    """A boundary with the sides that follow from forbidden labels; None where they contradict each other."""
    nets = [
        (producer, readers, never if costs[boundary - 1] == FORBIDDEN else costs[boundary - 1])
        for producer, readers, costs in problem.nets
        if readers
    ]
    readers_of: dict[int, list[int]] = {}
    producers_of: dict[int, list[int]] = {}
    for producer, readers, _ in nets:
        readers_of.setdefault(producer, []).extend(readers)
        for reader in readers:
            producers_of.setdefault(reader, []).append(producer)
    forced_above = [node for node, costs in enumerate(full) if all(cost == never for cost in costs[:boundary])]
    forced_below = [node for node, costs in enumerate(full) if all(cost == never for cost in costs[boundary:])]
    above, below = _closure(forced_above, readers_of), _closure(forced_below, producers_of)
    if above & below:
        return None
    return _Level(
        step=[costs[boundary] - costs[boundary - 1] for costs in full],
        side={**dict.fromkeys(above, True), **dict.fromkeys(below, False)},
        nets=nets,
        leader=list(range(len(full))),
        # Telescoped unary costs add and take ``never`` again.
        infinite=never * (len(full) + 1) * problem.labels,
    )


def _closure(nodes: list[int], following: dict[int, list[int]]) -> set[int]:
    found: set[int] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += following.get(node, ())
    return found


def _merged(level: _Level) -> _Level:
    """A level whose nets that no best cut can cross are contracted: crossing one costs more than not cutting at all."""
    fixed = {node for node, above in level.side.items() if above}
    free = [node for node in range(len(level.step)) if node not in level.side]
    most = fixed.union(free)

    def cost(above: set[int]) -> int:
        crossed = (
            net_cost
            for producer, readers, net_cost in level.nets
            if producer not in above and any(reader in above for reader in readers)
        )
        return sum(level.step[node] for node in above) + sum(crossed)

    reached = min(cost(fixed), cost(most))
    least = sum(level.step[node] for node in fixed) + sum(min(0, level.step[node]) for node in free)
    leader = list(range(len(level.step)))

    def find(node: int) -> int:
        while leader[node] != node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for producer, readers, net_cost in level.nets:
        if net_cost + least > reached:
            for reader in readers:
                leader[find(reader)] = find(producer)
    leader = [find(node) for node in range(len(leader))]
    sides = {leader[node]: above for node, above in level.side.items()}
    side = {node: sides[leader[node]] for node in range(len(leader)) if leader[node] in sides}
    return _Level(level.step, side, level.nets, leader, level.infinite)


def _cut(levels: Sequence[_Level]) -> tuple[int, list[list[bool]]]:
    """The least cost of some boundaries, over that of all nodes below them, and for each which nodes lie above it.

    Node ``v`` has a vertex for each boundary, on the sink's side where it lies above; those that are fixed lie at the
    source or the sink.
    """
    count = len(levels[0].step)
    places: list[list[int]] = []
    vertices = 0
    for level in levels:
        place = [-1 if node not in level.side else (-3 if level.side[node] else -2) for node in range(count)]
        for node in range(count):
            if place[node] == -1:
                if place[level.leader[node]] == -1:
                    place[level.leader[node]] = vertices
                    vertices += 1
                place[node] = place[level.leader[node]]
        places.append(place)
    gates = sum(len(level.nets) for level in levels)
    network = Network(vertices + gates + 2)
    source, sink = vertices + gates, vertices + gates + 1
    places = [[{-2: source, -3: sink}.get(each, each) for each in place] for place in places]
    base, gate = 0, vertices
    for index, (level, place) in enumerate(zip(levels, places, strict=True)):
        for node, step in enumerate(level.step):
            if place[node] == sink:
                base += step
            elif place[node] != source:
                base += min(0, step)
                network.join(source, place[node], max(0, step))
                network.join(place[node], sink, max(0, -step))
            if index:
                network.join(places[index - 1][node], place[node], level.infinite)
        for producer, readers, cost in level.nets:
            ends = {place[reader] for reader in readers} - {place[producer]}
            if ends:
                network.join(place[producer], gate, cost)
            for end in ends:
                # Forwards: the reader sees the net. Backwards: a reader is not below its producer.
                network.join(gate, end, level.infinite)
                network.join(end, place[producer], level.infinite)
            gate += 1
    flow = network.maximum_flow(source, sink)
    below = network.cannot_reach(sink)
    return base + flow, [[not below[each] for each in place] for place in places]


@dataclass
class _Preflow:
    """Where a maximum flow computation stands; ``population`` counts the vertices at each distance."""

    source: int
    sink: int
    excess: list[int]
    distance: list[int]
    population: list[int]
    current: list[int]
    active: deque[int]
    queued: list[bool]

    def activate(self, vertex: int) -> None:
        if not self.queued[vertex] and vertex not in (self.source, self.sink):
            self.queued[vertex] = True
            self.active.append(vertex)


class Network:
    """A flow network over vertices 0..n-1; arcs are pairs, the odd one being the reverse of the even one."""

    def __init__(self, vertices: int) -> None:
        self.size = vertices
        self.arcs: list[list[int]] = [[] for _ in range(vertices)]
        self.head: list[int] = []
        self.room: list[int] = []

    def join(self, tail: int, head: int, capacity: int) -> None:
        """An arc, where it can carry anything."""
        if capacity and tail != head:
            self.add(tail, head, capacity)

    def add(self, tail: int, head: int, capacity: int) -> None:
        """An arc, and its empty reverse."""
        self.arcs[tail].append(len(self.head))
        self.head.append(head)
        self.room.append(capacity)
        self.arcs[head].append(len(self.head))
        self.head.append(tail)
        self.room.append(0)

    def maximum_flow(self, source: int, sink: int) -> int:
        """The value of a maximum flow; leaves a preflow whose residual arcs show a minimum cut on the sink's side.

        Push-relabel, first in first out, with the gap rule, and with all distances computed anew after every n / 4
        relabels (Cherkassky and Goldberg, "On implementing push-relabel method for the maximum flow problem", 1997).
        Only its first phase: what cannot reach the sink stays where it is, which the cut does not need.
        """
        size = self.size
        excess = [0] * size
        for arc in self.arcs[source]:
            excess[self.head[arc]] += self.room[arc]
            self.room[arc ^ 1] += self.room[arc]
            self.room[arc] = 0
        distance, population = self._distances(source, sink)
        state = _Preflow(source, sink, excess, distance, population, [0] * size, deque(), [False] * size)
        for vertex in range(size):
            if excess[vertex] and distance[vertex] < size:
                state.activate(vertex)
        relabels = 0
        while state.active:
            vertex = state.active.popleft()
            state.queued[vertex] = False
            relabels += self._discharge(vertex, state)
            if relabels > size // 4:
                relabels = 0
                state.distance, state.population = self._distances(source, sink)
                state.current = [0] * size
        return excess[sink]

    def _discharge(self, vertex: int, state: _Preflow) -> int:
        """Push a vertex's excess on, relabelling it until it is empty or cut off; gives the number of relabels."""
        head, room, size, out = self.head, self.room, self.size, self.arcs[vertex]
        excess, distance, current, population = state.excess, state.distance, state.current, state.population
        relabels = 0
        while excess[vertex] and distance[vertex] < size:
            if current[vertex] == len(out):
                mine = distance[vertex]
                lowest = min((distance[head[arc]] for arc in out if room[arc]), default=size) + 1
                relabels += 1
                population[mine] -= 1
                if population[mine] == 0:
                    self._lift(distance, population, mine)
                    lowest = size
                distance[vertex] = min(lowest, size)
                population[distance[vertex]] += 1
                current[vertex] = 0
                continue
            arc = out[current[vertex]]
            if room[arc] and distance[head[arc]] == distance[vertex] - 1:
                amount = min(excess[vertex], room[arc])
                room[arc] -= amount
                room[arc ^ 1] += amount
                excess[vertex] -= amount
                excess[head[arc]] += amount
                state.activate(head[arc])
            else:
                current[vertex] += 1
        return relabels

    def cannot_reach(self, sink: int) -> list[bool]:
        """Of each vertex, whether it lies on the source's side: no residual path leads from it to the sink."""
        arcs, head, room = self.arcs, self.head, self.room
        reaches = [False] * self.size
        reaches[sink] = True
        waiting = [sink]
        while waiting:
            vertex = waiting.pop()
            for arc in arcs[vertex]:
                other = head[arc]
                if room[arc ^ 1] and not reaches[other]:
                    reaches[other] = True
                    waiting.append(other)
        return [not reach for reach in reaches]

    def _distances(self, source: int, sink: int) -> tuple[list[int], list[int]]:
        """Arcs to the sink along residual arcs; ``size`` where there is no way. And how many vertices have each."""
        arcs, head, room, size = self.arcs, self.head, self.room, self.size
        distance = [size] * size
        distance[sink] = 0
        population = [0] * (size + 1)
        waiting = deque([sink])
        while waiting:
            vertex = waiting.popleft()
            further = distance[vertex] + 1
            population[further - 1] += 1
            for arc in arcs[vertex]:
                other = head[arc]
                if room[arc ^ 1] and distance[other] == size and other != source:
                    distance[other] = further
                    waiting.append(other)
        return distance, population

    def _lift(self, distance: list[int], population: list[int], gap: int) -> None:
        """No vertex has the distance ``gap``: none above it can reach the sink any more."""
        for vertex, far in enumerate(distance):
            if gap < far < self.size:
                population[far] -= 1
                population[self.size] += 1
                distance[vertex] = self.size
