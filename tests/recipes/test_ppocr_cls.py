"""The ppocr-cls recipe: its rendered lines are always the same, and the model reads them as a gate needs."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from modelforge.recipe import load_recipe
from modelforge.samples import load_function
from modelforge.target import Registry

pytest.importorskip("PIL", reason="the recipe's README says to install pillow")

FOLDER = Path(__file__).parents[2] / "recipes" / "ppocr-cls"


def samples(name: str) -> list[dict[str, Any]]:
    return list(load_function(f"lines:{name}", FOLDER, "data")())


@pytest.fixture(scope="module")
def evaluation() -> list[dict[str, Any]]:
    return samples("evaluation")


@pytest.fixture
def recipe() -> Any:
    # Looked for, not imported: installed with --no-deps, as the README says, the package cannot be.
    if importlib.util.find_spec("rapidocr_onnxruntime") is None:
        pytest.skip("rapidocr-onnxruntime is not installed")
    return load_recipe(FOLDER)


def test_samples_are_single_and_labelled(evaluation: list[dict[str, Any]]) -> None:
    assert len(evaluation) == 200
    assert [int(sample["label"]) for sample in evaluation] == [0, 1] * 100
    for sample in evaluation:
        assert set(sample) == {"x", "label"}
        assert (sample["x"].shape, sample["x"].dtype) == ((3, 48, 192), np.float32)
        assert -1 <= sample["x"].min() < sample["x"].max() <= 1


def test_the_same_samples_every_time(evaluation: list[dict[str, Any]]) -> None:
    for first, second in itertools.zip_longest(evaluation, samples("evaluation")):
        np.testing.assert_array_equal(first["x"], second["x"])


def test_calibration_lines_are_others(evaluation: list[dict[str, Any]]) -> None:
    calibration = samples("calibration")
    assert len(calibration) == 128
    seen = {sample["x"].tobytes() for sample in evaluation}
    assert len(seen) == 200
    assert not seen & {sample["x"].tobytes() for sample in calibration}


def test_preprocessing_is_rapidocrs(recipe: Any) -> None:
    """Against the package's own code, where all that it imports is here; on lines 48 high no filter differs."""
    from PIL import Image

    module = pytest.importorskip("rapidocr_onnxruntime.ch_ppocr_cls.text_cls", exc_type=ImportError)
    classifier = module.TextClassifier.__new__(module.TextClassifier)  # its __init__ would open a session of its own
    classifier.cls_image_shape = [3, 48, 192]
    preprocess = load_function("lines:preprocess", FOLDER, "data")
    for width in (20, 100, 192):
        rgb = np.random.RandomState(width).randint(0, 256, (48, width, 3), dtype=np.uint8)
        ours = preprocess(Image.fromarray(rgb))
        np.testing.assert_allclose(ours, classifier.resize_norm_img(rgb[:, :, ::-1]), atol=1e-6)


def test_the_model_is_right_on_the_lines(recipe: Any, evaluation: list[dict[str, Any]]) -> None:
    session = onnxruntime.InferenceSession(recipe.model, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"x": np.stack([sample["x"] for sample in evaluation])})
    right = scores.argmax(1) == [sample["label"] for sample in evaluation]
    assert right.mean() >= 0.97
    assert not right.all(), "lines that are all easy make a weak gate"


def test_the_recipe_loads_and_its_targets_exist(recipe: Any) -> None:
    assert recipe.model.is_file()
    assert recipe.dims["batch"].gears == (1, 6)
    tags = Registry().tags()
    assert {section.tag for section in recipe.targets} == {"t4", "a100", "cortex-a76", "x86-64"}
    assert {*recipe.serving.fallback, *(section.tag for section in recipe.targets)} <= set(tags)
