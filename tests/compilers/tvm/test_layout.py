"""What the layout pass turns, computes the same, and reaches the rules for images."""

from __future__ import annotations

import pytest
from onnx import helper

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.float_layers import agrees, assert_ran, model, values
from tests.compilers.tvm.kernels.machines import AVX2


@pytest.mark.parametrize(
    ("groups", "channels", "outputs", "kernel", "stride", "dilation", "rule"),
    [
        (1, 16, 24, 3, 1, 1, "convolution"),
        (1, 24, 33, 5, 2, 1, "convolution"),
        (16, 16, 16, 3, 1, 2, "depthwise"),
        (4, 16, 16, 1, 1, 1, "grouped"),
    ],
)
def test_convolutions_along_a_line(
    groups: int, channels: int, outputs: int, kernel: int, stride: int, dilation: int, rule: str
) -> None:
    attrs = {"group": groups, "strides": [stride], "dilations": [dilation], "pads": [1, 2]}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["t"], **attrs),
        helper.make_node("Relu", ["t"], ["u"]),
        helper.make_node("Conv", ["u", "v"], ["y"]),
    ]
    constants = {
        "w": values(outputs, channels // groups, kernel),
        "b": values(outputs, seed=2),
        "v": values(8, outputs, 1, seed=3),
    }
    assert_ran(agrees(model(nodes, (2, channels, 40), constants), AVX2), rule)


def test_a_convolution_of_volumes_has_vectors() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["t"], pads=[1] * 6), helper.make_node("Relu", ["t"], ["y"])]
    (report,) = agrees(model(nodes, (1, 8, 6, 7, 16), {"w": values(12, 8, 3, 3, 3)}), AVX2)
    assert report.rule == "generic"
    assert "scalar" not in report.note


def test_a_squeeze_and_excitation_computes_its_factors_once() -> None:
    """The factors are broadcast over the image: their convolution is not repeated for each pixel."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["m"]),
        helper.make_node("Conv", ["m", "b"], ["f"]),
        helper.make_node("HardSigmoid", ["f"], ["s"]),
        helper.make_node("Mul", ["c", "s"], ["y"]),
    ]
    reports = agrees(model(nodes, (1, 8, 9, 10), {"a": values(24, 8, 1, 1), "b": values(24, 24, 1, 1)}), AVX2)
    assert_ran(reports, "image-pooling")
    assert_ran(reports, "convolution")
