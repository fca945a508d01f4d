"""Products of int8 matrices agree with the QDQ model to one step of the output, for any sizes and every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from modelforge.compilers.tvm.machine import Machine

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, reference, rules, run, spread, steps_apart
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable


def product(
    leading: tuple[int, ...], inner: int, columns: int, zero: int = 0, op: str = "MatMul"
) -> tuple[Layers, float]:
    """Q, DQ, MatMul and Add (or Gemm with transB), Relu, Q, DQ, and the scale of the last Q."""
    layers = Layers((*leading, inner))
    layers.quantize(0.02, zero)
    if op == "Gemm":
        weight = layers.weight((columns, inner), 0)
        layers.value = layers.node("Gemm", layers.value, weight, layers.bias(columns), transB=1)
    else:
        layers.value = layers.node("MatMul", layers.value, layers.weight((inner, columns), 1))
        layers.value = layers.node("Add", layers.value, layers.bias(columns))
    layers.value = layers.node("Relu", layers.value)
    scale = spread(layers.model(), layers.rng.normal(size=layers.shape).astype(np.float32))
    layers.quantize(scale, -128)
    return layers, scale


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@settings(max_examples=9, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
@given(
    leading=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    inner=st.integers(1, 70),
    columns=st.integers(1, 90),
    zero=st.sampled_from([0, -128, 37]),
    op=st.sampled_from(["MatMul", "Gemm"]),
)
@example(leading=(1,), inner=64, columns=290, zero=37, op="MatMul")  # tiles reach beyond the last block of weights
@example(leading=(3,), inner=20, columns=54, zero=0, op="MatMul")
def test_agrees_to_one_step(
    machine: Machine, leading: tuple[int, ...], inner: int, columns: int, zero: int, op: str
) -> None:
    layers, scale = product(leading[:1] if op == "Gemm" else leading, inner, columns, zero, op)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(layers.model(), machine)
    assert rules(reports) == {"matmul-int8"}, reports
    assert steps_apart(run(executable, x), reference(layers.model(), x), scale) <= 1


@pytest.mark.parametrize("name", list(MACHINES))
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 64, 100), (17, 24, 48), (8, 30, 7)])
def test_the_rule_applies_on_every_machine(name: str, rows: int, inner: int, columns: int) -> None:
    layers, _ = product((rows,), inner, columns)
    _, reports = compiled(layers.model(), MACHINES[name])
    assert rules(reports) == {"matmul-int8"}, reports
