"""The report files that a variant may carry, as they are read: `accuracy.json`, `calibration.json`,
`sensitivity.json` and `report.json`. docs/guides/report.md describes them.

Strict about types and finite numbers, tolerant of what is absent and of keys from a later version.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

BINS_AT_MOST = 4096
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class OutputFigures(_Part):
    """One output against FP32. ``sqnr_db`` is None where the outputs are ``identical``; ``max_abs`` in its own unit."""

    output: str
    group: str | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    agreement: Fraction | None = None
    identical: bool = False


class RungFigures(_Part):
    """What one rung of the ladder reached; ``kept`` is how many layers stayed higher, ``latency_ms`` a median."""

    precision: str
    gate: str | None = None
    reason: str | None = None
    metric: str | None = None
    value: float | None = None
    drop: float | None = None
    sqnr_db: float | None = None
    identical: bool = False
    cosine: float | None = None
    agreement: Fraction | None = None
    samples: NonNegativeInt | None = None
    kept: NonNegativeInt | None = None
    latency_ms: Annotated[float, Field(ge=0)] | None = None


class Layer(_Part):
    """One layer: its SQNR against FP32 in dB, the precision it got, and why it stayed higher, if it did."""

    node: str
    op: str
    sqnr_db: float | None = None
    precision: str | None = None
    reason: str | None = None


class AccuracyDocument(_Part):
    """`accuracy.json`: how the variant was judged, more fully than its record says."""

    schema_: Literal[1] = Field(alias="schema")
    metric: str | None = None
    reference: float | None = None
    value: float | None = None
    drop: float | None = None
    max_drop: float | None = None
    samples: NonNegativeInt | None = None
    gate: str | None = None
    reasons: tuple[str, ...] = ()
    per_output: tuple[OutputFigures, ...] = ()
    ladder: tuple[RungFigures, ...] = ()
    layers: tuple[Layer, ...] = ()


class Bins(_Part):
    """A histogram: counts of equal bins over ``[low, high]``."""

    low: float
    high: float
    counts: Annotated[tuple[Count, ...], Field(min_length=1, max_length=BINS_AT_MOST)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise ValueError("`low` is above `high`")
        return self


class TensorRange(_Part):
    """One activation: the extremes seen, the clip range ``low`` to ``high`` chosen, exact zeros among the counted."""

    name: str
    minimum: float
    maximum: float
    low: float
    high: float
    zeros: Count | None = None
    bins: Bins | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minimum > self.maximum or self.low > self.high:
            raise ValueError(f"the range of {self.name!r} is upside down")
        return self


class CalibrationDocument(_Part):
    """`calibration.json`: what was calibrated with, and every range."""

    schema_: Literal[1] = Field(alias="schema")
    samples: NonNegativeInt
    data_digest: str | None = None
    method: str | None = None
    tensors: tuple[TensorRange, ...] = ()


class RankedLayer(_Part):
    """What one layer alone loses: its local SQNR in dB; None where nothing is lost."""

    node: str
    op: str
    sqnr_db: float | None = None


class CurvePoint(_Part):
    """What is reached with the ``excluded`` worst layers kept higher."""

    excluded: NonNegativeInt
    value: float | None = None
    drop: float | None = None
    sqnr_db: float | None = None
    agreement: Fraction | None = None
    gate: str | None = None


class SensitivityDocument(_Part):
    """`sensitivity.json`: layers by what they lose, worst first, and the search for how many to keep higher.

    Attributes:
        chosen: the ``excluded`` of the point that was taken; None where none met the gate.
    """

    schema_: Literal[1] = Field(alias="schema")
    metric: str | None = None
    ranking: tuple[RankedLayer, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    chosen: NonNegativeInt | None = None


class BuildDocument(_Part):
    """`report.json`: facts that the steps left. They are open: each compiler has its own."""

    accuracy: dict[str, Any] = {}
    prepare: dict[str, Any] = {}
    lower: dict[str, Any] = {}
    compile: dict[str, Any] = {}
