"""Minimum cuts are exact: held against every labelling there is, on small problems."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from modelforge.graph.mincut import FORBIDDEN, Labelling, Network, best_labels


def cost(problem: Labelling, labels: Sequence[int]) -> int | None:
    """Straight from the definition; None where the labelling is forbidden."""
    total = 0
    for costs, label in zip(problem.unary, labels, strict=True):
        if costs[label] == FORBIDDEN:
            return None
        total += costs[label]
    for producer, readers, costs in problem.nets:
        if any(labels[reader] < labels[producer] for reader in readers):
            return None
        for level in range(1, problem.labels):
            if labels[producer] < level and any(labels[reader] >= level for reader in readers):
                if costs[level - 1] == FORBIDDEN:
                    return None
                total += costs[level - 1]
    return total


@st.composite
def problems(draw: st.DrawFn) -> Labelling:
    labels = draw(st.integers(1, 4))
    count = draw(st.integers(1, 7 if labels < 3 else 5))
    value = st.one_of(st.integers(0, 30), st.integers(0, 3), st.just(FORBIDDEN))
    unary = draw(st.lists(st.lists(value, min_size=labels, max_size=labels), min_size=count, max_size=count))
    nets = []
    for producer in range(count - 1):
        readers = draw(st.lists(st.integers(producer + 1, count - 1), unique=True))
        nets.append((producer, readers, draw(st.lists(value, min_size=labels - 1, max_size=labels - 1))))
    return Labelling(labels, unary, nets)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_labelling_is_cheaper(problem: Labelling) -> None:
    every = itertools.product(range(problem.labels), repeat=len(problem.unary))
    least = min((found for labels in every if (found := cost(problem, labels)) is not None), default=None)
    answer = best_labels(problem)
    if least is None:
        assert answer is None
    else:
        assert answer is not None
        assert answer[0] == least
        assert cost(problem, answer[1]) == least, "the labelling has the cost that is claimed"


def test_a_textbook_flow() -> None:
    """Cormen, Leiserson, Rivest, Stein, figure 26.6: the maximum flow is 23."""
    network = Network(6)
    for tail, head, room in ((0, 1, 16), (0, 2, 13), (1, 3, 12), (2, 1, 4), (2, 4, 14), (3, 2, 9), (3, 5, 20)):
        network.add(tail, head, room)
    network.add(4, 3, 7)
    network.add(4, 5, 4)
    assert network.maximum_flow(0, 5) == 23


def test_large_numbers_stay_exact() -> None:
    """Picoseconds of minutes: beyond what a float or a 32-bit integer holds."""
    big = 10**15
    problem = Labelling(2, [[0, FORBIDDEN], [big + 2, big], [3 * big, 1]], [(0, [1], [2]), (1, [2], [1])])
    assert best_labels(problem) == (big + 3, [0, 1, 1])
