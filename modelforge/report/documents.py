"""The report files that a variant may carry, as they are read: `accuracy.json`, `calibration.json`,
`sensitivity.json` and `report.json` (docs/guides/report.md), and the open parts of a record and of `about`
that a report draws: latency by batch, targets, the split (docs/bundle-format.md).

Strict about types and finite numbers, tolerant of what is absent and of keys from a later version.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

BINS_AT_MOST = 4096
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(ge=0, le=1e15)]
"""Bounded, as what is drawn is added up and multiplied."""


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


class LayerTime(_Part):
    """What one layer of the artifact took on the device, by the vendor's own name: layers of the model may be fused."""

    name: str
    ms: Milliseconds


class LayersDocument(_Part):
    """`layers.json`: the time of each layer in one run, in the order of execution."""

    schema_: Literal[1] = Field(alias="schema")
    batch: NonNegativeInt | None = None
    layers: tuple[LayerTime, ...] = ()


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


# -- open parts of a record and of `about`: each is taken or left as a whole

BatchSize = Annotated[int, Field(gt=0, le=2**31)]
BatchKey = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}$")]


class Estimate(_Part):
    """What a model of the device says; ``by_batch`` as that of :class:`LatencyFigures`."""

    by_batch: dict[BatchKey, Milliseconds] = {}
    method: str | None = None


class LatencyFigures(_Part):
    """`latency` of a record: medians of one execution in milliseconds, by batch size (JSON's keys are text)."""

    by_batch: dict[BatchKey, Milliseconds] | None = None
    p50_ms: Milliseconds | None = None
    batch: BatchSize | None = None
    threads: BatchSize | None = None
    estimate: Estimate | None = None


class TargetFacts(_Part):
    """One of `about.targets`: the profile that was built with, in words."""

    title: str | None = None
    tier: str | None = None


class PlaceEstimate(_Part):
    """One target at one precision, estimated: what the model takes of what it may take, and how long it takes."""

    precision: str
    verdict: str
    needed_bytes: Annotated[int, Field(ge=0, le=1 << 60)]
    allowed_bytes: Annotated[int, Field(ge=0, le=1 << 60)]
    latency_ms: Annotated[float, Field(ge=0, le=1e15)] | None = None


class Place(_Part):
    """One row of `about.placement`: a target beside the model."""

    target: str
    tier: str
    verdict: str
    precision: str | None = None
    why: str = ""
    estimates: tuple[PlaceEstimate, ...] = ()


class PlacementFacts(_Part):
    """`about.placement`: where the model can run, by estimate."""

    budget_ms: Annotated[float, Field(gt=0, le=1e12)]
    rows: tuple[Place, ...]


class ServingFacts(_Part):
    """`about.serving`: what the recipe says for schedulers."""

    latency_budget_ms: Annotated[float, Field(gt=0, le=1e12)] | None = None
    fallback: tuple[str, ...] = ()


class StageTensor(_Part):
    """A tensor that a stage takes or gives; ``bytes`` at the sizes of the split; ``source`` is a stage, or `input`."""

    name: str
    dtype: str | None = None
    shape: tuple[int | str | None, ...] | None = None
    bytes: Count | None = None
    source: str | None = Field(None, alias="from")


class StageDocument(_Part):
    """One of `split.stages`; ``seconds`` is an estimate."""

    name: str
    inputs: tuple[StageTensor, ...] = ()
    outputs: tuple[StageTensor, ...] = ()
    layers: Count | None = None
    flops: Count | None = None
    weight_bytes: Count | None = None
    activation_bytes: Count | None = None
    seconds: Annotated[float, Field(ge=0, le=1e9)] | None = None


class OutputSource(_Part):
    """One of `split.outputs`: an output of the model, and the stage that gives it."""

    name: str
    source: str | None = Field(None, alias="from")


class Way(_Part):
    """One of `split.transport`: how a tensor crosses; ``scale`` and ``zero_point`` of QuantizeLinear for `uint8`."""

    dtype: str
    scale: float | None = None
    zero_point: int | None = None


class ChainStage(_Part):
    stage: str
    target: str
    evidence: str | None = None


class ChainFigures(_Part):
    """A chain against FP32, as the accuracy of a variant."""

    metric: str | None = None
    reference: float | None = None
    value: float | None = None
    drop: float | None = None
    max_drop: float | None = None
    sqnr_db: float | None = None
    identical: bool = False
    cosine: float | None = None
    agreement: Fraction | None = None
    samples: NonNegativeInt | None = None
    gate: str | None = None


class ChainDocument(_Part):
    """One of `split.chains`: variants run one after the other, judged as the whole model, or why they were not.

    ``lowered``: of the lowered models on all samples, where an emulator ran some of them only.
    """

    stages: tuple[ChainStage, ...] = ()
    accuracy: ChainFigures | None = None
    lowered: ChainFigures | None = None
    reason: str | None = None


class TransportBytes(_Part):
    """Bytes of what is sent, by how its floats are."""

    fp32: Count
    fp16: Count
    int8: Count


class Candidate(_Part):
    """One of `split.candidates`: a place to cut; ``flops_before`` as a share of all."""

    tensors: Annotated[tuple[str, ...], Field(min_length=1)]
    flops_before: Fraction
    bytes: TransportBytes


class CrossingSeconds(_Part):
    """Estimates; None where a profile knows no rate. ``saved`` may be below zero."""

    crossing: Annotated[float, Field(ge=0, le=1e12)]
    npu: Annotated[float, Field(ge=0, le=1e12)] | None = None
    cpu: Annotated[float, Field(ge=0, le=1e12)] | None = None
    saved: Annotated[float, Field(ge=-1e12, le=1e12)] | None = None


class PartitionCost(_Part):
    """One of `partitions.TAG.costs`: what a stage on the NPU costs to hand over to, and saves."""

    stage: str
    tensors: Count
    bytes: Count
    seconds: CrossingSeconds


class TierLink(_Part):
    """From one tier to the next; ``bandwidth`` in bytes a second."""

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    latency_ms: Milliseconds
    bandwidth: Annotated[float, Field(gt=0, le=1e18)]


class TierCut(_Part):
    """One way to place the layers, with its times; ``factor`` is what the bandwidths were multiplied by."""

    kind: str
    route: tuple[str, ...] = ()
    crossing: dict[str, tuple[str, ...]] = {}
    bytes: TransportBytes
    tier_ms: dict[str, Milliseconds]
    link_ms: dict[str, Milliseconds] = {}
    total_ms: Milliseconds
    fits: bool = True
    factor: Annotated[float, Field(gt=0, le=1e12)] = 1.0

    @property
    def sent(self) -> tuple[str, ...]:
        """The tensors that cross any link, each once."""
        return tuple(dict.fromkeys(name for names in self.crossing.values() for name in names))


class TierChoices(_Part):
    """`split.tiers`: the best ways over tiers and links, and how the best one depends on the bandwidth."""

    estimate: bool = True
    transport: Literal["fp32", "fp16", "int8"] = "fp32"
    return_outputs: bool = True
    links: Annotated[tuple[TierLink, ...], Field(min_length=1)]
    cuts: tuple[TierCut, ...] = ()
    sweep: tuple[TierCut, ...] = ()

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names in the order of the links, which JSON's objects do not keep."""
        linked = [name for link in self.links for name in (link.source, link.target)]
        placed = [name for cut in (*self.cuts, *self.sweep) for name in cut.tier_ms]
        return tuple(dict.fromkeys([*linked, *placed]))
