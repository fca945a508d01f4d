"""The prepared model is the original in canonical form: same answers, dynamic where asked, the same bytes each time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.errors import ModelError
from modelforge.graph import load as load_module
from modelforge.graph import prepare as prepare_module
from modelforge.graph.inspect import inspect_model
from modelforge.graph.prepare import prepare
from tests.graph.conftest import SHAPES, make_graph, op_types, packaged, run, write_model


@pytest.mark.parametrize("name", ["det4", "rec4", "cls", "magika", "nudenet", "silero_ifless", "densenet121"])
def test_real_models_keep_their_answers(name: str, tmp_path: Path) -> None:
    report = prepare(packaged(name), tmp_path, SHAPES.get(name, {}))
    prepared = tmp_path / "model.onnx"
    onnx.checker.check_model(str(prepared), full_check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert report.simplify == "kept"
    assert report.max_abs_diff < 1e-4
    assert report.opset >= 13 or report.opset_raised.startswith("discarded")
    assert report.nodes_after <= report.nodes_before
    assert not {"Constant", "BatchNormalization"} & set(op_types(prepared)) or name == "densenet121"
    json.dumps(asdict(report))


def test_on_a_photo_sized_input_the_answers_are_the_same(tmp_path: Path) -> None:
    """Not the sizes that preparation compared at."""
    prepare(packaged("det4"), tmp_path, SHAPES["det4"])
    image = np.random.default_rng(3).uniform(-1, 1, (1, 3, 96, 160)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "model.onnx", x=image)[0], run(packaged("det4"), x=image)[0], atol=1e-5)


def test_dynamic_dimensions_survive_under_the_recipes_names(tmp_path: Path) -> None:
    report = prepare(packaged("rec4"), tmp_path, SHAPES["rec4"])
    assert inspect_model(tmp_path / "model.onnx").inputs[0].shape == ("batch", 3, 48, "width")
    assert len(report.sizes) == 2
    assert all(report.sizes[0][symbol] != report.sizes[1][symbol] for symbol in ("batch", "width"))
    for batch, width in ((1, 96), (3, 320)):
        image = np.zeros((batch, 3, 48, width), np.float32)
        assert run(tmp_path / "model.onnx", x=image)[0].shape == (batch, width // 8, 6625)


def test_a_dimension_without_a_name_stays_one(conv_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(conv_model, out, {})
    assert inspect_model(out / "model.onnx").inputs[0].shape == ("?", 3, 8, 8)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        prepare(packaged("cls"), tmp_path / folder, SHAPES["cls"])
    assert (tmp_path / "a/model.onnx").read_bytes() == (tmp_path / "b/model.onnx").read_bytes()


def test_a_simplifier_that_fails_is_done_without(tmp_path: Path) -> None:
    """onnxsim 0.8.1 raises on this model: an If's body captures a value that it moves behind."""
    report = prepare(packaged("silero_op15"), tmp_path, {})
    assert report.simplify.startswith("discarded: ")
    assert report.max_abs_diff < 1e-4
    assert "Constant" not in op_types(tmp_path / "model.onnx")


def _spoil(change: str, source: Path, out: Path) -> None:
    model = onnx.load(source)
    if change == "weights":
        weight = next(item for item in model.graph.initializer if len(item.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    elif change == "batch":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    elif change == "garbage":
        out.write_bytes(b"not a model")
        return
    out.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "says"), [("weights", "differs"), ("batch", "another shape"), ("garbage", "not an ONNX")]
)
def test_a_simplified_model_that_is_wrong_is_discarded(
    conv_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, says: str
) -> None:
    """The double does what onnxsim has done: change numbers, fix a dynamic batch, write rubbish."""
    monkeypatch.setattr(prepare_module, "simplify", lambda source, out: _spoil(change, source, out))
    out = tmp_path / "out"
    report = prepare(conv_model, out, {"x": ("batch", 3, 8, 8)})
    assert report.simplify.startswith("discarded: ")
    assert says in report.simplify
    assert report.max_abs_diff < 1e-6
    image = np.ones((3, 3, 8, 8), np.float32)
    np.testing.assert_allclose(run(out / "model.onnx", x=image)[0], run(conv_model, x=image)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"images": (1, 3, 8, 8)}, 'no input "images"'),
        ({"x": (1, 3, 8, 8, 1)}, "4 dimensions"),
        ({"x": ("batch", 3, 9, 8)}, "fixed size 8 at axis 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    conv_model: Path, tmp_path: Path, inputs: dict[str, tuple[int | str, ...]], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        prepare(conv_model, tmp_path / "out", inputs)
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_one_symbol_cannot_have_two_sizes(tmp_path: Path) -> None:
    shape = ["n", 4]
    graph = make_graph(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [("a", TensorProto.FLOAT, shape), ("b", TensorProto.FLOAT, shape)],
        [("y", TensorProto.FLOAT, shape)],
    )
    model = write_model(tmp_path / "two.onnx", graph)
    with pytest.raises(ModelError, match='names this size "n"'):
        prepare(model, tmp_path / "out", {"a": (1, 4), "b": (2, 4)})
    prepare(model, tmp_path / "out", {"a": (2, 4)})
    facts = inspect_model(tmp_path / "out/model.onnx")
    assert [value.shape for value in (*facts.inputs, *facts.outputs)] == [(2, 4)] * 3


def test_a_model_that_does_not_run_is_refused(tmp_path: Path) -> None:
    graph = make_graph(
        [helper.make_node("Sharpen", ["x"], ["y"], domain="com.example")],
        [("x", TensorProto.FLOAT, [1])],
        [("y", TensorProto.FLOAT, [1])],
    )
    model = write_model(tmp_path / "custom.onnx", graph, com_example=1)
    with pytest.raises(ModelError, match="ONNX Runtime does not load the model"):
        prepare(model, tmp_path / "out", {})


def test_a_model_that_runs_at_no_size_is_refused(tmp_path: Path) -> None:
    weights = {"shape": np.array([7, 7, 7, 7, 7, 7], np.int64)}
    graph = make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", TensorProto.FLOAT, ["n"])],
        [("y", TensorProto.FLOAT, None)],
        weights,
    )
    model = write_model(tmp_path / "reshape.onnx", graph)
    with pytest.raises(ModelError, match="fails to run") as caught:
        prepare(model, tmp_path / "out", {})
    assert "[dims]" in str(caught.value.fix)
    prepare(model, tmp_path / "out", {}, sizes={"n": 7**6})


def test_weights_beyond_a_protobuf_stay_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small limit in place of 1.5 GB: no tool that needs one protobuf is called."""
    for module in (load_module, prepare_module):
        monkeypatch.setattr(module, "INLINE_BYTES", 10_000)
    report = prepare(packaged("cls"), tmp_path, SHAPES["cls"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert "too large" in report.simplify
    assert "too large" in report.opset_raised
    assert report.max_abs_diff < 1e-5


def test_a_model_that_takes_only_some_numbers_is_prepared_at_those(tmp_path: Path) -> None:
    """Silero at 576 samples runs at 16 kHz only, and ONNX Runtime refuses its 8 kHz branch with that length fixed."""
    model = packaged("silero")
    report = prepare(model, tmp_path, {"input": (1, 576), "state": (2, 1, 128)})
    assert report.input_shapes.startswith("discarded: does not run")
    assert {"sr": 16000} in report.values  # at 576 samples
    assert {} in report.values  # the other branch, at a length of its own
    assert report.nodes_after < report.nodes_before
    rng = np.random.default_rng(0)
    state = rng.normal(size=(2, 1, 128)).astype(np.float32)
    for rate, length in ((16000, 576), (8000, 288)):
        sound = rng.normal(size=(1, length)).astype(np.float32) / 10
        feed = {"input": sound, "state": state, "sr": np.array(rate, np.int64)}
        for exact, got in zip(run(model, **feed), run(tmp_path / "model.onnx", **feed), strict=True):
            np.testing.assert_allclose(got, exact, atol=1e-5)


def test_fixed_sizes_are_kept_where_they_run(tmp_path: Path) -> None:
    report = prepare(packaged("cls"), tmp_path, {"x": (1, 3, 48, 192)})
    assert report.input_shapes == "kept"
    assert inspect_model(tmp_path / "model.onnx").inputs[0].shape == (1, 3, 48, 192)
