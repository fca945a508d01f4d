"""Quantized transposed convolutions are integer products, of any geometry, and bytes take their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.phases import as_phases
from modelforge.target import Registry
from tests.compilers.tvm.kernels.integer_layers import (
    Layers,
    compiled,
    imported,
    reference,
    rules,
    run,
    spread,
    steps_apart,
)
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable
from tests.compilers.tvm.models import Build, needs_qemu


def layer(
    shape: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, int],
    tail: tuple[str, ...] = ("Relu",),
    axis: int | None = 1,
    **attributes: Any,
) -> tuple[onnx.ModelProto, np.ndarray, float]:
    """A transposed convolution with bias and what follows it, its input, and a step of its output."""
    layers = Layers(shape, seed=outputs)
    layers.quantize(0.03, 5)
    weight = layers.weight((shape[1], outputs // attributes.get("group", 1), *kernel), axis)
    layers.value = layers.node("ConvTranspose", layers.value, weight, layers.bias(outputs), **attributes)
    for op in tail:
        layers.value = layers.node(op, layers.value)
    x = layers.rng.normal(size=shape).astype(np.float32)
    scale = spread(layers.model(), x)
    layers.quantize(scale, -7)
    return layers.model(), x, scale


@pytest.mark.parametrize("machine", runnable(AVX512))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([1, 1, 2]),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    inputs=st.sampled_from([2, 6, 16, 33]),
    outputs=st.sampled_from([1, 2, 12, 34]),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.sampled_from([1, 1, 2]),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    extra=st.integers(0, 1),
    axis=st.sampled_from([None, 1]),
)
def test_agrees_with_the_model_as_it_is_written(
    machine: Any,
    batch: int,
    size: tuple[int, int],
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilation: int,
    pads: tuple[int, ...],
    extra: int,
    axis: int | None,
) -> None:
    for along in (0, 1):
        whole = (size[along] - 1) * strides[along] + dilation * (kernel[along] - 1) + 1
        assume(whole > pads[along] + pads[2 + along] and extra < strides[along])
    made, x, scale = layer(
        (batch, inputs, *size),
        outputs,
        kernel,
        axis=axis,
        strides=strides,
        dilations=[dilation] * 2,
        pads=pads,
        output_padding=[extra] * 2,
    )
    executable, reports = compiled(made, machine)
    assert not [report for report in reports if "Error" in report.note], reports
    assert rules(reports) <= {"matmul-int8", "convolution-int8"}, reports
    assert steps_apart(run(executable, x), reference(made, x), scale) <= 1


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("outputs", "kernel"), [(1, 2), (24, 2), (12, 4), (10, 3)])
def test_bytes_are_moved_on_every_machine(name: str, outputs: int, kernel: int) -> None:
    """Bias, ReLU and Q are in the kernel of the products; pixels take their places as bytes."""
    from modelforge.compilers.tvm import lowering, scheduling
    from modelforge.compilers.tvm.api import bindings, dtype_of, shape_of

    made, _, _ = layer((1, 24, 10, 13), outputs, (kernel, kernel), strides=[2, 2])
    module = lowering.lower(imported(made), MACHINES[name])
    floats = [
        shape_of(variable)
        for variable, _, _ in bindings(module)
        if variable is not None and dtype_of(variable) == "float32"
    ]
    assert len(floats) == 1, floats  # the model's output
    _, reports = scheduling.schedule_all(module, MACHINES[name])
    assert rules(reports) == {"matmul-int8" if kernel == 2 else "convolution-int8"}
    taps = -(-kernel // 2)
    height, width = 10 + taps - 1, 13 + taps - 1
    assert max(report.macs for report in reports) == height * width * 24 * 4 * outputs * taps**2
    (placed,) = [report for report in reports if report.rule == "phases"]
    assert placed.note.startswith("pixels of 2" if outputs == 1 else "rows of")
    assert not [report for report in reports if "Error" in report.note]


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
def test_what_each_value_goes_through_alone_goes_before(machine: Any) -> None:
    """As at the end of PP-OCR's detector: one channel and a sigmoid, and a float output."""
    layers = Layers((1, 24, 9, 20))
    layers.quantize(0.03, 5)
    weight = layers.weight((24, 1, 2, 2), 1)
    layers.value = layers.node("ConvTranspose", layers.value, weight, layers.bias(1), strides=[2, 2])
    layers.value = layers.node("Sigmoid", layers.value)
    made, x = layers.model(), layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(made, machine)
    (product,) = [report for report in reports if report.macs]
    assert (product.rule, "sigmoid" in product.name, "add" in product.name) == ("matmul-int8", True, False)
    assert np.abs(run(executable, x) - reference(made, x)).max() < 1e-4


@pytest.mark.parametrize("machine", runnable(AVX512))
def test_groups_stay_in_float(machine: Any) -> None:
    made, x, scale = layer((1, 8, 6, 7), 12, (2, 2), strides=[2, 2], group=2, axis=None)
    executable, reports = compiled(made, machine)
    assert rules(reports) == {"transposed"}
    assert steps_apart(run(executable, x), reference(made, x), scale) <= 1


@pytest.mark.parametrize("tag", ["cortex-a76", pytest.param("cortex-a53", marks=pytest.mark.slow)])
def test_arm_code_agrees_under_qemu(tag: str, build: Build, tmp_path: Path) -> None:
    """SDOT; SMLAL on the other, which compiles and emulates the same again."""
    needs_qemu()
    made, x, scale = layer((1, 24, 7, 18), 20, (3, 2), strides=[2, 2], pads=[1, 0, 1, 0])
    built = build(made, Registry().get(tag), {"x": x.shape}, {}, "int8")
    (ours,) = built.run({"x": x}, tmp_path)[0].values()
    assert {kernel["rule"] for kernel in built.compiled.report["kernels"] if kernel["macs"]} == {"convolution-int8"}
    assert steps_apart(ours, reference(made, x), scale) <= 1


def test_taps_of_a_phase() -> None:
    """Element s * t + p of the window is tap t of phase p, in reverse."""
    weight = np.arange(4, dtype=np.int8).reshape(1, 1, 1, 4)
    assert as_phases(weight, (1, 2), (1, 1)).tolist() == [[[[2, 0]]], [[[3, 1]]]]
    assert as_phases(weight[..., :3], (1, 2), (1, 1)).tolist() == [[[[2, 0]]], [[[0, 1]]]]
