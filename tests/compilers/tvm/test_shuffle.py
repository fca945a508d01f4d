"""Channel shuffles vanish into what follows them, and nothing changes."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("tvm")

import numpy as np

from tests.compilers.tvm.kernels.float_layers import agrees, assert_ran, model, values
from tests.compilers.tvm.kernels.machines import AVX2


def shuffled(
    channels: int, parts: int, tail: list[onnx.NodeProto], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """``x`` with its channels shuffled as ``s``, then ``tail``."""
    nodes = [
        helper.make_node("Reshape", ["x", "apart"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", ["b", "whole"], ["s"]),
    ]
    shapes = {"apart": [1, parts, channels // parts, 6, 5], "whole": [1, channels, 6, 5]}
    return model([*nodes, *tail], (1, channels, 6, 5), {**{k: np.array(v) for k, v in shapes.items()}, **constants})


@settings(max_examples=8, deadline=None, derandomize=True)
@given(parts=st.sampled_from([2, 3, 4]), share=st.sampled_from([3, 4, 8]), groups=st.sampled_from([1, 2]))
def test_goes_through_a_depthwise_convolution_into_the_next(parts: int, share: int, groups: int) -> None:
    channels = parts * share * 2
    tail = [
        helper.make_node("Mul", ["s", "scale"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Conv", ["r", "dw", "db"], ["d"], group=channels, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["d", "w"], ["y"], group=groups),
    ]
    constants = {
        "scale": values(1, channels, 1, 1),
        "dw": values(channels, 1, 3, 3),
        "db": values(channels),
        "w": values(12, channels // groups, 1, 1),
    }
    reports = agrees(shuffled(channels, parts, tail, constants), AVX2)
    assert_ran(reports, "depthwise")
    assert_ran(reports, "convolution" if groups == 1 else "grouped")
    assert not [report for report in reports if "take" in report.name or "reshape" in report.name], reports


def test_what_needs_the_channels_in_order_gets_them() -> None:
    """ShuffleNet V2: half of the channels go on alone."""
    tail = [
        helper.make_node("Split", ["s"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Conv", ["right", "w"], ["c"]),
        helper.make_node("Concat", ["left", "c"], ["y"], axis=1),
    ]
    agrees(shuffled(16, 2, tail, {"w": values(8, 8, 1, 1)}), AVX2)


def test_a_shuffled_output_is_shuffled() -> None:
    agrees(shuffled(12, 3, [helper.make_node("Relu", ["s"], ["y"])], {}), AVX2, tolerance=0)


def test_two_shuffles_are_one() -> None:
    tail = [
        helper.make_node("Reshape", ["s", "apart"], ["a2"]),
        helper.make_node("Transpose", ["a2"], ["b2"], perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", ["b2", "whole"], ["s2"]),
        helper.make_node("Conv", ["s2", "w"], ["y"]),
    ]
    agrees(shuffled(12, 3, tail, {"w": values(4, 12, 1, 1)}), AVX2)
