"""Binding symbols: static shapes all the way, the same answers, and a refusal for a symbol that is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelforge.errors import ModelError
from modelforge.graph.inspect import inspect_model
from modelforge.graph.prepare import prepare
from modelforge.graph.specialize import specialize
from tests.graph.conftest import SHAPES, op_types, packaged, run


def test_shapes_are_static_and_answers_the_same(tmp_path: Path) -> None:
    prepare(packaged("rec4"), tmp_path / "prepared", SHAPES["rec4"])
    prepared = tmp_path / "prepared/model.onnx"
    path = specialize(prepared, tmp_path / "static", {"batch": 2, "width": 160})
    assert path == tmp_path / "static/model.onnx"
    facts = inspect_model(path)
    assert facts.inputs[0].shape == (2, 3, 48, 160)
    assert facts.outputs[0].shape == (2, 20, 6625)
    assert "Shape" in op_types(prepared)
    assert "Shape" not in op_types(path)  # what TVM cannot import
    image = np.random.default_rng(2).uniform(-1, 1, (2, 3, 48, 160)).astype(np.float32)
    np.testing.assert_allclose(run(path, x=image)[0], run(prepared, x=image)[0], atol=1e-5)


def test_a_symbol_may_stay_open(tmp_path: Path) -> None:
    prepare(packaged("rec4"), tmp_path / "prepared", SHAPES["rec4"])
    path = specialize(tmp_path / "prepared/model.onnx", tmp_path / "static", {"width": 160})
    assert inspect_model(path).inputs[0].shape == ("batch", 3, 48, 160)
    assert run(path, x=np.zeros((3, 3, 48, 160), np.float32))[0].shape == (3, 20, 6625)


def test_an_unknown_symbol_is_refused(tmp_path: Path) -> None:
    prepare(packaged("cls"), tmp_path / "prepared", SHAPES["cls"])
    with pytest.raises(ModelError, match='symbol "bach"') as caught:
        specialize(tmp_path / "prepared/model.onnx", tmp_path / "static", {"bach": 1})
    assert "batch" in str(caught.value.fix)


def test_sizes_at_which_the_model_does_not_run_are_refused(tmp_path: Path) -> None:
    prepare(packaged("nudenet"), tmp_path / "prepared", {})
    with pytest.raises(ModelError, match="fails to run"):
        specialize(tmp_path / "prepared/model.onnx", tmp_path / "static", {"batch": 1, "height": 33, "width": 47})
