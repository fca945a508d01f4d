"""Which rule a kernel gets, and what becomes of one whose rule fails: slower, right, and told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from modelforge.compilers.tvm import lowering, pipeline, scheduling  # noqa: E402  # they import TVM
from modelforge.compilers.tvm.api import relax, target  # noqa: E402  # TVM may be missing
from modelforge.compilers.tvm.kernels import convolution  # noqa: E402  # TVM may be missing
from modelforge.compilers.tvm.machine import Machine  # noqa: E402  # TVM may be missing

AVX2 = Machine("x86_64-linux-gnu", "x86-64-v3", (), 2, 256)


def convolved() -> tuple[Any, np.ndarray[Any, Any]]:
    """A lowered 1x1 convolution of 8 channels with ReLU behind it, and its weights."""
    weight = np.random.default_rng(0).standard_normal((8, 8, 1, 1)).astype(np.float32)
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((1, 8, 6, 6), "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            sums = builder.emit(relax.op.nn.conv2d(data, relax.const(weight)))
            result = builder.emit_output(relax.op.nn.relu(sums))
        builder.emit_func_output(result)
    return lowering.lower(builder.get(), AVX2), weight


def run(module: Any, weight: np.ndarray[Any, Any]) -> None:
    executable = pipeline.compile_module(module, target(AVX2))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    data = np.random.default_rng(1).standard_normal((1, 8, 6, 6)).astype(np.float32)
    found = machine["main"](tvm.runtime.tensor(data)).numpy()
    wanted = np.maximum(np.einsum("ncyx,oc->noyx", data, weight[:, :, 0, 0]), 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_kernel_gets_the_rule_that_made_it_and_its_multiply_adds_are_counted() -> None:
    module, weight = convolved()
    module, reports = scheduling.schedule_all(module, AVX2)
    report = next(report for report in reports if report.macs)
    assert (report.rule, report.macs) == ("convolution", 8 * 8 * 6 * 6)
    run(module, weight)


def test_a_rule_that_fails_leaves_a_right_kernel_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("no such tile")

    module, weight = convolved()
    monkeypatch.setattr(convolution.Convolution, "schedule", fail)
    module, reports = scheduling.schedule_all(module, AVX2)
    report = next(report for report in reports if report.macs)
    assert report.rule == "generic"
    assert "convolution: no such tile" in report.note
    run(module, weight)
