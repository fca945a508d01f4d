"""Convolutions of int8 agree with the QDQ model to one step of the output, on any geometry, and for every machine."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from modelforge.compilers.tvm.machine import Machine
from modelforge.target import Registry
from tests.compilers.tvm.models import Build, needs_qemu

pytest.importorskip("tvm")

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


def layer(
    shape: tuple[int, int, int, int],
    channels: int,
    kernel: tuple[int, int],
    stride: int = 1,
    pad: int = 1,
    dilation: int = 1,
    zero: int = 0,
    dtype: str = "int8",
    activation: str = "Relu",
) -> tuple[Layers, float]:
    """Q, DQ, Conv, an activation, Q, DQ, and the scale of the last Q."""
    layers = Layers(shape)
    layers.quantize(0.02, zero, dtype)
    attributes = {"strides": [stride] * 2, "pads": [pad] * 4, "dilations": [dilation] * 2}
    layers.convolution(channels, kernel, **attributes)
    if activation:
        layers.value = layers.node(activation, layers.value)
    scale = spread(layers.model(), layers.rng.normal(size=shape).astype(np.float32))
    layers.quantize(scale, -3)
    return layers, scale


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@settings(max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(5, 17), st.integers(5, 17)),
    inputs=st.integers(1, 40),
    channels=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.integers(1, 2),
    pad=st.integers(0, 2),
    dilation=st.integers(1, 2),
    zero=st.sampled_from([0, -128, 37]),
    activation=st.sampled_from(["", "Relu", "HardSwish", "Sigmoid"]),
)
def test_agrees_to_one_step(
    machine: Machine,
    batch: int,
    size: tuple[int, int],
    inputs: int,
    channels: int,
    kernel: tuple[int, int],
    stride: int,
    pad: int,
    dilation: int,
    zero: int,
    activation: str,
) -> None:
    if any((side - 1) * dilation + 1 > length + 2 * pad for side, length in zip(kernel, size, strict=True)):
        return
    layers, scale = layer((batch, inputs, *size), channels, kernel, stride, pad, dilation, zero, activation=activation)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    model = layers.model()
    executable, reports = compiled(model, machine)
    assert rules(reports) <= {"convolution-int8", "matmul-int8"}, reports
    theirs = reference(model, x)
    assert np.abs(theirs).max() > 0
    assert steps_apart(run(executable, x), theirs, scale) <= 1


@pytest.mark.parametrize("name", list(MACHINES))
@pytest.mark.parametrize(
    ("shape", "channels", "kernel"),
    [
        ((1, 32, 9, 14), 48, (3, 3)),
        ((2, 16, 8, 8), 24, (1, 1)),
        ((1, 3, 12, 12), 10, (3, 3)),
        ((1, 20, 7, 7), 17, (1, 1)),
        ((1, 40, 5, 13), 33, (3, 3)),
    ],
)
def test_the_rule_applies_on_every_machine(
    name: str, shape: tuple[int, int, int, int], channels: int, kernel: tuple[int, int]
) -> None:
    layers, _ = layer(shape, channels, kernel, pad=kernel[0] // 2)
    _, reports = compiled(layers.model(), MACHINES[name])
    assert rules(reports) == {"matmul-int8" if kernel == (1, 1) else "convolution-int8"}, reports


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
def test_unsigned_activations_of_a_foreign_model_are_taken(machine: Machine) -> None:
    layers, scale = layer((1, 12, 9, 9), 20, (3, 3), zero=113, dtype="uint8")
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(layers.model(), machine)
    assert rules(reports) == {"convolution-int8"}
    assert steps_apart(run(executable, x), reference(layers.model(), x), scale) <= 1


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
def test_sums_do_not_saturate(machine: Machine) -> None:
    """The largest products that there are: VPMADDUBSW would clip them at 2 ** 15."""
    layers = Layers((1, 64, 6, 6))
    layers.quantize(1 / 127, 0)
    weight = np.full((16, 64, 3, 3), 127, np.int8)
    scale = layers.constant(np.full(16, 1 / 127, np.float32))
    values = layers.constant(weight)
    dequantized = layers.node("DequantizeLinear", values, scale, layers.constant(np.zeros(16, np.int8)), axis=0)
    layers.value = layers.node("Conv", layers.value, dequantized, pads=[1] * 4)
    layers.quantize(576 / 127, 0)
    x = np.ones(layers.shape, np.float32)
    ours = run(compiled(layers.model(), machine)[0], x)
    np.testing.assert_allclose(ours, reference(layers.model(), x), rtol=1e-6)
    assert ours.max() == pytest.approx(576, rel=1e-3)


RUNS = [
    ((1, 3, 23, 61), (7, 7), 2),
    ((1, 16, 10, 21), (3, 3), 2),
    ((1, 1, 12, 21), (5, 5), 1),
    ((1, 32, 9, 12), (3, 3), 1),
    ((2, 3, 14, 30), (3, 3), 2),
    ((1, 6, 9, 17), (1, 3), 1),
]
"""Images of few channels, and padded ones: a row of a window is one run of bytes."""


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize(("shape", "kernel", "stride"), RUNS)
def test_rows_of_windows(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], stride: int, machine: Machine
) -> None:
    layers, scale = layer(shape, 16, kernel, stride, pad=kernel[0] // 2, zero=-9)
    x = layers.rng.normal(size=shape).astype(np.float32)
    executable, reports = compiled(layers.model(), machine)
    assert rules(reports) == {"convolution-int8"}
    assert steps_apart(run(executable, x), reference(layers.model(), x), scale) <= 1


@pytest.mark.parametrize("tag", ["cortex-a76", "cortex-a53"])
@pytest.mark.parametrize(("shape", "kernel", "stride"), RUNS[:4])  # batches of one
def test_rows_of_windows_on_arm(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], stride: int, tag: str, build: Build, tmp_path: Path
) -> None:
    needs_qemu()
    layers, scale = layer(shape, 16, kernel, stride, pad=kernel[0] // 2, zero=-9)
    x = layers.rng.normal(size=shape).astype(np.float32)
    built = build(layers.model(), Registry().get(tag), {"x": shape}, {}, "int8")
    (ours,) = built.run({"x": x}, tmp_path)[0].values()
    assert steps_apart(ours, reference(layers.model(), x), scale) <= 1


def test_three_channels_are_not_filled_up_to_four() -> None:
    """7x7 of 3: 21 bytes a row, 24 with the last step, where 4 bytes for each pixel would be 28."""
    from modelforge.compilers.tvm import lowering
    from modelforge.compilers.tvm.api import kernels

    layers, _ = layer((1, 3, 32, 32), 16, (7, 7), 2, pad=3)
    module = lowering.lower(imported(layers.model()), MACHINES["cortex-a76"])
    (first,) = [body for name, body in kernels(module) if "convolution_int8" in name.name_hint]
    sizes = [
        prod(int(size) for size in re.findall(r"\d+(?=\)|,)", shape))
        for shape in re.findall(r'param_\d+: T\.Buffer\(\((.*?)\), "int8"\)', first.script())
    ]
    assert sizes == [16 * 7 * 24]


@pytest.mark.parametrize(("pad", "axes"), [(1, 3), (0, None)])
def test_padded_rows_are_runs_with_borders_of_their_own(pad: int, axes: int | None) -> None:
    """Whole steps too: the copy has one axis for columns and channels, and no vector of it asks where it is."""
    from modelforge.compilers.tvm import lowering, scheduling
    from modelforge.compilers.tvm.api import kernels

    layers, _ = layer((1, 16, 20, 20), 32, (3, 3), pad=pad)
    machine = MACHINES["cortex-a76"]
    module, _ = scheduling.schedule_all(lowering.lower(imported(layers.model()), machine), machine)
    (script,) = [body.script() for name, body in kernels(module) if "convolution_int8" in name.name_hint]
    copied = re.search(r"pad_operand = T\.(?:sblock_)?alloc_buffer\(\((.*?)\)", script)
    assert (copied.group(1).count(",") + 1 if copied else None) == axes, script
    assert ("pragma_loop_partition_hint" in script) == (axes is not None)
