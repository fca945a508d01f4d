"""Groups as bands: a block of output channels reads the input channels of its groups, and gives what they give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.kernels.bands import band_of
from modelforge.compilers.tvm.machine import Machine
from modelforge.target import Registry
from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, reference, rules, run, spread, steps_apart
from tests.compilers.tvm.kernels.machines import AVX512, CORTEX_A76, runnable
from tests.compilers.tvm.models import Build, needs_qemu

GROUPS = st.sampled_from([2, 3, 4, 8])
SHARES = st.sampled_from([1, 3, 4, 17, 20, 34])
"""Channels of a group: less than a vector, a vector, and no multiple of one."""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(groups=GROUPS, inputs=SHARES, outputs=SHARES, machine=st.sampled_from([AVX512, CORTEX_A76]))
def test_a_band_has_the_inputs_of_all_channels_of_its_block(
    groups: int, inputs: int, outputs: int, machine: Machine
) -> None:
    dice = np.random.default_rng(groups * inputs * outputs)
    weight = dice.integers(-127, 128, (groups * outputs, 1, 1, inputs)).astype(np.int8)
    band = band_of(weight, groups, machine)
    data = dice.integers(-128, 128, max(groups * inputs, band.length))
    banded = band.weights(weight)
    assert band.groups == groups
    assert band.products >= banded.size >= weight.size
    for channel in range(groups * outputs):
        place = channel // outputs * band.outputs + channel % outputs
        start = band.start(place // band.width)
        assert 0 <= start <= max(0, groups * inputs - band.length)
        own = data[channel // outputs * inputs :][:inputs] @ weight[channel, 0, 0].astype(int)
        assert data[start : start + band.length] @ banded[place, 0, 0].astype(int) == own


@pytest.mark.parametrize(("machine", "outputs", "length"), [(CORTEX_A76, 36, 136), (AVX512, 48, 136)])
def test_groups_stand_apart_where_that_is_less_work(machine: Machine, outputs: int, length: int) -> None:
    """A third of 34 channels are no whole vectors: a block of two groups would read the inputs of both."""
    band = band_of(np.zeros((136, 1, 1, 136), np.int8), 4, machine)
    assert (band.apart, band.outputs, band.length) == (True, outputs, length)


@pytest.mark.parametrize("machine", runnable(AVX512))
@settings(max_examples=10, deadline=None, derandomize=True)
@given(groups=GROUPS, inputs=SHARES, outputs=SHARES, kernel=st.sampled_from([1, 3]), batch=st.sampled_from([1, 2]))
def test_agrees_with_the_model_as_it_is_written(
    machine: object, groups: int, inputs: int, outputs: int, kernel: int, batch: int
) -> None:
    layers = Layers((batch, groups * inputs, 6, 5), seed=inputs)
    layers.quantize(0.03, 5)
    layers.convolution(groups * outputs, (kernel, kernel), group=groups, pads=[kernel // 2] * 4)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    scale = spread(layers.model(), x)
    layers.quantize(scale, 0)
    model = layers.model()
    executable, reports = compiled(model, machine)
    if inputs > 1 or outputs != 1:  # else it is depthwise
        assert rules(reports) <= {"matmul-int8", "convolution-int8", "depthwise-int8"}, reports
    assert steps_apart(run(executable, x), reference(model, x), scale) <= 1


@pytest.mark.parametrize("kernel", [1, 3])
def test_sdot_under_qemu(kernel: int, build: Build, tmp_path: Path) -> None:
    needs_qemu()
    layers = Layers((1, 68, 7, 6))
    layers.quantize(0.03, 5)
    layers.convolution(34, (kernel, kernel), group=2, pads=[kernel // 2] * 4)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    scale = spread(layers.model(), x)
    layers.quantize(scale, 0)
    model = layers.model()
    built = build(model, Registry().get("cortex-a76"), {"x": layers.shape}, {}, "int8")
    (ours,) = built.run({"x": x}, tmp_path)[0].values()
    assert {kernel["rule"] for kernel in built.compiled.report["kernels"] if kernel["macs"]} <= {
        "matmul-int8",
        "convolution-int8",
    }
    assert steps_apart(ours, reference(model, x), scale) <= 1
