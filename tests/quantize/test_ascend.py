"""The AscendQuant form and its emulation: against NumPy by the documented formulas, and against the QDQ form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from modelforge.errors import BuildError
from modelforge.forge import worker
from modelforge.quantize.ascend_emulation import NOTE, emulate_ascend, has_ascend_nodes
from modelforge.quantize.dialects.ascend import KEEP_FP32, to_ascend
from modelforge.quantize.qdq import quantize_model
from tests.quantize.models import observe, run, write

RNG = np.random.default_rng(5)
N = helper.make_node
Array = np.ndarray[Any, Any]


def normal(*shape: int, mean: float = 0.0) -> Array:
    return RNG.normal(mean, 1.0, size=shape).astype(np.float32)


def lowered(folder: Path, model: Path, feed: dict[str, Array], keep: dict[str, str] | None = None) -> Path:
    """The QDQ form in ``qdq/``, and what ATC gets in ``om/``."""
    quantize_model(model, observe(model, feed), folder / "qdq", dialect="ascend", method="minmax")
    to_ascend(folder / "qdq" / "model.onnx", folder / "om", keep=keep)
    return folder / "om" / "model.onnx"


def conv(folder: Path, **attributes: Any) -> tuple[Path, dict[str, Array]]:
    """Conv with a bias on an input that is no way symmetric: the offset is not 0, and pads are added to it."""
    weights = {"w": normal(5, 4, 3, 3), "b": normal(5)}
    nodes = [N("Conv", ["x", "w", "b"], ["y"], name="conv", pads=[1] * 4, **attributes)]
    return write(folder / "m.onnx", nodes, {"x": ["n", 4, 7, 7]}, {"y": ["n", 5, 7, 7]}, weights), {
        "x": normal(2, 4, 7, 7, mean=1.5)
    }


def gemm(folder: Path, **attributes: Any) -> tuple[Path, dict[str, Array]]:
    weights = {"w": normal(6, 5), "b": normal(6)}
    nodes = [N("Gemm", ["x", "w", "b"], ["y"], name="gemm", transB=1, **attributes)]
    return write(folder / "m.onnx", nodes, {"x": ["n", 5]}, {"y": ["n", 6]}, weights), {"x": normal(3, 5, mean=1.0)}


def matmul(folder: Path) -> tuple[Path, dict[str, Array]]:
    nodes = [N("MatMul", ["x", "w"], ["y"], name="matmul")]
    return write(folder / "m.onnx", nodes, {"x": ["n", 3, 5]}, {"y": ["n", 3, 6]}, {"w": normal(5, 6)}), {
        "x": normal(2, 3, 5, mean=-1.0)
    }


MODELS: dict[str, Callable[[Path], tuple[Path, dict[str, Array]]]] = {"conv": conv, "gemm": gemm, "matmul": matmul}


class Plugin:
    """ATC's nodes in NumPy integers, as their pages define them: no code shared with the emulation."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}

    def run(self, feed: dict[str, Array]) -> Array:
        values: dict[str, Any] = {**self.weights, **feed}
        for node in self.model.graph.node:
            inputs = [values[name] for name in node.input]
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            values[node.output[0]] = getattr(self, node.op_type)(attributes, *inputs)
        return np.asarray(values["y"])

    def AscendQuant(self, attributes: dict[str, Any], x: Array) -> Any:  # noqa: N802 - the operator's name
        assert isinstance(attributes["scale"], float)
        quantized = np.clip(np.rint(x.astype(np.float64) * attributes["scale"] + attributes["offset"]), -128, 127)
        return quantized.astype(np.int8), attributes["offset"]

    def AscendDequant(self, attributes: dict[str, Any], x: Array, scale: Array) -> Array:  # noqa: N802  # an operator's name
        del attributes
        assert scale.dtype == np.uint64
        assert x.dtype == np.int64
        factor = (scale & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        return np.asarray(x * factor.reshape(-1, *[1] * (x.ndim - 2 if scale.size > 1 else 0)), np.float32)

    def Conv(self, attributes: dict[str, Any], x: Any, weight: Array, bias: Array) -> Array:  # noqa: N802  # an operator's name
        """Padding is the quantized zero, which the offset is: Conv2D's offset_x."""
        del attributes
        values, offset = x
        assert (weight.dtype, bias.dtype) == (np.int8, np.int32)
        pads = ((0, 0), (0, 0), (1, 1), (1, 1))
        padded = np.pad(values.astype(np.int64), pads, constant_values=int(offset)) - int(offset)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        return np.asarray(np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.int64)) + bias.reshape(1, -1, 1, 1))

    def Gemm(self, attributes: dict[str, Any], x: Any, weight: Array, bias: Array) -> Array:  # noqa: N802  # an operator's name
        del attributes
        assert bias.dtype == np.int32
        return np.asarray((x[0].astype(np.int64) - int(x[1])) @ weight.astype(np.int64).T + bias)

    def MatMul(self, attributes: dict[str, Any], x: Any, weight: Array) -> Array:  # noqa: N802  # an operator's name
        del attributes
        return np.asarray((x[0].astype(np.int64) - int(x[1])) @ weight.astype(np.int64))


@pytest.mark.parametrize("kind", MODELS)
def test_the_emulation_is_the_documented_arithmetic(kind: str, tmp_path: Path) -> None:
    model, feed = MODELS[kind](tmp_path)
    native = lowered(tmp_path, model, feed)
    emulated = emulate_ascend(native, tmp_path / "emulated", half=False)
    np.testing.assert_allclose(run(emulated, feed)[0], Plugin(native).run(feed), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_native_form_is_what_the_qdq_form_computes(kind: str, tmp_path: Path) -> None:
    """1/s instead of a division by s may move a value that lies on a rounding edge by one step, and no more."""
    model, feed = MODELS[kind](tmp_path)
    native = lowered(tmp_path, model, feed)
    exact, qdq = run(model, feed)[0], run(tmp_path / "qdq" / "model.onnx", feed)[0]
    emulated = run(emulate_ascend(native, tmp_path / "emulated", half=False), feed)[0]
    assert np.abs(emulated - qdq).max() < 0.2 * np.abs(qdq - exact).max()


def test_the_offset_is_used(tmp_path: Path) -> None:
    model, feed = conv(tmp_path)
    graph = onnx.load(lowered(tmp_path, model, feed)).graph
    attributes = {each.name: helper.get_attribute_value(each) for each in graph.node[0].attribute}
    assert attributes["offset"] not in (0.0, -128.0)
    assert attributes["scale"] == pytest.approx(255 / (feed["x"].max() - min(feed["x"].min(), 0)), rel=0.05)


def test_the_rest_is_rounded_to_fp16(tmp_path: Path) -> None:
    """A value that FP16 cannot tell from its neighbour, behind the int8 layer."""
    weights = {"w": normal(5, 6), "big": np.array(2048.0, np.float32), "one": np.array(1.0, np.float32)}
    nodes = [
        N("MatMul", ["x", "w"], ["m"], name="matmul"),
        N("Mul", ["m", "zero"], ["z"]),
        N("Add", ["z", "big"], ["a"]),
        N("Add", ["a", "one"], ["b"]),
        N("Sub", ["b", "big"], ["y"]),
    ]
    weights["zero"] = np.array(0.0, np.float32)
    model = write(tmp_path / "m.onnx", nodes, {"x": ["n", 5]}, {"y": ["n", 6]}, weights)
    feed = {"x": normal(2, 5)}
    native = lowered(tmp_path, model, feed)
    assert (run(emulate_ascend(native, tmp_path / "exact", half=False), feed)[0] == 1).all()
    # 2049 lies between 2048 and 2050.
    assert (run(emulate_ascend(native, tmp_path / "half"), feed)[0] == 0).all()


def test_a_node_that_overflows_is_kept(tmp_path: Path) -> None:
    weights = {"w": normal(5, 6), "big": np.array(300.0, np.float32), "small": np.array(1 / 90000.0, np.float32)}
    nodes = [
        N("MatMul", ["x", "w"], ["m"], name="matmul"),
        N("Mul", ["m", "big"], ["a"], name="up"),
        N("Mul", ["a", "big"], ["b"], name="over"),
        N("Mul", ["b", "small"], ["y"], name="down"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": ["n", 5]}, {"y": ["n", 6]}, weights)
    feed = {"x": normal(2, 5, mean=2.0)}
    plain = lowered(tmp_path / "plain", model, feed)
    assert np.isinf(run(emulate_ascend(plain, tmp_path / "inf"), feed)[0]).any()
    native = lowered(tmp_path / "kept", model, feed, keep={"over": "overflows", "down": "reads it"})
    metadata = {each.key: each.value for each in onnx.load(native).metadata_props}
    assert metadata[KEEP_FP32] == "over\ndown"
    got, exact = run(emulate_ascend(native, tmp_path / "emulated"), feed)[0], run(model, feed)[0]
    np.testing.assert_allclose(got, exact, atol=0.05 * np.abs(exact).max())


def test_what_stands_beside_a_kept_node_is_kept_too(tmp_path: Path) -> None:
    """A value that overflows must not become FP16 where it is quantized either."""
    weights = {"w": normal(5, 5), "v": normal(5, 6)}
    nodes = [
        N("MatMul", ["x", "w"], ["m"], name="first"),
        N("Relu", ["m"], ["r"], name="relu"),
        N("MatMul", ["r", "v"], ["y"], name="second"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": ["n", 5]}, {"y": ["n", 6]}, weights)
    native = lowered(tmp_path, model, {"x": normal(2, 5)}, keep={"first": "", "relu": ""})
    metadata = {each.key: each.value for each in onnx.load(native).metadata_props}
    kept = metadata[KEEP_FP32].splitlines()
    assert kept == ["first", "first/AscendDequant", "relu", "r/QuantizeLinear/AscendQuant"]


@pytest.mark.parametrize(
    ("bias", "beta"), [(normal(2, 6), 1.0), (normal(6), 0.5), (np.array(0.7, np.float32).reshape(()), 2.0)]
)
def test_a_gemm_whose_c_is_no_bias_adds_it_in_float(bias: Array, beta: float, tmp_path: Path) -> None:
    weights = {"w": normal(5, 6), "c": np.asarray(bias)}
    nodes = [N("Gemm", ["x", "w", "c"], ["y"], name="gemm", beta=beta)]
    model = write(tmp_path / "m.onnx", nodes, {"x": [2, 5]}, {"y": [2, 6]}, weights)
    feed = {"x": normal(2, 5)}
    native = lowered(tmp_path, model, feed)
    assert [node.op_type for node in onnx.load(native).graph.node][:3] == ["AscendQuant", "Gemm", "AscendDequant"]
    got = run(emulate_ascend(native, tmp_path / "emulated"), feed)[0]
    np.testing.assert_allclose(got, run(tmp_path / "qdq" / "model.onnx", feed)[0], atol=0.02)


def layer_norm(folder: Path, opset: int = 17, **attributes: Any) -> tuple[Path, dict[str, Array]]:
    weights = {"s": normal(6, mean=1.0), "b": normal(6), "w": normal(6, 6)}
    nodes = [
        N("LayerNormalization", ["x", "s", "b"], ["n0"], name="norm", **attributes),
        N("MatMul", ["n0", "w"], ["y"], name="matmul"),
    ]
    return write(folder / "m.onnx", nodes, {"x": ["n", 4, 6]}, {"y": ["n", 4, 6]}, weights, opset), {
        "x": normal(2, 4, 6, mean=2.0)
    }


@pytest.mark.parametrize("attributes", [{}, {"axis": 2, "epsilon": 0.1}, {"axis": -1}])
def test_layer_normalization_is_opened(attributes: dict[str, Any], tmp_path: Path) -> None:
    """AscendQuant goes up to opset 16 before CANN 9, and LayerNormalization begins with 17."""
    model, feed = layer_norm(tmp_path, **attributes)
    native = lowered(tmp_path, model, feed, keep={"norm": "overflows"})
    graph = onnx.load(native)
    assert graph.opset_import[0].version == 13
    assert not [node for node in graph.graph.node if node.op_type == "LayerNormalization"]
    kept = {each.key: each.value for each in graph.metadata_props}[KEEP_FP32].splitlines()
    assert len(kept) >= 8
    got = run(emulate_ascend(native, tmp_path / "emulated", half=False), feed)[0]
    np.testing.assert_allclose(got, run(tmp_path / "qdq" / "model.onnx", feed)[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("nodes", "opset", "stated"),
    [
        ([N("Relu", ["m"], ["y"])], 17, 13),
        ([N("Reshape", ["m", "shape"], ["y"])], 17, 13),
        ([N("Reshape", ["m", "shape"], ["y"], allowzero=1)], 17, 14),
        ([N("HardSwish", ["m"], ["y"])], 17, 14),
        ([N("ReduceMean", ["m"], ["y"], axes=[1])], 17, 13),
        ([N("Mish", ["m"], ["y"])], 18, 18),
        ([N("Relu", ["m"], ["y"])], 13, 13),
    ],
)
def test_the_opset_is_said_as_low_as_it_is_true(
    nodes: Sequence[onnx.NodeProto], opset: int, stated: int, tmp_path: Path
) -> None:
    weights = {"w": normal(5, 6), "shape": np.array([-1, 6], np.int64)}
    every = [N("MatMul", ["x", "w"], ["m"], name="matmul"), *nodes]
    model = write(tmp_path / "m.onnx", every, {"x": ["n", 5]}, {"y": ["n", None]}, weights, opset)  # type: ignore[list-item]  # names and numbers
    feed = {"x": normal(2, 5)}
    native = lowered(tmp_path, model, feed)
    assert onnx.load(native).opset_import[0].version == stated
    emulated = emulate_ascend(native, tmp_path / "emulated", half=False)
    np.testing.assert_allclose(run(emulated, feed)[0], run(tmp_path / "qdq" / "model.onnx", feed)[0], atol=1e-2)


def test_the_forge_s_worker_emulates_it(tmp_path: Path) -> None:
    model, feed = conv(tmp_path)
    native = lowered(tmp_path, model, feed)
    assert has_ascend_nodes(native)
    assert not has_ascend_nodes(model)
    answer = worker.emulate({"model": str(native), "folder": str(tmp_path / "emulated")})
    assert answer["note"] == NOTE
    assert run(Path(answer["model"]), feed)[0].shape == (2, 5, 7, 7)
    assert worker.emulate({"model": str(model), "folder": str(tmp_path / "none")}) == {"model": None}


def test_onnx_s_own_tools_refuse_the_native_form(tmp_path: Path) -> None:
    """Why the emulation exists, and why nothing else may read such a lowered model as it is."""
    model, feed = conv(tmp_path)
    native = lowered(tmp_path, model, feed)
    with pytest.raises(onnx.checker.ValidationError, match="AscendQuant"):
        onnx.checker.check_model(onnx.load(native))
    with pytest.raises(Exception, match="AscendQuant"):
        run(native, feed)


@pytest.mark.parametrize(("name", "value"), [("round_mode", "Floor"), ("sqrt_mode", 1)])
def test_what_is_not_emulated_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    model, feed = conv(tmp_path)
    native = onnx.load(lowered(tmp_path, model, feed))
    native.graph.node[0].attribute.append(helper.make_attribute(name, value))
    onnx.save(native, tmp_path / "other.onnx")
    with pytest.raises(BuildError, match="another rounding"):
        emulate_ascend(tmp_path / "other.onnx", tmp_path / "emulated")
