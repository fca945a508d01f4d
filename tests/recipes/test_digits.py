"""The digits recipe: the committed files are what train.py says, and good enough for a gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from modelforge.recipe import load_recipe
from modelforge.target import Registry

FOLDER = Path(__file__).parents[2] / "recipes" / "digits"


@pytest.fixture(scope="module")
def evaluation() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "evaluation.npz") as data:
        return dict(data)


def test_the_model_is_right_on_held_out_digits(evaluation: dict[str, np.ndarray]) -> None:
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"x": evaluation["x"]})
    assert logits.shape == (360, 10)
    assert (logits.argmax(1) == evaluation["label"]).mean() >= 0.97


def test_the_data_are_what_the_recipe_says(evaluation: dict[str, np.ndarray]) -> None:
    assert (evaluation["x"].shape, evaluation["x"].dtype) == ((360, 1, 8, 8), np.float32)
    assert (evaluation["label"].shape, evaluation["label"].dtype) == ((360,), np.int64)
    assert np.bincount(evaluation["label"]).min() >= 30
    with np.load(FOLDER / "calibration.npz") as calibration:
        x = calibration["x"]
    assert (x.shape, x.dtype, x.min(), x.max()) == ((128, 1, 8, 8), np.float32, 0.0, 1.0)
    held_out = {sample.tobytes() for sample in evaluation["x"]}
    assert not held_out & {sample.tobytes() for sample in x}, "a calibration sample is judged on"


def test_the_model_has_what_a_classifier_has() -> None:
    model = onnx.load(FOLDER / "model.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert {"Conv", "BatchNormalization", "Relu", "Add", "MaxPool", "GlobalAveragePool", "Gemm"} <= kinds
    assert model.opset_import[0].version == 17
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) < 300_000


def test_the_recipe_loads_and_its_targets_exist() -> None:
    recipe = load_recipe(FOLDER)
    assert recipe.model.is_file()
    registry = Registry()
    assert {section.tag for section in recipe.targets} == {"t4", "a100", "cortex-a76", "x86-64"}
    for section in recipe.targets:
        assert set(section.precision) <= set(registry.get(section.tag).precisions)
    assert set(recipe.serving.fallback) <= set(registry.tags())
