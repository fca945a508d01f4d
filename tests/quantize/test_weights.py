"""Weights and biases: the arithmetic, its bounds, and the channels that break naive quantizers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from modelforge.quantize.weights import (
    SMALLEST_SCALE,
    half_up,
    least_weight_scale,
    quantize_bias,
    quantize_weight,
    weight_axis,
)

WEIGHTS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=4, max_side=6),
    elements=st.floats(-100, 100, width=32),
)


@given(WEIGHTS, st.sampled_from([127, 64]))
def test_no_value_is_further_off_than_half_a_step(weight: np.ndarray, largest: int) -> None:
    quantized = quantize_weight(weight, 0, largest=largest)
    assert quantized.values.dtype == np.int8
    assert np.abs(quantized.values.astype(int)).max() <= largest
    step = quantized.scale.reshape(-1, *[1] * (weight.ndim - 1))
    assert (np.abs(quantized.dequantized() - weight) <= step * 0.5001).all()
    assert (quantized.scale >= SMALLEST_SCALE).all()


def test_each_channel_has_its_own_scale() -> None:
    weight = np.array([[1.0, -2.0], [100.0, 50.0]], np.float32)
    assert quantize_weight(weight, 0).scale.tolist() == pytest.approx([2 / 127, 100 / 127])
    assert quantize_weight(weight, 1).scale.tolist() == pytest.approx([100 / 127, 50 / 127])
    assert quantize_weight(weight, None).scale.shape == ()


def test_a_channel_of_zeros_takes_the_finest_scale_of_the_others() -> None:
    weight = np.array([[0.0, 0.0], [1.0, 0.5], [4.0, 0.0]], np.float32)
    quantized = quantize_weight(weight, 0)
    assert quantized.scale[0] == quantized.scale[1]
    assert quantized.values[0].tolist() == [0, 0]


def test_denormal_weights_get_a_normal_scale() -> None:
    quantized = quantize_weight(np.full((2, 2), 1e-42, np.float32), 0)
    assert (quantized.scale == np.float32(SMALLEST_SCALE)).all()


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quantize_weight(np.array([[np.nan]], np.float32), 0)


@pytest.mark.parametrize(
    ("op", "rank", "trans", "axis"),
    [
        ("Conv", 4, False, 0),
        ("ConvTranspose", 4, False, 1),
        ("Gemm", 2, False, 1),
        ("Gemm", 2, True, 0),
        ("MatMul", 2, False, 1),
        ("MatMul", 3, False, 2),
        ("MatMul", 1, False, None),
    ],
)
def test_axis_of_the_output_channels(op: str, rank: int, trans: bool, axis: int | None) -> None:
    assert weight_axis(op, rank, trans) == axis


@given(st.floats(1e-7, 6e4))
def test_half_up_is_the_next_half(scale: float) -> None:
    half = half_up(np.array(scale))
    assert half.astype(np.float16).astype(np.float32) == half
    assert half >= scale
    assert float(np.nextafter(np.float16(half), np.float16(0))) < scale


def test_bias_scale_is_the_product_and_the_values_round() -> None:
    values, scale = quantize_bias(np.array([1.0, -3.0], np.float32), 0.5, np.array([0.1, 0.2], np.float32))
    assert scale.tolist() == pytest.approx([0.05, 0.1])
    assert values.tolist() == [20, -30]
    assert values.dtype == np.int32


def test_a_bias_beyond_int32_raises_the_weight_scale_instead_of_wrapping() -> None:
    weight = np.array([[1e-12, -1e-12], [1.0, 0.5]], np.float32)
    bias = np.array([50.0, 1.0], np.float32)
    with pytest.raises(ValueError, match="int32"):
        quantize_bias(bias, 0.01, quantize_weight(weight, 0).scale)
    quantized = quantize_weight(weight, 0, least=least_weight_scale(bias, 0.01))
    values, scale = quantize_bias(bias, 0.01, quantized.scale)
    assert (values * scale.astype(np.float64)).tolist() == pytest.approx([50.0, 1.0], rel=1e-6)
