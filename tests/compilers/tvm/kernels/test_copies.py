"""Kernels that move elements move the right ones, and in vectors or tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.float_layers import Array, agrees, assert_ran, model, scheduled
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable

POOL = helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[1, 1])
"""What it gives lies channels last."""


def concat(shape: tuple[int, ...], others: list[int]) -> onnx.ModelProto:
    """An image joined with slices of itself along channels."""
    nodes, constants = [POOL], {"axes": np.array([1]), "zero": np.array([0])}
    for at, channels in enumerate(others):
        constants[f"end{at}"] = np.array([channels])
        nodes.append(helper.make_node("Slice", ["p", "zero", f"end{at}", "axes"], [f"s{at}"]))
    names = ["p", *(f"s{at}" for at in range(len(others)))]
    return model([*nodes, helper.make_node("Concat", names, ["y"], axis=1)], shape, constants)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    channels=st.sampled_from([3, 16, 24, 34, 64]),
    shares=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_concatenation(channels: int, shares: list[int], size: tuple[int, int]) -> None:
    made = concat((2, channels, *size), [max(1, channels * share // 8) for share in shares])
    reports = agrees(made, AVX2, tolerance=0)
    assert not [report for report in reports if report.rule == "none"]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_concatenations_are_rows_of_vectors(machine: Any) -> None:
    assert_ran(scheduled(concat((1, 64, 14, 14), [32, 48]), machine)[1], "copies")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 35), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_transposes(shape: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(shape)).tolist()
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=order),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    agrees(model(nodes, shape), AVX2, tolerance=0)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("perm", [[0, 2, 3, 1], [0, 3, 1, 2], [0, 1, 3, 2]])
def test_transposes_go_by_tiles(machine: Any, perm: list[int]) -> None:
    _, reports = scheduled(model([helper.make_node("Transpose", ["x"], ["y"], perm=perm)], (1, 48, 40, 32)), machine)
    assert_ran(reports, "copies")
    assert "tiles" in reports[0].note


def resize(sizes: Array, **attrs: Any) -> onnx.ModelProto:
    shape = (1, 6, 7, 9)
    target = np.array([1, 6, *sizes], np.int64)
    nodes = [POOL, helper.make_node("Resize", ["p", "", "", "sizes"], ["y"], **attrs)]
    return model(nodes, shape, {"sizes": target})


@pytest.mark.parametrize("machine", runnable(AVX512))
@pytest.mark.parametrize("place", ["asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("sizes", [(14, 27), (10, 5), (7, 18)])
def test_resizing(machine: Any, place: str, sizes: tuple[int, int]) -> None:
    for method in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
        made = resize(np.array(sizes), mode="nearest", coordinate_transformation_mode=place, nearest_mode=method)
        agrees(made, machine, tolerance=0)
    agrees(resize(np.array(sizes), mode="linear", coordinate_transformation_mode=place), machine)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_resizes_are_copies_on_every_machine(machine: Any) -> None:
    made = resize(np.array([14, 18]), mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    _, reports = scheduled(made, machine)
    assert [report for report in reports if "resize" in report.name and "resize2d" not in report.name], reports
    assert not [report for report in reports if "Error" in report.note]


@pytest.mark.parametrize("sections", [[16, 16], [5, 20, 7], [1, 31]])
def test_splits_are_slices(sections: list[int]) -> None:
    """Each part is read where it is used: nothing is copied beforehand."""
    names = [f"s{at}" for at in range(len(sections))]
    nodes = [
        POOL,
        helper.make_node("Split", ["p", "sections"], names, axis=1),
        helper.make_node("Neg", [names[0]], ["n"]),
        helper.make_node("Concat", [*names[1:], "n"], ["y"], axis=1),
    ]
    reports = agrees(model(nodes, (1, 32, 6, 7), {"sections": np.array(sections)}), AVX2, tolerance=0)
    # The pool of one pixel, what joins the parts, and the order of axes that the model wants.
    assert len(reports) <= 3


def test_gathers_of_channels() -> None:
    nodes = [POOL, helper.make_node("Gather", ["p", "order"], ["y"], axis=1)]
    for order in ([3, 1, -1, 0, 0], list(np.arange(12).reshape(3, 4).T.ravel())):
        agrees(model(nodes, (1, 12, 5, 6), {"order": np.array(order)}), AVX2, tolerance=0)
