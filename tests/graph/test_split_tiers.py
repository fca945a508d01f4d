"""The placement over tiers is the best there is: held against every placement on 200 random small DAGs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from math import inf
from pathlib import Path

import pytest

from modelforge.errors import UnsupportedError
from modelforge.graph.split import OverTiers, plan_split
from modelforge.graph.split_graph import LayerGraph, read_layers
from modelforge.graph.split_tiers import Link, Tier, TierProblem, best_cut, evaluate, sweep, top_cuts
from tests.graph.conftest import packaged
from tests.graph.split_models import random_dag

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def seconds(problem: TierProblem, labels: Sequence[int]) -> float:
    """The time of a placement, from the definition; infinite where data flows back or a link is missing."""
    graph, names = problem.graph, [tier.name for tier in problem.tiers]
    total = sum(problem.tiers[label].seconds[position] for position, label in enumerate(labels))
    where = {name: labels[position] for position, layer in enumerate(graph.layers) for name in layer.writes}
    furthest: dict[str, int] = {}
    for position, layer in enumerate(graph.layers):
        for name in layer.reads:
            if where.get(name, 0) > labels[position]:
                return inf
            furthest[name] = max(furthest.get(name, 0), labels[position])

    def size(name: str) -> int:
        return (graph.tensors[name].elements or 0) * BYTES[problem.transport]

    if max(labels) == 0:
        return total
    best = inf
    for through in itertools.product((False, True), repeat=len(names)):
        route = [index for index in range(len(names)) if index == 0 or through[index]]
        if not set(labels) <= set(route) or route[-1] != max(labels):
            continue
        links = [problem.links.get((names[a], names[b])) for a, b in itertools.pairwise(route)]
        if None in links:
            continue
        time = total
        for link, to in zip(links, route[1:], strict=True):
            assert link is not None
            sent = sum(size(name) for name, far in furthest.items() if where.get(name, 0) < to <= far)
            time += link.latency + sent / link.bandwidth
            if problem.return_outputs:
                back = sum(size(name) for name in graph.outputs if where.get(name, 0) >= to)
                time += link.latency + back / link.bandwidth
        best = min(best, time)
    return best


def some_problem(graph: LayerGraph, seed: int, tiers: int) -> TierProblem:
    rng = random.Random(seed)
    names = ("device", "edge", "cloud") if tiers == 3 else ("device", "cloud")
    speeds = (1.0, rng.uniform(0.05, 1.5), rng.uniform(0.01, 1.0))[:tiers]
    base = [rng.uniform(0.1, 5) for _ in graph.layers]
    placed = tuple(
        Tier(name, [each * speed * rng.uniform(0.7, 1.3) for each in base])
        for name, speed in zip(names, speeds, strict=True)
    )
    links = {
        (a, b): Link(rng.choice((0, 0.3, 2.0)), rng.choice((20.0, 80.0, 400.0))) for a, b in itertools.pairwise(names)
    }
    if tiers == 3 and rng.random() < 0.5:
        links["device", "cloud"] = Link(rng.uniform(0, 3), rng.uniform(20, 400))
    return TierProblem(graph, placed, links, rng.choice(("fp32", "fp16", "int8")), rng.random() < 0.5)


@pytest.mark.parametrize("tiers", [2, 3])
def test_no_placement_is_faster(tmp_path: Path, tiers: int) -> None:
    kinds = set()
    for seed in range(100):
        graph = read_layers(random_dag(tmp_path / "dag.onnx", seed, 8 if tiers == 2 else 6))
        problem = some_problem(graph, seed, tiers)
        every = itertools.product(range(tiers), repeat=len(graph.layers))
        least = min(seconds(problem, labels) for labels in every)
        found = best_cut(problem)
        assert found.seconds == pytest.approx(least, rel=1e-9), f"seed {seed}"
        assert seconds(problem, found.labels) == pytest.approx(least, rel=1e-9), f"seed {seed}"
        kinds.add(found.kind.split(" ")[0])
    assert kinds == {"all", "send", "cut"}, "the problems ask for every kind of answer"


def two_tiers(graph: LayerGraph, bandwidth: float, latency: float = 0.001) -> TierProblem:
    device = Tier("device", [(layer.flops or 0) / 20e9 for layer in graph.layers])
    cloud = Tier("cloud", [(layer.flops or 0) / 4e12 for layer in graph.layers])
    return TierProblem(graph, (device, cloud), {("device", "cloud"): Link(latency, bandwidth)})


def test_the_answer_follows_the_bandwidth() -> None:
    """A slow link: all on the device. A fast one: send the input. Never more time for more bandwidth."""
    problem = two_tiers(read_layers(packaged("resnet50")), 1.25e6)
    found = sweep(problem, (1e-3, 0.1, 1.0, 10.0, 1e3))
    assert found[0][1].kind == "all on device"
    assert found[0][1].link_seconds == {}
    assert found[-1][1].kind == "send the input to cloud"
    times = [cut.seconds for _, cut in found]
    assert times == sorted(times, reverse=True)


def test_latency_is_a_fixed_charge_and_not_paid_when_nothing_crosses() -> None:
    graph = read_layers(packaged("resnet50"))
    quick, slow = (best_cut(two_tiers(graph, 1e9, latency)) for latency in (0.0, 10.0))
    assert quick.kind != "all on device"
    assert slow.kind == "all on device"
    assert slow.seconds == pytest.approx(sum(layer.flops or 0 for layer in graph.layers) / 20e9)


def test_int8_transport_quarters_the_bytes_of_floats_only() -> None:
    graph = read_layers(packaged("magika"), {"unk__214": 1})
    cut = evaluate(two_tiers(graph, 1e6), [1] * len(graph.layers))
    assert cut.kind == "send the input to cloud"
    assert cut.bytes["int8"] == cut.bytes["fp32"] == 2048 * 4, "its input is int32: it goes as it is"
    graph = read_layers(packaged("resnet50"))
    cut = evaluate(two_tiers(graph, 1e6), [1] * len(graph.layers))
    assert (cut.bytes["fp32"], cut.bytes["fp16"], cut.bytes["int8"]) == (602112, 301056, 150528)


def test_top_cuts_are_ranked_and_name_both_extremes() -> None:
    problem = two_tiers(read_layers(packaged("nudenet"), {"height": 320, "width": 320}), 12.5e6)
    cuts = top_cuts(problem, 8)
    assert [cut.seconds for cut in cuts] == sorted(cut.seconds for cut in cuts)
    assert cuts[0].seconds == best_cut(problem).seconds
    assert {"all on device", "send the input to cloud"} <= {cut.kind for cut in cuts}
    assert len({tuple(cut.crossing.items()) for cut in cuts if cut.kind == "cut"}) == len(
        [cut for cut in cuts if cut.kind == "cut"]
    )


def test_memory_forbids_and_a_layer_that_runs_nowhere_is_refused() -> None:
    graph = read_layers(packaged("resnet50"))
    problem = two_tiers(graph, 1e3)
    device, cloud = problem.tiers
    assert best_cut(problem).kind == "all on device"
    small = Tier("device", device.seconds, memory=10_000_000)
    found = best_cut(TierProblem(graph, (small, cloud), problem.links))
    assert found.fits
    assert found.kind != "all on device"
    plan = plan_split(graph, OverTiers(TierProblem(graph, (small, cloud), problem.links)))
    assert sum(stage.weight_bytes for stage in plan.stages if stage.name == "device") <= 10_000_000
    tiny = Tier("cloud", cloud.seconds, memory=10_000_000)
    with pytest.raises(UnsupportedError, match="fits the tiers' memory"):
        best_cut(TierProblem(graph, (small, tiny), problem.links))
    nowhere = [inf if layer.op == "Softmax" else 1.0 for layer in graph.layers]
    with pytest.raises(UnsupportedError, match="no tier can run"):
        best_cut(TierProblem(graph, (Tier("device", nowhere), Tier("cloud", nowhere)), problem.links))


def test_a_layer_only_one_tier_runs_goes_there() -> None:
    graph = read_layers(packaged("resnet50"))
    problem = two_tiers(graph, 1e3)
    device = [
        inf if layer.op == "Softmax" else time
        for layer, time in zip(graph.layers, problem.tiers[0].seconds, strict=True)
    ]
    found = best_cut(TierProblem(graph, (Tier("device", device), problem.tiers[1]), problem.links))
    where = {layer.op: label for layer, label in zip(graph.layers, found.labels, strict=True)}
    assert where["Softmax"] == 1
    assert where["Conv"] == 0
