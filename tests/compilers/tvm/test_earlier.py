"""Q comes before what only moves values, and nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.integer_layers import Layers, compiled, reference, run, steps_apart
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, CORTEX_A76, runnable


def fire() -> Layers:
    """Two branches, a concat and a max pool before one Q, as in SqueezeNet."""
    layers = Layers((1, 8, 11, 9), seed=5)
    trunk = layers.quantize(0.03, 5)
    branches = []
    for kernel in (1, 3):
        layers.value = trunk
        layers.convolution(16, (kernel, kernel), pads=[kernel // 2] * 4)
        branches.append(layers.node("Relu", layers.value))
    joined = layers.node("Concat", *branches, axis=1)
    layers.value = layers.node("MaxPool", joined, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    layers.quantize(0.04, -128)
    return layers


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
def test_a_pool_and_a_concat_work_on_bytes(machine: Any) -> None:
    layers = fire()
    layers.convolution(8, (1, 1), inputs=32)
    layers.quantize(0.05, 0)
    model, x = layers.model(), layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(model, machine)
    # One kernel makes bytes of floats: the input's. The other Q are ends of convolutions.
    assert sum("requantize" in report.name and not report.macs for report in reports) == 1, reports
    assert steps_apart(run(executable, x), reference(model, x), 0.05) <= 2


def test_no_float_image_is_left() -> None:
    layers = fire()
    layers.convolution(8, (1, 1), inputs=32)
    layers.quantize(0.05, 0)
    assert images_in_floats(layers) == [(1, 6, 5, 8)], "the output, before its axes are turned"


def test_a_value_that_floats_are_read_of_is_left_alone() -> None:
    """A pool whose floats leave the model, too: quantizing before it would be a second pool."""
    layers = fire()
    pooled = layers.nodes[-3].output[0]
    layers.value = layers.node("Add", layers.value, pooled)
    assert (1, 6, 5, 32) in images_in_floats(layers)


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
def test_a_shuffle_goes_through_quantized_layers(machine: Any) -> None:
    """As in ShuffleNet, with fewer channels: no copy is left of it, its order is in the weights, made dense.

    Without dot products groups stay groups, in float, behind a copy.
    """
    layers = Layers((1, 16, 6, 7), seed=6)
    layers.quantize(0.03, 5)
    layers.convolution(24, (1, 1), group=2, inputs=16)
    value = layers.node("Relu", layers.value)
    apart, whole = (layers.constant(np.array(shape, np.int64)) for shape in ([1, 2, 12, 6, 7], [1, 24, 6, 7]))
    value = layers.node("Transpose", layers.node("Reshape", value, apart), perm=[0, 2, 1, 3, 4])
    layers.value = layers.node("Reshape", value, whole)
    layers.quantize(0.02, -128)
    layers.convolution(24, (3, 3), group=24, inputs=24, pads=[1] * 4)
    layers.quantize(0.03, 3)
    layers.convolution(16, (1, 1), group=2, inputs=24)
    layers.quantize(0.04, 0)
    model, x = layers.model(), layers.rng.normal(size=layers.shape).astype(np.float32)
    executable, reports = compiled(model, machine)
    moved = [name for name in (report.name for report in reports) if any(word in name for word in MOVES)]
    assert bool(moved) == (not machine.dot), moved
    assert steps_apart(run(executable, x), reference(model, x), 0.04) <= 3


MOVES = ("take", "shuffle", "reshape")


def images_in_floats(layers: Layers) -> list[tuple[int, ...]]:
    """Shapes of the float tensors between kernels, but for the model's input and output."""
    from modelforge.compilers.tvm import lowering
    from modelforge.compilers.tvm.api import bindings, dtype_of, shape_of
    from tests.compilers.tvm.kernels.integer_layers import imported

    module = lowering.lower(imported(layers.model()), CORTEX_A76)
    found = bindings(module)
    result = {variable for variable, _, reads in found if variable is None for variable in reads}
    tensors = [variable for variable, _, _ in found if variable is not None and variable not in result]
    return [shape_of(each) or () for each in tensors if dtype_of(each) == "float32" and len(shape_of(each) or ()) == 4]
