"""Clip ranges: what each method promises, on distributions where it shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelforge.errors import DataError
from modelforge.quantize.ranges import Histogram, TensorRange
from modelforge.quantize.thresholds import (
    CANDIDATES,
    CLIPPED_AT_MOST,
    CLIPPING_WEIGHT,
    METHODS,
    NEAR,
    Method,
    _divergence,
    _divergences,
    _ends,
    _entropy,
    _grid,
    _levels,
    _Weighted,
    clip_range,
    expected_error,
)

SCHEMES = [(True, True), (False, True), (False, False)]


def measured(values: NDArray[np.float32], sample: int = 1) -> TensorRange:
    """As calibration gives it: exact ends, a histogram of every ``sample``-th element."""
    low, high = float(values.min()), float(values.max())
    some = values[::sample]
    bins = Histogram.spanning(low, high).plus(some)
    return TensorRange("t", 4, values.size, low, high, int((some == 0).sum()), 0, 0, bins)


def quantized_error(values: NDArray[np.float32], low: float, high: float, steps: int) -> float:
    """The mean squared error of really quantizing."""
    scale = (high - low) / steps
    codes = np.clip(np.rint((values.astype(np.float64) - low) / scale), 0, steps)
    return float(((codes * scale + low - values) ** 2).mean())


def long_tailed(seed: int = 0, size: int = 200_000) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_t(2.5, size).astype(np.float32)


DISTRIBUTIONS = st.sampled_from(["normal", "tailed", "relu", "negative", "spiky", "offset", "outlier"])


def draw(kind: str, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=4000) * 10.0 ** rng.uniform(-6, 6)
    changed = {
        "tailed": lambda: x * np.exp(rng.normal(size=x.size)),
        "relu": lambda: np.maximum(x, 0),
        "negative": lambda: -np.abs(x),
        "spiky": lambda: np.round(x / x.std()),
        "offset": lambda: x + 5 * x.std(),
        "outlier": lambda: np.append(x, x.std() * 1e5),
    }
    return np.asarray(changed.get(kind, lambda: x)(), np.float32)


@given(kind=DISTRIBUTIONS, seed=st.integers(0, 10_000), scheme=st.sampled_from(SCHEMES), bits=st.sampled_from([4, 8]))
@settings(max_examples=150, deadline=None)
def test_the_chosen_range_is_never_worse_than_the_whole(
    kind: str, seed: int, scheme: tuple[bool, bool], bits: int
) -> None:
    tensor = measured(draw(kind, seed), sample=3)
    symmetric, signed = scheme
    whole = clip_range(tensor, "minmax", symmetric=symmetric, signed=signed, bits=bits)
    for method, weight in (("auto", CLIPPING_WEIGHT), ("mse", 1.0)):
        chosen = clip_range(tensor, method, symmetric=symmetric, signed=signed, bits=bits)  # type: ignore[arg-type]  # a literal
        errors = [
            expected_error(tensor, *ends, symmetric=symmetric, signed=signed, bits=bits, clipping_weight=weight)
            for ends in (chosen, whole)
        ]
        assert errors[0] <= errors[1]


@given(
    kind=DISTRIBUTIONS, seed=st.integers(0, 10_000), scheme=st.sampled_from(SCHEMES), method=st.sampled_from(METHODS)
)
@settings(max_examples=150, deadline=None)
def test_a_range_holds_zero_and_stays_inside_the_whole(
    kind: str, seed: int, scheme: tuple[bool, bool], method: Method
) -> None:
    tensor = measured(draw(kind, seed))
    symmetric, signed = scheme
    low, high = clip_range(tensor, method, symmetric=symmetric, signed=signed)
    whole = clip_range(tensor, "minmax", symmetric=symmetric, signed=signed)
    assert whole[0] <= low <= 0 <= high <= whole[1]
    assert low < high
    if symmetric:
        assert low == -high


def test_minmax_is_the_exact_range() -> None:
    tensor = measured(np.array([-1, 0.25, 3], np.float32))
    assert clip_range(tensor, "minmax", symmetric=False, signed=False) == (-1, 3)
    assert clip_range(tensor, "minmax", symmetric=True, signed=True) == (-3, 3)
    positive = measured(np.array([2, 3], np.float32))
    assert clip_range(positive, "minmax", symmetric=False, signed=True) == (0, 3)
    assert clip_range(positive, "minmax", symmetric=True, signed=False) == (0, 3)


def test_an_unsigned_type_without_zero_point_refuses_negative_values() -> None:
    with pytest.raises(DataError, match='tensor "t"'):
        clip_range(measured(np.array([-1, 1], np.float32)), "minmax", symmetric=True, signed=False)


def test_percentile_leaves_out_that_share() -> None:
    values = long_tailed()
    low, high = clip_range(measured(values), "percentile", symmetric=True, signed=True, percentile=99)
    assert float((np.abs(values) > high).mean()) == pytest.approx(0.01, rel=0.2)
    low, high = clip_range(measured(values), "percentile", symmetric=False, signed=False, percentile=99)
    assert float(((values > high) | (values < low)).mean()) == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entropy_clips_a_long_tail(scheme: tuple[bool, bool]) -> None:
    # ONNX Runtime's compares one candidate, the whole range (facts: identical to minmax).
    tensor = measured(long_tailed())
    low, high = clip_range(tensor, "entropy", symmetric=scheme[0], signed=scheme[1])
    whole = clip_range(tensor, "minmax", symmetric=scheme[0], signed=scheme[1])
    assert high - low < 0.6 * (whole[1] - whole[0])


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    tensor = measured(np.random.default_rng(0).uniform(-1, 1, 400_000).astype(np.float32))
    _, high = clip_range(tensor, "entropy", symmetric=True, signed=True)
    assert high > 0.95


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_expected_error_is_that_of_really_quantizing(symmetric: bool) -> None:
    values = long_tailed()
    tensor = measured(values)
    for method in METHODS:
        low, high = clip_range(tensor, method, symmetric=symmetric, signed=symmetric)
        expected = expected_error(tensor, low, high, symmetric=symmetric, signed=symmetric)
        assert expected == pytest.approx(quantized_error(values, low, high, 254 if symmetric else 255), rel=0.1)


def test_mse_beats_minmax_when_really_quantizing() -> None:
    values = long_tailed()
    tensor = measured(values, sample=7)
    errors = {
        method: quantized_error(values, *clip_range(tensor, method, symmetric=True, signed=True), 254)
        for method in METHODS
    }
    assert errors["mse"] < 0.75 * errors["minmax"]
    assert errors["mse"] < errors["auto"] < errors["minmax"]


def test_auto_clips_few_elements_where_mse_clips_many() -> None:
    rng = np.random.default_rng(0)
    # One channel in a hundred is ten times as strong: it is signal, and percentile and mse would cut it off.
    values = np.concatenate([rng.normal(size=99_000), 10 * rng.normal(size=1_000)]).astype(np.float32)
    tensor = measured(values)
    shares = {}
    for method in METHODS:
        _, high = clip_range(tensor, method, symmetric=True, signed=True, bits=4)
        shares[method] = float((np.abs(values) > high).mean())
    assert shares["auto"] <= CLIPPED_AT_MOST * 1.1
    assert shares["mse"] > 3 * shares["auto"]


def test_an_outlier_that_the_subsample_missed_still_counts() -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values[1] = 40.0
    tensor = measured(values, sample=2)
    assert tensor.bins.counts.sum() == 5_000
    _, high = clip_range(tensor, "auto", symmetric=True, signed=True)
    assert high > 20  # a squared error of 36 ** 2, eight times, is more than the noise of the rest


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("values", [[0.0], [5.0], [-5.0, -5.0], [1e-42], [3e38, -3e38], [0.0, 1e-20], [1.0, 1.0000001]])
def test_degenerate_tensors_have_a_usable_range(values: list[float], scheme: tuple[bool, bool], method: Method) -> None:
    low, high = clip_range(measured(np.array(values, np.float32)), method, symmetric=scheme[0], signed=scheme[1])
    assert low <= 0 <= high
    scale = np.float32((high - low) / 255)
    assert np.isfinite(scale)
    assert scale >= np.finfo(np.float32).tiny


@pytest.mark.parametrize("method", METHODS)
def test_a_single_value_is_kept(method: Method) -> None:
    low, high = clip_range(measured(np.full(100, 5, np.float32)), method, symmetric=False, signed=False)
    assert (low, high) == (0.0, 5.0)


@settings(max_examples=60, deadline=None)
@given(DISTRIBUTIONS, st.integers(0, 1000), st.sampled_from(SCHEMES))
def test_entropy_is_what_comparing_bin_by_bin_gives(kind: str, seed: int, scheme: tuple[bool, bool]) -> None:
    """Sums over levels find the few candidates; the result is that of looking at every bin for every candidate."""
    symmetric, signed = scheme
    values = _Weighted(measured(draw(kind, seed)))
    levels = _levels(symmetric, signed, 8)
    low, high = _ends(min(values.points[0], 0.0), max(values.points[-1], 0.0), symmetric, signed)
    shares = np.linspace(1.0, min(levels * values.width / (high - low), 0.5), CANDIDATES)
    divergences = [_divergence(values, low * share, high * share, levels) for share in shares]
    best = shares[int(np.argmin(divergences))]
    assert _entropy(values, levels, symmetric, signed) == (float(low * best), float(high * best))


@pytest.mark.parametrize("kind", ["normal", "tailed", "relu", "offset"])
def test_estimates_of_the_divergence_are_near_it_and_few_are_left_open(kind: str) -> None:
    values = _Weighted(measured(draw(kind, 3)))
    high = float(values.points[-1])
    low = min(float(values.points[0]), 0.0)
    shares = np.linspace(1.0, 0.5, CANDIDATES)
    found = _divergences(values, low * shares, high * shares, 255)
    exact = np.array([_divergence(values, low * share, high * share, 255) for share in shares])
    known = ~np.isnan(found)
    assert known.mean() > 0.9
    np.testing.assert_allclose(found[known], exact[known], atol=NEAR)


@pytest.mark.parametrize("method", ["auto", "mse"])
@pytest.mark.parametrize("kind", ["tailed", "outlier", "negative"])
def test_two_sided_ranges_are_those_of_every_pair_of_ends(method: Method, kind: str) -> None:
    tensor = measured(draw(kind, 5))
    values = _Weighted(tensor)
    careful = method == "auto"
    lows, highs = _grid(min(tensor.minimum, 0.0), max(tensor.maximum, 0.0), False, False)
    best, chosen = np.inf, (0.0, 0.0)
    for low in lows.ravel():
        for high in highs.ravel():
            errors, clipped = values.errors(np.array([low]), np.array([high]), 255, CLIPPING_WEIGHT if careful else 1.0)
            if not (careful and clipped[0] > CLIPPED_AT_MOST * values.inexact) and errors[0] < best:
                best, chosen = errors[0], (float(low), float(high))
    assert clip_range(tensor, method, symmetric=False, signed=False) == (min(chosen[0], 0.0), max(chosen[1], 0.0))
