"""Facts of real models against figures known otherwise, and the traps: unnamed dims, foldable nodes, bodies."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from modelforge.errors import ModelError
from modelforge.graph.inspect import inspect_model
from tests.graph.conftest import make_graph, packaged, write_model


@pytest.mark.parametrize(
    ("name", "shapes", "gflops"),
    [
        # Multiply-adds of the papers, doubled: ResNet-50 4.1 G (He 2015), SqueezeNet 1.0 0.35 G, DenseNet-121 2.87 G.
        ("resnet50", {}, 8.2),
        ("squeezenet", {}, 0.7),
        ("densenet121", {}, 5.7),
    ],
)
def test_flops_are_those_of_the_papers(name: str, shapes: dict[str, tuple[int, ...]], gflops: float) -> None:
    facts = inspect_model(packaged(name), shapes=shapes)
    assert facts.flops is not None
    assert facts.flops / 1e9 == pytest.approx(gflops, rel=0.02)
    assert facts.peak_activation_bytes is not None


def test_flops_and_peak_of_a_convolution(conv_model: Path) -> None:
    facts = inspect_model(conv_model, shapes={"x": ("batch", 3, 8, 8)}, bound={"batch": 2})
    outputs = 2 * 4 * 8 * 8
    assert facts.flops == outputs * 2 * 3 * 3 * 3 + outputs  # the Conv without bias, and the Relu
    assert facts.peak_activation_bytes == 2 * outputs * 4  # its input and its output, while Relu runs
    assert facts.bound == {"batch": 2}


def test_unnamed_dimensions_are_question_marks_and_count_as_one(conv_model: Path) -> None:
    facts = inspect_model(conv_model)
    assert facts.inputs[0].shape == ("?", 3, 8, 8)
    assert facts.outputs[0].shape == ("?", 4, 8, 8)
    assert facts.bound == {"x[0]": 1}
    assert facts.inputs[0].dtype == "float32"


def test_shapes_name_dimensions_of_inputs_and_outputs(conv_model: Path) -> None:
    assert inspect_model(conv_model, shapes={"x": ("n", 3, 8, 8)}).outputs[0].shape == ("n", 4, 8, 8)
    assert inspect_model(conv_model, shapes={"x": (5, 3, 8, 8)}).outputs[0].shape == (5, 4, 8, 8)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"z": (1, 3, 8, 8)}, 'no input "z"'),
        ({"x": (1, 3, 8)}, "has 4 dimensions"),
        ({"x": (1, 4, 8, 8)}, "fixed size 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(conv_model: Path, shapes: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        inspect_model(conv_model, shapes=shapes)


def test_paddle_models_have_their_weights_counted_and_no_constant_among_the_ops() -> None:
    facts = inspect_model(packaged("cls"), shapes={"x": ("batch", 3, 48, 192)})
    assert facts.parameters > 100_000  # all in Constant nodes
    assert facts.parameter_bytes >= 4 * 100_000
    assert facts.op("Constant") is None
    conv = facts.op("Conv")
    assert conv is not None
    assert conv.count == 53
    assert facts.flops is not None
    assert facts.flops > 30e6


def test_shape_arithmetic_folds_only_where_the_shape_is_static() -> None:
    dynamic = inspect_model(packaged("rec4"), shapes={"x": ("batch", 3, 48, "width")})
    static = inspect_model(packaged("rec4"), shapes={"x": (1, 3, 48, 320)})
    assert dynamic.op("Shape") is not None
    assert static.op("Shape") is None
    assert static.outputs[0].shape == (1, 40, 6625)
    assert (
        static.flops
        == inspect_model(packaged("rec4"), {"batch": 1, "width": 320}, {"x": ("batch", 3, 48, "width")}).flops
    )


def test_operators_of_bodies_are_seen() -> None:
    facts = inspect_model(packaged("silero"))
    lstm = facts.op("LSTM")
    assert lstm is not None
    assert lstm.in_subgraph
    assert lstm.example


def test_quantization_is_not_folded_away(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 4), np.int8), "s": np.float32(0.1), "z": np.int8(0)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="product"),
    ]
    graph = make_graph(
        nodes,
        [("x", TensorProto.FLOAT, [1, 4])],
        [("y", TensorProto.FLOAT, [1, 4])],
        {k: np.array(v) for k, v in weights.items()},
    )
    facts = inspect_model(write_model(tmp_path / "q.onnx", graph))
    assert [(found.op, found.count, found.example) for found in facts.ops] == [
        ("DequantizeLinear", 1, "d"),
        ("MatMul", 1, "product"),
    ]


def test_random_numbers_are_not_folded_and_custom_operators_are_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], shape=[1, 4]),
        helper.make_node("Add", ["x", "r"], ["a"]),
        helper.make_node("Sharpen", ["a"], ["y"], domain="com.example"),
    ]
    graph = make_graph(nodes, [("x", TensorProto.FLOAT, ["n", 4])], [("y", TensorProto.FLOAT, ["n", 4])])
    facts = inspect_model(write_model(tmp_path / "c.onnx", graph, com_example=1))
    assert facts.op("RandomNormal") is not None
    assert facts.op("Sharpen", "com.example") is not None
    assert facts.op("Sharpen") is None
    assert facts.opsets == {"": 17, "com.example": 1}
    assert facts.outputs[0].shape == ("n", 4)


def test_weights_need_not_be_there(tmp_path: Path) -> None:
    """External data is not opened: 8 TB of it cost nothing."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2_000_000, 1_000_000])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    graph = make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", 2_000_000])],
        [("y", TensorProto.FLOAT, None)],
    )
    graph.initializer.append(weight)
    facts = inspect_model(write_model(tmp_path / "e.onnx", graph))
    assert facts.parameters == 2 * 10**12
    assert facts.outputs[0].shape == ("n", 1_000_000)
    assert facts.flops == 2 * 2 * 10**12


def test_a_loop_of_unknown_length_has_no_figures(tmp_path: Path) -> None:
    body = make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["a", "a"], ["b"])],
        [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("a", TensorProto.FLOAT, [4])],
        [("on", TensorProto.BOOL, []), ("b", TensorProto.FLOAT, [4])],
    )
    graph = make_graph(
        [helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body)],
        [("trips", TensorProto.INT64, []), ("x", TensorProto.FLOAT, [4])],
        [("y", TensorProto.FLOAT, [4])],
    )
    facts = inspect_model(write_model(tmp_path / "loop.onnx", graph))
    assert facts.flops is None
    assert facts.op("Add") is not None


def test_cost_may_be_left_out(conv_model: Path) -> None:
    facts = inspect_model(conv_model, cost=False)
    assert (facts.flops, facts.peak_activation_bytes, facts.bound) == (None, None, {})


def test_facts_are_json_and_only_onnx_is_imported(conv_model: Path) -> None:
    """`plan` runs this every time: onnx-ir and ONNX Runtime would cost it half a second."""
    json.dumps(asdict(inspect_model(conv_model)))
    code = (
        "import sys; from pathlib import Path; from modelforge.graph.inspect import inspect_model; "
        "from modelforge.graph.load import check_model, model_files; "
        "check_model(Path(sys.argv[1])); inspect_model(Path(sys.argv[1])); "
        "sys.exit(','.join({'onnx_ir', 'onnxruntime', 'onnxsim'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(conv_model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
