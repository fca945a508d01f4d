"""How far a quantized activation reaches: the clip range of one tensor from its histogram. Plain numbers, no onnx.

The error model is the usual one: uniform rounding noise inside the range, distance to its end outside (Sung, Shin and
Hwang, 2015, arXiv:1511.06488).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from modelforge.errors import DataError
from modelforge.quantize.ranges import Histogram, TensorRange

Method = Literal["auto", "minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

PERCENTILE = 99.99
CLIPPING_WEIGHT = 8.0
"""What a squared clipping error counts beside a squared rounding error in "auto": rounding errors are independent and
average out in the next layer's sums, clipping errors all have one sign and hit the strongest responses."""
CLIPPED_AT_MOST = 1e-3
"""The share of the non-zero elements that "auto" may clip."""
GRID = 48
"""Ends tried for each side."""
CANDIDATES = 128
"""Ranges that the entropy search compares."""
NOTHING = 1e-30
"""A tensor that never leaves this is zero: a scale for it would be no normal float32."""

Floats = NDArray[np.float64]


def clip_range(
    tensor: TensorRange,
    method: Method = "auto",
    *,
    symmetric: bool,
    signed: bool,
    bits: int = 8,
    percentile: float = PERCENTILE,
) -> tuple[float, float]:
    """The range ``(low, high)`` to quantize: ``low <= 0 <= high`` and ``low < high``, as zero must be exact.

    Args:
        method: ``minmax`` clips nothing; ``percentile`` keeps that share in percent; ``entropy`` looks for the least
            Kullback-Leibler divergence (Migacz, "8-bit inference with TensorRT", GTC 2017); ``mse`` for the least
            squared error; ``auto`` for the least error too, but counts clipping :data:`CLIPPING_WEIGHT` times and
            clips at most :data:`CLIPPED_AT_MOST`.
        symmetric: zero point 0: ``low`` is ``-high``, or 0 where it is unsigned.
        signed: the integer type; without ``symmetric`` it makes no difference.

    Raises:
        DataError: a negative range under an unsigned type with zero point 0.
    """
    if symmetric and not signed and tensor.minimum < 0:
        raise DataError(
            f"goes down to {tensor.minimum}, which an unsigned type with zero point 0 does not hold",
            where=f'tensor "{tensor.name}"',
            fix="quantize it signed, or with a zero point",
        )
    if tensor.absmax < NOTHING:
        return (-1.0 if symmetric and signed else 0.0), 1.0
    low, high = min(tensor.minimum, 0.0), max(tensor.maximum, 0.0)
    if method == "minmax":
        return _ends(low, high, symmetric, signed)
    values = _Weighted(tensor)
    if method == "percentile":
        low, high = _percentile(values, percentile / 100, symmetric)
    elif method == "entropy":
        low, high = _entropy(values, _levels(symmetric, signed, bits), symmetric, signed)
    else:
        careful = method == "auto"
        lows, highs = _grid(low, high, symmetric, signed)
        errors, clipped = values.errors(
            lows, highs, _levels(symmetric, signed, bits), CLIPPING_WEIGHT if careful else 1.0
        )
        if careful:
            errors = np.where(clipped > CLIPPED_AT_MOST * values.inexact, np.inf, errors)
            errors[0] = min(errors[0], np.finfo(np.float64).max)  # the first clips nothing
        best = int(np.argmin(errors))
        low, high = float(lows[best]), float(highs[best])
    return _ends(low, high, symmetric, signed)


def expected_error(
    tensor: TensorRange,
    low: float,
    high: float,
    *,
    symmetric: bool,
    signed: bool,
    bits: int = 8,
    clipping_weight: float = 1.0,
) -> float:
    """Mean squared error of an element of ``tensor`` quantized over ``[low, high]``, by the histogram.

    The histogram is scaled to all elements; minimum and maximum count as at least one element each, as the
    subsample may have missed them. Exact zeros have no error.
    """
    values = _Weighted(tensor)
    levels = _levels(symmetric, signed, bits)
    errors, _ = values.errors(np.array([low]), np.array([high]), levels, clipping_weight)
    return float(errors[0]) / max(tensor.finite, 1)


def _levels(symmetric: bool, signed: bool, bits: int) -> int:
    """Steps between the ends: s8 with zero point 0 leaves -128 out."""
    return (1 << bits) - (2 if symmetric and signed else 1)


def _ends(low: float, high: float, symmetric: bool, signed: bool) -> tuple[float, float]:
    if not symmetric:
        low, high = min(low, 0.0), max(high, 0.0)
        return (low, high) if high - low >= NOTHING else (low, low + NOTHING)
    bound = max(-low, high, NOTHING)
    return (-bound if signed else 0.0), bound


class _Weighted:
    """A histogram as weighted points, with the sums that any range's error is made of."""

    def __init__(self, tensor: TensorRange) -> None:
        bins: Histogram = tensor.bins
        scale = tensor.finite / max(bins.total, 1)
        counts = bins.counts * scale
        used = np.flatnonzero(counts)
        first, last = _bin(bins, tensor.minimum), _bin(bins, tensor.maximum)
        counts[[first, last]] = np.maximum(counts[[first, last]], 1.0)
        self.width = bins.width
        inside = slice(min(first, *used[:1]), max(last, *used[-1:]) + 1)
        centers = np.clip(bins.centers[inside], tensor.minimum, tensor.maximum)
        self.points: Floats = np.asarray(centers, np.float64)
        self.points[0], self.points[-1] = tensor.minimum, tensor.maximum
        self.weights: Floats = np.asarray(counts[inside], np.float64)
        self.zeros = tensor.zeros * scale
        self.inexact = max(float(self.weights.sum()) - self.zeros, 0.0)
        powers = self.weights * self.points ** np.arange(3)[:, np.newaxis]
        self._sums = np.concatenate([np.zeros((3, 1)), np.cumsum(powers, axis=1)], axis=1)

    def errors(self, lows: Floats, highs: Floats, levels: int, clipping_weight: float) -> tuple[Floats, Floats]:
        """Summed squared error and clipped weight of each range ``[lows, highs]``."""
        below = np.searchsorted(self.points, lows, side="left")
        above = np.searchsorted(self.points, highs, side="right")
        total = self._sums[:, -1:]
        head, tail = self._sums[:, below], total - self._sums[:, above]
        clipped = np.zeros_like(lows)
        squared = np.zeros_like(lows)
        for sums, end in ((head, lows), (tail, highs)):
            clipped += sums[0]
            # The sum of (x - end)^2; cancellation must not make it negative.
            squared += np.maximum(sums[2] - 2 * end * sums[1] + end * end * sums[0], 0.0)
        step = (highs - lows) / levels
        rounded = np.maximum(self.inexact - clipped, 0.0)
        return clipping_weight * squared + step * step / 12 * rounded, clipped


def _bin(bins: Histogram, value: float) -> int:
    return min(max(int((value - bins.low) // bins.width), 0), len(bins.counts) - 1)


def _grid(low: float, high: float, symmetric: bool, signed: bool) -> tuple[Floats, Floats]:
    """Ranges to compare; the first is the whole. Ends lie closer together towards zero, where tails end."""
    shares = np.geomspace(1.0, 1 / 256, GRID)
    if symmetric:
        bounds = max(-low, high) * np.geomspace(1.0, 1 / 256, GRID * 8)
        return (-bounds if signed else np.zeros_like(bounds)), bounds
    lows = low * shares if low < 0 else np.zeros(1)
    highs = high * shares if high > 0 else np.zeros(1)
    grid_low, grid_high = np.meshgrid(lows, highs, indexing="ij")
    return grid_low.ravel(), grid_high.ravel()


def _percentile(values: _Weighted, share: float, symmetric: bool) -> tuple[float, float]:
    """Symmetric: of the absolute values. Else half of what is left out goes to each side."""
    if symmetric:
        order = np.argsort(np.abs(values.points), kind="stable")
        high = float(np.abs(values.points)[order][_quantile(values.weights[order], share)])
        return -high, high
    outside = (1 - share) / 2
    low = values.points[_quantile(values.weights, outside)]
    high = values.points[_quantile(values.weights, 1 - outside)]
    return float(low), float(high)


def _quantile(weights: Floats, share: float) -> int:
    sums = np.cumsum(weights)
    return min(int(np.searchsorted(sums, share * sums[-1])), len(sums) - 1)


def _entropy(values: _Weighted, levels: int, symmetric: bool, signed: bool) -> tuple[float, float]:
    """The range whose quantized distribution has the least divergence from the true one.

    The whole range shrinks about zero in :data:`CANDIDATES` steps, down to where a level is as wide as a bin.
    """
    low, high = _ends(min(values.points[0], 0.0), max(values.points[-1], 0.0), symmetric, signed)
    least = min(levels * values.width / (high - low), 0.5)
    shares = np.linspace(1.0, least, CANDIDATES)
    divergences = [_divergence(values, low * share, high * share, levels) for share in shares]
    best = shares[int(np.argmin(divergences))]
    return float(low * best), float(high * best)


def _divergence(values: _Weighted, low: float, high: float, levels: int) -> float:
    first, last = np.searchsorted(values.points, [low, high])
    last = min(last + 1, len(values.points))
    weights: NDArray[Any] = values.weights[first:last]
    if not len(weights) or not weights.any():
        return float("inf")
    step = (high - low) / levels
    level = np.clip(np.rint((values.points[first:last] - low) / step), 0, levels).astype(np.int64)
    # What a quantized tensor tells: each level's weight, spread over those of its bins that hold anything.
    held = weights > 0
    total, places = np.bincount(level, weights), np.bincount(level, held)
    spread = np.where(held, (total / np.maximum(places, 1))[level], 0.0)
    # The true one, with what was clipped at the ends.
    true = weights.copy()
    true[0] += values.weights[:first].sum()
    true[-1] += values.weights[last:].sum()
    there = true > 0
    p, q = true[there] / true.sum(), np.maximum(spread[there], 1e-9 * spread.sum()) / spread.sum()
    return float((p * np.log(p / q)).sum())
