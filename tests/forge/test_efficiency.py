"""Estimates and what corrects them."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.errors import InputError
from modelforge.forge.efficiency import (
    EFFICIENCY,
    Factor,
    Measurement,
    factor_for,
    machine_for,
    record_measurement,
)
from modelforge.graph.roofline import layer_seconds
from modelforge.graph.split_graph import LayerGraph, read_layers
from modelforge.target import Registry
from tests.graph.conftest import packaged


def measurement(model: str, ratio: float, precision: str = "fp32", batch: int = 1) -> Measurement:
    return Measurement("x86-64", "onnxruntime", precision, model, batch, 0.010, 0.010 * ratio)


def test_measurements_correct_the_estimate_and_tell_its_error(tmp_path: Path) -> None:
    assert factor_for("x86-64", "onnxruntime", "fp32", home=tmp_path) == Factor()
    for model, ratio in (("a", 2.0), ("b", 2.2), ("c", 1.8)):
        record_measurement(measurement(model, ratio), evidence="device", home=tmp_path)
    found = factor_for("x86-64", "onnxruntime", "fp32", home=tmp_path)
    assert found.value == pytest.approx(2.0)
    assert found.measurements == 3
    # Each from the median of the two others: 2.0/2.0, 1.9/2.2, 2.1/1.8.
    assert found.error == pytest.approx(1 - 1.9 / 2.2, rel=1e-6)
    assert found.scope == "target, compiler and precision"
    other = factor_for("x86-64", "onnxruntime", "int8", home=tmp_path)
    assert (other.value, other.scope) == (pytest.approx(2.0), "target and compiler")
    assert factor_for("t4", "onnxruntime", "fp32", home=tmp_path).measurements == 0


def test_a_later_measurement_takes_the_place_of_the_same(tmp_path: Path) -> None:
    record_measurement(measurement("a", 2.0), evidence="device", home=tmp_path)
    record_measurement(measurement("a", 3.0), evidence="device", home=tmp_path)
    found = factor_for("x86-64", "onnxruntime", "fp32", home=tmp_path)
    assert (found.value, found.measurements, found.error) == (pytest.approx(3.0), 1, None)
    record_measurement(measurement("a", 1.0, batch=8), evidence="device", home=tmp_path)
    assert factor_for("x86-64", "onnxruntime", "fp32", home=tmp_path).measurements == 2


@pytest.mark.parametrize("evidence", ["emulator", "simulator", "reference", "none"])
def test_only_a_device_measures(tmp_path: Path, evidence: str) -> None:
    with pytest.raises(InputError, match=evidence):
        record_measurement(measurement("a", 2.0), evidence=evidence, home=tmp_path)
    with pytest.raises(InputError, match="above 0"):
        record_measurement(measurement("a", 0.0), evidence="device", home=tmp_path)
    assert not (tmp_path / "measurements.json").exists()


def test_a_spoilt_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "measurements.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        factor_for("x86-64", "onnxruntime", "fp32", home=tmp_path)


def test_every_compiler_of_a_profile_has_its_row_and_every_row_its_source() -> None:
    named = {name for target in Registry() for name in target.compilers}
    assert named <= set(EFFICIENCY)
    assert all(row.source.startswith(("measured", "estimate", "MLPerf", "github.com")) for row in EFFICIENCY.values())


def test_no_peak_no_machine() -> None:
    registry = Registry()
    assert machine_for(registry.get("qualcomm-htp-v73"), "int8", "qualcomm") is None
    assert machine_for(registry.get("v100"), "int8", "tensorrt") is None
    mixed, int8 = (machine_for(registry.get("t4"), each, "tensorrt") for each in ("mixed", "int8"))
    assert mixed == int8


PUBLISHED = {
    # github.com/airockchip/rknn_model_zoo README_CN.md, INT8, images a second on one core
    ("rk3588", "resnet50"): 110.4,
    ("rk3576", "resnet50"): 99.8,
    ("rk3566", "resnet50"): 38.5,
    ("rk3588", "yolov8n"): 74.0,
    ("rk3576", "yolov8n"): 90.2,
    ("rk3566", "yolov8n"): 34.4,
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, LayerGraph]:
    # NudeNet's 320n is a YOLOv8n with fewer classes; published figures are at 640 pixels.
    return {
        "resnet50": read_layers(packaged("resnet50")),
        "yolov8n": read_layers(packaged("nudenet"), {"height": 640, "width": 640}),
    }


@pytest.mark.parametrize(("tag", "name"), PUBLISHED)
def test_estimates_are_within_a_factor_of_two_of_published_figures(
    graphs: dict[str, LayerGraph], tag: str, name: str
) -> None:
    machine = machine_for(Registry().get(tag), "int8", "rockchip")
    assert machine is not None
    ratio = sum(layer_seconds(graphs[name], machine)) * PUBLISHED[tag, name]
    assert 0.5 < ratio < 2
