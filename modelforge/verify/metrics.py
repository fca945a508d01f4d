"""Figures that compare two sets of outputs, and figures on labels. Plain NumPy, float64 sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from modelforge.errors import DataError
from modelforge.samples import load_function

Array = np.ndarray[Any, Any]
Outputs = Mapping[str, Array]
LabelMetric = Callable[[Outputs, Array | None], float]


@dataclass(frozen=True)
class Comparison:
    """One output beside its reference.

    Attributes:
        identical: bit for bit the same; ``sqnr_db`` is None then, as it would be infinite.
        sqnr_db: ``10 log10(sum ref^2 / sum (ref - value)^2)`` over all samples: total energy, as a mean over samples
            is meaningless where a softmax saturates.
        cosine: of the two outputs as one long vector.
        max_abs: largest absolute difference.
        agreement: share of positions whose largest entry along the last axis is the same, for ``[samples, classes]``
            and ``[samples, steps, classes]``; None for any other output.
        fault: what makes the output no output at all: NaN, infinity, all zero, all equal.
        collapsed: of a channel group: the share of the channels that say something in the reference and the same
            everywhere in the value; None for a whole output.
    """

    identical: bool
    sqnr_db: float | None
    cosine: float
    max_abs: float
    agreement: float | None
    fault: str | None
    collapsed: float | None = None

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def compare(reference: Array, value: Array) -> Comparison:
    """Hold one output against its reference, both ``[samples, ...]``.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != value.shape:
        raise ValueError(f"the shapes differ: {list(reference.shape)} and {list(value.shape)}")
    if reference.dtype.kind not in "fiub":
        equal = bool((reference == value).all())
        return Comparison(
            equal, None, float(equal), 0.0 if equal else math.inf, float(np.mean(reference == value)), None
        )
    fault = fault_of(value, reference)
    if np.array_equal(reference, value):
        return Comparison(True, None, 1.0, 0.0, _agreement(reference, value), fault)
    first, second = reference.astype(np.float64).ravel(), value.astype(np.float64).ravel()
    if not np.isfinite(second).all():
        return Comparison(False, -math.inf, 0.0, math.inf, 0.0, fault)
    difference = first - second
    signal, noise = float(first @ first), float(difference @ difference)
    norm = math.sqrt(signal * float(second @ second))
    return Comparison(
        identical=False,
        sqnr_db=10 * math.log10(signal / noise) if signal > 0 and noise > 0 else -math.inf,
        cosine=float(first @ second) / norm if norm > 0 else 0.0,
        max_abs=float(np.abs(difference).max()),
        agreement=_agreement(reference, value),
        fault=fault,
    )


@dataclass(frozen=True)
class ChannelGroup:
    """Channels ``start`` to ``stop`` (without it) of an output along ``axis``, which mean something else than the rest.

    Attributes:
        name: what they are called in reports.
        alike: they may mean the same as the rest after all, as they come from the same kind of operator.
    """

    output: str
    name: str
    axis: int
    start: int
    stop: int
    alike: bool

    @property
    def title(self) -> str:
        return f"{self.start}:{self.stop} {self.name}"

    def of(self, output: Array) -> Array:
        """The group's channels, ``[samples, ...]``."""
        return output[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


SILENT_SCORE = 0.05
"""Scores from 0 to 1 that never get above this say that nothing is there."""


def is_silent(group: ChannelGroup, reference: Array) -> bool:
    """Whether a channel group of an output ``[samples, ...]`` can be scores that find nothing in any of the samples."""
    values = group.of(reference)
    return bool(values.size) and float(values.min()) >= 0 and float(values.max()) < SILENT_SCORE


SILENT = 0.05
"""A channel that varies by less than this share of the liveliest one of its group has nothing to lose."""


def compare_group(group: ChannelGroup, reference: Array, value: Array) -> Comparison:
    """Hold one channel group against its reference; both are the whole output ``[samples, ...]``, of one shape.

    ``agreement`` is that of the largest channel, where the group can be scores (two channels or more, within 0 and 1):
    over all places with a score of at least a quarter of the largest, as the others decide nothing.
    """
    first, second = group.of(reference), group.of(value)
    found = compare(first, second)
    if reference.dtype.kind != "f" or not np.isfinite(second).all():
        return found
    first, second = (np.moveaxis(each, group.axis, 0).reshape(group.stop - group.start, -1) for each in (first, second))
    spread = np.ptp(first, axis=1)
    lively = spread > SILENT * spread.max(initial=0.0)
    dead = np.ptp(second, axis=1) == 0
    collapsed = float(np.mean(dead[lively])) if lively.any() else 0.0
    agreement = None
    if len(first) > 1 and first.min() >= 0 and 0 < first.max() <= 1:
        loud = first.max(axis=0) >= first.max() / 4
        agreement = float(np.mean(first[:, loud].argmax(axis=0) == second[:, loud].argmax(axis=0)))
    return replace(found, agreement=agreement, collapsed=collapsed)


def fault_of(value: Array, reference: Array | None = None) -> str | None:
    """Say why an output is none: NaN, infinity, or collapsed (all equal) where the reference is not."""
    if value.size == 0:
        return "is empty"
    if value.dtype.kind != "f":
        return None
    if np.isnan(value).any():
        return "holds NaN"
    if np.isinf(value).any():
        return "holds infinity"
    if value.size == 1 or (reference is not None and _is_flat(reference)):
        return None
    if not value.any():
        return "is all zero"
    return "is all equal" if _is_flat(value) else None


def _is_flat(array: Array) -> bool:
    return bool((array == array.flat[0]).all())


def _agreement(reference: Array, value: Array) -> float | None:
    if reference.dtype.kind != "f" or reference.ndim not in (2, 3) or reference.shape[-1] < 2:
        return None
    return float(np.mean(reference.argmax(axis=-1) == value.argmax(axis=-1)))


def label_metric(name: str, *, k: int, output: str | None, folder: Path, where: str) -> LabelMetric | None:
    """The function behind a metric's name: higher is better. None for ``cosine`` and ``sqnr``, which need no labels.

    ``top1`` and ``topk`` take class scores ``[samples, classes]`` (of ``output``, or of the only output) and integer
    labels ``[samples]``. ``module:function`` is called with (outputs by name, labels or None) and gives a float.
    """
    if name in ("cosine", "sqnr"):
        return None
    if name in ("top1", "topk"):
        return _TopK(1 if name == "top1" else k, output, where)
    function = load_function(name, folder, where)

    def user_metric(outputs: Outputs, labels: Array | None) -> float:
        try:
            value = float(function(outputs, labels))
        except Exception as error:  # the user's code may raise anything; it is their metric that is wrong
            raise DataError(f"the metric raised {type(error).__name__}: {error}", where=f"{where} = {name}") from error
        if not math.isfinite(value):
            raise DataError(f"the metric gave {value}", where=f"{where} = {name}")
        return value

    return user_metric


@dataclass(frozen=True)
class _TopK:
    k: int
    output: str | None
    where: str

    def __call__(self, outputs: Outputs, labels: Array | None) -> float:
        if labels is None:
            raise DataError('the metric needs labels: an array "label"', where=self.where)
        if self.output is None and len(outputs) > 1:
            raise DataError(
                f"the model has several outputs: {', '.join(outputs)}",
                where=self.where,
                fix='name the one that holds class scores: output = "NAME" under [accuracy]',
            )
        if self.output is not None and self.output not in outputs:
            raise DataError(f'there is no output "{self.output}"; there are: {", ".join(outputs)}', where=self.where)
        scores = outputs[self.output] if self.output else next(iter(outputs.values()))
        scores = scores.reshape(len(scores), -1)
        wanted = labels.reshape(len(labels), -1)
        if wanted.shape[1] != 1 or wanted.dtype.kind not in "iu":
            raise DataError(
                f"labels must be one integer a sample, got {labels.dtype} {list(labels.shape)}", where=self.where
            )
        if wanted.min() < 0 or wanted.max() >= scores.shape[1]:
            raise DataError(
                f"labels go from {wanted.min()} to {wanted.max()}, the model has {scores.shape[1]} classes",
                where=self.where,
            )
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        return float((best == wanted).any(axis=1).mean())


def majority_share(labels: Array) -> float:
    """What a model that always says the most frequent label would reach."""
    _, counts = np.unique(labels, return_counts=True)
    return float(counts.max() / counts.sum())
