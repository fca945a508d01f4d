"""Each dialect's rules, one small graph a rule; real compilers where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from modelforge.errors import BuildError, InputError
from modelforge.graph.fp16 import convert_fp16
from modelforge.quantize.dialects import DIALECTS, get_dialect
from modelforge.quantize.dialects.ascend import to_ascend
from modelforge.quantize.dialects.tensorrt import merge_casts
from modelforge.quantize.qdq import QuantizeReport, quantize_model
from tests.quantize.models import Qdq, observe, run, write

RNG = np.random.default_rng(7)
N = helper.make_node


def conv_weight(out: int, inputs: int, size: int = 3) -> np.ndarray:
    return RNG.normal(size=(out, inputs, size, size)).astype(np.float32)


def image(*shape: int) -> np.ndarray:
    return RNG.normal(1.0, 2.0, size=shape).astype(np.float32)


def quantize(
    folder: Path, model: Path, feed: dict[str, np.ndarray], dialect: str, **options: Any
) -> tuple[Qdq, QuantizeReport]:
    report = quantize_model(model, observe(model, feed), folder / "out", dialect=dialect, method="minmax", **options)
    return Qdq(folder / "out"), report


@pytest.fixture
def conv_relu_conv(tmp_path: Path) -> Path:
    """Conv -> Relu -> Conv on 32 channels, both with a bias."""
    weights = {
        "w0": conv_weight(32, 32),
        "b0": image(32),
        "w1": conv_weight(32, 32),
        "b1": image(32),
    }
    nodes = [
        N("Conv", ["x", "w0", "b0"], ["c0"], pads=[1] * 4, name="first"),
        N("Relu", ["c0"], ["r0"], name="relu"),
        N("Conv", ["r0", "w1", "b1"], ["y"], pads=[1] * 4, name="second"),
    ]
    return write(tmp_path / "m.onnx", nodes, {"x": ["n", 32, 6, 6]}, {"y": ["n", 32, 6, 6]}, weights)


@pytest.fixture
def feed() -> dict[str, np.ndarray]:
    return {"x": image(2, 32, 6, 6)}


def test_unknown_dialect_names_the_nearest() -> None:
    with pytest.raises(InputError, match='did you mean "tensorrt"'):
        get_dialect("tensort")


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_dialect_loads_and_is_near_fp32(
    dialect: str, conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    quantize(tmp_path, conv_relu_conv, feed, dialect)
    exact, other = run(conv_relu_conv, feed)[0], run(tmp_path / "out" / "model.onnx", feed)[0]
    assert 0 < np.abs(exact - other).max() < 0.05 * np.abs(exact).max()


def test_tensorrt_activations_are_int8_around_zero(
    conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    qdq, _ = quantize(tmp_path, conv_relu_conv, feed, "tensorrt")
    for node in ("first", "second"):
        assert qdq.zero_point(node, 0).dtype == np.int8
        assert qdq.zero_point(node, 0) == 0
        assert qdq.scale(node, 0).astype(np.float16).astype(np.float32) == qdq.scale(node, 0)


def test_tensorrt_has_no_q_between_conv_and_relu(
    conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    qdq, _ = quantize(tmp_path, conv_relu_conv, feed, "tensorrt")
    assert qdq.quantized_values() == {"x", "r0"}


def test_tensorrt_leaves_biases_in_float(conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path) -> None:
    qdq, _ = quantize(tmp_path, conv_relu_conv, feed, "tensorrt")
    assert qdq.reads("first", 2) is None
    assert qdq.values[qdq.nodes["first"].input[2]].dtype == np.float32


def test_onnxruntime_x86_has_uint8_activations_and_int32_biases(
    conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    qdq, _ = quantize(tmp_path, conv_relu_conv, feed, "onnxruntime-x86")
    assert qdq.zero_point("first", 0).dtype == np.uint8
    assert 0 < qdq.zero_point("first", 0) < 255
    assert qdq.constant("first", 1).dtype == np.int8
    assert qdq.scale("first", 1).shape == (32,)
    assert qdq.constant("first", 2).dtype == np.int32
    np.testing.assert_allclose(qdq.scale("first", 2), qdq.scale("first", 0) * qdq.scale("first", 1), rtol=1e-6)


def test_onnxruntime_quantizes_behind_the_relu_that_it_fuses(
    conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    qdq, _ = quantize(tmp_path, conv_relu_conv, feed, "onnxruntime-x86")
    assert qdq.quantized_values() == {"x", "r0"}


def test_onnxruntime_really_runs_int8_kernels(tmp_path: Path) -> None:
    """A Conv whose output were not quantized would run in float: ONNX Runtime's own optimiser is asked."""
    import onnxruntime

    weights = {"w0": conv_weight(8, 8), "b0": image(8), "w1": conv_weight(8, 8), "b1": image(8)}
    nodes = [
        N("Conv", ["x", "w0", "b0"], ["c0"], pads=[1] * 4),
        N("Sigmoid", ["c0"], ["s0"]),
        N("Conv", ["s0", "w1", "b1"], ["c1"], pads=[1] * 4),
        N("Relu", ["c1"], ["r1"]),
        N("Sigmoid", ["r1"], ["y"]),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": ["n", 8, 6, 6]}, {"y": ["n", 8, 6, 6]}, weights)
    quantize(tmp_path, model, {"x": image(1, 8, 6, 6)}, "onnxruntime-x86")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert ops.count("QLinearConv") == 2
    assert "Conv" not in ops


def test_reduce_range_keeps_weights_to_seven_bits(
    conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    full, _ = quantize(tmp_path / "a", conv_relu_conv, feed, "onnxruntime-x86")
    reduced, _ = quantize(tmp_path / "b", conv_relu_conv, feed, "onnxruntime-x86", reduce_range=True)
    assert np.abs(full.constant("first", 1).astype(int)).max() == 127
    assert np.abs(reduced.constant("first", 1).astype(int)).max() == 64


def test_tvm_has_zero_points_and_a_float_bias(
    conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    qdq, _ = quantize(tmp_path, conv_relu_conv, feed, "tvm")
    assert qdq.zero_point("first", 0).dtype == np.int8
    assert -128 < qdq.zero_point("first", 0) < 127
    assert qdq.zero_point("second", 0) == -128  # behind a Relu: all 256 steps are above zero
    assert qdq.reads("first", 2) is None
    assert qdq.values[qdq.nodes["first"].input[2]].dtype == np.float32


@pytest.mark.parametrize("op", ["Add", "Sum"])
def test_tvm_reads_the_other_branch_of_a_residual_sum_as_bytes(
    op: str, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    weights = {"w0": conv_weight(32, 32), "w1": conv_weight(32, 32)}
    nodes = [
        N("Conv", ["x", "w0"], ["c0"], pads=[1] * 4, name="first"),
        N("Relu", ["c0"], ["r0"], name="relu"),
        N("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4, name="second"),
        N(op, ["c1", "r0"], ["y"], name="residual"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": ["n", 32, 6, 6]}, {"y": ["n", 32, 6, 6]}, weights)
    qdq, _ = quantize(tmp_path, model, feed, "tvm")
    assert qdq.reads("residual", 0) is None
    assert qdq.reads("residual", 1) is not None


def test_tvm_takes_transposed_convolutions_of_one_group(tmp_path: Path) -> None:
    """Of whatever channels; groups have no integer kernel."""
    weights = {
        "w0": RNG.normal(size=(16, 8, 2, 2)).astype(np.float32),
        "w1": RNG.normal(size=(8, 4, 2, 2)).astype(np.float32),
        "w2": RNG.normal(size=(8, 1, 2, 2)).astype(np.float32),
        "w3": RNG.normal(size=(1, 2, 1, 1)).astype(np.float32),
    }
    double = {"strides": [2, 2]}
    nodes = [
        N("ConvTranspose", ["x", "w0"], ["c0"], name="doubled", **double),
        N("ConvTranspose", ["c0", "w1"], ["c1"], name="groups", group=2, **double),
        N("ConvTranspose", ["c1", "w2"], ["c2"], name="one", **double),
        N("ConvTranspose", ["c2", "w3"], ["y"], name="small"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": ["n", 16, 3, 3]}, {"y": ["n", 2, 24, 24]}, weights)
    qdq, report = quantize(tmp_path, model, {"x": image(2, 16, 3, 3)}, "tvm")
    assert report.quantized == ("doubled", "one", "small")
    assert "in groups" in report.kept["groups"]
    assert qdq.reads("one", 0) is not None


def test_onnxruntime_arm_is_int8_with_an_offset(
    conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    qdq, _ = quantize(tmp_path, conv_relu_conv, feed, "onnxruntime-arm")
    assert qdq.zero_point("second", 0) == np.int8(-128)  # behind a Relu, all of the range is for positive values


@pytest.fixture
def residual(tmp_path: Path) -> Path:
    """y = conv(relu(conv(x))) + x."""
    weights = {"w0": conv_weight(16, 16), "w1": conv_weight(16, 16), "w2": conv_weight(16, 16)}
    nodes = [
        N("Conv", ["x", "w0"], ["c0"], pads=[1] * 4, name="stem"),
        N("Relu", ["c0"], ["r0"]),
        N("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4, name="branch"),
        N("Add", ["c1", "r0"], ["a"], name="add"),
        N("Relu", ["a"], ["r1"]),
        N("Conv", ["r1", "w2"], ["y"], pads=[1] * 4, name="next"),
    ]
    return write(tmp_path / "m.onnx", nodes, {"x": ["n", 16, 6, 6]}, {"y": ["n", 16, 6, 6]}, weights)


def test_tensorrt_quantizes_only_the_branch_that_no_conv_is_fused_into(residual: Path, tmp_path: Path) -> None:
    qdq, _ = quantize(tmp_path, residual, {"x": image(1, 16, 6, 6)}, "tensorrt")
    assert qdq.reads("add", 0) is None
    assert qdq.reads("add", 1) is qdq.reads("branch", 0)


def concat(tmp_path: Path, factor: float) -> Path:
    """Two 1x1 Convs, one ``factor`` times as loud, joined and read by a third."""
    weights = {
        "w0": conv_weight(16, 16, 1),
        "w1": conv_weight(16, 16, 1) * np.float32(factor),
        "w2": conv_weight(16, 32, 1),
    }
    nodes = [
        N("Conv", ["x", "w0"], ["c0"], name="quiet"),
        N("Conv", ["x", "w1"], ["c1"], name="loud"),
        N("Concat", ["c0", "c1"], ["j"], axis=1, name="join"),
        N("Conv", ["j", "w2"], ["y"], name="reader"),
    ]
    return write(tmp_path / "m.onnx", nodes, {"x": ["n", 16, 6, 6]}, {"y": ["n", 16, 6, 6]}, weights)


def test_tensorrt_gives_the_inputs_of_a_concat_its_outputs_scale(tmp_path: Path) -> None:
    qdq, _ = quantize(tmp_path, concat(tmp_path, 1.5), {"x": image(1, 16, 6, 6)}, "tensorrt")
    assert qdq.scale("join", 0) == qdq.scale("join", 1) == qdq.scale("reader", 0)


@pytest.mark.parametrize("dialect", ["tensorrt", "onnxruntime-x86", "qualcomm"])
def test_a_concat_of_mixed_meanings_is_kept_apart_and_reported(dialect: str, tmp_path: Path) -> None:
    qdq, report = quantize(tmp_path, concat(tmp_path, 500), {"x": image(1, 16, 6, 6)}, dialect)
    assert report.mixed["join"] > 50
    assert "join" not in report.quantized
    assert "mixed meanings" in report.kept["reader"]
    assert qdq.reads("reader", 0) is None


def test_tensorrt_skips_gemv_and_small_channels(tmp_path: Path) -> None:
    weights = {
        "w0": conv_weight(16, 3),
        "w1": conv_weight(32, 16),
        "wd": conv_weight(32, 1),
        "g": RNG.normal(size=(32, 1)).astype(np.float32),
    }
    nodes = [
        N("Conv", ["x", "w0"], ["c0"], pads=[1] * 4, name="rgb"),
        N("Conv", ["c0", "w1"], ["c1"], pads=[1] * 4, name="dense"),
        N("Conv", ["c1", "wd"], ["c2"], pads=[1] * 4, group=32, name="depthwise"),
        N("GlobalAveragePool", ["c2"], ["p"]),
        N("Flatten", ["p"], ["f"]),
        N("MatMul", ["f", "g"], ["y"], name="column"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": ["n", 3, 6, 6]}, {"y": ["n", 1]}, weights)
    _, report = quantize(tmp_path, model, {"x": image(2, 3, 6, 6)}, "tensorrt")
    assert report.kept["rgb"].startswith("Conv: small channels")
    assert report.kept["column"].startswith("MatMul: GEMV")
    assert report.quantized == ("dense", "depthwise")


def test_attention_stays_in_float_but_where_the_dialect_wants_it(tmp_path: Path) -> None:
    weights = {"w": RNG.normal(size=(16, 16)).astype(np.float32)}
    nodes = [
        N("MatMul", ["x", "w"], ["q"], name="project"),
        N("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
        N("MatMul", ["q", "t"], ["y"], name="attention"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": [1, 8, 16]}, {"y": [1, 8, 8]}, weights)
    feed = {"x": image(1, 8, 16)}
    _, plain = quantize(tmp_path / "a", model, feed, "tensorrt")
    _, whole = quantize(tmp_path / "b", model, feed, "qualcomm")
    assert plain.kept["attention"] == "MatMul: a product of two activations"
    assert "attention" in whole.quantized


def test_ascend_has_one_scale_for_a_matmul_and_one_a_channel_for_a_conv(tmp_path: Path) -> None:
    weights = {"w0": conv_weight(8, 8), "w1": RNG.normal(size=(8, 8)).astype(np.float32)}
    nodes = [
        N("Conv", ["x", "w0"], ["c0"], pads=[1] * 4, name="conv"),
        N("GlobalAveragePool", ["c0"], ["p"]),
        N("Flatten", ["p"], ["f"]),
        N("MatMul", ["f", "w1"], ["y"], name="product"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": [2, 8, 6, 6]}, {"y": [2, 8]}, weights)
    qdq, _ = quantize(tmp_path, model, {"x": image(2, 8, 6, 6)}, "ascend")
    assert qdq.scale("conv", 1).shape == (8,)
    assert qdq.scale("product", 1).shape == ()


def test_rockchip_and_qualcomm_quantize_between_operators_too(residual: Path, tmp_path: Path) -> None:
    for dialect in ("rockchip", "qualcomm"):
        qdq, report = quantize(tmp_path / dialect, residual, {"x": image(1, 16, 6, 6)}, dialect)
        assert "add" in report.quantized
        assert qdq.reads("add", 0) is not None
        assert qdq.reads("add", 1) is not None


def test_a_carrier_keeps_the_scale_of_what_it_moves(tmp_path: Path) -> None:
    weights = {"w0": conv_weight(16, 16), "w1": conv_weight(16, 16)}
    nodes = [
        N("Conv", ["x", "w0"], ["c0"], pads=[1] * 4),
        N("Relu", ["c0"], ["r0"]),
        N("MaxPool", ["r0"], ["p"], kernel_shape=[2, 2], strides=[2, 2], name="pool"),
        N("Conv", ["p", "w1"], ["y"], pads=[1] * 4, name="reader"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": [1, 16, 6, 6]}, {"y": [1, 16, 3, 3]}, weights)
    for dialect in ("onnxruntime-x86", "rockchip", "qualcomm"):
        qdq, _ = quantize(tmp_path / dialect, model, {"x": image(1, 16, 6, 6)}, dialect)
        assert qdq.scale("pool", 0) == qdq.scale("reader", 0)


def test_ascend_nodes_hold_the_arithmetic_of_the_qdq_form(
    conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The nodes, computed in NumPy as the plugins define them, give what ONNX Runtime gives for the QDQ form."""
    quantize(tmp_path, conv_relu_conv, feed, "ascend")
    assert to_ascend(tmp_path / "out" / "model.onnx", tmp_path / "om") == 2
    model = onnx.load(tmp_path / "om" / "model.onnx")
    assert [node.op_type for node in model.graph.node] == [
        *("AscendQuant", "Conv", "AscendDequant", "Relu", "AscendQuant", "Conv", "AscendDequant")
    ]
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values.update(feed)
    for node in model.graph.node:
        values[node.output[0]] = _EMULATED[node.op_type](node, [values[name] for name in node.input])
    exact = run(tmp_path / "out" / "model.onnx", feed)[0]
    np.testing.assert_allclose(values["y"], exact, rtol=1e-4, atol=1e-3)


def _ascend_quant(node: onnx.NodeProto, inputs: list[np.ndarray]) -> np.ndarray:
    attributes = {attribute.name: attribute.f for attribute in node.attribute}
    # The offset leaves again before the integer product: GE folds it into the bias.
    values = np.clip(np.rint(inputs[0] * attributes["scale"]) + attributes["offset"], -128, 127)
    return np.asarray(values - attributes["offset"])


def _int_conv(node: onnx.NodeProto, inputs: list[np.ndarray]) -> np.ndarray:
    x, weight, bias = inputs
    assert weight.dtype == np.int8
    assert bias.dtype == np.int32
    padded = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.asarray(np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.int64)) + bias.reshape(1, -1, 1, 1))


def _ascend_dequant(node: onnx.NodeProto, inputs: list[np.ndarray]) -> np.ndarray:
    assert inputs[1].dtype == np.uint64
    scale = inputs[1].astype(np.uint32).view(np.float32)
    return np.asarray(inputs[0] * scale.reshape(1, -1, 1, 1))


_EMULATED: dict[str, Callable[[onnx.NodeProto, list[np.ndarray]], np.ndarray]] = {
    "AscendQuant": _ascend_quant,
    "Conv": _int_conv,
    "AscendDequant": _ascend_dequant,
    "Relu": lambda node, inputs: np.maximum(inputs[0], 0),
}


def test_to_ascend_refuses_another_dialect(conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path) -> None:
    quantize(tmp_path, conv_relu_conv, feed, "tensorrt")
    with pytest.raises(BuildError, match="bias is not int32"):
        to_ascend(tmp_path / "out" / "model.onnx", tmp_path / "om")


def test_merge_casts_gives_q_and_dq_fp16_and_the_same_numbers(residual: Path, tmp_path: Path) -> None:
    feed = {"x": image(1, 16, 6, 6)}
    quantize(tmp_path, residual, feed, "tensorrt")
    convert_fp16(tmp_path / "out" / "model.onnx", tmp_path / "half")
    assert merge_casts(tmp_path / "half" / "model.onnx", tmp_path / "merged") > 0
    merged = Qdq(tmp_path / "merged")
    for name in ("stem", "branch", "next"):
        for index in (0, 1):
            assert merged.scale(name, index).dtype == np.float16
    before, after = (run(tmp_path / name / "model.onnx", feed)[0] for name in ("half", "merged"))
    assert np.abs(before - after).max() < 0.02 * np.abs(before).max()


@pytest.mark.parametrize("sm", [75, 80])
def test_tensorrt_rtx_builds_the_dialect(sm: int, residual: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from modelforge.compilers.tensorrt.switches import Switches
    from modelforge.toolchains import worker

    quantize(tmp_path, residual, {"x": image(1, 16, 6, 6)}, "tensorrt")
    convert_fp16(tmp_path / "out" / "model.onnx", tmp_path / "half")
    merge_casts(tmp_path / "half" / "model.onnx", tmp_path / "merged")
    for name in ("half", "merged"):
        answer = worker.call(
            "modelforge.compilers.tensorrt.worker:build",
            {
                "model": str(tmp_path / name / "model.onnx"),
                "engine": str(tmp_path / f"{name}.engine"),
                "product": "tensorrt-rtx",
                "profiles": [{"x": [[1, 16, 6, 6], [2, 16, 6, 6], [4, 16, 6, 6]]}],
                "timing_cache": None,
                **asdict(Switches(capabilities=(sm,))),
            },
            workdir=tmp_path,
            timeout=300,
            what=f"TensorRT-RTX for SM{sm}",
        )
        assert answer["layers"] > 0
        assert (tmp_path / f"{name}.engine").stat().st_size > 1000


def test_relax_imports_the_tvm_dialect(conv_relu_conv: Path, feed: dict[str, np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from tvm.relax.frontend.onnx import from_onnx

    quantize(tmp_path, conv_relu_conv, feed, "tvm")
    module = from_onnx(onnx.load(tmp_path / "out" / "model.onnx"), keep_params_in_input=False)
    assert str(module).count("R.quantize(") == 2


@pytest.mark.parametrize("kind", ["silu", "hardswish in parts", "sigmoid of another"])
def test_no_step_is_spent_on_what_an_activation_makes_zero(kind: str, tmp_path: Path) -> None:
    """A Conv's output from -30 on: behind SiLU what is above -5.5 matters, behind x * clip(x + 3, 0, 6) above -3."""
    weights = {"w": conv_weight(8, 8, 1), "three": np.float32([3]), "zero": np.float32(0), "six": np.float32(6)}
    nodes = {
        "silu": [N("Sigmoid", ["c"], ["s"]), N("Mul", ["c", "s"], ["y"])],
        "hardswish in parts": [
            N("Add", ["c", "three"], ["a"]),
            N("Clip", ["a", "zero", "six"], ["k"]),
            N("Mul", ["c", "k"], ["y"]),
        ],
        "sigmoid of another": [N("Sigmoid", ["x"], ["s"]), N("Mul", ["c", "s"], ["y"])],
    }[kind]
    used = {name: array for name, array in weights.items() if any(name in node.input for node in nodes) or name == "w"}
    conv = N("Conv", ["x", "w"], ["c"], name="conv")
    model = write(tmp_path / "m.onnx", [conv, *nodes], {"x": [1, 8, 9, 9]}, {"y": [1, 8, 9, 9]}, used)
    feed = {"x": image(1, 8, 9, 9) * np.float32(4)}
    found = observe(model, feed)["c"]
    assert found.minimum < -10
    _, report = quantize(tmp_path, model, feed, "onnxruntime-x86")
    low = -report.tensors["c"].zero_point * report.tensors["c"].scale
    wanted = {"silu": -5.5, "hardswish in parts": -3, "sigmoid of another": found.minimum}[kind]
    assert low == pytest.approx(wanted, abs=report.tensors["c"].scale)
