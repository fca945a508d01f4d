"""FP16 on a CPU as FP16 hardware would have it: rounding and overflow of every tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from modelforge.graph.fp16 import convert_fp16
from modelforge.graph.fp16_emulation import emulate_fp16


def save(folder: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[int]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a"] * len(shape)))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "fp32.onnx"
    onnx.save(model, path)
    return path


def run(model: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def both(path: Path, tmp_path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    convert_fp16(path, tmp_path / "fp16")
    half = tmp_path / "fp16" / "model.onnx"
    emulated = emulate_fp16(half, tmp_path / "emulated")
    assert emulated is not None
    onnx.checker.check_model(str(emulated))
    return run(half, x), run(emulated, x)


def test_an_overflow_between_two_operators_shows(tmp_path: Path) -> None:
    """Squares sum to 200,000 and are divided again: ONNX Runtime's FP16 hides it, FP16 hardware does not."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"], "square"),
        helper.make_node("ReduceSum", ["square", "axes"], ["sum"], "sum"),
        helper.make_node("Mul", ["sum", "share"], ["y"], "mean"),
    ]
    weights = {"axes": np.array([1], np.int64), "share": np.array([1 / 512], np.float32)}
    path = save(tmp_path, nodes, weights, [1, 512])
    x = np.full((1, 512), 20, np.float32)
    plain, emulated = both(path, tmp_path, x)
    assert np.isfinite(plain).all(), "if this fails, ONNX Runtime has learnt to round, and the emulation can go"
    assert np.isinf(emulated).all()


def test_every_tensor_is_rounded(tmp_path: Path) -> None:
    """x + 1 - 1 in FP16 keeps what FP16 holds beside 1, and no more."""
    nodes = [
        helper.make_node("Add", ["x", "one"], ["up"], "up"),
        helper.make_node("Sub", ["up", "one"], ["y"], "down"),
    ]
    path = save(tmp_path, nodes, {"one": np.array([1], np.float32)}, [1, 64])
    x = np.linspace(0, 1e-3, 64, dtype=np.float32)[None]
    _, emulated = both(path, tmp_path, x)
    wanted = (x.astype(np.float16) + np.float16(1)) - np.float16(1)
    np.testing.assert_array_equal(emulated, wanted.astype(np.float32))


def test_a_model_without_fp16_runs_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Relu", ["x"], ["y"], "relu")], {}, [1, 4])
    assert emulate_fp16(path, tmp_path / "emulated") is None
