"""The roofline by hand on small graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from modelforge.graph.roofline import (
    Machine,
    bottleneck,
    fused_groups,
    layer_seconds,
    layer_times,
    layer_work,
    unpriced,
    weight_bytes,
)
from modelforge.graph.split_graph import LayerGraph, read_layers
from tests.graph.conftest import make_graph, packaged, write_model

MACHINE = Machine({"conv": 1e9, "matmul": 2e9, "other": 1e8}, 1e9, 4, 1e-6)


@pytest.fixture
def graph(tmp_path: Path) -> LayerGraph:
    """MatMul [n, 64] x [64, 32], then SiLU and a residual with the other input."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Sigmoid", ["m"], ["s"]),
        helper.make_node("Mul", ["m", "s"], ["silu"]),
        helper.make_node("Add", ["silu", "r"], ["y"]),
    ]
    kind = TensorProto.FLOAT
    model = make_graph(
        nodes,
        [("x", kind, ["n", 64]), ("r", kind, ["n", 32])],
        [("y", kind, ["n", 32])],
        {"w": np.zeros((64, 32), np.float32)},
    )
    return read_layers(write_model(tmp_path / "m.onnx", model), {"n": 8})


def test_one_kernel(graph: LayerGraph) -> None:
    assert fused_groups(graph) == [0, 0, 0, 0]
    work = layer_work(graph, 4)
    # The product reads x and writes m; what follows stays in the kernel, but for the other input.
    assert [each.activations for each in work] == [4 * (8 * 64 + 8 * 32), 0, 0, 4 * 8 * 32]
    assert [each.weights for each in work] == [4 * 64 * 32, 0, 0, 0]
    assert [each.starts for each in work] == [True, False, False, False]


def test_time_is_the_longer_of_both_and_weights_do_not_grow_with_the_batch(graph: LayerGraph) -> None:
    first = layer_times(layer_work(graph, 4), MACHINE)[0]
    assert first.compute == pytest.approx(2 * 8 * 64 * 32 / 2e9)
    assert first.memory == pytest.approx((4 * 768 + 8192) / 1e9)
    assert first.seconds == pytest.approx(max(first.compute, first.memory) + 1e-6)
    more = layer_times(layer_work(graph, 4), MACHINE, batch=10)[0]
    assert more.compute == pytest.approx(10 * first.compute)
    assert more.memory == pytest.approx((10 * 4 * 768 + 8192) / 1e9)
    assert sum(layer_seconds(graph, MACHINE, 10)) < 10 * sum(layer_seconds(graph, MACHINE))


def test_precision_changes_bytes_of_floats_only(graph: LayerGraph) -> None:
    assert weight_bytes(graph, {"w"}, 1) == 64 * 32
    assert layer_work(graph, 1)[0].activations == 768
    ids = read_layers(packaged("magika"))
    integers = {name for name, weight in ids.weights.items() if not weight.is_float}
    assert integers
    assert weight_bytes(ids, integers, 1) == weight_bytes(ids, integers, 4)


def test_a_lookup_reads_its_rows_not_its_table(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "i"], ["y"])]
    model = make_graph(
        nodes,
        [("i", TensorProto.INT64, [2])],
        [("y", TensorProto.FLOAT, [2, 8])],
        {"table": np.zeros((1000, 8), np.float32)},
    )
    work = layer_work(read_layers(write_model(tmp_path / "m.onnx", model)), 4)
    assert work[0].weights == 2 * 8 * 4


def test_what_is_not_known_is_named_and_bottlenecks_are_told(graph: LayerGraph) -> None:
    assert unpriced(graph) == []
    open_sizes = read_layers(packaged("nudenet"))
    assert len(unpriced(open_sizes)) > 50, "at a size of one pixel its shapes contradict each other"
    times = layer_times(layer_work(graph, 4), MACHINE)
    assert bottleneck(times) == "compute"
    slow = Machine(MACHINE.rates, 1e6, 4, 0)
    assert bottleneck(layer_times(layer_work(graph, 4), slow)) == "memory"


def test_resnet50_against_the_usual_figures() -> None:
    graph = read_layers(packaged("resnet50"))
    assert sum(layer.flops or 0 for layer in graph.layers) == pytest.approx(8.2e9, rel=0.01)
    assert sum(weight.bytes for weight in graph.weights.values()) == pytest.approx(102.2e6, rel=0.01)
