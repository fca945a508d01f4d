"""Sums in half precision: blocks of products in FP16, blocks in FP32; right for every shape, and near the exact sum."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import relax
from modelforge.compilers.tvm.kernels import halves, tiles
from tests.compilers.tvm.kernels.float_layers import assert_ran
from tests.compilers.tvm.kernels.graphs import Graph, compiled, rules, run
from tests.compilers.tvm.kernels.machines import AVX2, CORTEX_A53, CORTEX_A76, runs_here

WIDE = replace(AVX2, vector_bits=128, cores=1)
HALF = replace(WIDE, fp16=True)
"""Rounds after each operation as a processor with FP16 arithmetic does, only slower; small tiles compile quickly."""
if not runs_here(AVX2):
    pytest.skip("no processor with AVX2 and F16C", allow_module_level=True)


def convolution(weight: np.ndarray, stride: int, padding: int) -> Graph:
    def graph(emit: Any, data: Any) -> Any:
        sums = emit(relax.op.nn.conv2d(data, relax.const(weight), strides=(stride, stride), padding=(padding, padding)))
        return relax.op.nn.relu(emit(relax.op.negative(sums)))

    return graph


def product(weight: np.ndarray) -> Graph:
    return lambda emit, data: relax.op.nn.relu(emit(relax.op.matmul(data, relax.const(weight))))


def halved(*shape: int, seed: int, mean: float = 0.0) -> np.ndarray:
    return (mean + np.random.default_rng(seed).standard_normal(shape)).astype(np.float16)


def convolved(data: np.ndarray, weight: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """The exact sums, NCHW."""
    padded = np.pad(data.astype(np.float64), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwyx,ocyx->nohw", windows, weight.astype(np.float64))


def decibels(exact: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - got.astype(np.float64)).sum()))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 90),
    outputs=st.integers(1, 40),
    height=st.integers(3, 9),
    width=st.integers(3, 15),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
)
def test_convolutions_agree_with_numpy(
    batch: int, channels: int, outputs: int, height: int, width: int, kernel: int, stride: int, padding: int
) -> None:
    data = halved(batch, channels, height, width, seed=1)
    weight = halved(outputs, channels, kernel, kernel, seed=2)
    result, reports = run(convolution(weight, stride, padding), [data], HALF)
    assert_ran(reports, "convolution")
    exact = np.maximum(-convolved(data, weight, stride, padding), 0)
    assert result.dtype == np.float16
    np.testing.assert_allclose(result, exact, rtol=4e-3, atol=1e-2 * math.sqrt(channels) * kernel)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.integers(1, 20), inner=st.integers(1, 200), columns=st.integers(1, 70))
def test_products_agree_with_numpy(rows: int, inner: int, columns: int) -> None:
    data, weight = halved(rows, inner, seed=1), halved(inner, columns, seed=2)
    result, reports = run(product(weight), [data], HALF)
    assert set(rules(reports).values()) == {"matmul"}
    exact = np.maximum(data.astype(np.float64) @ weight.astype(np.float64), 0)
    np.testing.assert_allclose(result, exact, rtol=4e-3, atol=1e-2 * math.sqrt(inner))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), rows=st.integers(1, 12), inner=st.integers(30, 150), columns=st.integers(1, 40))
def test_products_of_activations_agree_with_numpy(batch: int, rows: int, inner: int, columns: int) -> None:
    left, right = halved(batch, rows, inner, seed=1), halved(batch, inner, columns, seed=2)
    result, reports = run(lambda emit, a, b: emit(relax.op.matmul(a, b)), [left, right], HALF)
    assert set(rules(reports).values()) == {"product"}
    exact = left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(result, exact, rtol=4e-3, atol=1e-2 * math.sqrt(inner))


@pytest.mark.parametrize("inner", [512, 2048])
def test_errors_do_not_grow_with_the_length_of_a_sum(inner: int) -> None:
    """Sums that only grow are the worst case: FP16 alone reaches 30 dB at 2048 products."""
    data, weight = halved(6, inner, seed=1, mean=3.0), np.abs(halved(inner, 40, seed=2)) / 64
    exact = data.astype(np.float64) @ weight.astype(np.float64)
    blocks, _ = run(product(weight), [data], HALF)
    alone, _ = run(product(weight), [data], WIDE)
    assert decibels(exact, blocks) > 60
    assert decibels(exact, alone) < 50


def test_a_bias_is_added_before_the_sum_is_rounded() -> None:
    """Blocks of small integers are exact, and their sum is 4000, of which FP16 knows every fourth only."""
    random = np.random.default_rng(1)
    data, weight = (random.integers(1, 4, shape).astype(np.float16) for shape in ((5, 1024), (1024, 24)))
    bias = np.full(24, -4096, np.float16)

    def graph(emit: Any, values: Any) -> Any:
        biased = emit(relax.op.add(emit(relax.op.matmul(values, relax.const(weight))), relax.const(bias)))
        gate = emit(relax.op.add(biased, relax.const(np.float16(3))))
        return emit(relax.op.multiply(biased, gate))  # the second addition is none of a bias: its kernel is one

    result, reports = run(graph, [data], HALF)
    left = data.astype(np.float64) @ weight.astype(np.float64) + bias
    assert np.any(left % 4)
    assert np.abs(left).max() < 2048
    assert list(rules(reports).values()).count("matmul") == 1
    np.testing.assert_array_equal(result, left.astype(np.float16) * (left + 3).astype(np.float16))


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ((1, 1, 256), (1, 1, 32)),
        ((3, 3, 16), (1, 3, 16)),
        ((3, 3, 24), (1, 1, 24)),
        ((3, 3, 3), (3, 3, 3)),
        ((1, 1, 120), (1, 1, 40)),
        ((1, 1, 37), (1, 1, 37)),
        ((5, 5, 8), (1, 5, 8)),
        ((1000,), (40,)),
        ((31,), (31,)),
        ((509,), (509,)),
    ],
)
def test_blocks_are_whole_parts_of_about_the_wanted_length(sizes: tuple[int, ...], block: tuple[int, ...]) -> None:
    """Whole vectors of input channels too, where there are any: a tile loads so many at once."""
    assert halves.block_of(sizes, 8) == block


def test_cortex_a76_widens_by_blocks_and_others_do_not() -> None:
    """Cortex-A53 has no FP16 arithmetic: LLVM widens there, and there is nothing to be gained."""
    weight, data = halved(256, 48, seed=1), halved(14, 256, seed=2)
    for machine, dtype, blocked in (
        (CORTEX_A76, np.float16, True),
        (CORTEX_A76, np.float32, False),
        (CORTEX_A53, np.float16, False),
    ):
        executable, reports = compiled(product(weight.astype(dtype)), [data.astype(dtype)], machine)
        assert set(rules(reports).values()) == {"matmul"}
        source = next(module for module in executable.mod.imports if module.kind == "llvm").inspect_source("asm")
        assert ("fcvtl2" in source and "fmla" in source) == blocked


def test_few_rows_are_multiplied_by_element_in_half_precision() -> None:
    """FMLA by element of FP16 reads its elements from registers 0 to 15: LLVM spills where a tile has many rows."""
    heights = [(rows, 1.0) for rows in range(1, 32)]
    assert max(tile.rows for tile in tiles.ranked(heights, 64, CORTEX_A76, "float16")) < 10
    assert max(tile.rows for tile in tiles.ranked(heights, 64, CORTEX_A76, "float32")) > 10
