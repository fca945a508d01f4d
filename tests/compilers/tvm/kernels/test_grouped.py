"""Grouped convolutions are right for any geometry, shuffled or not, and never fall back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.float_layers import agrees, assert_ran, model, scheduled, values
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable


def layer(shape: tuple[int, ...], groups: int, depth: int, share: int, kernel: int, **attrs: Any) -> onnx.ModelProto:
    """A grouped convolution with bias, and ReLU; ``shape`` is (batch, height, width)."""
    batch, height, width = shape
    weight = values(groups * share, depth, kernel, kernel) / np.float32(depth * kernel)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["t"], group=groups, kernel_shape=[kernel, kernel], **attrs),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    return model(nodes, (batch, groups * depth, height, width), {"w": weight, "b": values(groups * share, seed=2)})


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.sampled_from([1, 1, 2]), st.integers(3, 14), st.integers(3, 14)),
    groups=st.sampled_from([2, 3, 4, 8]),
    depth=st.sampled_from([2, 3, 4, 17]),
    share=st.sampled_from([1, 4, 6, 8, 17, 34, 50]),
    kernel=st.sampled_from([1, 1, 3]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
)
def test_agrees_with_onnx_runtime(
    shape: tuple[int, int, int],
    groups: int,
    depth: int,
    share: int,
    kernel: int,
    stride: int,
    dilation: int,
    pads: tuple[int, ...],
) -> None:
    span = dilation * (kernel - 1) + 1
    shape = (shape[0], max(shape[1], span), max(shape[2], span))
    made = layer(shape, groups, depth, share, kernel, strides=[stride] * 2, dilations=[dilation] * 2, pads=list(pads))
    assert_ran(agrees(made, AVX2), "grouped")


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
def test_residual_sums_are_joined(machine: Any) -> None:
    made = model(
        [
            helper.make_node("Conv", ["x", "w"], ["t"], group=4),
            helper.make_node("Add", ["t", "x"], ["u"]),
            helper.make_node("Relu", ["u"], ["y"]),
        ],
        (1, 136, 7, 9),
        {"w": values(136, 34, 1, 1)},
    )
    reports = agrees(made, machine)
    assert_ran(reports, "grouped")
    assert len([report for report in reports if report.rule not in ("copies", "generic")]) == 1


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("share", [4, 17, 34, 64])
def test_applies_on_every_machine(machine: Any, share: int) -> None:
    for kernel in (1, 3):
        made = layer((1, 14, 15), 4, share, share, kernel, pads=[kernel // 2] * 4)
        _, reports = scheduled(made, machine)
        assert_ran(reports, "grouped")
        assert max(report.macs for report in reports) == 14 * 15 * 4 * share * share * kernel**2
