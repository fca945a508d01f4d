"""Small ONNX models compiled in this process, and what ONNX Runtime makes of them: what tests of float rules share."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.tvm import frontend
from modelforge.compilers.tvm.api import relax, target, tvm
from modelforge.compilers.tvm.lowering import lower
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.pipeline import compile_module
from modelforge.compilers.tvm.scheduling import KernelReport, schedule_all

Array = np.ndarray[Any, Any]


def model(nodes: Sequence[Any], shape: Sequence[int], constants: dict[str, Array] | None = None) -> onnx.ModelProto:
    """A model from ``x`` of a shape to ``y``."""
    graph = helper.make_graph(
        list(nodes),
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    )


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scheduled(made: onnx.ModelProto, machine: Machine) -> tuple[Any, list[KernelReport]]:
    """The scheduled module of a model, and the reports on its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(made, path)
        module = frontend.import_entries({"main": path})
    return schedule_all(lower(module, machine), machine)


def agrees(made: onnx.ModelProto, machine: Machine, tolerance: float = 1e-4) -> list[KernelReport]:
    """Run a model compiled for a machine that this one is, compare with ONNX Runtime, return the kernels' reports."""
    module, reports = scheduled(made, machine)
    executable = compile_module(module, target(machine))
    shape = [size.dim_value for size in made.graph.input[0].type.tensor_type.shape.dim]
    data = values(*shape, seed=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    (wanted,) = onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, {"x": data})
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(data)).numpy()
    assert got.shape == wanted.shape
    assert np.ptp(wanted) > 0 or wanted.size == 1
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(wanted).max())))
    return reports


def assert_ran(reports: list[KernelReport], rule: str) -> None:
    """The rule scheduled a kernel, and no kernel fell back from its own rule."""
    assert rule in {report.rule for report in reports}, reports
    assert not [report for report in reports if "Error" in report.note or report.rule == "none"], reports
