"""Transposed convolutions are right for any geometry, and never fall back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.float_layers import agrees, assert_ran, model, scheduled, values
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable


def layer(shape: tuple[int, ...], outputs: int, kernel: int, groups: int = 1, **attrs: Any) -> onnx.ModelProto:
    """A transposed convolution with bias, and ReLU."""
    inputs = shape[1]
    weight = values(inputs, outputs // groups, kernel, kernel) / np.float32(kernel * inputs**0.5)
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w", "b"], ["t"], group=groups, kernel_shape=[kernel] * 2, **attrs),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    return model(nodes, shape, {"w": weight, "b": values(outputs, seed=2)})


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([1, 1, 2]),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    inputs=st.sampled_from([2, 6, 16]),
    outputs=st.sampled_from([2, 4, 12, 34]),
    kernel=st.integers(1, 5),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.sampled_from([1, 1, 2]),
    pad=st.integers(0, 2),
    extra=st.integers(0, 1),
    groups=st.sampled_from([1, 1, 2]),
)
def test_agrees_with_onnx_runtime(
    batch: int,
    size: tuple[int, int],
    inputs: int,
    outputs: int,
    kernel: int,
    strides: tuple[int, int],
    dilation: int,
    pad: int,
    extra: int,
    groups: int,
) -> None:
    span = dilation * (kernel - 1) + 1
    assume(all((size[axis] - 1) * strides[axis] + span - 2 * pad > 0 and extra < strides[axis] for axis in (0, 1)))
    made = layer(
        (batch, inputs, *size),
        outputs,
        kernel,
        groups,
        strides=strides,
        dilations=[dilation] * 2,
        pads=[pad] * 4,
        output_padding=[extra] * 2,
    )
    assert_ran(agrees(made, AVX2), "transposed")


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize("outputs", [1, 3, 24, 40])
def test_doubling_an_image(machine: Any, outputs: int) -> None:
    """As PP-OCR's detector does: window and stride of two; one output channel at the end."""
    assert_ran(agrees(layer((1, 24, 11, 20), outputs, 2, strides=[2, 2]), machine), "transposed")


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize(("outputs", "kernel"), [(1, 2), (24, 2), (32, 4), (10, 3)])
def test_applies_on_every_machine(machine: Any, outputs: int, kernel: int) -> None:
    _, reports = scheduled(layer((1, 24, 10, 13), outputs, kernel, strides=[2, 2]), machine)
    assert_ran(reports, "transposed")
    assert max(report.macs for report in reports) == 10 * 13 * 24 * outputs * kernel**2
