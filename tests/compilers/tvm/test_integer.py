"""A QDQ model becomes integer kernels with bytes between them, and still means what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from modelforge.target import Registry
from tests.compilers.tvm.models import Build, needs_qemu

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, imported, reference, rules, run, steps_apart
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable


def network(batch: int = 1) -> tuple[onnx.ModelProto, float]:
    """A small network with all that stays in int8 between layers, and the scale of its output.

    Convolution, depthwise and 1x1 with HardSwish, a residual sum, max pool, concat of equal scales, global average
    pool, Gemm behind a Flatten.
    """
    layers = Layers((batch, 8, 12, 10), seed=3)
    layers.quantize(0.03, 5)
    layers.convolution(24, (3, 3), pads=[1] * 4, strides=[1, 1])
    layers.value = layers.node("Relu", layers.value)
    trunk = layers.quantize(0.04, -128)
    layers.convolution(24, (3, 3), group=24, inputs=24, pads=[1] * 4)
    layers.value = layers.node("HardSwish", layers.value)
    layers.quantize(0.02, -20)
    layers.convolution(24, (1, 1), inputs=24)
    layers.value = layers.node("Relu", layers.node("Add", layers.value, trunk))
    joined = layers.quantize(0.05, -128)
    pooled = layers.node("MaxPool", joined, kernel_shape=[2, 2], strides=[2, 2])
    layers.value = pooled
    first = layers.quantize(0.05, -128)
    layers.convolution(24, (1, 1), inputs=24)
    layers.value = layers.node("Clip", layers.value, layers.constant(np.float32(0)), layers.constant(np.float32(6)))
    second = layers.quantize(0.05, -128)
    layers.value = layers.node("Concat", first, second, axis=1)
    layers.quantize(0.05, -128)
    layers.value = layers.node("Flatten", layers.node("GlobalAveragePool", layers.value))
    layers.quantize(0.01, -128)
    layers.value = layers.node("Gemm", layers.value, layers.weight((10, 48), 0), layers.bias(10), transB=1)
    layers.quantize(0.02, 0)
    return layers.model(), 0.02


def feed(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(batch, 8, 12, 10)).astype(np.float32)


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_agrees_with_the_model_as_it_is_written(machine: Any, batch: int) -> None:
    model, scale = network(batch)
    executable, reports = compiled(model, machine)
    assert rules(reports) == {"convolution-int8", "matmul-int8", "depthwise-int8"}, reports
    ours, theirs = run(executable, feed(batch)), reference(model, feed(batch))
    assert np.abs(theirs).max() > 20 * scale
    # One step a layer, handed on: the last layer multiplies what five others rounded.
    assert steps_apart(ours, theirs, scale) <= 3


@pytest.mark.parametrize("name", list(MACHINES))
def test_no_float_tensor_lies_between_layers(name: str) -> None:
    """Bytes, except for the mean of a whole image: FuseOps puts its DQ into the kernel before it."""
    from modelforge.compilers.tvm import lowering
    from modelforge.compilers.tvm.api import bindings, dtype_of, shape_of

    model, _ = network()
    module = lowering.lower(imported(model), MACHINES[name])
    images = [
        (variable, shape_of(variable))
        for variable, _, _ in bindings(module)
        if variable is not None and dtype_of(variable) == "float32" and len(shape_of(variable) or ()) == 4
    ]
    assert [shape for _, shape in images if shape and np.prod(shape[1:3]) > 1] == [(1, 6, 5, 48)]


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize("kind", ["relu", "split", "shared", "unsigned"])
def test_what_works_on_bytes_between_layers(kind: str, machine: Any) -> None:
    """As foreign tools write it: a Relu or a Split behind a DQ, its parts read by several, activations of uint8."""
    layers = Layers((1, 16, 9, 8), seed=4)
    layers.quantize(0.03, 9)
    layers.convolution(24, (3, 3))
    dtype, zero = ("uint8", 131) if kind == "unsigned" else ("int8", -7)
    layers.quantize(0.3, zero, dtype)
    if kind == "relu":
        layers.value = layers.node("Relu", layers.value)
    elif kind in ("split", "shared"):
        names = ["part0", "part1"]
        layers.nodes.append(onnx.helper.make_node("Split", [layers.value], names, axis=1))
        if kind == "shared":
            layers.value = layers.node("Concat", layers.node("Neg", names[0]), names[1], names[0], axis=1)
            layers.quantize(0.3, -7)
        else:
            layers.value = names[1]
    inputs = {"split": 12, "shared": 36}.get(kind, 24)
    layers.convolution(20, (3, 3), inputs=inputs)
    layers.quantize(0.5, 3)
    x = layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(layers.model(), machine)
    assert rules(reports) == {"convolution-int8"}
    assert steps_apart(run(executable, x), reference(layers.model(), x), 0.5) <= 1


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_an_input_of_bytes_is_taken_as_it_is(dtype: str, machine: Any) -> None:
    """Whatever the dot product of the machine reads: the other type is moved by 128."""
    layers = Layers((1, 16, 9, 8), seed=6)
    parameters = [layers.constant(np.float32(0.03)), layers.constant(np.array(9, dtype))]
    layers.value = layers.node("DequantizeLinear", "x", *parameters)
    layers.convolution(24, (3, 3))
    layers.quantize(0.3, -7)
    made = layers.model()
    made.graph.input[0].type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    bounds = np.iinfo(dtype)
    x = layers.rng.integers(bounds.min, bounds.max, layers.shape, dtype, endpoint=True)
    executable, reports = compiled(made, machine)
    assert rules(reports) == {"convolution-int8"}
    assert steps_apart(run(executable, x), reference(made, x), 0.3) <= 1


def test_a_model_without_quantization_is_left_alone() -> None:
    from modelforge.compilers.tvm import integer

    layers = Layers((1, 4, 6, 6))
    layers.value = layers.node("Conv", "x", layers.constant(np.ones((4, 4, 3, 3), np.float32)))
    module = imported(layers.model())
    assert integer.to_integers(module, AVX512) is module


def test_what_has_no_integer_kernel_is_computed_in_float() -> None:
    """Convolutions of many groups, a transposed one among them: their QDQ is arithmetic in float, and right."""
    layers = Layers((1, 16, 6, 6))
    layers.quantize(0.03, 5)
    layers.convolution(8, (3, 3), group=8, pads=[1] * 4)
    layers.quantize(0.03, 0)
    layers.value = layers.node(
        "ConvTranspose", layers.value, layers.weight((8, 3, 2, 2), None), strides=[2, 2], group=2
    )
    layers.quantize(0.02, 0)
    model, x = layers.model(), layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, _ = compiled(model, dataclasses.replace(AVX2, mcpu="x86-64", vector_bits=128))
    assert steps_apart(run(executable, x), reference(model, x), 0.02) <= 1


@pytest.mark.parametrize("machine", runnable(AVX512))
def test_groups_are_integer_products_where_there_are_dot_products(machine: Any) -> None:
    layers = Layers((1, 24, 7, 7))
    layers.quantize(0.03, 5)
    layers.convolution(36, (3, 3), group=3, pads=[1] * 4)
    layers.quantize(0.05, 0)
    model, x = layers.model(), layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(model, machine)
    assert rules(reports) == {"convolution-int8"}
    assert steps_apart(run(executable, x), reference(model, x), 0.05) <= 1


@pytest.mark.parametrize(
    "tag",
    # The last two are built and emulated for code that the others have too.
    [
        "cortex-a76",
        "cortex-a72",
        "cortex-a53",
        *(pytest.param(tag, marks=pytest.mark.slow) for tag in ("neoverse-n1", "armv8")),
    ],
)
def test_arm_code_agrees_under_qemu(tag: str, build: Build, tmp_path: Path) -> None:
    """SDOT on the first, SMLAL on the others, which have no dot products."""
    needs_qemu()
    model, scale = network()
    built = build(model, Registry().get(tag), {"x": (1, 8, 12, 10)}, {}, "int8")
    outputs, ran = built.run({"x": feed()}, tmp_path)
    assert ran.evidence == "emulator"
    (ours,) = outputs.values()
    assert steps_apart(ours, reference(model, feed()), scale) <= 3
    found = {
        kernel["note"].split()[0] for kernel in built.compiled.report["kernels"] if kernel["rule"] == "matmul-int8"
    }
    assert found == {"sdot" if tag in ("cortex-a76", "neoverse-n1") else "smlal"}
