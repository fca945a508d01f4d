"""Floats become bytes as QuantizeLinear says, by conversions that round and narrowing that saturates."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, imported, reference, run
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, CORTEX_A76, runnable

HARD = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, -129.5, 1e9, -1e9, 3e38, -3e38, np.inf, -np.inf, 0.0, -0.0]
"""In steps: ties, what lies beyond a byte, beyond 32 bits, and infinite."""


def rounded(zero: int, dtype: str, bounds: tuple[float, float] | None = None) -> onnx.ModelProto:
    layers = Layers((1, 3, 7, len(HARD)))
    if bounds is not None:
        layers.value = layers.node("Clip", "x", *(layers.constant(np.float32(bound)) for bound in bounds))
    layers.quantize(1.0, zero, dtype)
    return layers.model()


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    zero=st.sampled_from([-128, -4, 0, 126]),  # even: an odd one is added before ties are rounded, not after
    unsigned=st.booleans(),
    bounds=st.sampled_from([None, (0.0, 6.5), (-40.0, 1e12), (300.0, 400.0)]),
)
def test_as_the_model_is_written(machine: Any, zero: int, unsigned: bool, bounds: tuple[float, float] | None) -> None:
    model = rounded(zero + 128 * unsigned, "uint8" if unsigned else "int8", bounds)
    x = np.random.default_rng(0).normal(scale=100, size=(1, 3, 7, len(HARD))).astype(np.float32)
    x[0, 0, 0] = HARD
    executable, reports = compiled(model, machine)
    assert any("requantize" in report.name for report in reports)
    np.testing.assert_array_equal(run(executable, x), reference(model, x))


def test_arm_converts_and_narrows_in_one_instruction_each() -> None:
    """No float is clipped, and no half-filled vector is narrowed twice."""
    from modelforge.compilers.tvm import lowering, pipeline, scheduling
    from modelforge.compilers.tvm.api import target

    layers = Layers((1, 16, 8, 8))
    layers.quantize(0.03, 5)
    layers.convolution(32, (1, 1))
    layers.quantize(0.05, 3)
    module, _ = scheduling.schedule_all(lowering.lower(imported(layers.model()), CORTEX_A76), CORTEX_A76)
    compiled_module = pipeline.compile_module(module, target(CORTEX_A76))
    code = next(each for each in modules(compiled_module.mod) if each.kind == "llvm").inspect_source("asm")
    layer = max(code.split(".globl"), key=lambda text: text.count("sdot"))
    assert "sqxtn" in layer
    assert "fcvtns" in layer
    assert "frintn" not in layer
    assert not {"fminnm", "fmaxnm"} & set(layer.split())
    assert "sub\tv" not in layer, "the zero point is where sums start"


def modules(module: Any) -> list[Any]:
    return [module, *(each for inner in module.imports for each in modules(inner))]


def test_biases_are_where_sums_start() -> None:
    """A bias, a zero point before and one behind: one product is left of them, and no sum."""
    layers = Layers((1, 8, 6, 6))
    layers.quantize(0.03, 5)
    layers.convolution(16, (3, 3))
    layers.quantize(0.05, 3)
    model = layers.model()
    _, reports = compiled(model, AVX2)
    (name,) = [report.name for report in reports if report.macs]
    layer = name.split("requantize")[0]  # the output's DQ is behind it
    assert layer.count("multiply") == 1, name
    assert layer.count("add") == layer.count("subtract") == 0, name
