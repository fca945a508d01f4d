"""Which channels of an output mean different things, read off real and made graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.graph.output_groups import find_output_groups


def _save(folder: Path, nodes: list[onnx.NodeProto], output: list[int | str], initializers=()) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        list(initializers),
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def _ranges(path: Path) -> list[tuple[str, int, int, int]]:
    return [(group.name, group.axis, group.start, group.stop) for group in find_output_groups(path)]


def test_boxes_and_scores_of_yolov8() -> None:
    spec = importlib.util.find_spec("nudenet")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("nudenet is not installed")
    groups = find_output_groups(Path(spec.submodule_search_locations[0]) / "320n.onnx")
    assert [(group.output, group.axis, group.start, group.stop, group.alike) for group in groups] == [
        ("output0", 1, 0, 4, False),
        ("output0", 1, 4, 22, False),
    ]


def test_a_transpose_and_a_pair_of_casts_behind_the_concat_are_followed(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Exp", ["x"], ["boxes"]),
        make("Sigmoid", ["x"], ["scores"]),
        make("Concat", ["boxes", "scores"], ["joined"], axis=1),
        make("Cast", ["joined"], ["half"], to=TensorProto.FLOAT16),
        make("Cast", ["half"], ["back"], to=TensorProto.FLOAT),
        make("Transpose", ["back"], ["y"], perm=[0, 2, 1]),
    ]
    assert _ranges(_save(tmp_path, nodes, ["n", 10, 8])) == [("boxes", 2, 0, 4), ("scores", 2, 4, 8)]


def test_a_nested_concat_is_taken_apart(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Exp", ["x"], ["a"]),
        make("Sigmoid", ["x"], ["b"]),
        make("Concat", ["a", "b"], ["ab"], axis=1),
        make("Tanh", ["x"], ["c"]),
        make("Concat", ["ab", "c"], ["y"], axis=1),
    ]
    assert _ranges(_save(tmp_path, nodes, ["n", 12, 10])) == [("a", 1, 0, 4), ("b", 1, 4, 8), ("c", 1, 8, 12)]


def test_scales_of_a_detector_are_looked_into(tmp_path: Path) -> None:
    """Concat over scales of Concat over meanings: the meanings are the groups, not the scales."""
    make = helper.make_node
    shape = numpy_helper.from_array(np.array([-1, 40, 2], np.int64), "shape")
    axes = numpy_helper.from_array(np.array([-1], np.int64), "axes")
    nodes = []
    for scale in "pq":
        nodes += [
            make("Unsqueeze", ["x", "axes"], [f"{scale}0"]),
            make("Exp", [f"{scale}0"], [f"{scale}_boxes"]),
            make("Sigmoid", [f"{scale}0"], [f"{scale}_scores"]),
            make("Concat", [f"{scale}_boxes", f"{scale}_scores"], [f"{scale}_joined"], axis=-1),
            make("Reshape", [f"{scale}_joined", "shape"], [f"{scale}_flat"]),
        ]
    nodes.append(make("Concat", ["p_flat", "q_flat"], ["y"], axis=1))
    path = _save(tmp_path, nodes, ["n", 80, 2], [shape, axes])
    assert _ranges(path) == [("p_boxes", 2, 0, 1), ("p_scores", 2, 1, 2)]
    assert not any(group.alike for group in find_output_groups(path))


def test_equal_parts_are_alike(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Sigmoid", ["x"], ["a"]),
        make("Sigmoid", ["x"], ["b"]),
        make("Concat", ["a", "b"], ["y"], axis=2),
    ]
    assert all(group.alike for group in find_output_groups(_save(tmp_path, nodes, ["n", 4, 20])))


def test_what_is_computed_behind_a_concat_has_no_groups(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Exp", ["x"], ["a"]),
        make("Concat", ["a", "x"], ["b"], axis=1),
        make("Sigmoid", ["b"], ["y"]),
    ]
    assert _ranges(_save(tmp_path, nodes, ["n", 8, 10])) == []
    open_axis = [make("Exp", ["x"], ["a"]), make("Concat", ["a", "x"], ["y"], axis=0)]
    assert _ranges(_save(tmp_path, open_axis, ["m", 4, 10])) == []
