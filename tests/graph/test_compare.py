"""What counts as the same answer: FP32 rounding does, another type, shape, integer or NaN does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from modelforge.graph.compare import compare, open_session, random_inputs, reference_samples
from tests.graph.conftest import make_graph, packaged, write_model


def _scaled(path: Path, factor: float, to: int = TensorProto.FLOAT) -> Path:
    """``cast(x * factor)``."""
    nodes = [helper.make_node("Mul", ["x", "k"], ["m"]), helper.make_node("Cast", ["m"], ["y"], to=to)]
    weights = {"k": np.array(factor, np.float32)}
    graph = make_graph(nodes, [("x", TensorProto.FLOAT, ["n", 4])], [("y", to, ["n", 4])], weights)
    return write_model(path, graph)


@pytest.mark.parametrize(
    ("factor", "to", "reason"),
    [
        (3.0, TensorProto.FLOAT, ""),
        (3.00003, TensorProto.FLOAT, ""),
        (3.01, TensorProto.FLOAT, "differs by"),
        (float("nan"), TensorProto.FLOAT, "NaN in other places"),
        (3.0, TensorProto.DOUBLE, "is float64"),
    ],
)
def test_difference(tmp_path: Path, factor: float, to: int, reason: str) -> None:
    samples = reference_samples(_scaled(tmp_path / "a.onnx", 3.0), {}, {}, "a")
    difference = compare(_scaled(tmp_path / "b.onnx", factor, to), samples)
    assert reason in difference.reason
    assert bool(difference.reason) == bool(reason)
    assert (difference.max_abs == 0) == (factor == 3.0 and to == TensorProto.FLOAT)


def test_integers_must_be_equal(tmp_path: Path) -> None:
    samples = reference_samples(_scaled(tmp_path / "a.onnx", 1000.0, TensorProto.INT64), {}, {}, "a")
    assert "other values" in compare(_scaled(tmp_path / "b.onnx", 1001.0, TensorProto.INT64), samples).reason


def test_a_model_that_does_not_load_is_a_reason(tmp_path: Path) -> None:
    samples = reference_samples(_scaled(tmp_path / "a.onnx", 3.0), {}, {}, "a")
    (tmp_path / "b.onnx").write_bytes(b"rubbish")
    assert compare(tmp_path / "b.onnx", samples).reason.startswith("does not run")


def test_sequences_are_compared_by_element(tmp_path: Path) -> None:
    paths = []
    for axis in (0, 1):
        nodes = [helper.make_node("SplitToSequence", ["x"], ["y"], axis=axis)]
        graph = make_graph(nodes, [("x", TensorProto.FLOAT, [2, 2])], [])
        kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
        graph.output.append(helper.make_value_info("y", kind))
        paths.append(write_model(tmp_path / f"{axis}.onnx", graph))
    samples = reference_samples(paths[0], {}, {}, "s")
    assert compare(paths[0], samples).reason == ""
    assert "float32[2, 1]" in compare(paths[1], samples).reason


def test_samples_differ_in_every_open_size_and_are_the_same_each_time() -> None:
    first, second = reference_samples(packaged("nudenet"), {}, {"height": 64, "width": 96}, "n")
    assert dict(first.sizes) == {"batch": 2, "height": 64, "width": 96}
    assert all(first.sizes[name] != second.sizes[name] for name in first.sizes)
    again = reference_samples(packaged("nudenet"), {}, {"height": 64, "width": 96}, "n", most=1)[0]
    np.testing.assert_array_equal(again.inputs["images"], first.inputs["images"])


def test_a_size_that_the_model_wants_is_found() -> None:
    """Silero takes no sound shorter than its window."""
    (sample, *_) = reference_samples(packaged("silero_op15"), {}, {}, "s")
    assert sample.inputs["input"].shape[1] >= 64


def test_integers_are_safe_as_indices_and_bytes_are_any(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["i"], ["a"]), helper.make_node("Identity", ["u"], ["b"])]
    types = {"i": TensorProto.INT64, "u": TensorProto.UINT8}
    graph = make_graph(
        nodes,
        [(name, kind, [1000]) for name, kind in types.items()],
        [("a", TensorProto.INT64, [1000]), ("b", TensorProto.UINT8, [1000])],
    )
    inputs = random_inputs(open_session(write_model(tmp_path / "m.onnx", graph)), {}, {})
    assert set(inputs["i"]) == {0, 1}
    assert inputs["u"].max() > 200
