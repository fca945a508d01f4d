"""Symmetric int8 weights and int32 biases, as NumPy arrays. Knows no graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32: kernels flush what is below to zero, and dividing by it overflows."""
SMALLEST_HALF_SCALE = 2.0**-14
"""The smallest normal FP16: below it, a scale loses its digits."""
LARGEST_BIAS = 2**30
"""Of a quantized bias: leaves the accumulator half of its int32 range."""


@dataclass(frozen=True)
class QuantizedWeight:
    """``values * scale`` along ``axis`` is the weight.

    Attributes:
        values: int8, the shape of the weight.
        scale: float32, ``[channels]``, or ``[]`` where ``axis`` is None: one for the whole tensor.
    """

    values: Array
    scale: Array
    axis: int | None

    def dequantized(self) -> Array:
        """float32, as DequantizeLinear gives it."""
        return self.values.astype(np.float32) * along(self.scale, self.axis, self.values.ndim)


def weight_axis(op_type: str, rank: int, trans_b: bool = False) -> int | None:
    """The axis of a weight that its output channels lie along; None where no axis is.

    Conv ``[M, C/group, k...]``: 0; ConvTranspose ``[C, M/group, k...]``: 1; Gemm ``[K, N]``, or ``[N, K]`` with transB;
    MatMul ``[..., K, N]``: the last, and none for a vector.
    """
    if op_type == "Conv":
        return 0
    if op_type == "ConvTranspose":
        return 1
    if op_type == "Gemm":
        return 0 if trans_b else 1
    return rank - 1 if rank >= 2 else None


def quantize_weight(
    weight: Array, axis: int | None, *, largest: int = 127, half_scales: bool = False, least: Array | None = None
) -> QuantizedWeight:
    """Quantize symmetrically to ``-largest .. largest``; no value is clipped.

    Args:
        weight: float, finite.
        axis: the channels, one scale each; None for one scale.
        largest: 127; or 64 where a kernel adds two products in 16 bits (x86 without VNNI: 255 * 64 * 2 < 2 ** 15).
        half_scales: round scales up to FP16 numbers.
        least: lower bound of each scale, of the scale's shape.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    weight = np.asarray(weight, np.float32)
    if not np.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    scale = weight_scale(_absmax(weight, axis), largest, half_scales=half_scales, least=least)
    ratio = weight / along(scale, axis, weight.ndim)
    return QuantizedWeight(np.clip(np.rint(ratio), -largest, largest).astype(np.int8), scale, axis)


def weight_scale(absmax: Array, largest: int, *, half_scales: bool = False, least: Array | None = None) -> Array:
    """float32 scales for channels with these largest absolute values.

    A channel of zeros gets the smallest scale of the others: 1 would make its bias coarse, whose scale follows.
    """
    scale = np.asarray(absmax, np.float64) / largest
    used = scale[scale > 0]
    scale = np.where(scale > 0, scale, used.min() if used.size else 1.0 / largest)
    if least is not None:
        scale = np.maximum(scale, least)
    if half_scales:
        return half_up(np.maximum(scale, SMALLEST_HALF_SCALE))
    return np.maximum(scale, SMALLEST_SCALE).astype(np.float32)


def half_up(scale: Array) -> Array:
    """The next FP16 number that is not below, as float32."""
    half = np.asarray(scale, np.float64).astype(np.float16)
    half = np.where(half.astype(np.float64) < scale, np.nextafter(half, np.float16(np.inf)), half)
    return half.astype(np.float32)


def least_weight_scale(bias: Array, input_scale: float) -> Array:
    """The smallest weight scales, ``[channels]``, with which the int32 bias does not overflow and its scale is normal.

    Folded batch norms leave channels whose weights are all but zero: their own scale would be far below.
    """
    least = np.abs(bias.astype(np.float64)) / (float(input_scale) * LARGEST_BIAS)
    return np.asarray(np.maximum(least, 2 * SMALLEST_SCALE / float(input_scale)))


def quantize_bias(bias: Array, input_scale: float, weight_scale: Array) -> tuple[Array, Array]:
    """The bias as int32 ``[channels]`` and its float32 scale, the product of both scales, shaped as the weight's.

    One scale for all channels stays one number: Qualcomm's HTP misreads a list beside it, and saturates (QAIRT 2.51).

    Raises:
        ValueError: it does not fit; see :func:`least_weight_scale`.
    """
    product = np.float32(input_scale) * np.asarray(weight_scale, np.float32)
    scale = np.asarray(product, np.float32)
    if (scale < SMALLEST_SCALE).any():
        raise ValueError("the product of the scales is no normal float32")
    values = np.rint(bias.astype(np.float64) / scale)
    if np.abs(values).max(initial=0) > 2 * LARGEST_BIAS - 1:
        raise ValueError("the bias does not fit into int32")
    return values.astype(np.int32), scale


def along(scale: Array, axis: int | None, rank: int) -> Array:
    """The scale, shaped so that it multiplies a tensor of this rank along the axis."""
    if axis is None:
        return scale
    return scale.reshape([-1 if place == axis else 1 for place in range(rank)])


def _absmax(weight: Array, axis: int | None) -> Array:
    if axis is None:
        return np.asarray(np.abs(weight).max(initial=0.0))
    others = tuple(place for place in range(weight.ndim) if place != axis)
    return np.asarray(np.abs(weight).max(axis=others, initial=0.0))
