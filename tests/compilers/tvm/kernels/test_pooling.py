"""Pools are right for any window, and never fall back."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.float_layers import agrees, assert_ran, model, scheduled
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable


def layer(kind: str, shape: tuple[int, ...], **attrs: Any) -> onnx.ModelProto:
    """A pool, and the negative of it."""
    return model([helper.make_node(kind, ["x"], ["t"], **attrs), helper.make_node("Neg", ["t"], ["y"])], shape)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["MaxPool", "AveragePool"]),
    batch=st.sampled_from([1, 1, 2]),
    channels=st.sampled_from([2, 3, 8, 24, 58, 96]),
    size=st.tuples(st.integers(6, 17), st.integers(6, 17)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padded=st.tuples(*[st.integers(0, 2)] * 4),
    ceil=st.booleans(),
    counted=st.booleans(),
)
def test_agrees_with_onnx_runtime(
    kind: str,
    batch: int,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padded: tuple[int, ...],
    ceil: bool,
    counted: bool,
) -> None:
    pads = [min(pad, kernel[axis % 2] - 1) for axis, pad in enumerate(padded)]
    extra = {"count_include_pad": int(counted)} if kind == "AveragePool" else {}
    # Beyond the padding, runtimes differ on what a mean divides by: windows that end there are left out.
    ends = [(size[axis] + pads[axis] + pads[axis + 2] - kernel[axis]) % strides[axis] == 0 for axis in (0, 1)]
    made = layer(
        kind,
        (batch, channels, *size),
        kernel_shape=kernel,
        strides=strides,
        pads=pads,
        ceil_mode=int(ceil and (all(ends) or kind == "MaxPool")),
        **extra,
    )
    assert_ran(agrees(made, AVX2), "pooling")


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
def test_dilated_maxima(machine: Any) -> None:
    made = layer("MaxPool", (1, 16, 12, 13), kernel_shape=[3, 3], dilations=[2, 2], pads=[2, 1, 2, 1])
    assert_ran(agrees(made, machine), "pooling")


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize("shape", [(1, 16, 7, 7), (2, 1000, 13, 13), (1, 3, 5, 6), (1, 96, 40, 40), (2, 58, 1, 9)])
@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool"])
def test_whole_images(machine: Any, shape: tuple[int, ...], kind: str) -> None:
    made = model(
        [
            helper.make_node("MaxPool", ["x"], ["a"], kernel_shape=[1, 1]),  # what is read lies channels last
            helper.make_node(kind, ["a"], ["t"]),
            helper.make_node("Sigmoid", ["t"], ["y"]),
        ],
        shape,
    )
    assert_ran(agrees(made, machine), "image-pooling")


def test_a_window_as_large_as_the_image_is_the_image() -> None:
    assert_ran(agrees(layer("AveragePool", (1, 24, 7, 7), kernel_shape=[7, 7]), AVX2), "image-pooling")


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_applies_on_every_machine(machine: Any) -> None:
    for channels in (24, 64, 100):
        window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
        for kind in ("MaxPool", "AveragePool"):
            assert_ran(scheduled(layer(kind, (1, channels, 20, 31), **window), machine)[1], "pooling")
        whole = layer("AveragePool", (1, channels, 12, 14), kernel_shape=[12, 14])
        assert_ran(scheduled(whole, machine)[1], "image-pooling")
