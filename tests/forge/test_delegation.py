"""What handing tensors over to an NPU costs and saves, and what a chain delegates in all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modelforge.forge.delegation import HANDOVER, crossing_costs, together
from modelforge.graph.split import BySupport, plan_split
from modelforge.graph.split_graph import read_layers
from modelforge.target import Registry
from tests.graph.conftest import packaged

SIZES = {"height": 320, "width": 320}


@pytest.fixture(scope="module")
def shared() -> tuple[Any, Any]:
    """YOLOv8n with all but its last Concat on the NPU."""
    graph = read_layers(packaged("nudenet"), SIZES)
    last = graph.layers[graph.producer["output0"]]
    way = BySupport(lambda layer: layer.node != last.node, names=("rk3588-npu", "rk3588-cpu"))
    return plan_split(graph, way), graph


def test_a_detectors_body_is_worth_its_crossing(shared: tuple[Any, Any]) -> None:
    plan, graph = shared
    registry = Registry()
    target, host = registry.get("rk3588"), registry.get("cortex-a76")
    (cost,) = crossing_costs(plan, graph, target, host, "int8")
    assert cost["tensors"] == 3
    assert cost["bytes"] == 4 * (3 * 320 * 320 + 22 * 2100)
    seconds = cost["seconds"]
    assert seconds["crossing"] == pytest.approx(2 * cost["bytes"] / target.memory.bandwidth + HANDOVER)
    assert seconds["saved"] == pytest.approx(seconds["cpu"] - seconds["npu"] - seconds["crossing"])
    assert seconds["saved"] > 0.01

    slow = replace(target, memory=target.memory.model_copy(update={"bandwidth": 5e6}))
    (crawling,) = crossing_costs(plan, graph, slow, host, "int8")
    assert crawling["seconds"]["saved"] < 0


def test_without_a_rate_nothing_is_said_to_be_saved(shared: tuple[Any, Any]) -> None:
    registry = Registry()
    (cost,) = crossing_costs(*shared, registry.get("qualcomm-htp-v73"), registry.get("armv8"), "int8")
    assert (cost["seconds"]["npu"], cost["seconds"]["saved"]) == (None, None)
    assert cost["seconds"]["cpu"] > 0


def test_a_chain_adds_up_what_its_variants_tell() -> None:
    npu = {"operators": {"npu": 5, "cpu": 1}, "macs": {"npu": 100, "cpu": 2}, "off_npu": ["a"], "source": "toolkit"}
    cpu = {"operators": {"npu": 0, "cpu": 3}, "macs": {"npu": 0, "cpu": 7}, "off_npu": ["b", "c"], "source": "plan"}
    assert together([npu, cpu]) == {
        "operators": {"npu": 5, "cpu": 4},
        "macs": {"npu": 100, "cpu": 9},
        "off_npu": ["a", "b", "c"],
        "source": "toolkit; plan",
    }
    unknown = together([npu, {**cpu, "macs": None}])
    assert unknown is not None
    assert unknown["macs"] is None
    assert together([npu, None]) is None
    assert together([]) is None
