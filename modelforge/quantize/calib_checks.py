"""Refuse data that would make a range table worthless: too little of it, noise instead of samples, or constants.

Looks at the data alone; whether it fits the model was checked when it was loaded (:mod:`modelforge.samples`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelforge.errors import DataError, nearest
from modelforge.samples import Samples

WORDS = ("few", "random", "constant")
"""What an override may name."""

_ROWS = 64
_ELEMENTS = 1 << 16
"""Of the data, at most so much is looked at for noise."""
_SMALLEST_ROW = 16
_SMALLEST_SAMPLE = 512
_SPATIAL = 4
"""An image-like sample has at least so many elements along its last two axes."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """Something wrong that was allowed: to be kept in the bundle."""

    word: str
    what: str


def check_calibration(
    samples: Samples, *, floor: int, allow: Collection[str] = (), where: str = "calibration.data"
) -> tuple[Finding, ...]:
    """Refuse calibration data that says little about real inputs.

    Args:
        floor: how many different samples there must be.
        allow: which of :data:`WORDS` to let pass.
        where: the recipe key, for messages.

    Returns:
        what is wrong and was allowed.

    Raises:
        DataError: no data at all; or fewer different samples than ``floor`` ("few"), floating point images that are
            independent uniform or normal noise ("random"), a floating point input that has one and the same value
            everywhere ("constant").
    """
    for word in allow:
        if word not in WORDS:
            raise DataError(f'"{word}" names nothing that can be allowed; {nearest(word, WORDS)}', where=where)
    if samples.count == 0 or not samples.arrays:
        raise DataError("holds no samples", where=where, fix="give samples of what the model will meet")
    findings = [*_few(samples, floor)]
    for name, array in samples.arrays.items():
        if array.dtype.kind == "f" and array[0].size > 1:  # a single number is a setting, not a signal
            findings += [*_constant(name, array), *_random(name, array)]
    for finding in findings:
        if finding.word not in allow:
            raise DataError(finding.what, where=where, fix=_FIXES[finding.word])
    return tuple(findings)


_FIXES = {
    "few": 'give more samples; or allow = ["few"], which the bundle will record',
    "random": 'calibrate with real inputs: ranges of noise are wrong for them; or allow = ["random"], on record',
    "constant": 'give samples that differ, as real inputs do; or allow = ["constant"], which the bundle will record',
}


def _few(samples: Samples, floor: int) -> list[Finding]:
    if samples.count < floor:
        return [Finding("few", f"holds {samples.count} samples, fewer than the {floor} that calibration needs")]
    different = len({_row_digest(samples, index) for index in range(samples.count)})
    if different < min(floor, samples.count):
        what = f"holds {samples.count} samples, but only {different} different ones; calibration needs {floor}"
        return [Finding("few", what)]
    return []


def _row_digest(samples: Samples, index: int) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(samples.arrays):
        hasher.update(np.ascontiguousarray(samples.arrays[name][index]).tobytes())
    return hasher.digest()


def _constant(name: str, array: NDArray[Any]) -> list[Finding]:
    value = array.flat[0]
    if all((row == value).all() for row in array):
        return [Finding("constant", f'the input "{name}" is {value} in every element of every sample')]
    return []


def _random(name: str, array: NDArray[Any]) -> list[Finding]:
    """Noise: no element tells anything about its neighbours along any axis, and the distribution is a textbook's."""
    shape = array.shape[1:]
    if len(shape) < 2 or min(shape[-2:]) < _SPATIAL or math.prod(shape) < _SMALLEST_ROW:
        return []
    rows = np.asarray(array[: max(2, min(_ROWS, _ELEMENTS // math.prod(shape)))], np.float64)
    if rows.size < _SMALLEST_SAMPLE:
        return []
    # Channels are often shifted and scaled each by its own mean and deviation.
    axes = tuple(axis for axis in range(rows.ndim) if axis != 1 or rows.ndim < 4)
    spread = rows.std(axis=axes, keepdims=True)
    if (spread == 0).any():
        return []
    rows = (rows - rows.mean(axis=axes, keepdims=True)) / spread
    if any(_is_correlated(rows, axis) for axis in range(rows.ndim) if rows.shape[axis] > 1):
        return []
    flat = np.sort(rows.reshape(-1))
    for kind, distribution in _DISTRIBUTIONS.items():
        expected = distribution(flat)
        steps = np.arange(1, flat.size + 1) / flat.size
        # Kolmogorov-Smirnov; the allowance is for noise rounded to 8 bits.
        if np.abs(expected - steps).max() < 1.63 / math.sqrt(flat.size) + 0.01:
            return [Finding("random", f'the input "{name}" looks like {kind} noise: neighbours are independent')]
    return []


def _is_correlated(rows: Floats, axis: int) -> bool:
    first = np.take(rows, range(rows.shape[axis] - 1), axis).reshape(-1)
    second = np.take(rows, range(1, rows.shape[axis]), axis).reshape(-1)
    scale = math.sqrt(float((first * first).sum() * (second * second).sum()))
    # Five deviations: of noise, one in two million fails; real images have 0.5 and more along some axis.
    return scale > 0 and abs(float((first * second).sum())) / scale > max(5 / math.sqrt(first.size), 0.02)


def _normal(x: Floats) -> Floats:
    # Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7: NumPy has no erf.
    z = np.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.asarray(0.5 * (1 + np.sign(x) * (1 - poly * np.exp(-z * z))), np.float64)


_DISTRIBUTIONS: dict[str, Callable[[Floats], Floats]] = {
    "uniform": lambda x: np.clip(0.5 + x / (2 * math.sqrt(3)), 0, 1),
    "normal": _normal,
}
