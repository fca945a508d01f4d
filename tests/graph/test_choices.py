"""Numbers that choose a branch are found, whichever way the comparison is written; nothing else is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from modelforge.graph.choices import deciding_values
from modelforge.graph.compare import compare, reference_samples
from tests.graph.conftest import make_graph, packaged, write_model

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def branching(path: Path, comparison: str, *, shape: list[int], factor: float = 2.0, through: bool = False) -> Path:
    """``x * factor if rate <comparison> 16000 else x * 3``."""
    branches = {}
    for name, number in (("then_branch", factor), ("else_branch", 3.0)):
        nodes = [helper.make_node("Mul", ["x", f"{name}/k"], [f"{name}/y"])]
        branches[name] = make_graph(nodes, [], [(f"{name}/y", FLOAT, ["n", 4])], {f"{name}/k": np.float32(number)})
    nodes = [helper.make_node("Reshape", ["rate", "one"], ["same"])] if through else []
    nodes += [
        helper.make_node(comparison, ["same" if through else "rate", "wanted"], ["is"]),
        helper.make_node("If", ["is"], ["y"], **branches),
    ]
    inputs = [("x", FLOAT, ["n", 4]), ("rate", INT64, shape)]
    weights = {"wanted": np.array(16000, np.int64), "one": np.array([1], np.int64)}
    return write_model(path, make_graph(nodes, inputs, [("y", FLOAT, ["n", 4])], weights))


@pytest.mark.parametrize(
    ("comparison", "values"),
    [("Equal", [16000]), ("Greater", [16000, 16001]), ("LessOrEqual", [16000, 16001]), ("Less", [15999, 16000])],
)
def test_each_side_of_a_comparison_is_tried(tmp_path: Path, comparison: str, values: list[int]) -> None:
    found = deciding_values(branching(tmp_path / "m.onnx", comparison, shape=[]))
    assert found == [{}, *({"rate": value} for value in values)]


def test_a_reshape_in_between_hides_nothing(tmp_path: Path) -> None:
    assert deciding_values(branching(tmp_path / "m.onnx", "Equal", shape=[1], through=True)) == [{}, {"rate": 16000}]


def test_many_numbers_are_data_and_decide_nothing(tmp_path: Path) -> None:
    assert deciding_values(branching(tmp_path / "m.onnx", "Equal", shape=[7])) == [{}]


def test_a_condition_that_is_an_input_is_tried_both_ways(tmp_path: Path) -> None:
    branches = {
        name: make_graph([helper.make_node(op, ["x"], [f"{name}/y"])], [], [(f"{name}/y", FLOAT, [2])])
        for name, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    nodes = [helper.make_node("Not", ["flag"], ["unset"]), helper.make_node("If", ["unset"], ["y"], **branches)]
    inputs = [("x", FLOAT, [2]), ("flag", TensorProto.BOOL, [])]
    model = write_model(tmp_path / "m.onnx", make_graph(nodes, inputs, [("y", FLOAT, [2])]))
    assert deciding_values(model) == [{}, {"flag": 0}, {"flag": 1}]
    taken = {bool(sample.inputs["flag"]) for sample in reference_samples(model, {}, {}, "m")}
    assert taken == {False, True}


def test_a_change_in_the_branch_that_chance_never_takes_is_seen(tmp_path: Path) -> None:
    samples = reference_samples(branching(tmp_path / "a.onnx", "Equal", shape=[]), {}, {}, "a")
    assert [sample.values for sample in samples] == [{}, {}, {"rate": 16000}, {"rate": 16000}]
    other = branching(tmp_path / "b.onnx", "Equal", shape=[], factor=2.5)
    assert "differs by" in compare(other, samples).reason


@pytest.mark.parametrize("name", ["det4", "magika", "nudenet"])
def test_models_without_a_choice_are_left_to_chance(name: str) -> None:
    assert deciding_values(packaged(name)) == [{}]


def test_silero_chooses_by_its_sampling_rate() -> None:
    assert deciding_values(packaged("silero")) == [{}, {"sr": 16000}]
