"""The short polynomial stands where bytes are made of a sigmoid, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("tvm")

from modelforge.compilers.tvm.machine import Machine
from modelforge.target import Registry
from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, imported, reference, run, spread, steps_apart
from tests.compilers.tvm.kernels.machines import AVX512, CORTEX_A76, runnable
from tests.compilers.tvm.models import Build, needs_qemu


def silu(*, readers: int = 0, move: bool = False, gated: bool = True) -> tuple[onnx.ModelProto, float, np.ndarray]:
    """A convolution with SiLU, or a sigmoid alone, quantized; read as a float beside that by ``readers`` operators."""
    layers = Layers((1, 16, 8, 8))
    layers.quantize(0.03, 5)
    value = layers.convolution(32, (3, 3))
    product = layers.node("Sigmoid", value)
    if gated:
        product = layers.node("Mul", value, product)
    layers.value = product
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    scale = spread(layers.model(), x)
    if move:
        layers.value = layers.node("Transpose", product, perm=[0, 1, 3, 2])
    layers.value = layers.quantize(scale, 3)
    for _ in range(readers):
        layers.value = layers.node("Add", layers.value, layers.node("Neg", product))
    return layers.model(), scale, x


def sigmoids(model: onnx.ModelProto) -> list[str]:
    """The kernels with a sigmoid that a model is lowered to."""
    from modelforge.compilers.tvm import lowering
    from modelforge.compilers.tvm.api import kernels

    names = [name.name_hint for name, _ in kernels(lowering.lower(imported(model), CORTEX_A76))]
    return [name for name in names if "sigmoid" in name or "quotient" in name]


@pytest.mark.parametrize("move", [False, True])
def test_a_sigmoid_that_becomes_bytes_is_coarse(move: bool) -> None:
    (name,) = sigmoids(silu(move=move)[0])
    assert "coarse_quotient" in name


def behind(model: onnx.ModelProto) -> list[str]:
    """What stands between the division and the bytes in each kernel that has one."""
    return [name.partition("coarse_quotient")[2].partition("requantize")[0] for name in sigmoids(model)]


def test_what_a_sigmoid_gates_is_divided() -> None:
    (between,) = behind(silu()[0])
    assert "multiply" not in between
    (between,) = behind(silu(gated=False)[0])
    assert "multiply" in between  # the scale of the bytes, which is in what is divided otherwise


def test_a_gate_of_another_shape_is_a_sigmoid_of_its_own() -> None:
    """Squeeze-and-excitation: a division for each pixel of the image would cost more than one for its channel."""
    layers = Layers((1, 16, 8, 8))
    image = layers.quantize(0.03, 5)
    gate = layers.node("Sigmoid", layers.node("GlobalAveragePool", layers.convolution(16, (1, 1))))
    layers.value = layers.node("Mul", image, gate)
    layers.quantize(0.01, 3)
    assert all("multiply" in between for between in behind(layers.model()))


def test_a_sigmoid_that_something_reads_as_float_is_exact() -> None:
    (name,) = sigmoids(silu(readers=1)[0])
    assert "coarse" not in name


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("machine", runnable(AVX512))
def test_bytes_are_as_good(machine: object, gated: bool) -> None:
    model, scale, x = silu(gated=gated)
    executable, _ = compiled(model, machine)
    ours, theirs = run(executable, x), reference(model, x)
    assert steps_apart(ours, theirs, scale) <= 1
    assert np.mean(np.rint(ours / scale) != np.rint(theirs / scale)) < 0.02


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("reach", [1, 1e3, 1e30])
def test_arm_code_agrees_under_qemu(gated: bool, reach: float, build: Build, tmp_path: Path) -> None:
    """Far out too, where powers of two have ended: in bytes, a sigmoid is 0 or 1 there."""
    needs_qemu()
    layers = Layers((1, 16, 8, 9))
    layers.quantize(0.03 * reach, 5)
    value = layers.convolution(20, (3, 3))
    layers.value = layers.node("Sigmoid", value)
    if gated:
        layers.value = layers.node("Mul", value, layers.value)
    x = (layers.rng.normal(size=layers.shape) * reach).astype(np.float32)
    scale = spread(layers.model(), x)
    layers.quantize(scale, -3)
    model = layers.model()
    (ours,) = build(model, Registry().get("cortex-a76"), {"x": x.shape}, {}, "int8").run({"x": x}, tmp_path)[0].values()
    theirs = reference(model, x)
    assert steps_apart(ours, theirs, scale) <= 1
    assert np.mean(np.rint(ours / scale) != np.rint(theirs / scale)) < 0.02


@pytest.mark.parametrize("machine", runnable(AVX512))
def test_its_relative_error_is_what_its_text_says(machine: Machine) -> None:
    from modelforge.compilers.tvm.api import target, te, tvm
    from modelforge.compilers.tvm.kernels.mathematics import COARSE_UNIT, coarse_quotient, number

    t = np.concatenate([np.linspace(-119, 119, 4001), [-1e30, 1e30, -np.inf, np.inf, 0.0]]).astype(np.float32)
    data = te.placeholder((len(t),), "float32")

    def compute(i: Any) -> Any:
        return coarse_quotient(number(COARSE_UNIT), data[i], machine)

    kernel = te.create_prim_func([data, te.compute(data.shape, compute)])
    module = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target(machine))
    result = tvm.runtime.tensor(np.zeros_like(t))
    module["main"](tvm.runtime.tensor(t), result)
    exact = 1 / (1 + np.exp2(np.clip(t, -120, 120).astype(np.float64)))
    assert np.max(np.abs(result.numpy() / exact - 1)) < 8e-5
