"""What the layout pass turns, computes the same, and reaches the rules for images."""

from __future__ import annotations

from typing import Any

import numpy as np
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


BEHIND = {
    "a mean over pixels": [("ReduceMean", {"keepdims": 0}, ["pixels"])],
    "a mean over rows": [("ReduceMean", {"keepdims": 0}, ["rows"])],
    "a mean over channels": [("ReduceMean", {"keepdims": 0}, ["axis"])],
    "the largest channel": [("ReduceMax", {"keepdims": 1}, ["axis"]), ("Sigmoid", {}, [])],
    "a softmax over channels": [("Softmax", {"axis": 1}, []), ("Relu", {}, [])],
    "a softmax over columns": [("Softmax", {"axis": -1}, []), ("Relu", {}, [])],
    "a constant for each channel": [("Mul", {}, ["channel"]), ("Relu", {}, [])],
    "a constant for each pixel": [("Add", {}, ["pixel"]), ("Relu", {}, [])],
    "a slice of channels": [("Slice", {}, ["from", "to", "axis"]), ("Relu", {}, [])],
    "an image as a line": [("Reshape", {}, ["line"]), ("Transpose", {"perm": [0, 2, 1]}, [])],
    "pixels as tokens": [("Flatten", {"axis": 2}, []), ("Relu", {}, [])],
}
"""Operators behind a convolution, each with its attributes and constants."""


@pytest.mark.parametrize("chain", BEHIND.values(), ids=BEHIND)
def test_what_stands_behind_a_convolution_is_turned_with_it(chain: list[tuple[str, dict[str, Any], list[str]]]) -> None:
    nodes, last = [helper.make_node("Conv", ["x", "w"], ["v0"], pads=[1] * 4)], "v0"
    for at, (op, attrs, constants) in enumerate(chain):
        name = "y" if at == len(chain) - 1 else f"v{at + 1}"
        nodes.append(helper.make_node(op, [last, *constants], [name], **attrs))
        last = name
    given = {
        "w": values(24, 8, 3, 3),
        "channel": values(24, 1, 1, seed=5),
        "pixel": values(9, 10, seed=6),
        "from": np.array([3]),
        "to": np.array([17]),
        "axis": np.array([1]),
        "rows": np.array([2]),
        "pixels": np.array([2, 3]),
        "line": np.array([0, 24, -1]),
    }
    used = {name: given[name] for name in ("w", *(name for _, _, constants in chain for name in constants))}
    assert_ran(agrees(model(nodes, (2, 8, 9, 10), used), AVX2), "convolution")
