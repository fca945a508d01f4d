"""HardSwish in 16 bits on Arm: bytes as from floats, within what its text says, and floats where it cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.fixed import Chain, fixed
from modelforge.compilers.tvm.machine import Machine
from modelforge.target import Registry
from tests.compilers.tvm.kernels.integer_layers import Array, Layers, imported, reference, spread, steps_apart
from tests.compilers.tvm.kernels.machines import AVX512, CORTEX_A53, CORTEX_A76
from tests.compilers.tvm.models import Build, needs_qemu


def model(
    channels: int, *, reach: float = 1.0, op: str = "HardSwish", affine: bool = False, read: bool = False
) -> tuple[onnx.ModelProto, float, Array]:
    """A quantized convolution with HardSwish or something alike, quantized; the last step, and an input.

    Args:
        reach: how far the values go.
        affine: whether a factor and an offset follow.
        read: whether something reads the result as a float as well.
    """
    layers = Layers((1, 16, 8, 9))
    layers.quantize(0.03 * reach, 5)
    value = layers.convolution(channels, (3, 3))
    if op == "HardSwish":
        layers.value = layers.node("HardSwish", value)
    else:
        moved = layers.node("Add", value, layers.constant(np.array(2.5, np.float32)))
        bounds = [layers.constant(np.float32(bound)) for bound in (0, 4)]
        layers.value = layers.node("Mul", layers.node("Clip", moved, *bounds), value)
    if affine:
        layers.value = layers.node("Mul", layers.value, layers.constant(np.array([1.3], np.float32)))
        layers.value = layers.node("Add", layers.value, layers.constant(np.array([-0.21], np.float32)))
    product = layers.value
    x = (layers.rng.normal(size=layers.shape) * reach).astype(np.float32)
    scale = spread(layers.model(), x)
    layers.quantize(scale, -3)
    if read:
        layers.value = layers.node("Add", layers.value, layers.node("Neg", product))
    return layers.model(), scale, x


def kernels_of(made: onnx.ModelProto, machine: Machine) -> list[str]:
    from modelforge.compilers.tvm import lowering
    from modelforge.compilers.tvm.api import kernels

    return [name.name_hint for name, _ in kernels(lowering.lower(imported(made), machine))]


@pytest.mark.parametrize("machine", [CORTEX_A53, CORTEX_A76], ids=["cortex-a53", "cortex-a76"])
@pytest.mark.parametrize("kind", [{}, {"op": "another"}, {"affine": True}, {"reach": 2.0}], ids=str)
def test_it_is_found(machine: Machine, kind: dict[str, object]) -> None:
    assert any("hard_swish" in name for name in kernels_of(model(32, **kind)[0], machine))  # type: ignore[arg-type]  # keyword arguments by name


def test_elsewhere_and_for_floats_it_is_not() -> None:
    assert not any("hard_swish" in name for name in kernels_of(model(32)[0], AVX512))
    assert not any("hard_swish" in name for name in kernels_of(model(32, read=True)[0], CORTEX_A76))
    assert not any("hard_swish" in name for name in kernels_of(model(32, reach=20.0)[0], CORTEX_A76))


@pytest.mark.parametrize("tag", ["cortex-a53", "cortex-a76"])
@pytest.mark.parametrize(
    ("channels", "kind"),
    [
        (32, {}),
        (20, {"affine": True}),
        (7, {"op": "another"}),
        (33, {"reach": 2.0}),
        (8, {"reach": 20.0}),
        (16, {"reach": 0.05}),
    ],
)
def test_arm_code_agrees_under_qemu(
    channels: int, kind: dict[str, object], tag: str, build: Build, tmp_path: Path
) -> None:
    """Channels that fill vectors, and such that do not."""
    needs_qemu()
    made, scale, x = model(channels, **kind)  # type: ignore[arg-type]  # keyword arguments by name
    (ours,) = build(made, Registry().get(tag), {"x": x.shape}, {}, "int8").run({"x": x}, tmp_path)[0].values()
    theirs = reference(made, x)
    assert steps_apart(ours, theirs, scale) <= 1
    assert np.mean(np.rint(ours / scale) != np.rint(theirs / scale)) < 0.1


def doubled(one: Array, other: Array, bits: int) -> Array:
    """SQRDMULH, of int64 that hold numbers of so many bits."""
    return np.clip((one * other + (1 << (bits - 2))) >> (bits - 1), -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    largest=st.floats(-6.0, -1.0),
    ratio=st.floats(-1.0, 2.0),
    zero=st.integers(-128, 127),
    c=st.floats(0.5, 4.0),
    top=st.floats(1.0, 8.0),
    seed=st.integers(0, 99),
)
def test_its_error_is_what_its_text_says(
    largest: float, ratio: float, zero: int, c: float, top: float, seed: int
) -> None:
    dice = np.random.default_rng(seed)
    scale = 10.0**largest * dice.uniform(0.01, 1.0, 64)
    chain = Chain(None, scale, c, top, 10.0**ratio, zero + dice.uniform(-0.5, 0.5), -128.0, 127.0, "int8")
    found = fixed(chain)
    assume(found is not None)
    assert found is not None
    sums = np.concatenate([dice.integers(-(1 << 31), 1 << 31, (40, 64)), dice.normal(0, 4 / scale, (400, 64))])
    sums = np.clip(sums, -(1 << 31), (1 << 31) - 1).astype(np.int64)
    x = sums * scale
    exact = np.clip(x * np.clip(x + c, 0, top) * chain.ratio + chain.offset, -128, 127)
    raised = np.clip(sums << found.up, -(1 << 31), (1 << 31) - 1)
    short = np.clip(doubled(raised, found.multipliers.astype(np.int64), 32), -(1 << 15), (1 << 15) - 1)
    gate = np.clip(np.minimum(short + found.c, (1 << 15) - 1), 0, found.top)
    steps = np.clip(doubled(short, gate, 16) + found.offset, -(1 << 15), (1 << 15) - 1) >> found.bits
    assert np.abs(np.clip(steps, -128, 127) - exact).max() <= 0.5 + 2.0 ** (1 - found.bits)


def test_what_reaches_too_far_for_16_bits_is_left() -> None:
    """A step of 2 and more: sums end before their bytes do."""
    assert fixed(Chain(None, np.array([1e-3]), 3.0, 6.0, 1 / 6 / 2, 0.0, -128.0, 127.0, "int8")) is None
    assert fixed(Chain(None, np.array([1e-3]), 3.0, 6.0, 1 / 6 * 20, 0.0, -128.0, 127.0, "int8")) is not None
