"""Batch sizes to serve with: from how long a variant takes for each size, and the time that an answer may take.

Pure functions of a record. What was measured, what was estimated and what is not known are told apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from modelforge.bundle.record import VariantRecord

Source = Literal["measured", "estimated", "none"]
_GAIN = 1.05
"""A larger batch must answer that much more a second to be worth its wait: below lies the noise of a measurement."""


@dataclass(frozen=True)
class Curve:
    """Milliseconds for one execution, by batch size.

    Attributes:
        source: ``measured`` on a device; ``estimated`` (a model of the device, ``detail`` names it); ``none``.
    """

    milliseconds: Mapping[int, float]
    source: Source
    detail: str = ""

    def at(self, size: int) -> Time:
        """How long a batch of ``size`` takes: a point of the curve, or a straight line between two.

        Below the smallest point its time holds as a bound, since a batch can be filled up; beyond the largest nothing.
        """
        if size in self.milliseconds:
            return Time(self.milliseconds[size], self.source, self.detail)
        for low, high in itertools.pairwise(sorted(self.milliseconds)):
            if low < size < high:
                left, right = self.milliseconds[low], self.milliseconds[high]
                between = left + (right - left) * (size - low) / (high - low)
                return Time(between, self.source, self._with(f"between batch {low} and {high}"))
        if self.milliseconds and size < min(self.milliseconds):
            least = min(self.milliseconds)
            return Time(self.milliseconds[least], self.source, self._with(f"at most: that of batch {least}"))
        return Time(None, "none", "not measured" + (f" at batch {size}" if self.milliseconds else ""))

    def _with(self, text: str) -> str:
        return f"{text}, {self.detail}" if self.detail else text


@dataclass(frozen=True)
class Time:
    """Milliseconds of one execution, None where they are not known."""

    milliseconds: float | None
    source: Source
    detail: str = ""

    def words(self) -> str:
        if self.milliseconds is None:
            return self.detail or "not measured"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.milliseconds:.4g} ms, {self.source}{detail}"


@dataclass(frozen=True)
class Batching:
    """What to serve a variant with.

    Attributes:
        preferred: batch sizes to gather, rising; each answers clearly more a second than those before it.
        max_batch: the largest of them.
        max_queue_delay_us: how long to wait for a batch to fill, in microseconds.
        milliseconds: what one execution of ``max_batch`` takes; None where it is not known.
        throughput: answers a second at ``max_batch``, one execution at a time.
        meets_budget: None where there is no budget, or no curve to hold against it.
    """

    preferred: tuple[int, ...]
    max_batch: int
    max_queue_delay_us: int
    source: Source
    milliseconds: float | None = None
    throughput: float | None = None
    meets_budget: bool | None = None
    reasons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "preferred_batch_sizes": list(self.preferred),
            "max_batch_size": self.max_batch,
            "max_queue_delay_us": self.max_queue_delay_us,
            "source": self.source,
            "latency_ms": self.milliseconds,
            "throughput_per_s": self.throughput,
            "meets_budget": self.meets_budget,
            "reasons": list(self.reasons),
        }


def curve_of(record: VariantRecord) -> Curve:
    """The latency curve that a record holds.

    ``latency.by_batch`` with evidence ``device`` is measured, as is ``latency.p50_ms`` at ``latency.batch``;
    ``latency.estimate.by_batch`` is estimated (``latency.estimate.method`` says how). Times under an emulator or a
    simulator say nothing of the device and are not taken.
    """
    latency = record.latency.model_extra or {}
    if record.latency.evidence == "device":
        points = _points(latency.get("by_batch"))
        median, batch = latency.get("p50_ms"), latency.get("batch")
        if not points and isinstance(batch, int):
            points = _points({str(batch): median})
        if points:
            threads = latency.get("threads")
            return Curve(points, "measured", f"{threads} thread{'s' * (threads != 1)}" if threads else "")
    estimate = latency.get("estimate")
    if isinstance(estimate, dict) and (points := _points(estimate.get("by_batch"))):
        return Curve(points, "estimated", str(estimate.get("method", "")))
    return Curve({}, "none")


def sizes_of(record: VariantRecord) -> tuple[int, ...]:
    """The batch sizes that a variant was made for, rising; empty where its batch is fixed."""
    batch = record.batch
    if batch is None:
        return ()
    return tuple(sorted(set(batch.values or [size for size in (batch.min, batch.opt, batch.max) if size is not None])))


def latency_budget(about: Mapping[str, Any]) -> float | None:
    """``serving.latency_budget_ms`` of a bundle."""
    serving = about.get("serving")
    budget = serving.get("latency_budget_ms") if isinstance(serving, dict) else None
    return float(budget) if isinstance(budget, (int, float)) and _is_time(budget) else None


def recommend(curve: Curve, sizes: Sequence[int], budget_ms: float | None) -> Batching | None:
    """Recommend batch sizes and a queue delay.

    A request that arrives just after an execution has begun waits for its end, at most one execution; then for its
    own batch to fill; then its own execution runs. So a batch of ``b`` meets a budget under load where
    ``2 x time(b) + delay <= budget``, and on an idle server where ``time(b) <= budget``.

    The delay is what the budget leaves, and never more than one execution of the largest batch: waiting longer than
    that only trades time for nothing, since the next batch could have run.

    Args:
        sizes: those that the variant was made for, at least one; sizes of the curve beyond the largest are not used.
        budget_ms: the time that an answer may take in all, in milliseconds.

    Returns:
        None where ``sizes`` is empty: the batch is fixed, and there is nothing to recommend.
    """
    if not sizes:
        return None
    known = {size: time for size, time in sorted(curve.milliseconds.items()) if min(sizes) <= size <= max(sizes)}
    if not known:
        return _unmeasured(sizes)
    worth = _worth(known)
    beyond = [size for size in sizes if size > max(known)]
    gaps = (f"nothing is known of batches of {', '.join(map(str, beyond))}: not recommended",) if beyond else ()
    under_load = [size for size in worth if budget_ms is None or 2 * known[size] <= budget_ms]
    if under_load:
        return replace(_advice(under_load, known, curve, budget_ms), reasons=gaps)
    idle = [size for size in worth if known[size] <= (budget_ms or 0)]
    if idle:
        advice = _advice(idle[:1], known, curve, None)
        return replace(
            advice,
            meets_budget=True,
            reasons=(f"only where a request finds the server idle: twice its time is above {budget_ms:g} ms",),
        )
    smallest = min(known)
    advice = _advice([smallest], known, curve, None)
    why = f"batch {smallest} alone takes {known[smallest]:.4g} ms, {curve.source}: above {budget_ms:g} ms"
    return replace(advice, meets_budget=False, reasons=(why,))


def _unmeasured(sizes: Sequence[int]) -> Batching:
    preferred = tuple(size for size in sorted(set(sizes)) if size > 1) or (max(sizes),)
    reason = "no latency is recorded: the sizes that it was built for, and no waiting; measure on the device"
    return Batching(preferred, max(sizes), 0, "none", reasons=(reason,))


def _advice(chosen: Sequence[int], known: Mapping[int, float], curve: Curve, budget_ms: float | None) -> Batching:
    largest = chosen[-1]
    time = known[largest]
    slack = 0.0 if budget_ms is None or largest == 1 else min(budget_ms - 2 * time, time)
    return Batching(
        preferred=tuple(chosen),
        max_batch=largest,
        max_queue_delay_us=int(slack * 1000),
        source=curve.source,
        milliseconds=time,
        throughput=round(largest * 1000 / time, 3),
        meets_budget=None if budget_ms is None else True,
    )


def _worth(known: Mapping[int, float]) -> list[int]:
    """The sizes that answer clearly more a second than every smaller one."""
    best, worth = 0.0, []
    for size, time in known.items():
        if size / time > best * _GAIN:
            worth.append(size)
        best = max(best, size / time)
    return worth


def _points(given: Any) -> dict[int, float]:
    """``{"1": 2.1, "4": 6.0}`` with the keys as numbers; what is no batch size or no time is passed over."""
    if not isinstance(given, dict):
        return {}
    found = {int(key): float(value) for key, value in given.items() if _is_size(key) and _is_time(value)}
    return {size: found[size] for size in sorted(found) if size > 0}


def _is_size(key: Any) -> bool:
    return isinstance(key, str) and key.isdecimal() and len(key) < 10


def _is_time(value: Any) -> bool:
    # A record may come from anywhere: whole numbers beyond a float's range are no times.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e15
