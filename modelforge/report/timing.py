"""What a record says of the time of one execution by batch size: measured and estimated apart, and what follows.

The rules of curves and recommendations are those of :mod:`modelforge.bundle.batching`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter

from modelforge.bundle.batching import Batching, Curve, curve_of, recommend, sizes_of
from modelforge.bundle.record import VariantRecord
from modelforge.report.about import checked
from modelforge.report.documents import LatencyFigures

_LATENCY = TypeAdapter(LatencyFigures)
_NOTHING = Curve({}, "none")


@dataclass(frozen=True)
class Timing:
    """Curves of one variant in milliseconds by batch size, empty where nothing is known.

    Attributes:
        batching: batch sizes to serve with; None where the batch is fixed, or nothing was compiled.
        budget_ms: the time that an answer may take, as the recipe gives it for the whole model.
        left_out: what the record says in another shape.
    """

    measured: Curve
    estimated: Curve
    batching: Batching | None
    budget_ms: float | None
    left_out: str | None = None

    @property
    def best(self) -> Curve:
        """What was measured, else what was estimated."""
        return self.measured if self.measured.milliseconds else self.estimated

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({*self.measured.milliseconds, *self.estimated.milliseconds}))

    def estimate_is_off(self, size: int) -> float | None:
        """By what share the estimate is above (or below, negative) what was measured at a size."""
        measured, estimated = self.measured.milliseconds.get(size), self.estimated.milliseconds.get(size)
        return estimated / measured - 1 if measured and estimated else None


def timing_of(record: VariantRecord, budget_ms: float | None) -> Timing:
    """The curves of a record, and the batch sizes recommended for a budget."""
    latency = record.latency
    _, fault = checked(_LATENCY, latency.model_dump(exclude={"evidence"}), "latency")
    if fault is not None:
        return Timing(_NOTHING, _NOTHING, None, budget_ms, fault)
    found = curve_of(record)
    # `curve_of` takes the estimate only where nothing was measured: here both are drawn beside each other.
    unmeasured = record.model_copy(update={"latency": latency.model_copy(update={"evidence": "none"})})
    measured = found if found.source == "measured" else _NOTHING
    batching = recommend(found, sizes_of(record), budget_ms) if record.status == "compiled" else None
    return Timing(measured, curve_of(unmeasured), batching, budget_ms)
