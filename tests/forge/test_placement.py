"""Where models can run: the same criterion for all, and a sensible answer for four kinds of model."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from benchmarks.split_models import llama
from modelforge.errors import InputError
from modelforge.forge.efficiency import Measurement, record_measurement
from modelforge.forge.placement import MEMORY_SHARE, Matrix, placement_matrix
from modelforge.graph.inspect import inspect_model
from modelforge.graph.split_graph import read_layers
from modelforge.target import Registry
from tests.graph.conftest import make_graph, packaged, write_model
from tests.graph.split_models import export_bert


def matrix(
    model: Path, tmp_path: Path, *tags: str, sizes: dict[str, int] | None = None, task: str = "interactive",
    budget_ms: float | None = None,
) -> Matrix:  # fmt: skip
    registry = Registry()
    targets = [registry.get(tag) for tag in tags] or list(registry)
    graph = read_layers(model, sizes)
    return placement_matrix(
        graph, inspect_model(model, cost=False), targets, task=task, budget_ms=budget_ms, home=tmp_path
    )


def verdicts(found: Matrix) -> dict[str, str]:
    return {tier.tier: tier.verdict for tier in found.tiers}


def test_resnet50_runs_everywhere_and_best_in_int8_on_the_device(tmp_path: Path) -> None:
    found = matrix(packaged("resnet50"), tmp_path)
    assert verdicts(found) == {"device": "yes", "edge": "yes", "cloud": "yes"}
    device = found.tiers[0]
    assert device.fastest == "int8"
    assert device.widest != "fp32", "no device does it in FP32 in time"
    assert set(device.unknown) == {tag for tag in Registry().tags() if tag.startswith(("qualcomm", "ethos"))}


def test_a_yolo_nano_runs_on_the_device_after_quantization(tmp_path: Path) -> None:
    """640 pixels, video at 30 frames a second."""
    sizes = {"height": 640, "width": 640}
    found = matrix(packaged("nudenet"), tmp_path, sizes=sizes, task="object-detection")
    assert verdicts(found)["edge"] == verdicts(found)["cloud"] == "yes"
    rows = {row.target.tag: row for row in found.rows}
    assert rows["cortex-a76"].verdict == "after quantization"
    assert rows["rk3588"].verdict in ("yes", "after quantization")
    assert found.tiers[0].fastest == "int8"
    assert "fp32" not in {row.best.precision for row in found.rows if row.best and row.target.tier == "device"}
    assert "33.3 ms" in rows["cortex-a76"].why


def test_a_13b_decoder_runs_in_the_cloud_only(tmp_path: Path) -> None:
    found = matrix(llama(tmp_path / "llama.onnx"), tmp_path, task="text-generation")
    assert verdicts(found) == {"device": "no", "edge": "no", "cloud": "yes"}
    rows = {row.target.tag: row for row in found.rows}
    assert rows["jetson-agx-orin"].estimates[-1].verdict == "latency", "it has the memory, but not the bandwidth"
    assert rows["rk3588"].estimates[-1].verdict == "memory"
    assert rows["a100"].best is not None


@pytest.mark.slow  # exports BERT-base: half a gigabyte
def test_bert_base_runs_from_the_edge_on(tmp_path: Path) -> None:
    model = export_bert(tmp_path / "bert.onnx", layers=12, width=768, heads=12, words=30522, length=128, dynamic=False)
    found = matrix(model, tmp_path)
    assert verdicts(found)["device"] in ("no", "some")
    assert verdicts(found)["edge"] == verdicts(found)["cloud"] == "yes"
    rows = {row.target.tag: row for row in found.rows}
    assert rows["jetson-orin-nano"].best is not None
    assert rows["rk3588"].verdict == rows["cortex-a76"].verdict == "no"


def test_the_criterion_is_told_and_can_be_set(tmp_path: Path) -> None:
    model = packaged("resnet50")
    tight = matrix(model, tmp_path, "cortex-a76", "t4", budget_ms=3)
    assert {row.target.tag: row.verdict for row in tight.rows}["cortex-a76"] == "no"
    facts = tight.facts()
    assert facts["estimate"] is True
    assert facts["criterion"]["latency_budget_ms"] == 3
    assert facts["criterion"]["memory_share"] == MEMORY_SHARE
    assert any("nothing was run" in note for note in facts["notes"])
    with pytest.raises(InputError, match='task "poetry" has no latency budget'):
        matrix(model, tmp_path, "t4", task="poetry")
    assert matrix(model, tmp_path, "t4", task="poetry", budget_ms=10).budget_ms == 10


def test_precisions_operators_and_unknown_peaks(tmp_path: Path) -> None:
    found = {row.target.tag: row for row in matrix(packaged("silero_op15"), tmp_path).rows}
    assert {each.precision for each in found["v100"].estimates} == {"fp32", "fp16"}, "Volta has no INT8"
    assert found["qualcomm-htp-v73"].verdict == "unknown"
    kind = TensorProto.FLOAT
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Special", ["a"], ["y"], domain="com.example")]
    graph = make_graph(nodes, [("x", kind, [4])], [("y", kind, [4])])
    model = write_model(tmp_path / "special.onnx", graph, com_example=1)
    row = matrix(model, tmp_path, "cortex-a76").rows[0]
    assert row.verdict == "no"
    assert {each.verdict for each in row.estimates} == {"unsupported"}
    assert "Special" in row.why


def test_a_batch_that_can_be_chosen_gets_a_curve(tmp_path: Path) -> None:
    sizes = {"height": 320, "width": 320}
    row = matrix(packaged("nudenet"), tmp_path, "t4", sizes=sizes).rows[0]
    assert row.best is not None
    curve = row.best.batches
    assert list(curve) == [1, 2, 4, 8, 16, 32]
    assert all(curve[2 * size] < 2 * curve[size] for size in (1, 2, 4, 8, 16)), "weights are read once a batch"
    assert row.best.throughput == pytest.approx(max(size / time for size, time in curve.items()) * 1e3)
    fixed = matrix(packaged("resnet50"), tmp_path, "t4").rows[0].best
    assert fixed is not None
    assert fixed.batches == {}


def test_a_measured_latency_corrects_the_estimate(tmp_path: Path) -> None:
    model = packaged("resnet50")
    before = matrix(model, tmp_path, "x86-64").rows[0].estimates[0]
    assert before.latency_ms is not None
    seconds = before.latency_ms / 1e3
    record_measurement(
        Measurement("x86-64", before.compiler, "fp32", "resnet50", 1, seconds, 2 * seconds),
        evidence="device",
        home=tmp_path,
    )
    after = matrix(model, tmp_path, "x86-64").rows[0].estimates[0]
    assert after.latency_ms == pytest.approx(2 * before.latency_ms)
    assert after.factor.measurements == 1
    assert (before.verdict, after.verdict) == ("yes", "latency")


def test_sizes_that_are_not_known_are_told(tmp_path: Path) -> None:
    found = matrix(packaged("nudenet"), tmp_path, "t4")
    assert any("count as nothing" in note and "height" in note for note in found.notes)
