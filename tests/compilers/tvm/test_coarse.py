"""The short polynomial stands where bytes are made of a sigmoid, and only there."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, imported, reference, run, spread, steps_apart
from tests.compilers.tvm.kernels.machines import AVX512, CORTEX_A76, runnable


def silu(*, readers: int = 0, move: bool = False) -> tuple[onnx.ModelProto, float, np.ndarray]:
    """A convolution with SiLU, quantized; read as a float beside that by ``readers`` more operators."""
    layers = Layers((1, 16, 8, 8))
    layers.quantize(0.03, 5)
    value = layers.convolution(32, (3, 3))
    layers.value = product = layers.node("Mul", value, layers.node("Sigmoid", value))
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
    return [name for name in names if "sigmoid" in name]


@pytest.mark.parametrize("move", [False, True])
def test_a_sigmoid_that_becomes_bytes_is_coarse(move: bool) -> None:
    (name,) = sigmoids(silu(move=move)[0])
    assert "coarse_sigmoid" in name


def test_a_sigmoid_that_something_reads_as_float_is_exact() -> None:
    (name,) = sigmoids(silu(readers=1)[0])
    assert "coarse" not in name


@pytest.mark.parametrize("machine", runnable(AVX512))
def test_bytes_are_as_good(machine: object) -> None:
    model, scale, x = silu()
    executable, _ = compiled(model, machine)
    ours, theirs = run(executable, x), reference(model, x)
    assert steps_apart(ours, theirs, scale) <= 1
    assert np.mean(np.rint(ours / scale) != np.rint(theirs / scale)) < 0.02


@pytest.mark.parametrize("machine", runnable(AVX512))
def test_its_relative_error_is_what_its_text_says(machine: object) -> None:
    from modelforge.compilers.tvm.api import target, te, tvm
    from modelforge.compilers.tvm.kernels.mathematics import coarse_sigmoid

    x = np.concatenate([np.linspace(-85, 85, 4001), [-1e30, 1e30, -np.inf, np.inf, 0.0]]).astype(np.float32)
    data = te.placeholder((len(x),), "float32")
    kernel = te.create_prim_func([data, te.compute(data.shape, lambda i: coarse_sigmoid(data[i]))])
    module = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target(machine))
    result = tvm.runtime.tensor(np.zeros_like(x))
    module["main"](tvm.runtime.tensor(x), result)
    ours, finite = result.numpy(), np.abs(x) < 86
    exact = 1 / (1 + np.exp(-x[finite].astype(np.float64)))
    assert np.max(np.abs(ours[finite] / exact - 1)) < 8e-5
    np.testing.assert_allclose(ours[~finite], np.where(x[~finite] > 0, 1.0, 2.0**-124), rtol=8e-5)
