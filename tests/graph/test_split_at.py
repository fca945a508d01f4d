"""Cuts that the user names: what lies before them, and why some are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from modelforge.errors import ModelError
from modelforge.graph.split import At, plan_split
from modelforge.graph.split_chain import compare_chain
from modelforge.graph.split_graph import LayerGraph, read_layers
from modelforge.graph.split_write import write_split
from tests.graph.conftest import make_graph, packaged, write_model


@pytest.fixture(scope="module")
def resnet() -> LayerGraph:
    return read_layers(packaged("resnet50"))


def names(graph: LayerGraph, *cuts: str) -> list[list[str]]:
    plan = plan_split(graph, At(tuple(tuple(cut.split(",")) for cut in cuts)))
    return [[tensor.name for tensor in stage.inputs] for stage in plan.stages]


def residual(path: Path) -> Path:
    """x -> a -> b -> sum(b, a) -> y, and a second output z from a."""
    weights = {"w": np.eye(4, dtype=np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["b", "a"], ["s"]),
        helper.make_node("Neg", ["s"], ["y"]),
        helper.make_node("Abs", ["a"], ["z"]),
    ]
    kind = TensorProto.FLOAT
    return write_model(
        path, make_graph(nodes, [("x", kind, [2, 4])], [("y", kind, [2, 4]), ("z", kind, [2, 4])], weights)
    )


def test_one_tensor(tmp_path: Path, resnet: LayerGraph) -> None:
    assert names(resnet, "r47") == [["gpu_0/data_0"], ["r47"]]
    plan = plan_split(resnet, At((("r47",), ("r89",))))
    assert [stage.name for stage in plan.stages] == ["stage1", "stage2", "stage3"]
    stages = write_split(packaged("resnet50"), plan, tmp_path / "s")
    assert compare_chain(packaged("resnet50"), stages.folder).identical


def test_a_tensor_read_on_both_sides_and_a_side_output(tmp_path: Path) -> None:
    """`a` is read before the cut and after it; what makes `z` needs nothing but `a`, so it stands after the cut."""
    model = residual(tmp_path / "m.onnx")
    graph = read_layers(model)
    plan = plan_split(graph, At((("a", "b"),)))
    assert [tensor.name for tensor in plan.stages[0].outputs] == ["a", "b"]
    assert [tensor.name for tensor in plan.stages[1].inputs] == ["a", "b"]
    assert dict(plan.outputs) == {"y": "stage2", "z": "stage2"}
    assert compare_chain(model, write_split(model, plan, tmp_path / "s").folder).identical
    late = plan_split(graph, At((("s",),)))
    assert [tensor.name for tensor in late.stages[0].outputs] == ["s", "z"]
    assert dict(late.outputs) == {"y": "stage2", "z": "stage1"}
    assert compare_chain(model, write_split(model, late, tmp_path / "late").folder).identical


def test_a_cut_that_does_not_separate_names_what_is_missing(tmp_path: Path, resnet: LayerGraph) -> None:
    with pytest.raises(ModelError, match='"b" does not separate the graph: "a" goes past it') as caught:
        plan_split(read_layers(residual(tmp_path / "m.onnx")), At((("b",),)))
    assert caught.value.fix == "--at b,a"
    with pytest.raises(ModelError, match="does not separate") as caught:
        names(resnet, "r50")
    cut = str(caught.value.fix).removeprefix("--at ")
    assert names(resnet, cut), "the cut that the message proposes is one"


@pytest.mark.parametrize(
    ("cuts", "says", "fix"),
    [
        (("r8x",), 'no tensor "r8x"', "did you mean"),
        (("qqqqqqqqqqqq",), "no tensor", "--plan-only"),
        (("r89", "r47"), "would form a cycle", "in the order"),
        (("r47", "r47"), "nothing lies between", "leave one"),
        (("gpu_0/data_0",), "nothing lies before", "between two layers"),
        (("gpu_0/softmax_1",), "nothing lies after", "between two layers"),
        (("gpu_0/conv1_w_0",), "is a constant", "depends on the inputs"),
        (("r47,r1",), "nothing after the cut reads", "--at r47"),
    ],
)
def test_refusals(resnet: LayerGraph, cuts: tuple[str, ...], says: str, fix: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        names(resnet, *cuts)
    assert fix in str(caught.value.fix)


def test_a_tensor_inside_a_body_is_refused() -> None:
    graph = read_layers(packaged("silero"))
    inner = next(name for name in graph.inner if name not in graph.tensors)
    with pytest.raises(ModelError, match="lies in a body of node"):
        plan_split(graph, At(((inner,),)))


def test_an_input_that_only_a_later_stage_reads_enters_there(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Add", ["b", "late"], ["y"]),
    ]
    kind = TensorProto.FLOAT
    graph = make_graph(nodes, [("x", kind, [4]), ("late", kind, [4])], [("y", kind, [4])])
    model = write_model(tmp_path / "m.onnx", graph)
    plan = plan_split(read_layers(model), At((("a",),)))
    assert [[tensor.name for tensor in stage.inputs] for stage in plan.stages] == [["x"], ["a", "late"]] or [
        sorted(tensor.name for tensor in stage.inputs) for stage in plan.stages
    ] == [["x"], ["a", "late"]]
    assert compare_chain(model, write_split(model, plan, tmp_path / "s").folder).identical


def test_an_input_read_on_both_sides_must_be_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Add", ["b", "x"], ["y"]),
    ]
    kind = TensorProto.FLOAT
    model = write_model(tmp_path / "m.onnx", make_graph(nodes, [("x", kind, [4])], [("y", kind, [4])]))
    graph = read_layers(model)
    with pytest.raises(ModelError, match='"x" goes past it') as caught:
        plan_split(graph, At((("a",),)))
    assert caught.value.fix == "--at a,x"
    assert len(plan_split(graph, At((("a", "x"),))).stages) == 2
