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

_SHARES, _FINE_SHARES = np.geomspace(1.0, 1 / 256, GRID), np.geomspace(1.0, 1 / 256, GRID * 8)
LEAST_Q = 1e-9
"""The least share that the entropy search gives a bin: what is clipped may count where nothing was before."""
NEAR, NEAR_EDGE = 1e-9, 1e-6
"""Below which differences of divergences, and of places in bins, may be rounding."""

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
            errors.flat[0] = min(errors.flat[0], np.finfo(np.float64).max)  # the first clips nothing
        best = int(np.argmin(errors))
        low, high = (float(np.broadcast_to(ends, errors.shape).flat[best]) for ends in (lows, highs))
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
        powers = self.weights * np.stack([np.ones_like(self.points), self.points, self.points * self.points])
        self._sums = np.concatenate([np.zeros((3, 1)), np.cumsum(powers, axis=1)], axis=1)

    def errors(self, lows: Floats, highs: Floats, levels: int, clipping_weight: float) -> tuple[Floats, Floats]:
        """Summed squared error and clipped weight of each range ``[lows, highs]``, whose shapes are broadcast."""
        below = np.searchsorted(self.points, lows, side="left")
        above = np.searchsorted(self.points, highs, side="right")
        total = self._sums[:, -1].reshape(3, *(1 for _ in highs.shape))
        head, tail = self._sums[:, below], total - self._sums[:, above]
        clipped: Floats = head[0] + tail[0]
        # The sum of (x - end)^2 on each side; cancellation must not make it negative.
        squared: Floats = sum(
            np.maximum(sums[2] - 2 * end * sums[1] + end * end * sums[0], 0.0)
            for sums, end in ((head, lows), (tail, highs))
        )
        step = (highs - lows) / levels
        rounded = np.maximum(self.inexact - clipped, 0.0)
        return clipping_weight * squared + step * step / 12 * rounded, clipped


def _bin(bins: Histogram, value: float) -> int:
    return min(max(int((value - bins.low) // bins.width), 0), len(bins.counts) - 1)


def _grid(low: float, high: float, symmetric: bool, signed: bool) -> tuple[Floats, Floats]:
    """Ranges to compare, as arrays to broadcast; the first is the whole. Ends lie closer together towards zero, where
    tails end."""
    if symmetric:
        bounds = max(-low, high) * _FINE_SHARES
        return (-bounds if signed else np.zeros_like(bounds)), bounds
    lows = low * _SHARES if low < 0 else np.zeros(1)
    highs = high * _SHARES if high > 0 else np.zeros(1)
    return lows[:, np.newaxis], highs[np.newaxis]


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
    estimates = _divergences(values, low * shares, high * shares, levels)
    least = np.min(estimates, initial=np.inf, where=~np.isnan(estimates))
    # What is too near to the least to be told apart, or could not be estimated, is looked at bin by bin.
    near = shares[~(estimates > least + NEAR)]
    best = min(near, key=lambda share: _divergence(values, low * share, high * share, levels))
    return float(low * best), float(high * best)


def _divergences(values: _Weighted, lows: Floats, highs: Floats, levels: int) -> Floats:
    """What :func:`_divergence` says of each range, to :data:`NEAR`, or NaN where that is not certain.

    Level by level rather than bin by bin: bins of a level that hold anything share one q, so that ``sum p log q`` has a
    term for each level, and ``sum p log p`` is a difference of running sums but for the bins at both ends.
    """
    points, weights, count = values.points, values.weights, len(values.points)
    first, last = np.searchsorted(points, lows), np.minimum(np.searchsorted(points, highs) + 1, count)
    edges, certain = _first_bins(values, lows, (highs - lows) / levels, levels)
    edges = np.clip(edges, first[:, np.newaxis], last[:, np.newaxis])
    held = weights > 0
    sums, places, entropies = (_running(each) for each in (weights, held, _times_log(weights)))
    total, bins = np.diff(sums[edges]), np.diff(places[edges])
    whole = sums[last] - sums[first]
    scale = np.maximum(whole, NOTHING)
    log_q = np.log(np.maximum(total / np.maximum(bins, 1) / scale[:, np.newaxis], LEAST_Q))
    cross = (total * log_q).sum(axis=1)
    own = entropies[last] - entropies[first]
    rows = np.arange(len(lows))
    for end, outside in ((first, sums[first]), (last - 1, sums[-1] - sums[last])):
        # What is clipped counts at the end's bin, which is in one of the levels.
        place = np.clip(end, 0, count - 1)
        level = np.minimum((edges[:, 1:] <= place[:, np.newaxis]).sum(axis=1), levels)
        cross += outside * np.where(held[place], log_q[rows, level], np.log(LEAST_Q))
        own += _times_log(weights[place] + outside) - _times_log(weights[place])
    found = (own - cross) / sums[-1] - np.log(sums[-1])
    # One bin is both ends at once.
    return np.where(certain & (last - first > 1) & (whole > 0), found, np.nan)


def _first_bins(values: _Weighted, lows: Floats, steps: Floats, levels: int) -> tuple[NDArray[np.int64], Any]:
    """The first bin of each level of each range, ``[ranges, levels + 2]`` with the end of the last one; and for which
    ranges that is certain: not where a bin lies between two levels to within rounding."""
    points, count = values.points, len(values.points)
    if count < 4 or not np.allclose(np.diff(points[1:-1]), values.width, rtol=1e-6, atol=0):
        return np.zeros((len(lows), levels + 2), np.int64), np.zeros(len(lows), np.bool_)
    between = lows[:, np.newaxis] + steps[:, np.newaxis] * (np.arange(1, levels + 1) - 0.5)
    # The points lie on a grid, but for the two at the ends, which are the minimum and the maximum.
    place = (between - points[1]) / values.width + 1
    certain = (np.abs(place - np.rint(place)) > NEAR_EDGE).all(axis=1)
    inner = np.clip(np.ceil(place), 1, count - 1).astype(np.int64)
    inner = np.where(between <= points[0], 0, np.where(between > points[-1], count, inner))
    for end in (points[0], points[-1]):
        certain &= (np.abs(between - end) > NEAR_EDGE * values.width).all(axis=1)
    outer = np.zeros((len(lows), 1), np.int64)
    return np.concatenate([outer, inner, outer + count], axis=1), certain


def _running(values: NDArray[Any]) -> Floats:
    return np.concatenate([np.zeros(1), np.cumsum(values, dtype=np.float64)])


def _times_log(values: Floats) -> Floats:
    found: Floats = values * np.log(np.where(values > 0, values, 1.0))
    return found


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
    p, q = true[there] / true.sum(), np.maximum(spread[there], LEAST_Q * spread.sum()) / spread.sum()
    return float((p * np.log(p / q)).sum())
