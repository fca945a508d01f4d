"""Depthwise convolutions are right for any geometry, and never fall back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import target
from modelforge.compilers.tvm.kernels.convolution import Window
from modelforge.compilers.tvm.kernels.depthwise import met
from modelforge.compilers.tvm.pipeline import compile_module
from tests.compilers.tvm.kernels.float_layers import agrees, assert_ran, model, scheduled, values
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, CORTEX_A76, MACHINES, runnable


def layer(shape: tuple[int, ...], kernel: tuple[int, int], times: int = 1, **attrs: Any) -> onnx.ModelProto:
    """A depthwise convolution with bias and ReLU."""
    channels = shape[1]
    weight = values(channels * times, 1, *kernel) / np.float32(kernel[0] * kernel[1])
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["t"], group=channels, kernel_shape=list(kernel), **attrs),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    return model(nodes, shape, {"w": weight, "b": values(channels * times, seed=2)})


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([1, 1, 2]),
    channels=st.sampled_from([2, 3, 8, 13, 16, 34, 48, 58, 88]),
    size=st.tuples(st.integers(5, 19), st.integers(5, 19)),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([3, 5])),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilation=st.sampled_from([1, 1, 2]),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    times=st.sampled_from([1, 1, 2, 3]),
)
def test_agrees_with_onnx_runtime(
    batch: int,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilation: int,
    pads: tuple[int, ...],
    times: int,
) -> None:
    height, width = (max(size[axis], dilation * (kernel[axis] - 1) + 1) for axis in (0, 1))
    made = layer(
        (batch, channels, height, width), kernel, times, strides=strides, dilations=[dilation] * 2, pads=list(pads)
    )
    assert_ran(agrees(made, AVX2), "depthwise")


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize("channels", [8, 24, 88, 200])
def test_wide_images_take_several_blocks_of_rows(machine: Any, channels: int) -> None:
    made = layer((1, channels, 40, 70), (3, 3), strides=[1, 1], pads=[1, 1, 1, 1])
    assert_ran(agrees(made, machine), "depthwise")


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize(
    ("size", "kernel", "attrs"),
    [
        ((2, 30), (5, 5), {"pads": [2] * 4}),
        ((1, 7), (3, 3), {"pads": [1] * 4, "strides": [2, 2]}),
        ((2, 9), (2, 3), {"pads": [2, 1, 0, 1], "dilations": [3, 1]}),  # only the second row meets the image
    ],
)
def test_few_rows_under_a_tall_window(
    machine: Any, size: tuple[int, int], kernel: tuple[int, int], attrs: dict[str, Any]
) -> None:
    made = layer((2, 24, *size), kernel, **attrs)
    assert_ran(agrees(made, machine), "depthwise")


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_applies_on_every_machine(machine: Any, kernel: int) -> None:
    made = layer((2, 72, 17, 29), (kernel, kernel), strides=[2, 1], pads=[kernel // 2] * 4)
    _, reports = scheduled(made, machine)
    assert_ran(reports, "depthwise")
    assert next(report.macs for report in reports if report.rule == "depthwise") == 2 * 72 * 9 * 29 * kernel**2


def test_compiles_for_arm() -> None:
    module, _ = scheduled(layer((1, 40, 9, 9), (3, 3), pads=[1] * 4), CORTEX_A76)
    assert compile_module(module, target(CORTEX_A76)) is not None


@given(
    height=st.integers(1, 6),
    tall=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    top=st.integers(0, 4),
    bottom=st.integers(0, 4),
)
def test_rows_that_meet_only_padding_are_left_out(
    height: int, tall: int, stride: int, dilation: int, top: int, bottom: int
) -> None:
    span = dilation * (tall - 1) + 1
    if span > height + top + bottom:
        return
    window = Window((1, height, 5, 8), 8, (tall, 3), (stride, 1), (top, 1, bottom, 1), (dilation, 1))
    weight = np.arange(8 * tall * 3).reshape(8, tall, 3, 1)
    found, kept = met(window, weight)
    assert found.size == window.size
    for y in range(window.size[0]):
        at = {y * stride + row * dilation - top: weight[0, row, 0, 0] for row in range(tall)}
        after = {y * stride + row * dilation - found.padding[0]: kept[0, row, 0, 0] for row in range(len(kept[0]))}
        inside = {row: value for row, value in at.items() if 0 <= row < height}
        assert inside == {row: value for row, value in after.items() if 0 <= row < height}
