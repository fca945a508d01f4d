"""Shuffles in front of convolutions in groups: an interleave of bytes where that is less work than dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("tvm")

from modelforge.compilers.tvm.kernels.shuffles import interleaved
from modelforge.target import Registry
from tests.compilers.tvm.kernels.float_layers import agrees, model
from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, imported, reference, run, spread, steps_apart
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, CORTEX_A76, runnable
from tests.compilers.tvm.models import Build, needs_qemu

SIZE = (9, 6)


def unit(parts: int, share: int, outputs: int, depthwise: bool = True) -> tuple[onnx.ModelProto, np.ndarray, float]:
    """A ShuffleNet unit: shuffle, depthwise, 1x1 in ``parts`` groups of ``share`` inputs and ``outputs`` outputs."""
    channels = parts * share
    layers = Layers((1, channels, *SIZE), seed=share)
    layers.quantize(0.03, 5)
    apart = layers.constant(np.array([1, parts, share, *SIZE]))
    turned = layers.node("Transpose", layers.node("Reshape", layers.value, apart), perm=[0, 2, 1, 3, 4])
    layers.value = layers.node("Reshape", turned, layers.constant(np.array([1, channels, *SIZE])))
    if depthwise:
        layers.convolution(channels, (3, 3), group=channels, pads=[1] * 4)
        layers.quantize(0.1, -3)
    layers.convolution(parts * outputs, (1, 1), group=parts)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    scale = spread(layers.model(), x)
    layers.quantize(scale, 0)
    return layers.model(), x, scale


@pytest.mark.parametrize("machine", runnable(AVX512))
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("share", [17, 32, 34])
def test_groups_are_kept_and_bytes_are_moved(machine: Any, parts: int, share: int) -> None:
    made, x, scale = unit(parts, share, 72)
    executable, reports = compiled(made, machine)
    assert [report.note for report in reports if report.rule == "shuffle"] == [f"{parts} parts"]
    (product,) = [report for report in reports if report.rule == "matmul-int8"]
    assert product.macs == np.prod(SIZE) * parts * 72 * share
    assert not [report for report in reports if "Error" in report.note]
    assert steps_apart(run(executable, x), reference(made, x), scale) <= 1


def test_a_dense_product_takes_the_order_where_it_is_less_work() -> None:
    """Few outputs: a pass over the input would cost more than the products with zeros."""
    _, reports = scheduled(unit(2, 8, 4, depthwise=False)[0], CORTEX_A76)
    assert not [report for report in reports if report.rule == "shuffle"]
    (product,) = [report for report in reports if report.rule == "matmul-int8"]
    assert product.macs == np.prod(SIZE) * 8 * 16


def test_sdot_under_qemu(build: Build, tmp_path: Path) -> None:
    needs_qemu()
    parts = 4
    made, x, scale = unit(parts, 34, 68)
    built = build(made, Registry().get("cortex-a76"), {"x": x.shape}, {}, "int8")
    (ours,) = built.run({"x": x}, tmp_path)[0].values()
    notes = {kernel["rule"]: kernel["note"] for kernel in built.compiled.report["kernels"]}
    assert notes["shuffle"] == f"{parts} parts"
    assert notes["matmul-int8"].startswith("sdot")
    assert steps_apart(ours, reference(made, x), scale) <= 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(parts=st.integers(2, 9), step=st.integers(2, 20), dtype=st.sampled_from([np.float32, np.int64]))
def test_any_order_that_takes_parts_in_turn(parts: int, step: int, dtype: Any) -> None:
    """A Gather along the last axis, of any type."""
    order = np.arange(parts * step).reshape(parts, step).T.ravel()
    assert interleaved(order, len(order)) == (parts, step)
    cast = helper.make_node("Cast", ["x"], ["c"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    nodes = [cast, helper.make_node("Gather", ["c", "order"], ["g"], axis=2)]
    nodes.append(helper.make_node("Cast", ["g"], ["y"], to=onnx.TensorProto.FLOAT))
    reports = agrees(model(nodes, (2, 3, len(order)), {"order": order}), AVX2, tolerance=0)
    assert [report.note for report in reports if report.rule == "shuffle"] == [f"{parts} parts"]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 2], [0, 4, 1, 5], [0, 2]])
def test_other_orders_are_no_shuffle(order: list[int]) -> None:
    assert interleaved(np.array(order), 4) is None


def test_a_part_of_the_channels_may_be_left_out() -> None:
    assert interleaved(np.array([0, 4, 1, 5, 2, 6]), 8) == (2, 4)


def scheduled(made: onnx.ModelProto, machine: Any) -> tuple[Any, list[Any]]:
    """Kernels and reports, without code."""
    from modelforge.compilers.tvm import lowering, scheduling

    return scheduling.schedule_all(lowering.lower(imported(made), machine), machine)
