"""Stage files: weights streamed, bodies whole, constants copied, arithmetic on shapes repeated or written in."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.errors import BuildError, InputError, ModelError
from modelforge.graph.load import check_model
from modelforge.graph.split import At, Balanced, plan_split
from modelforge.graph.split_chain import Chain, compare_chain
from modelforge.graph.split_graph import read_layers
from modelforge.graph.split_write import write_split
from tests.graph.conftest import make_graph, op_types, packaged, run, write_model

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def external_model(path: Path, floats: int = 5000) -> Path:
    """Two multiplications, each with its own external weight, and a third that shares the first's."""
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("Mul", ["x", "w0"], ["a"]),
        helper.make_node("Mul", ["a", "w1"], ["b"]),
        helper.make_node("Add", ["b", "w0"], ["y"]),
    ]
    graph = make_graph(nodes, [("x", FLOAT, [floats])], [("y", FLOAT, [floats])])
    data = b""
    for index in range(2):
        tensor = TensorProto(name=f"w{index}", data_type=FLOAT, dims=[floats], data_location=TensorProto.EXTERNAL)
        content = rng.normal(size=floats).astype(np.float32).tobytes()
        for key, value in (("location", "weights.bin"), ("offset", len(data)), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
        data += content + bytes(17)
        graph.initializer.append(tensor)
    (path.parent / "weights.bin").write_bytes(data)
    return write_model(path, graph)


def test_external_weights_are_copied_to_the_stages_that_need_them(tmp_path: Path) -> None:
    model = external_model(tmp_path / "m.onnx")
    plan = plan_split(read_layers(model), At((("a",), ("b",))))
    assert plan.duplicated == {"w0": 20000}
    stages = write_split(model, plan, tmp_path / "s")
    sizes = {path.name: path.stat().st_size for path in stages.folder.glob("*.data")}
    assert sizes == {"stage1.onnx.data": 20000, "stage2.onnx.data": 20000, "stage3.onnx.data": 20000}
    for path in stages.files:
        check_model(path)
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            assert {entry.key: entry.value for entry in tensor.external_data}["location"] == f"{path.name}.data"
    assert compare_chain(model, stages.folder).identical
    with pytest.raises(ModelError, match="not the one that was planned"):
        write_split(packaged("squeezenet").parent / "light_bvlc_alexnet.onnx", plan_big(), tmp_path / "t")


def plan_big():  # type: ignore[no-untyped-def]  # a fixture of many types
    return plan_split(read_layers(packaged("densenet121")), Balanced(2))


def test_holes_stay_holes(tmp_path: Path) -> None:
    """A gigabyte that takes no room in the model takes none in the stages."""
    count = 1 << 28
    nodes = [helper.make_node("Gather", ["table", "i"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    graph = make_graph(nodes, [("i", INT, [1])], [("y", FLOAT, [1])])
    tensor = TensorProto(name="table", data_type=FLOAT, dims=[count], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("length", 4 * count)):
        tensor.external_data.add(key=key, value=str(value))
    graph.initializer.append(tensor)
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.seek(4 * 1000)
        stream.write(np.float32(7).tobytes())
        stream.truncate(4 * count)
    if os.stat(tmp_path / "w.bin").st_blocks > 1000:
        pytest.skip("this file system has no sparse files")
    model = write_model(tmp_path / "m.onnx", graph)
    stages = write_split(model, plan_split(read_layers(model), At((("a",),))), tmp_path / "s")
    data = stages.folder / "stage1.onnx.data"
    assert data.stat().st_size == 4 * count
    assert data.stat().st_blocks < 1000
    with data.open("rb") as stream:
        stream.seek(4 * 1000)
        assert np.frombuffer(stream.read(4), np.float32)[0] == 7


@pytest.mark.parametrize("name", ["silero", "silero_ifless"])
def test_bodies_are_kept_whole_and_what_they_capture_crosses(tmp_path: Path, name: str) -> None:
    model = packaged(name)
    sizes = {"input[0]": 1, "input[1]": 512, "state[1]": 1, "batch": 1, "sequence": 512}
    graph = read_layers(model, sizes)
    before = sorted(op_types(model))
    plan = plan_split(graph, Balanced(2, "bytes"))
    stages = write_split(model, plan, tmp_path / "s")
    after = sorted(op for path in stages.files for op in op_types(path))
    assert before == after, "every node stands in one stage"
    feeds = [{
        "input": np.random.default_rng(1).uniform(-1, 1, (1, 512)).astype(np.float32),
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }]  # fmt: skip
    found = compare_chain(model, stages.folder, feeds=feeds)
    assert (found.max_abs, found.reason, found.data) == (0, "", "given")


def test_a_capture_becomes_an_input_of_the_stage(tmp_path: Path) -> None:
    body = make_graph([helper.make_node("Add", ["a", "a"], ["r"])], [], [("r", FLOAT, [4])], name="then")
    other = make_graph([helper.make_node("Neg", ["b"], ["q"])], [], [("q", FLOAT, [4])], name="else")
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Abs", ["a"], ["b"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other),
    ]
    graph = make_graph(nodes, [("x", FLOAT, [4]), ("c", TensorProto.BOOL, [])], [("y", FLOAT, [4])])
    model = write_model(tmp_path / "m.onnx", graph)
    plan = plan_split(read_layers(model), At((("a", "b"),)))
    assert {tensor.name for tensor in plan.stages[1].inputs} == {"a", "b", "c"}
    assert compare_chain(model, write_split(model, plan, tmp_path / "s").folder).identical


def reshaping(path: Path, batch: int | str) -> Path:
    """The shape of ``a``, made in the first stage, is used after a cut that ``a`` does not cross."""
    weights = {"w": np.ones((4, 6), np.float32), "i": np.array([0], np.int64), "rest": np.array([-1], np.int64)}
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("Gather", ["shape", "i"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["target"], axis=0),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Reshape", ["b", "target"], ["y"]),
    ]
    return write_model(path, make_graph(nodes, [("x", FLOAT, [batch, 3, 4])], [("y", FLOAT, [batch, 18])], weights))


def test_static_shapes_are_written_into_the_stage(tmp_path: Path) -> None:
    model = reshaping(tmp_path / "m.onnx", 2)
    plan = plan_split(read_layers(model), At((("b",),)))
    assert [tensor.name for tensor in plan.stages[1].inputs] == ["b"]
    assert plan.stages[1].known[0].values == (2, -1)
    stages = write_split(model, plan, tmp_path / "s")
    assert op_types(stages.files[1]) == ["Reshape"]
    assert compare_chain(model, stages.folder).identical


def test_open_shapes_are_shipped_when_they_cannot_be_repeated(tmp_path: Path) -> None:
    model = reshaping(tmp_path / "m.onnx", "n")
    plan = plan_split(read_layers(model), At((("b",),)))
    assert {tensor.name: tensor.bytes for tensor in plan.stages[1].inputs} == {"b": 72, "target": 16}
    assert compare_chain(model, write_split(model, plan, tmp_path / "s").folder, sizes={"n": 3}).identical


def test_open_shapes_are_repeated_where_their_source_crosses_anyway(tmp_path: Path) -> None:
    model = reshaping(tmp_path / "m.onnx", "n")
    plan = plan_split(read_layers(model), At((("a",),)))
    assert [tensor.name for tensor in plan.stages[1].inputs] == ["a"]
    stages = write_split(model, plan, tmp_path / "s")
    assert "Shape" in op_types(stages.files[1])
    assert "Shape" not in op_types(stages.files[0])
    assert compare_chain(model, stages.folder, sizes={"n": 3}).identical


def test_symbols_types_and_random_nodes(tmp_path: Path) -> None:
    """Symbolic shapes reach the stage; a random node is no constant, so it is not repeated."""
    nodes = [
        helper.make_node("RandomNormal", [], ["noise"], shape=[4], seed=1.0),
        helper.make_node("Mul", ["x", "noise"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Add", ["b", "noise"], ["y"]),
    ]
    model = write_model(tmp_path / "m.onnx", make_graph(nodes, [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 4])]))
    plan = plan_split(read_layers(model), At((("a", "noise"),)))
    stages = write_split(model, plan, tmp_path / "s")
    assert sum(op_types(path).count("RandomNormal") for path in stages.files) == 1
    value = next(each for each in onnx.load(stages.files[1]).graph.input if each.name == "a")
    assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == ["n", 4]


def test_constant_and_passed_through_outputs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["y"]),
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.arange(3, dtype=np.float32))),
        helper.make_node("Neg", ["k"], ["constant"]),
    ]
    outputs = [("y", FLOAT, [4]), ("constant", FLOAT, [3])]
    model = write_model(tmp_path / "m.onnx", make_graph(nodes, [("x", FLOAT, [4])], outputs))
    plan = plan_split(read_layers(model), At((("a",),)))
    stages = write_split(model, plan, tmp_path / "s")
    x = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(Chain(stages.folder).run({"x": x})["constant"], run(model, x=x)[1])
    assert compare_chain(model, stages.folder).identical


def test_nothing_half_written(tmp_path: Path) -> None:
    model = external_model(tmp_path / "m.onnx")
    plan = plan_split(read_layers(model), At((("a",),)))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not a split"):
        write_split(model, plan, full)

    def refuse(folder: Path) -> None:
        assert (folder / "stage1.onnx").exists()
        raise BuildError("no")

    with pytest.raises(BuildError):
        write_split(model, plan, tmp_path / "s", refuse)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(ModelError):
        write_split(model, plan, tmp_path / "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m.onnx", "weights.bin"]


def test_an_earlier_split_is_replaced(tmp_path: Path) -> None:
    model = external_model(tmp_path / "m.onnx")
    graph = read_layers(model)
    write_split(model, plan_split(graph, At((("a",), ("b",)))), tmp_path / "s")
    write_split(model, plan_split(graph, At((("a",),))), tmp_path / "s")
    assert sorted(path.name for path in (tmp_path / "s").glob("*.onnx")) == ["stage1.onnx", "stage2.onnx"]


def test_a_chain_that_is_not_the_model_is_told(tmp_path: Path) -> None:
    model = external_model(tmp_path / "m.onnx")
    stages = write_split(model, plan_split(read_layers(model), At((("a",),))), tmp_path / "s")
    spoilt = onnx.load(stages.files[1])
    spoilt.graph.node[-1].op_type = "Sub"
    onnx.save(spoilt, stages.files[1])
    found = compare_chain(model, stages.folder)
    assert found.max_abs > 0
    assert "differs" in found.reason
    assert not found.identical
    stages.files[1].unlink()
    assert "does not run" in compare_chain(model, stages.folder).reason
