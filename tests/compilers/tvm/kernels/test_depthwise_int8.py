"""Depthwise convolutions of int8 agree with the QDQ model to one step, for any window and every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from modelforge.compilers.tvm.machine import Machine

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, reference, rules, run, spread, steps_apart
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable


def layer(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], stride: int = 1, pad: int = 1, zero: int = 0
) -> tuple[Layers, float]:
    """Q, DQ, depthwise Conv, Relu, Q, DQ, and the scale of the last Q."""
    layers = Layers(shape)
    layers.quantize(0.02, zero)
    layers.convolution(shape[1], kernel, group=shape[1], strides=[stride] * 2, pads=[pad] * 4)
    layers.value = layers.node("Relu", layers.value)
    scale = spread(layers.model(), layers.rng.normal(size=shape).astype(np.float32))
    layers.quantize(scale, -128)
    return layers, scale


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@settings(max_examples=9, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
@given(
    batch=st.integers(1, 2),
    channels=st.integers(2, 70),
    size=st.tuples(st.integers(5, 15), st.integers(5, 15)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 2),
    pad=st.integers(0, 2),
    zero=st.sampled_from([0, -128, 37]),
)
def test_agrees_to_one_step(
    machine: Machine,
    batch: int,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    pad: int,
    zero: int,
) -> None:
    layers, scale = layer((batch, channels, *size), kernel, stride, pad, zero)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(layers.model(), machine)
    assert rules(reports) <= {"depthwise-int8", "depthwise-dot"}, reports
    assert steps_apart(run(executable, x), reference(layers.model(), x), scale) <= 1


@pytest.mark.parametrize("name", list(MACHINES))
@pytest.mark.parametrize(
    ("shape", "kernel", "stride"), [((1, 33, 10, 14), (3, 3), 1), ((2, 20, 9, 9), (5, 5), 2), ((1, 7, 8, 8), (3, 3), 1)]
)
def test_the_rule_applies_on_every_machine(
    name: str, shape: tuple[int, int, int, int], kernel: tuple[int, int], stride: int
) -> None:
    layers, _ = layer(shape, kernel, stride, kernel[0] // 2)
    _, reports = compiled(layers.model(), MACHINES[name])
    assert rules(reports) == {"depthwise-int8"}, reports
