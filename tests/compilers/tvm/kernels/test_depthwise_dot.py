"""Depthwise convolutions by dot products over four pixels agree with the QDQ model, for any window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from modelforge.compilers.tvm.machine import Machine

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import target, tvm
from modelforge.compilers.tvm.kernels.convolution import Window
from modelforge.compilers.tvm.kernels.depthwise_dot import _Groups
from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, reference, rules, run, spread, steps_apart
from tests.compilers.tvm.kernels.machines import AVX512, CORTEX_A53, CORTEX_A76, MACHINES, runnable
from tests.compilers.tvm.models import Build, cortex_a76, needs_qemu

SEARCH = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)


def layer(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: int = 1,
    zero: int = 0,
    dtype: str = "int8",
) -> tuple[Layers, float]:
    """Q, DQ, depthwise Conv, Q, DQ, and the scale of the last Q."""
    layers = Layers(shape)
    layers.quantize(0.02, zero, dtype)
    attributes = {"strides": list(strides), "pads": list(pads), "dilations": [dilation, 1]}
    layers.convolution(shape[1], kernel, group=shape[1], **attributes)
    scale = spread(layers.model(), layers.rng.normal(size=shape).astype(np.float32))
    layers.quantize(scale, 3)
    return layers, scale


@pytest.mark.parametrize("machine", runnable(AVX512))
@SEARCH
@given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([16, 32, 48]),
    size=st.tuples(st.integers(1, 17), st.integers(2, 19)),
    kernel=st.tuples(st.integers(1, 5), st.sampled_from([2, 3, 3, 4, 5, 5, 7, 9])),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.sampled_from([1, 1, 2]),
    zero=st.sampled_from([0, -128, 37]),
)
@example(1, 16, (9, 14), (3, 3), (1, 1), (1, 1, 1, 1), 1, 37)  # a width that no tile divides
@example(2, 16, (2, 20), (5, 5), (1, 1), (2, 2, 2, 2), 1, -128)  # rows of the window that meet only padding
@example(1, 16, (2, 9), (2, 3), (1, 1), (2, 1, 0, 1), 3, 37)  # one row of the window, below the image's first
@example(1, 16, (7, 1), (3, 3), (2, 2), (1, 1, 1, 1), 1, -5)
def test_agrees_to_one_step(
    machine: Machine,
    batch: int,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilation: int,
    zero: int,
) -> None:
    top, left, bottom, right = pads
    height = max(size[0], dilation * (kernel[0] - 1) + 1 - top - bottom)
    width = max(size[1], kernel[1] - left - right)
    layers, scale = layer((batch, channels, height, width), kernel, strides, pads, dilation, zero)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(layers.model(), machine)
    assert rules(reports) == {"depthwise-dot"}, reports
    assert steps_apart(run(executable, x), reference(layers.model(), x), scale) <= 1


@pytest.mark.parametrize("machine", runnable(AVX512))
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_wide_images_take_several_blocks_of_rows(machine: Machine, dtype: str) -> None:
    layers, scale = layer((1, 32, 40, 130), (5, 5), pads=(2, 2, 2, 2), zero=100, dtype=dtype)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(layers.model(), machine)
    assert rules(reports) == {"depthwise-dot"}, reports
    assert steps_apart(run(executable, x), reference(layers.model(), x), scale) <= 1


@pytest.mark.parametrize("machine", runnable(AVX512))
def test_sums_do_not_saturate(machine: Machine) -> None:
    layers = Layers((1, 16, 6, 6))
    layers.quantize(1 / 127, 0)
    values, zeros = layers.constant(np.full((16, 1, 5, 5), 127, np.int8)), layers.constant(np.zeros(16, np.int8))
    weight = layers.node("DequantizeLinear", values, layers.constant(np.full(16, 1 / 127, np.float32)), zeros, axis=0)
    layers.value = layers.node("Conv", layers.value, weight, pads=[2] * 4, group=16)
    layers.quantize(25 / 127, 0)
    x = np.ones(layers.shape, np.float32)
    ours = run(compiled(layers.model(), machine)[0], x)
    np.testing.assert_allclose(ours, reference(layers.model(), x), rtol=1e-6)
    assert ours.max() == pytest.approx(25, rel=1e-3)


@pytest.mark.parametrize("name", list(MACHINES))
@pytest.mark.parametrize("channels", [8, 16, 24, 30])
@pytest.mark.parametrize(
    ("size", "kernel", "strides"),
    [((9, 14), (3, 3), (1, 1)), ((9, 9), (5, 5), (2, 2)), ((8, 6), (3, 3), (1, 3)), ((8, 6), (3, 1), (1, 1))],
)
def test_is_taken_where_there_are_dot_products(
    name: str, channels: int, size: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int]
) -> None:
    """Elsewhere, and for other windows and channels, sums are those of :mod:`depthwise_int8`."""
    layers, _ = layer((1, channels, *size), kernel, strides)
    _, reports = compiled_for(layers, MACHINES[name])
    together = {"cortex-a76": 8, "avx512-vnni": 16}.get(name)
    taken = together is not None and channels % together == 0 and kernel[1] > 1 and strides[1] < 3
    assert rules(reports) == {"depthwise-dot" if taken else "depthwise-int8"}, reports


def compiled_for(layers: Layers, machine: Machine) -> tuple[object, list[object]]:
    """The kernels as they were scheduled: no code is made of them."""
    from modelforge.compilers.tvm import lowering, scheduling
    from tests.compilers.tvm.kernels.integer_layers import imported

    return scheduling.schedule_all(lowering.lower(imported(layers.model()), machine), machine)


@pytest.mark.parametrize(("machine", "wanted"), [(CORTEX_A76, True), (CORTEX_A53, False)])
def test_arm_sums_by_sdot_what_it_stored_by_st4(machine: Machine, wanted: bool) -> None:
    layers, _ = layer((1, 16, 9, 20), (3, 3), zero=-7)
    module, _ = compiled_for(layers, machine)
    text = assembly(tvm.compile(module, target(machine)).mod)
    assert ("sdot" in text, "st4" in text) == (wanted, wanted)


def assembly(module: object) -> str:
    """What LLVM made of a module and those that it brings along."""
    own = module.inspect_source("asm") if module.kind == "llvm" else ""  # type: ignore[attr-defined]
    return own + "".join(assembly(each) for each in module.imports)  # type: ignore[attr-defined]


@pytest.mark.qemu
def test_cortex_a76_under_qemu(build: Build, tmp_path: Path) -> None:
    """Windows of both strides, over sixteen and over eight channels, over few rows and over many."""
    needs_qemu()
    scale, shapes = 0.05, [(3, 1, 1), (3, 2, 1), (5, 1, 2), (5, 2, 2), (7, 1, 3)]
    for channels, size in ((24, (9, 14)), (16, (2, 21))):
        layers = Layers((1, channels, *size))
        start, flat = layers.quantize(0.02, 21), []
        for kernel, stride, pad in shapes:
            layers.value = start
            layers.convolution(channels, (kernel, kernel), group=channels, strides=[stride] * 2, pads=[pad] * 4)
            layers.quantize(scale, 0)
            flat.append(layers.node("Flatten", layers.value))
        layers.value = layers.node("Concat", *flat, axis=1)
        model = layers.model()
        made = build(model, cortex_a76(), {"x": layers.shape}, {}, precision="int8")
        x = layers.rng.normal(size=layers.shape).astype(np.float32)
        folder = tmp_path / str(channels)
        folder.mkdir()
        (ours,) = made.run({"x": x}, folder)[0].values()
        assert steps_apart(ours, reference(model, x), scale) <= 1
        assert "depthwise-dot" in (made.model.parent / "work" / "answer.json").read_text()


@given(wide=st.integers(2, 12), stride=st.integers(1, 2), width=st.integers(1, 12))
def test_groups_have_each_tap_once(wide: int, stride: int, width: int) -> None:
    """What the packed weights give over groups of four pixels is the window's row over the pixels."""
    window = Window((1, 3, 2 * width + wide + 8, 8), 8, (2, wide), (1, stride), (0, 0, 0, 0), (1, 1))
    rng = np.random.default_rng(wide)
    weight = rng.integers(-9, 10, (8, 2, wide)).astype(np.int8)
    groups = _Groups.of(window)
    packed = groups.pack(weight, 8)[0].astype(int)
    wide_tile = -(-width // groups.turns) * groups.turns
    pixels = rng.integers(-9, 10, (2 * groups.pixels(wide_tile) + 2, 8))
    for x in range(wide_tile):
        ours = np.zeros(8, int)
        for group in range(groups.count):
            at = 2 * (x // groups.turns) + group * groups.step
            ours += (packed[1, group, x % groups.turns] * pixels[at : at + 4].T).sum(axis=1)
        np.testing.assert_array_equal(ours, (weight[:, 1].T * pixels[x * stride : x * stride + wide]).sum(axis=0))
