"""Nodes that the importer would make wrong without a word: refused by name, or freed of what nothing reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

pytest.importorskip("tvm")

from modelforge.compilers.protocol import Refusal
from modelforge.compilers.tvm import TvmCompiler, frontend, preflight_nodes
from modelforge.errors import UnsupportedError
from tests.compilers.tvm.kernels.float_layers import agrees, values
from tests.compilers.tvm.kernels.graphs import here
from tests.compilers.tvm.models import this_machine

MICROSOFT = "com.microsoft"
CONSTANTS = {
    "scale": values(8, seed=1),
    "bias": values(8, seed=2),
    "variance": np.abs(values(8, seed=3)) + 1,
    "ratio": np.array(0.5, np.float32),
    "on": np.array(True),
    "off": np.array(False),
}
LAYER_NORM = ("LayerNormalization", ["x", "scale", "bias"])
SKIP = ("SkipLayerNormalization", ["x", "x", "scale", "bias", "bias"])
POOL = ("MaxPool", ["x"])
DROPOUT = ("Dropout", ["x"])
BATCH_NORM = ("BatchNormalization", ["x", "scale", "bias", "bias", "variance"])
KERNEL = {"kernel_shape": [2, 2], "strides": [2, 2]}


def graph(node: tuple[str, list[str]], outputs: list[str], *results: str, domain: str = "", **more: Any) -> Any:
    """A model of one node of a layer, whose ``results`` are outputs."""
    made = helper.make_node(*node, outputs, name="layer3/node", domain=domain, **more)
    shape = (2, 8, 8) if domain else (2, 8, 4, 8)
    whole = helper.make_graph(
        [made],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in results],
        [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(whole, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize(
    ("made", "op"),
    [
        (graph(LAYER_NORM, ["y", "mean"], "y", "mean"), "LayerNormalization"),
        (graph(LAYER_NORM, ["y", "", "deviation"], "y", "deviation"), "LayerNormalization"),
        (graph(DROPOUT, ["y", "mask"], "y", "mask"), "Dropout"),
        (graph(POOL, ["y", "indices"], "y", "indices", **KERNEL), "MaxPool"),
        (graph(SKIP, ["y", "", "", "sum"], "y", "sum", domain=MICROSOFT), "SkipLayerNormalization"),
    ],
)
def test_an_output_that_the_importer_has_not_is_refused_where_it_is_read(made: Any, op: str, tmp_path: Path) -> None:
    (refusal,) = refused(made, tmp_path)
    assert refusal.rule == "output"
    assert f"of {op} (node layer3/node)" in refusal.what
    with pytest.raises(UnsupportedError, match="layer3/node"):
        frontend.import_entries({"main": tmp_path / "model.onnx"})


def test_a_reader_inside_the_graph_counts(tmp_path: Path) -> None:
    made = graph(LAYER_NORM, ["h", "mean"], "y")
    made.graph.node.append(helper.make_node("Sub", ["x", "mean"], ["y"]))
    assert [refusal.rule for refusal in refused(made, tmp_path)] == ["output"]
    made.graph.node[1].input[1] = "h"
    assert refused(made, tmp_path) == []


def test_a_reader_that_nothing_needs_does_not_count(tmp_path: Path) -> None:
    made = graph(LAYER_NORM, ["y", "mean"], "y")
    made.graph.node.append(helper.make_node("Neg", ["mean"], ["unused"]))
    assert refused(made, tmp_path) == []


def test_a_reader_in_the_body_of_a_loop_counts(tmp_path: Path) -> None:
    made = graph(LAYER_NORM, ["h", "mean"], "y")
    body = helper.make_graph([helper.make_node("Neg", ["mean"], ["inner"])], "body", [], [])
    body.output.append(helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None))
    made.graph.node.append(helper.make_node("If", ["on"], ["y"], then_branch=body, else_branch=body))
    assert [refusal.rule for refusal in refused(made, tmp_path)] == ["output"]


@pytest.mark.parametrize(
    "made",
    [
        graph(BATCH_NORM, ["y"], "y", training_mode=1),
        graph(BATCH_NORM, ["y", "mean", "spread"], "y", training_mode=1),
        graph(BATCH_NORM, ["y", "mean", "spread", "saved", "kept"], "y"),  # so before opset 14
        graph(("Dropout", ["x", "ratio", "on"]), ["y"], "y"),
        graph(("Dropout", ["x", "ratio", "x"]), ["y"], "y"),
    ],
)
def test_training_mode_is_refused(made: Any, tmp_path: Path) -> None:
    (refusal,) = refused(made, tmp_path)
    assert refusal.rule == "training"
    assert "layer3/node" in refusal.what


@pytest.mark.parametrize(
    "made",
    [
        graph(LAYER_NORM, ["y", "mean", "deviation"], "y"),
        graph(DROPOUT, ["y", "mask"], "y"),
        graph(("Dropout", ["x", "ratio", "off"]), ["y"], "y"),
        graph(POOL, ["y", "indices"], "y", **KERNEL),
        graph(POOL, ["y", ""], "y", **KERNEL),
        graph(SKIP, ["y", "", "", "sum"], "y", domain=MICROSOFT),
        graph(BATCH_NORM, ["y"], "y"),
    ],
)
def test_what_nothing_reads_is_left_out(made: Any, tmp_path: Path) -> None:
    assert refused(made, tmp_path) == []
    agrees(made, here())


def test_every_operator_with_optional_outputs_is_known() -> None:
    """Those of the importer's table that ONNX gives some; the others give all that they have."""
    whole = {"Unique"}  # refused: data-dependent
    optional = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and any("Optional" in str(output.option) for output in schema.outputs)
    }
    from modelforge.compilers.tvm.preflight import importable

    known = {op for domain, op in preflight_nodes._GIVEN if domain == ""} | {"BatchNormalization"}
    assert (optional & importable()[""]) - whole == known


def refused(made: Any, folder: Path) -> list[Refusal]:
    path = folder / "model.onnx"
    onnx.save(made, path)
    return TvmCompiler().supports_model(path, this_machine())
