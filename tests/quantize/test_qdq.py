"""Writing QDQ: the arithmetic against NumPy, what is refused, and a real model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from modelforge.errors import InputError, UnsupportedError
from modelforge.graph.prepare import prepare
from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.dialects import DIALECTS, get_dialect
from modelforge.quantize.qdq import parameters_of, quantize_model
from modelforge.quantize.ranges import RangeTable
from tests.graph.conftest import packaged, sqnr_db
from tests.quantize.models import Qdq, observe, run, write

N = helper.make_node


def gemm_model(folder: Path, rows: int, inner: int, columns: int, trans: bool, seed: int = 3) -> Path:
    rng = np.random.default_rng(seed)
    shape = (columns, inner) if trans else (inner, columns)
    weights = {"w": rng.normal(size=shape).astype(np.float32), "b": rng.normal(size=(1, columns)).astype(np.float32)}
    nodes = [N("Gemm", ["x", "w", "b"], ["y"], transB=int(trans), name="gemm")]
    return write(folder / "m.onnx", nodes, {"x": [rows, inner]}, {"y": [rows, columns]}, weights)


@given(
    st.integers(1, 5),
    st.integers(2, 9),
    st.integers(2, 9),
    st.booleans(),
    st.sampled_from(sorted(DIALECTS)),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_a_gemm_is_what_numpy_makes_of_its_integers(
    tmp_path_factory: pytest.TempPathFactory, rows: int, inner: int, columns: int, trans: bool, name: str, seed: int
) -> None:
    """Also the (1, N) bias of a Gemm that onnxsim made of MatMul and Add."""
    folder = tmp_path_factory.mktemp("gemm")
    model = gemm_model(folder, rows, inner, columns, trans, seed)
    x = np.random.default_rng(seed).normal(1, 3, (rows, inner)).astype(np.float32)
    try:
        quantize_model(model, observe(model, {"x": x}), folder, dialect=name, method="minmax")
    except UnsupportedError:
        assert min(inner, columns) < get_dialect(name).fewest_channels
        return
    qdq = Qdq(folder)
    rules = get_dialect(name)
    scale, zero = qdq.scale("gemm", 0), int(qdq.zero_point("gemm", 0))
    integers = np.clip(np.rint(x / scale) + zero, -128 if rules.signed else 0, 127 if rules.signed else 255) - zero
    weight = qdq.constant("gemm", 1).astype(np.int64)
    product = integers.astype(np.int64) @ (weight.T if trans else weight)
    step = scale.astype(np.float64) * qdq.scale("gemm", 1).astype(np.float64)
    bias = qdq.constant("gemm", 2) * step if rules.bias == "int32" else qdq.values[qdq.nodes["gemm"].input[2]]
    expected, slack = product * step + bias, 1e-4
    if rules.graph_outputs:
        output = qdq.producer["y"]
        slack, last = (qdq.values[name] for name in output.input[1:])
        low, high = (slack * (bound - float(last)) for bound in rules.bounds)
        expected = np.clip(np.rint(expected / slack) * slack, low, high)
    np.testing.assert_allclose(run(folder / "model.onnx", {"x": x})[0], expected, rtol=1e-4, atol=slack)


def test_outputs_are_quantized_where_the_dialect_wants_it(tmp_path: Path) -> None:
    """One is read by the model too, one is behind a carrier, one comes from a mixed Concat and stays float."""
    rng = np.random.default_rng(5)
    weights = {"w": rng.normal(size=(6, 6)).astype(np.float32), "b": rng.normal(size=6).astype(np.float32)}
    weights |= {"large": np.full((1, 6), 1000, np.float32)}
    nodes = [
        N("Gemm", ["x", "w", "b"], ["first"], name="gemm"),
        N("Relu", ["first"], ["second"], name="relu"),
        N("Flatten", ["second"], ["third"], name="flatten"),
        N("Mul", ["second", "large"], ["much"], name="mul"),
        N("Concat", ["second", "much"], ["fourth"], name="concat", axis=1),
    ]
    outputs = {"first": [1, 6], "third": [1, 6], "fourth": [1, 12]}
    model = write(tmp_path / "m.onnx", nodes, {"x": [1, 6]}, outputs, weights)
    x = {"x": rng.normal(size=(1, 6)).astype(np.float32)}
    quantize_model(model, observe(model, x), tmp_path, dialect="qualcomm", method="minmax")
    qdq = Qdq(tmp_path)
    assert [each.name for each in qdq.model.graph.output] == list(outputs)
    assert [qdq.producer[name].op_type for name in outputs] == ["DequantizeLinear", "DequantizeLinear", "Concat"]
    readers = [node for node in qdq.model.graph.node if qdq.nodes["gemm"].output[0] in node.input]
    assert [node.op_type for node in readers] == ["QuantizeLinear"], "the output and the Relu read one quantized value"
    assert qdq.values[qdq.producer["third"].input[1]] == qdq.scale("flatten", 0), "one scale"
    for exact, found in zip(run(model, x), run(tmp_path / "model.onnx", x), strict=True):
        assert sqnr_db(exact, found) > 25


def test_one_scale_for_the_weight_is_one_for_the_bias(tmp_path: Path) -> None:
    """QAIRT 2.51 misreads a list of bias scales beside a single weight scale: its outputs were all at the bounds."""
    model = gemm_model(tmp_path, 1, 4, 3, True)
    x = {"x": np.random.default_rng(1).normal(size=(1, 4)).astype(np.float32)}
    quantize_model(model, observe(model, x), tmp_path, dialect="qualcomm", method="minmax")
    qdq = Qdq(tmp_path)
    assert (qdq.scale("gemm", 1).shape, qdq.scale("gemm", 2).shape) == ((), ())


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(set(DIALECTS) - {"tensorrt"})),
)
@settings(deadline=None, max_examples=40)
def test_a_conv_of_any_shape_stays_near_fp32(
    tmp_path_factory: pytest.TempPathFactory,
    inputs: int, outputs: int, size: int, depthwise: bool, bias: bool, name: str,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("conv")
    rng = np.random.default_rng(inputs * 7 + outputs)
    group = inputs if depthwise else 1
    weights = {"w": rng.normal(size=(outputs * group, inputs // group, size, size)).astype(np.float32)}
    if bias:
        weights["b"] = rng.normal(size=outputs * group).astype(np.float32)
    node = N("Conv", ["x", *weights], ["y"], group=group, pads=[size // 2] * 4, name="conv")
    model = write(folder / "m.onnx", [node], {"x": [2, inputs, 5, 5]}, {"y": [2, outputs * group, 5, 5]}, weights)
    x = rng.normal(0.5, 1, (2, inputs, 5, 5)).astype(np.float32)
    table = observe(model, {"x": x})
    try:
        quantize_model(model, table, folder, dialect=name, method="minmax")
    except UnsupportedError:
        assert min(inputs, outputs) < 4  # small channels
        return
    exact, found = run(model, {"x": x})[0], run(folder / "model.onnx", {"x": x})[0]
    assert sqnr_db(exact, found) > 28


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from(sorted(DIALECTS)))
def test_parameters_hold_zero_and_the_range(a: float, b: float, name: str) -> None:
    rules = get_dialect(name)
    low, high = min(a, b), max(a, b)
    found = parameters_of(low, high, rules)
    smallest, largest = rules.bounds
    assert smallest <= found.zero_point <= largest
    assert found.scale >= np.finfo(np.float32).tiny
    held = [(bound - found.zero_point) * found.scale for bound in (smallest, largest)]
    slack = found.scale * 0.51
    assert held[0] - slack <= min(low, 0.0)
    assert held[1] + slack >= max(high, 0.0)
    if rules.symmetric:
        assert found.zero_point == 0


def test_an_activation_that_is_always_zero_gets_a_usable_scale() -> None:
    assert parameters_of(0.0, 0.0, get_dialect("onnxruntime-x86")).scale == 1.0
    assert parameters_of(-1e-44, 0.0, get_dialect("tvm")).scale >= np.finfo(np.float32).tiny


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    weights = {"w0": rng.normal(size=(8, 8)).astype(np.float32), "w1": rng.normal(size=(8, 8)).astype(np.float32)}
    nodes = [
        N("MatMul", ["x", "w0"], ["h"], name="first"),
        N("Tanh", ["h"], ["t"]),
        N("MatMul", ["t", "w1"], ["y"], name="second"),
    ]
    return write(tmp_path / "m.onnx", nodes, {"x": [4, 8]}, {"y": [4, 8]}, weights)


X = np.random.default_rng(6).normal(size=(4, 8)).astype(np.float32)


def test_excluded_nodes_stay_in_float_and_say_so(two_layers: Path, tmp_path: Path) -> None:
    report = quantize_model(two_layers, observe(two_layers, {"x": X}), tmp_path, dialect="tvm", exclude=["second"])
    assert report.quantized == ("first",)
    assert report.kept["second"] == "MatMul: excluded"
    assert Qdq(tmp_path).reads("second", 1) is None


def test_excluding_an_unknown_node_names_the_nearest(two_layers: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match='did you mean "second"'):
        quantize_model(two_layers, observe(two_layers, {"x": X}), tmp_path, dialect="tvm", exclude=["secnd"])


def test_a_layer_without_a_range_stays_in_float(two_layers: Path, tmp_path: Path) -> None:
    table = observe(two_layers, {"x": X})
    partial = RangeTable({"x": table["x"]}, 1, "sha256:d", "sha256:m")
    report = quantize_model(two_layers, partial, tmp_path, dialect="tvm")
    assert report.kept["second"] == "MatMul: no range of t"


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]}, {})
    with pytest.raises(UnsupportedError, match="quantizes no node"):
        quantize_model(model, observe(model, {"x": X[:1, :4]}), tmp_path, dialect="tvm")


def test_weights_that_two_layers_share_are_written_once(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)}
    nodes = [
        N("MatMul", ["x", "w"], ["h"], name="first"),
        N("Tanh", ["h"], ["t"]),
        N("MatMul", ["t", "w"], ["y"], name="second"),
    ]
    model = write(tmp_path / "m.onnx", nodes, {"x": [4, 8]}, {"y": [4, 8]}, weights)
    quantize_model(model, observe(model, {"x": X}), tmp_path / "out", dialect="tvm")
    qdq = Qdq(tmp_path / "out")
    assert qdq.nodes["first"].input[1] == qdq.nodes["second"].input[1]
    assert sum(array.dtype == np.int8 and array.size == 64 for array in qdq.values.values()) == 1


def test_the_same_input_gives_the_same_bytes(two_layers: Path, tmp_path: Path) -> None:
    table = observe(two_layers, {"x": X})
    written = []
    for place in ("a", "b"):
        quantize_model(two_layers, table, tmp_path / place, dialect="onnxruntime-x86")
        written.append((tmp_path / place / "model.onnx").read_bytes())
    assert written[0] == written[1]


def test_an_old_opset_is_raised_for_per_channel_scales(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(1).normal(size=(8, 8, 1, 1)).astype(np.float32)}
    model = write(
        tmp_path / "m.onnx", [N("Conv", ["x", "w"], ["y"])], {"x": [1, 8, 4, 4]}, {"y": [1, 8, 4, 4]}, weights, opset=11
    )
    x = np.random.default_rng(2).normal(size=(1, 8, 4, 4)).astype(np.float32)
    report = quantize_model(model, observe(model, {"x": x}), tmp_path / "out", dialect="onnxruntime-x86")
    assert report.opset_raised == 11
    assert report.opset >= 13
    assert sqnr_db(run(model, {"x": x})[0], run(tmp_path / "out" / "model.onnx", {"x": x})[0]) > 30


def test_the_report_is_json(two_layers: Path, tmp_path: Path) -> None:
    report = quantize_model(two_layers, observe(two_layers, {"x": X}), tmp_path, dialect="onnxruntime-x86")
    document = json.loads(json.dumps(dataclasses.asdict(report)))
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert document["quantize_nodes"] == kinds.count("QuantizeLinear")
    assert document["dequantize_nodes"] == kinds.count("DequantizeLinear")
    assert document["tensors"]["x"]["scale"] > 0


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_a_real_model_keeps_its_answers(dialect: str, tmp_path: Path, cls: tuple[Path, RangeTable, np.ndarray]) -> None:
    model, table, lines = cls
    report = quantize_model(model, table, tmp_path, dialect=dialect)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    assert len(report.quantized) >= 25
    exact, found = run(model, {"x": lines})[0], run(tmp_path / "model.onnx", {"x": lines})[0]
    # Stripes instead of text: near the border between both classes, so that noise would show.
    assert np.mean(exact.argmax(1) == found.argmax(1)) >= 0.9


@pytest.fixture(scope="module")
def cls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RangeTable, np.ndarray]:
    """PP-OCR's direction classifier, its ranges, and 16 images of dark stripes."""
    folder = tmp_path_factory.mktemp("cls")
    prepare(packaged("cls"), folder, {"x": ("batch", 3, 48, 192)})
    rng = np.random.default_rng(8)
    lines = np.ones((16, 3, 48, 192), np.float32)
    for line in lines:
        for start in range(4, 180, 9):
            high = rng.integers(5, 40)
            line[:, high : high + rng.integers(4, 30), start : start + rng.integers(2, 7)] = -1
    table = calibrate(folder / "model.onnx", [{"x": line[None]} for line in lines])
    return folder / "model.onnx", table, lines
