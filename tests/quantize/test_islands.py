"""Layers that INT8 makes slower stay in float, by whole runs between float operators, and the report says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import helper

from modelforge.quantize.qdq import QuantizeReport, quantize_model
from tests.quantize.models import observe, write

N = helper.make_node


def _quantized(folder: Path, activation: str, wide: int, dialect: str = "onnxruntime-x86") -> QuantizeReport:
    """expand 1x1, depthwise 3x3, project 1x1, with an activation behind the first two; 32 channels outside."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(size=(wide, 32, 1, 1)).astype(np.float32),
        "w2": random.normal(size=(wide, 1, 3, 3)).astype(np.float32),
        "w3": random.normal(size=(32, wide, 1, 1)).astype(np.float32),
    }
    nodes = [
        N("Conv", ["x", "w1"], ["a"], name="expand"),
        N(activation, ["a"], ["b"]),
        N("Conv", ["b", "w2"], ["c"], name="depthwise", group=wide, pads=[1, 1, 1, 1]),
        N(activation, ["c"], ["d"]),
        N("Conv", ["d", "w3"], ["y"], name="project"),
    ]
    model = write(folder / "m.onnx", nodes, {"x": ["n", 32, 8, 8]}, {"y": ["n", 32, 8, 8]}, weights)
    table = observe(model, {"x": random.normal(size=(2, 32, 8, 8)).astype(np.float32)})
    return quantize_model(model, table, folder / "out", dialect=dialect)


def test_a_depthwise_conv_between_float_operators_stays_in_float(tmp_path: Path) -> None:
    report = _quantized(tmp_path, "HardSwish", 128)
    assert report.quantized == ("expand", "project")
    assert "INT8 is no faster here" in report.kept["depthwise"]


def test_in_a_run_of_integers_it_is_quantized_with_the_others(tmp_path: Path) -> None:
    """Conversions before and behind it would cost more than it does."""
    assert _quantized(tmp_path, "Relu", 128).quantized == ("expand", "depthwise", "project")


def test_a_dialect_without_the_rule_quantizes_it(tmp_path: Path) -> None:
    assert "depthwise" in _quantized(tmp_path, "HardSwish", 128, "onnxruntime-arm").quantized


def test_short_sums_do_not_pay_for_their_conversions(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weights = {
        "w1": random.normal(size=(64, 16, 1, 1)).astype(np.float32),
        "w2": random.normal(size=(16, 64, 1, 1)).astype(np.float32),
    }
    nodes = [
        N("Conv", ["x", "w1"], ["a"], name="short"),
        N("Sigmoid", ["a"], ["b"]),
        N("Conv", ["b", "w2"], ["y"], name="long"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": [1, 16, 8, 8]}, {"y": [1, 16, 8, 8]}, weights)
    table = observe(model, {"x": random.normal(size=(1, 16, 8, 8)).astype(np.float32)})
    assert quantize_model(model, table, tmp_path / "out", dialect="onnxruntime-x86").quantized == ("long",)


def test_where_nothing_would_be_left_all_is_quantized(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(2).normal(size=(8, 8, 1, 1)).astype(np.float32)}
    model = write(
        tmp_path / "m.onnx",
        [N("Conv", ["x", "w"], ["y"], name="only")],
        {"x": [1, 8, 4, 4]},
        {"y": [1, 8, 4, 4]},
        weights,
    )
    table = observe(model, {"x": np.ones((1, 8, 4, 4), np.float32)})
    assert quantize_model(model, table, tmp_path / "out", dialect="onnxruntime-x86").quantized == ("only",)
