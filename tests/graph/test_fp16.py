"""FP16 of real models by SQNR, and the traps one by one: overflow, vanishing, bodies, Resize, Cast, shapes, borders."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFont

from modelforge.graph.fp16 import Fp16Report, convert_fp16
from modelforge.graph.prepare import prepare
from tests.graph.conftest import SHAPES, make_graph, packaged, run, sqnr_db, write_model

FLOAT = TensorProto.FLOAT


def _feeds(name: str) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    if name == "magika":
        return {"bytes": rng.integers(0, 257, (2, 2048)).astype(np.int32)}
    if name.startswith("silero"):
        sound = (0.1 * rng.standard_normal((1, 512))).astype(np.float32)
        return {"input": sound, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000, np.int64)}
    if name == "det4":
        return {"x": _page()}
    key, shape = {
        "rec4": ("x", (1, 3, 48, 160)),
        "cls": ("x", (1, 3, 48, 192)),
        "nudenet": ("images", (1, 3, 160, 160)),
        "densenet121": ("data_0", (1, 3, 224, 224)),
    }[name]
    return {key: rng.uniform(0, 1, shape).astype(np.float32)}


def _page() -> NDArray[Any]:
    """Dark words on white, [1, 3, 160, 320] in [-1, 1]: on noise a text detector finds nothing to compare."""
    page = Image.new("L", (320, 160), 250)
    draw = ImageDraw.Draw(page)
    for line in range(2):
        draw.text((8, 8 + 60 * line), f"Hello {line} forge", fill=20, font=ImageFont.load_default(28))
    grey = np.asarray(page, np.float32) / 127.5 - 1
    return np.broadcast_to(grey, (1, 3, 160, 320)).copy()


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("rec4", 45),
        ("cls", 45),
        ("magika", 60),
        ("nudenet", 55),
        ("silero", 45),
        ("silero_op15", 45),
        ("silero_ifless", 45),
        ("densenet121", 45),
        # Its logits reach 160, where FP16 steps by 0.125: at the last Sigmoid, rounding of any one layer shows.
        ("det4", 28),
    ],
)
def test_real_models_stay_close(name: str, floor: float, tmp_path: Path) -> None:
    prepare(packaged(name), tmp_path / "prepared", SHAPES.get(name, {}))
    source, result = tmp_path / "prepared/model.onnx", tmp_path / "half/model.onnx"
    report = convert_fp16(source, result.parent)
    feeds = _feeds(name)
    for exact, half in zip(run(source, **feeds), run(result, **feeds), strict=True):
        assert half.dtype == exact.dtype
        assert sqnr_db(exact, half) >= floor
    assert result.stat().st_size < 0.6 * source.stat().st_size
    assert report.converted > 20
    json.dumps(asdict(report))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        convert_fp16(packaged("silero"), tmp_path / folder)
    assert (tmp_path / "a/model.onnx").read_bytes() == (tmp_path / "b/model.onnx").read_bytes()


def test_a_variance_beyond_fp16_keeps_its_node_and_the_answer(tmp_path: Path) -> None:
    """Two public converters clamp PP-OCRv4 det's 9.8e7 to 1e4 and are off by 70 times, without a word."""
    report = convert_fp16(packaged("det4"), tmp_path)
    assert report.kept == {"p2o.BatchNormalization.1": "batch_norm_0.w_2: a value of 9.79e+07 is beyond FP16's 65504"}
    page = _page()
    assert sqnr_db(run(packaged("det4"), x=page)[0], run(tmp_path / "model.onnx", x=page)[0]) > 25


def _convert(folder: Path, graph: onnx.GraphProto, opset: int = 17, **options: Any) -> tuple[Path, Path, Fp16Report]:
    source = write_model(folder / "source.onnx", graph, opset)
    report = convert_fp16(source, folder / "half", **options)
    return source, folder / "half/model.onnx", report


def _close(source: Path, result: Path, tolerance: float = 2e-3, **inputs: NDArray[Any]) -> None:
    for exact, half in zip(run(source, **inputs), run(result, **inputs), strict=True):
        assert half.dtype == exact.dtype
        np.testing.assert_allclose(half, exact, rtol=tolerance, atol=tolerance)


def _dtypes(path: Path) -> dict[str, int]:
    """Element type by initializer name."""
    return {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(
    ("constant", "reason"), [(1e5, "beyond FP16"), (-3.4e38, "beyond FP16"), (1e-12, "all values are 0")]
)
def test_a_constant_that_fp16_cannot_hold_keeps_its_node(tmp_path: Path, constant: float, reason: str) -> None:
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], name="before"),
        helper.make_node("Max", ["a", "k"], ["m"], name="kept"),
        helper.make_node("Min", ["m", "a"], ["y"], name="after"),
    ]
    graph = make_graph(nodes, [("x", FLOAT, [4])], [("y", FLOAT, [4])], {"k": np.array([constant], np.float32)})
    source, result, report = _convert(tmp_path, graph)
    assert list(report.kept) == ["kept"]
    assert reason in report.kept["kept"]
    assert report.converted == 2
    assert _dtypes(result) == {"k": FLOAT}
    _close(source, result, x=np.array([-2, 0, 1, 3], np.float32))


def test_infinity_is_a_value_that_fp16_has(tmp_path: Path) -> None:
    nodes = [helper.make_node("Max", ["x", "k"], ["y"])]
    graph = make_graph(nodes, [("x", FLOAT, [2])], [("y", FLOAT, [2])], {"k": np.array([-np.inf], np.float32)})
    _, result, report = _convert(tmp_path, graph)
    assert report.kept == {}
    assert report.casts == 2
    np.testing.assert_array_equal(run(result, x=np.array([-2, 5], np.float32))[0], [-2, 5])


def test_bodies_are_converted_and_captured_values_cast(tmp_path: Path) -> None:
    """`then` computes on a captured value, `else` hands a weight of the outer graph on."""
    then = make_graph([helper.make_node("Mul", ["a", "w"], ["t"])], [], [("t", FLOAT, [3])], name="then")
    other = make_graph([helper.make_node("Identity", ["w"], ["e"])], [], [("e", FLOAT, [3])], name="other")
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("If", ["c"], ["i"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["i", "a"], ["y"]),
    ]
    graph = make_graph(
        nodes,
        [("c", TensorProto.BOOL, []), ("x", FLOAT, [3])],
        [("y", FLOAT, [3])],
        {"w": np.array([0.5, 1.5, 2.5], np.float32)},
    )
    source, result, report = _convert(tmp_path, graph)
    assert set(_dtypes(result).values()) == {TensorProto.FLOAT16}
    assert report.casts == 2
    for condition in (True, False):
        _close(source, result, x=np.array([-1, 2, 3], np.float32), c=np.array(condition))


def test_loop_and_scan_carry_fp16(tmp_path: Path) -> None:
    loop = make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Mul", ["v", "k"], ["next"]),
            helper.make_node("Abs", ["next"], ["seen"]),
        ],
        [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("v", FLOAT, [2])],
        [("on", TensorProto.BOOL, []), ("next", FLOAT, [2]), ("seen", FLOAT, [2])],
        {"k": np.array([-1.5], np.float32)},
        name="loop",
    )
    scan = make_graph(
        [helper.make_node("Add", ["sum", "item"], ["total"]), helper.make_node("Neg", ["total"], ["each"])],
        [("sum", FLOAT, [2]), ("item", FLOAT, [2])],
        [("total", FLOAT, [2]), ("each", FLOAT, [2])],
        name="scan",
    )
    nodes = [
        helper.make_node("Loop", ["n", "", "x"], ["last", "all"], body=loop),
        helper.make_node("Scan", ["last", "all"], ["y", "z"], body=scan, num_scan_inputs=1),
    ]
    graph = make_graph(
        nodes, [("x", FLOAT, [2])], [("y", FLOAT, [2]), ("z", FLOAT, None)], {"n": np.array(3, np.int64)}
    )
    source, result, report = _convert(tmp_path, graph)
    assert report.kept == {}
    _close(source, result, x=np.array([1, -2], np.float32))


def test_a_kept_if_keeps_its_bodies(tmp_path: Path) -> None:
    body = make_graph([helper.make_node("Neg", ["a"], ["n"], name="inside")], [], [("n", FLOAT, [2])])
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], name="abs"),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body, name="choice"),
    ]
    graph = make_graph(nodes, [("c", TensorProto.BOOL, []), ("x", FLOAT, [2])], [("y", FLOAT, [2])])
    source, result, report = _convert(tmp_path, graph, keep_fp32={"choice"})
    assert report.kept["choice"] == "asked for"
    assert report.kept["inside"] == "inside choice, which is kept"
    assert report.converted == 1
    _close(source, result, x=np.array([1, -2], np.float32), c=np.array(True))


def test_resize_keeps_its_scales(tmp_path: Path) -> None:
    weights = {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 1.7, 1.7], np.float32)}
    nodes = [helper.make_node("Resize", ["x", "roi", "scales"], ["y"], mode="nearest")]
    graph = make_graph(nodes, [("x", FLOAT, [1, 1, 10, 10])], [("y", FLOAT, None)], weights)
    source, result, report = _convert(tmp_path, graph)
    assert report.converted == 1
    assert _dtypes(result)["scales"] == FLOAT
    _close(source, result, x=np.random.default_rng(0).random((1, 1, 10, 10), np.float32))


def test_arithmetic_on_shapes_stays_exact(tmp_path: Path) -> None:
    """4099 is no FP16 number: through FP16 the result would have 4100 or 4096 elements."""
    weights = {"one": np.array([1.0], np.float32), "half": np.array(0.5, np.float32)}
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=FLOAT),
        helper.make_node("Mul", ["f", "one"], ["g"]),
        helper.make_node("Cast", ["g"], ["n"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["n"], ["z"], value=numpy_helper.from_array(np.array([2], np.float32))),
        helper.make_node("Mul", ["z", "half"], ["h"]),
        helper.make_node("Add", ["x", "h"], ["y"]),
    ]
    graph = make_graph(nodes, [("x", FLOAT, ["n"])], [("y", FLOAT, None)], weights)
    source, result, report = _convert(tmp_path, graph)
    assert all("shapes" in reason for reason in report.kept.values())
    _close(source, result, x=np.ones(4099, np.float32))


def test_types_that_are_attributes_follow(tmp_path: Path) -> None:
    two = numpy_helper.from_array(np.array([2], np.float32))
    nodes = [
        helper.make_node("Cast", ["i"], ["f"], to=FLOAT),
        helper.make_node("ConstantOfShape", ["i"], ["two"], value=two),
        helper.make_node("RandomNormalLike", ["two"], ["noise"], name="random", scale=1e-3, seed=1.0, dtype=FLOAT),
        helper.make_node("Mul", ["f", "two"], ["m"]),
        helper.make_node("Add", ["m", "noise"], ["y"]),
        helper.make_node("Cast", ["y"], ["d"], to=TensorProto.DOUBLE),
    ]
    graph = make_graph(
        nodes, [("i", TensorProto.INT64, [1])], [("y", FLOAT, [None]), ("d", TensorProto.DOUBLE, [None])]
    )
    source, result, report = _convert(tmp_path, graph)
    assert list(report.kept) == ["random"]
    assert report.converted == 4 + 1  # the last Cast reads FP16
    _close(source, result, tolerance=0.02, i=np.array([1], np.int64))


def test_quantization_stays(tmp_path: Path) -> None:
    weights = {"s": np.array(1e-6, np.float32), "z": np.array(0, np.int8)}
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize"),
        helper.make_node("Neg", ["d"], ["y"]),
    ]
    graph = make_graph(nodes, [("x", FLOAT, [3])], [("y", FLOAT, [3])], weights)
    source, result, report = _convert(tmp_path, graph, opset=19)
    assert set(report.kept) == {"quantize", "dequantize"}
    assert _dtypes(result)["s"] == FLOAT
    _close(source, result, tolerance=1e-6, x=np.array([1e-5, 5e-5, 1e-4], np.float32))


def test_borders_keep_name_and_type(tmp_path: Path) -> None:
    """An input that is an output, an output that others read, an output in the middle of a chain."""
    nodes = [
        helper.make_node("Abs", ["x"], ["middle"]),
        helper.make_node("Neg", ["middle"], ["y"]),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    graph = make_graph(nodes, [("x", FLOAT, [2])], [(name, FLOAT, [2]) for name in ("middle", "y", "same")])
    source, result, _ = _convert(tmp_path, graph)
    model = onnx.load(result)
    assert [value.name for value in model.graph.output] == ["middle", "y", "same"]
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {FLOAT}
    _close(source, result, x=np.array([-1, 2], np.float32))


def test_nodes_may_be_kept_by_a_function(tmp_path: Path) -> None:
    report = convert_fp16(packaged("cls"), tmp_path, keep_fp32=lambda node: node.op_type == "Softmax")
    assert list(report.kept.values()) == ["asked for"]
