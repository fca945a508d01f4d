"""Equalization, bias correction and the choice between them: on nets made to need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from modelforge.quantize.equalize import equalize
from modelforge.quantize.improve import CEILING_DB, closeness, correct_biases, quantize_best
from modelforge.quantize.qdq import quantize_model
from modelforge.quantize.ranges import RangeTable
from tests.graph.conftest import sqnr_db
from tests.quantize.models import Qdq, observe, run, write

N = helper.make_node
FEED = {"x": np.random.default_rng(4).normal(0.3, 1, (8, 8, 6, 6)).astype(np.float32)}


def feeds() -> Iterator[Mapping[str, np.ndarray]]:
    for start in range(0, 8, 2):
        yield {"x": FEED["x"][start : start + 2]}


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Conv -> HardSwish as exported (Add, Clip, Mul, Div) -> depthwise -> Relu -> 1x1, channels 300 times apart."""
    rng = np.random.default_rng(9)
    loud = np.geomspace(0.1, 30, 16).astype(np.float32)
    weights = {
        "w0": (rng.normal(size=(16, 8, 1, 1)) * loud.reshape(-1, 1, 1, 1)).astype(np.float32),
        "b0": rng.normal(size=16).astype(np.float32),
        "three": np.array(3, np.float32),
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
        "w1": rng.normal(size=(16, 1, 3, 3)).astype(np.float32),
        "b1": rng.normal(size=16).astype(np.float32),
        "w2": (rng.normal(size=(4, 16, 1, 1)) / loud.reshape(1, -1, 1, 1)).astype(np.float32),
        "b2": rng.normal(size=4).astype(np.float32),
    }
    nodes = [
        N("Conv", ["x", "w0", "b0"], ["c0"], name="expand"),
        N("Add", ["c0", "three"], ["a"]),
        N("Clip", ["a", "zero", "six"], ["k"]),
        N("Mul", ["c0", "k"], ["m"]),
        N("Div", ["m", "six"], ["h"]),
        N("Conv", ["h", "w1", "b1"], ["c1"], pads=[1] * 4, group=16, name="depthwise"),
        N("Relu", ["c1"], ["r"]),
        N("Conv", ["r", "w2", "b2"], ["y"], name="project"),
    ]
    return write(tmp_path / "m.onnx", nodes, {"x": ["n", 8, 6, 6]}, {"y": ["n", 4, 6, 6]}, weights)


def quantized_sqnr(model: Path, folder: Path) -> float:
    quantize_model(model, observe(model, FEED), folder, dialect="tvm", method="minmax")
    return sqnr_db(run(model, FEED)[0], run(folder / "model.onnx", FEED)[0])


def test_equalization_keeps_the_function_and_raises_sqnr(uneven: Path, tmp_path: Path) -> None:
    report = equalize(uneven, observe(uneven, FEED), tmp_path / "even")
    assert set(report.equalized) == {"h", "r"}
    even = tmp_path / "even" / "model.onnx"
    exact = run(uneven, FEED)[0]
    np.testing.assert_allclose(run(even, FEED)[0], exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    assert quantized_sqnr(even, tmp_path / "b") > quantized_sqnr(uneven, tmp_path / "a") + 6


def test_a_depthwise_conv_takes_all_of_the_spread(uneven: Path, tmp_path: Path) -> None:
    equalize(uneven, observe(uneven, FEED), tmp_path / "even")
    channels = observe(tmp_path / "even" / "model.onnx", FEED)["h"].channel_absmax
    assert channels is not None
    assert channels.max() / channels.min() < 1.01


def test_what_something_else_reads_too_is_left_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = {"w0": rng.normal(size=(8, 8, 1, 1)).astype(np.float32), "w1": rng.normal(size=(8, 8, 1, 1)).astype("f")}
    nodes = [
        N("Conv", ["x", "w0"], ["c"], name="first"),
        N("Relu", ["c"], ["r"]),
        N("Conv", ["r", "w1"], ["d"], name="second"),
        N("Add", ["d", "r"], ["y"]),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": ["n", 8, 6, 6]}, {"y": ["n", 8, 6, 6]}, weights)
    assert equalize(model, observe(model, FEED), tmp_path / "even").equalized == {}


@pytest.mark.parametrize("dialect", ["tvm", "onnxruntime-x86"])
def test_bias_correction_takes_the_mean_error_away(dialect: str, uneven: Path, tmp_path: Path) -> None:
    """A float bias and an int32 one; weights of 7 bits make the shift large."""
    quantize_model(uneven, observe(uneven, FEED), tmp_path / "q", dialect=dialect, method="minmax", reduce_range=True)
    report = correct_biases(uneven, tmp_path / "q" / "model.onnx", tmp_path / "c", feeds)
    assert set(report.corrected) == {"expand", "depthwise", "project"}
    exact = run(uneven, FEED)[0]
    errors = [
        np.abs((exact - run(tmp_path / name / "model.onnx", FEED)[0]).mean((0, 2, 3))).max() for name in ("q", "c")
    ]
    assert errors[1] < 0.5 * errors[0]
    before, after = Qdq(tmp_path / "q"), Qdq(tmp_path / "c")
    assert before.constant("project", 1).tolist() == after.constant("project", 1).tolist()


def test_closeness_counts_each_meaning_of_an_output_once(tmp_path: Path) -> None:
    """Scores of 1 beside boxes of 1000: 1 % off in either is the same loss, and a silent class is none of its own."""
    sizes = {"boxes": np.full(2, 1000, np.float32), "scores": np.array([1, 1e-4], np.float32)}
    wrong = {"boxes": np.float32([1.01, 1.01]), "scores": np.float32([1.01, 1.01]), "silent": np.float32([1, 3])}

    def model(name: str, boxes: np.ndarray, scores: np.ndarray) -> Path:
        weights = {
            "a": (sizes["boxes"] * boxes).reshape(1, 2, 1, 1),
            "b": (sizes["scores"] * scores).reshape(1, 2, 1, 1),
        }
        nodes = [
            N("Mul", ["x", "a"], ["boxes"]),
            N("Sin", ["x"], ["s"]),
            N("Div", ["s", "s"], ["one"]),
            N("Mul", ["one", "b"], ["scaled"]),
            N("Relu", ["scaled"], ["scores"]),
            N("Concat", ["boxes", "scores"], ["y"], axis=1),
        ]
        return write(tmp_path / f"{name}.onnx", nodes, {"x": [1, 2, 2, 2]}, {"y": [1, 4, 2, 2]}, weights)

    exact = np.ones(2, np.float32)
    feed = {"x": np.random.default_rng(0).uniform(0.5, 1, (1, 2, 2, 2)).astype(np.float32)}
    models = [
        model("exact", exact, exact),
        model("large", wrong["boxes"], exact),
        model("small", exact, wrong["scores"]),
        model("silent", exact, wrong["silent"]),
    ]
    same, large, small, silent = closeness(models[0], models, lambda: iter([feed]))
    assert same == CEILING_DB
    assert large == pytest.approx((40 + CEILING_DB) / 2, abs=0.1)
    assert small == pytest.approx(large, abs=0.1)
    assert silent > small + 10


def test_the_best_candidate_is_what_is_written(uneven: Path, tmp_path: Path) -> None:
    calls: list[Path] = []

    def calibrate(model: Path) -> RangeTable:
        calls.append(model)
        return observe(model, FEED)

    report = quantize_best(
        uneven, observe(uneven, FEED), tmp_path / "out", dialect="tvm", feeds=feeds, calibrate=calibrate
    )
    assert len(calls) == 1
    assert len(report.candidates) == 5
    assert report.chosen == max(report.candidates, key=lambda candidate: candidate.closeness_db)
    assert report.chosen.start.startswith("equalized")
    written = closeness(uneven, [tmp_path / "out" / "model.onnx"], feeds)[0]
    assert written == pytest.approx(report.chosen.closeness_db, abs=0.01)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.onnx"]


def test_each_improvement_can_be_switched_off(uneven: Path, tmp_path: Path) -> None:
    report = quantize_best(
        uneven,
        observe(uneven, FEED),
        tmp_path,
        dialect="tvm",
        feeds=feeds,
        calibrate=lambda model: observe(model, FEED),
        methods=("minmax",),
        strengths=(),
        bias_correction=False,
    )
    assert [(candidate.start, candidate.method, candidate.corrected) for candidate in report.candidates] == [
        ("plain", "minmax", False)
    ]
