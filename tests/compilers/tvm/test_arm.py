"""Arm's own instructions give what the model's operators do: hard values, under QEMU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("tvm")

from modelforge.target import Registry
from tests.compilers.tvm.kernels.integer_layers import reference
from tests.compilers.tvm.kernels.test_requantize import HARD, rounded
from tests.compilers.tvm.models import Build, needs_qemu


@pytest.mark.parametrize(("zero", "bounds"), [(-128, None), (3, None), (127, (-7.5, 5e9)), (-5, (300.0, 400.0))])
def test_bytes_as_onnx_rounds_them(zero: int, bounds: tuple[float, float] | None, build: Build, tmp_path: Path) -> None:
    """Odd zero points too: they are added behind the rounding of ties, as QuantizeLinear says."""
    needs_qemu()
    model = rounded(zero, "int8", bounds)
    x = np.random.default_rng(0).normal(scale=100, size=(1, 3, 7, len(HARD))).astype(np.float32)
    x[0, 0, 0] = HARD
    (ours,) = build(model, Registry().get("cortex-a76"), {"x": x.shape}, {}, "int8").run({"x": x}, tmp_path)[0].values()
    np.testing.assert_array_equal(ours, reference(model, x))


def test_extremes_hand_nan_on(build: Build, tmp_path: Path) -> None:
    needs_qemu()
    nodes = [
        helper.make_node("Max", ["x", "one"], ["least"], name="max"),
        helper.make_node("Min", ["least", "two"], ["y"], name="min"),
    ]
    graph = helper.make_graph(
        nodes,
        "extremes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 37))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 37))],
        [helper.make_tensor(name, TensorProto.FLOAT, (), [value]) for name, value in (("one", 1.0), ("two", 2.0))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    x = np.linspace(-4, 4, 37, dtype=np.float32)[None]
    x[0, [0, 5, 36]] = np.nan, np.inf, -np.inf
    (ours,) = build(model, Registry().get("cortex-a76"), {"x": x.shape}, {}).run({"x": x}, tmp_path)[0].values()
    np.testing.assert_array_equal(ours, np.clip(x, 1.0, 2.0))
