"""Each graph pass on the trap that it is there for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper

from modelforge.errors import BuildError
from modelforge.graph.load import load, save
from modelforge.graph.passes import (
    FoldBatchNormalization,
    LiftConstants,
    RemoveDeadNodes,
    RemoveIdentities,
    RemoveInitializerInputs,
    RemoveUnusedOpsets,
    UniqueNames,
    run_passes,
)
from tests.graph.conftest import make_graph, op_types, packaged, run, write_model

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(5)


def _apply(source: Path, folder: Path, *passes: onnx_ir.passes.PassBase) -> tuple[Path, dict[str, bool]]:
    model = load(source)
    modified = run_passes(model, passes, str(source))
    return save(model, folder, "result.onnx")[0], modified


def test_constants_are_lifted_in_bodies_too(tmp_path: Path) -> None:
    path, modified = _apply(packaged("silero"), tmp_path, LiftConstants(), RemoveDeadNodes())
    assert modified["LiftConstants"]
    assert "Constant" in op_types(packaged("silero"))
    assert "Constant" not in op_types(path)


def test_a_constant_that_is_an_output_stays(tmp_path: Path) -> None:
    value = onnx.numpy_helper.from_array(np.ones(2, np.float32))
    nodes = [helper.make_node("Constant", [], ["k"], value=value), helper.make_node("Relu", ["x"], ["y"])]
    graph = make_graph(nodes, [("x", FLOAT, [1])], [("y", FLOAT, [1]), ("k", FLOAT, [2])])
    path, _ = _apply(write_model(tmp_path / "m.onnx", graph), tmp_path, LiftConstants())
    np.testing.assert_array_equal(run(path, x=np.ones(1, np.float32))[1], np.ones(2))


def _norm_model(
    folder: Path, layer: onnx.NodeProto, weights: dict[str, np.ndarray], x: list[int], channels: int
) -> Path:
    statistics = {
        "scale": RNG.uniform(0.5, 2, channels),
        "shift": RNG.normal(size=channels),
        "mean": RNG.normal(size=channels) * 1e4,
        # The largest of PP-OCRv4 det's.
        "var": RNG.uniform(1e7, 9.8e7, channels),
    }
    norm = helper.make_node("BatchNormalization", ["c", *statistics], ["y"], epsilon=1e-3)
    every = {key: np.asarray(value, np.float32) for key, value in (weights | statistics).items()}
    graph = make_graph([layer, norm], [("x", FLOAT, x)], [("y", FLOAT, None)], every)
    return write_model(folder / "norm.onnx", graph)


@pytest.mark.parametrize(
    ("layer", "weights", "x", "channels"),
    [
        (helper.make_node("Conv", ["x", "w"], ["c"]), {"w": (6, 4, 3, 3)}, [2, 4, 7, 7], 6),
        (helper.make_node("Conv", ["x", "w", "b"], ["c"], group=2), {"w": (6, 2, 3, 3), "b": (6,)}, [2, 4, 7, 7], 6),
        (helper.make_node("ConvTranspose", ["x", "w", "b"], ["c"]), {"w": (4, 6, 3, 3), "b": (6,)}, [2, 4, 7, 7], 6),
        (helper.make_node("ConvTranspose", ["x", "w"], ["c"], group=2), {"w": (4, 3, 3, 3)}, [2, 4, 7, 7], 6),
        (helper.make_node("Gemm", ["x", "w", "b"], ["c"], beta=0.5), {"w": (5, 6), "b": (1, 6)}, [3, 5], 6),
        (helper.make_node("Gemm", ["x", "w"], ["c"], transB=1, alpha=3.0), {"w": (6, 5)}, [3, 5], 6),
    ],
)
def test_batch_normalization_folds(
    tmp_path: Path, layer: onnx.NodeProto, weights: dict[str, tuple[int, ...]], x: list[int], channels: int
) -> None:
    arrays = {name: RNG.normal(size=shape) * 1e4 for name, shape in weights.items()}
    source = _norm_model(tmp_path, layer, arrays, x, channels)
    path, _ = _apply(source, tmp_path, FoldBatchNormalization(), RemoveDeadNodes())
    assert op_types(path) == [layer.op_type]
    inputs = RNG.normal(size=x).astype(np.float32)
    np.testing.assert_allclose(run(path, x=inputs)[0], run(source, x=inputs)[0], rtol=2e-4, atol=2e-4)


def test_a_layer_that_something_else_reads_is_not_folded_into(tmp_path: Path) -> None:
    source = _norm_model(
        tmp_path, helper.make_node("Conv", ["x", "w"], ["c"]), {"w": RNG.normal(size=(6, 4, 1, 1))}, [1, 4, 3, 3], 6
    )
    model = onnx.load(source)
    model.graph.node.append(helper.make_node("Relu", ["c"], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", FLOAT, None))
    source.write_bytes(model.SerializeToString())
    path, modified = _apply(source, tmp_path, FoldBatchNormalization())
    assert not modified["FoldBatchNormalization"]
    assert "BatchNormalization" in op_types(path)


def test_a_shared_weight_is_folded_once_for_each_layer(tmp_path: Path) -> None:
    """Two Convs share `w`; only one has a normalization behind it."""
    weights = {name: RNG.uniform(1, 2, 4).astype(np.float32) for name in ("scale", "shift", "mean", "var")}
    weights["w"] = RNG.normal(size=(4, 4, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["y"]),
        helper.make_node("Conv", ["x", "w"], ["z"]),
    ]
    graph = make_graph(nodes, [("x", FLOAT, [1, 4, 3, 3])], [("y", FLOAT, None), ("z", FLOAT, None)], weights)
    source = write_model(tmp_path / "m.onnx", graph)
    path, _ = _apply(source, tmp_path, FoldBatchNormalization(), RemoveDeadNodes())
    assert op_types(path) == ["Conv", "Conv"]
    inputs = RNG.normal(size=(1, 4, 3, 3)).astype(np.float32)
    for got, wanted in zip(run(path, x=inputs), run(source, x=inputs), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_identities_go_where_they_may(tmp_path: Path) -> None:
    """Kept: one from an input to an output, and one of two outputs that share a producer."""
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Identity", ["b"], ["c"]),
        helper.make_node("Identity", ["c"], ["y"]),
        helper.make_node("Identity", ["b"], ["z"]),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    outputs = [(name, FLOAT, [3]) for name in ("y", "z", "same")]
    source = write_model(tmp_path / "m.onnx", make_graph(nodes, [("x", FLOAT, [3])], outputs))
    path, _ = _apply(source, tmp_path, RemoveIdentities())
    assert sorted(op_types(path)) == ["Identity", "Identity", "Relu"]
    onnx.checker.check_model(str(path), full_check=True)
    inputs = np.array([-1, 0, 1], np.float32)
    for got, wanted in zip(run(path, x=inputs), run(source, x=inputs), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_an_identity_that_brings_an_outer_value_into_a_body_stays(tmp_path: Path) -> None:
    bodies = [
        make_graph([helper.make_node("Identity", [outer], [f"{outer}_in"])], [], [(f"{outer}_in", FLOAT, [2])])
        for outer in ("p", "x")
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["p"]),
        helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
    ]
    graph = make_graph(nodes, [("c", TensorProto.BOOL, []), ("x", FLOAT, [2])], [("y", FLOAT, [2])])
    path, _ = _apply(write_model(tmp_path / "m.onnx", graph), tmp_path, RemoveIdentities())
    inputs = np.array([-1, 2], np.float32)
    np.testing.assert_array_equal(run(path, x=inputs, c=np.array(True))[0], [0, 2])
    np.testing.assert_array_equal(run(path, x=inputs, c=np.array(False))[0], [-1, 2])


def test_names_are_unique_over_bodies_and_never_empty(tmp_path: Path) -> None:
    body = make_graph([helper.make_node("Neg", ["x"], ["n"], name="same")], [], [("n", FLOAT, [1])])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="same"),
        helper.make_node("Neg", ["r"], ["m"], name="same_1"),
        helper.make_node("Abs", ["m"], ["a"]),
        helper.make_node("If", ["c"], ["i"], then_branch=body, else_branch=body, name="same"),
        helper.make_node("Add", ["a", "i"], ["y"], name="same"),
    ]
    graph = make_graph(nodes, [("c", TensorProto.BOOL, []), ("x", FLOAT, [1])], [("y", FLOAT, [1])])
    model = load(write_model(tmp_path / "m.onnx", graph))
    run_passes(model, [UniqueNames()], "m")
    names = [node.name for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph)]
    assert len(set(names)) == len(names) == 7
    assert "same_1" in names  # a name that was unique stays
    assert "Abs/a" in names


def test_weights_among_the_inputs_and_unused_opsets_go(tmp_path: Path) -> None:
    path, modified = _apply(packaged("resnet50"), tmp_path, RemoveInitializerInputs())
    assert modified["RemoveInitializerInputs"]
    result = onnx.load(path)
    assert len(result.graph.input) == 1
    assert result.ir_version >= 4
    onnx.checker.check_model(result)
    path, _ = _apply(packaged("magika"), tmp_path, RemoveUnusedOpsets())
    assert [item.domain for item in onnx.load(path).opset_import] == [""]


def test_the_pass_that_fails_is_named(conv_model: Path) -> None:
    class Explode(onnx_ir.passes.InPlacePass):
        def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
            raise ZeroDivisionError("boom")

    with pytest.raises(BuildError, match="the graph pass Explode failed: ZeroDivisionError: boom"):
        run_passes(load(conv_model), [Explode()], "m")
