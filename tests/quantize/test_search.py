"""The search for the fewest layers to keep in float, over evaluators of every shape."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.quantize.search import Trial, search_exclusions

Names = tuple[str, ...]


def names(count: int) -> list[str]:
    return [f"layer{index}" for index in range(count)]


class Evaluator:
    """Answers by the number of excluded names, and remembers what it was asked."""

    def __init__(self, passes: Callable[[int], bool]) -> None:
        self.passes = passes
        self.asked: list[Names] = []

    def __call__(self, excluded: Names) -> Trial:
        self.asked.append(excluded)
        return self.passes(len(excluded)), {"value": 0.5 + len(excluded) / 1000}


@given(count=st.integers(1, 300), need=st.integers(0, 320))
def test_a_monotone_gate_gives_the_smallest_prefix(count: int, need: int) -> None:
    evaluate = Evaluator(lambda excluded: excluded >= need)
    found = search_exclusions(names(count), evaluate)
    if need > count - 1:  # the last layer is never excluded: nothing would be quantized
        assert found.exclude is None
        assert found.chosen is None
    else:
        assert found.exclude == tuple(names(count)[:need])
    assert len(evaluate.asked) == len(set(evaluate.asked)) <= 2 * math.log2(count) + 4


@given(passing=st.lists(st.booleans(), min_size=1, max_size=200), limit=st.none() | st.integers(0, 220))
def test_any_gate_gives_a_prefix_that_was_seen_to_pass(passing: list[bool], limit: int | None) -> None:
    evaluate = Evaluator(lambda excluded: passing[min(excluded, len(passing) - 1)])
    found = search_exclusions(names(len(passing)), evaluate, limit=limit)
    seen = [excluded for excluded in evaluate.asked if evaluate.passes(len(excluded))]
    assert found.exclude == min(seen, key=len, default=None)
    assert len(evaluate.asked) == len(set(evaluate.asked)) <= 2 * math.log2(len(passing)) + 4
    assert [point["excluded"] for point in found.curve] == sorted(len(each) for each in evaluate.asked)
    assert [point["gate"] == "passed" for point in found.curve] == [
        evaluate.passes(point["excluded"]) for point in found.curve
    ]
    if limit is not None:
        assert max(len(each) for each in evaluate.asked) <= limit


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=40), need=st.integers(0, 100))
def test_a_block_is_excluded_as_one(sizes: list[int], need: int) -> None:
    blocks = [[f"b{block}n{index}" for index in range(size)] for block, size in enumerate(sizes)]
    ends = [sum(sizes[:count]) for count in range(len(sizes))]
    evaluate = Evaluator(lambda excluded: excluded >= need)
    found = search_exclusions(blocks, evaluate)
    assert all(len(each) in ends for each in evaluate.asked)
    assert found.chosen == min((end for end in ends if end >= need), default=None)
    if found.exclude is not None:
        assert found.exclude == tuple(name for block in blocks for name in block)[: found.chosen]


def test_int8_that_passes_as_it_is_takes_one_evaluation() -> None:
    evaluate = Evaluator(lambda _: True)
    found = search_exclusions(names(50), evaluate)
    assert found.exclude == ()
    assert evaluate.asked == [()]


def test_an_island_between_failures_is_kept() -> None:
    """4 passes, 3 does not, nor does 2, 5 or more: the bisection must not lose the only one that passed."""
    found = search_exclusions(names(20), Evaluator(lambda excluded: excluded == 4))
    assert found.chosen == 4


def test_where_all_fail_the_curve_and_the_worst_layers_remain() -> None:
    found = search_exclusions(names(20), Evaluator(lambda _: False), limit=6)
    assert found.exclude is None
    assert [point["excluded"] for point in found.curve] == [0, 1, 2, 4, 6]
    assert found.worst == tuple(names(8))


def test_the_document_is_json_with_the_ranking_and_the_curve() -> None:
    ranking = [{"node": name, "op": "Conv", "sqnr_db": 10.0} for name in names(9)]
    found = search_exclusions(names(9), Evaluator(lambda excluded: excluded >= 3))
    document = json.loads(json.dumps(found.facts("top1", ranking)))
    assert (document["schema"], document["metric"], document["chosen"]) == (1, "top1", 3)
    assert document["ranking"] == ranking
    assert document["curve"][0] == {"excluded": 0, "value": 0.5, "gate": "failed"}
    assert [point["excluded"] for point in document["curve"]] == [0, 1, 2, 3, 4]


def test_figures_do_not_overwrite_the_verdict() -> None:
    found = search_exclusions(["a"], lambda _: (False, {"gate": "passed", "excluded": 7}))
    assert found.curve == ({"excluded": 0, "gate": "failed"},)


def test_an_error_in_an_evaluation_ends_the_search() -> None:
    def evaluate(excluded: Names) -> Trial:
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        search_exclusions(names(3), evaluate)


@pytest.mark.parametrize(("ranking", "limit"), [(["a", "b", "a"], None), ([["a", "b"], ["b"]], None), (["a"], -1)])
def test_a_senseless_ranking_is_refused(ranking: list[str], limit: int | None) -> None:
    with pytest.raises(ValueError, match=r"twice|limit"):
        search_exclusions(ranking, Evaluator(lambda _: True), limit=limit)


def test_what_is_known_to_be_too_few_is_not_tried() -> None:
    asked: list[int] = []

    def evaluate(exclude: tuple[str, ...]) -> tuple[bool, dict[str, float]]:
        asked.append(len(exclude))
        return True, {}

    found = search_exclusions(["a", "b", "c"], evaluate, least=1)
    assert (found.exclude, asked) == (("a",), [1])
