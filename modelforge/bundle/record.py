"""The variant record: what is known of one variant, as its config blob and under ``variants`` of ``inspect --json``.

Every key of the contract is always there; ``null`` means "there is none" (no artifact) or "not measured" (a figure).
Strict about types, tolerant of keys from a later version: they are dropped, or kept where a part is open.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from modelforge.bundle.format import DIGEST_PATTERN, title_fault
from modelforge.errors import IntegrityError
from modelforge.store import canonical_json
from modelforge.target import TAG_PATTERN, Precision

Status = Literal["compiled", "deferred", "failed", "skipped"]
Evidence = Literal["device", "emulator", "simulator", "reference", "none"]
Gate = Literal["passed", "failed", "overridden", "none"]
Digest = Annotated[str, Field(pattern=DIGEST_PATTERN.replace(r"\Z", "$"))]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    """Closed: keys that this version does not know are dropped on reading."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class _OpenPart(_Part):
    """Open: figures and facts of one compiler or runner stand beside the known keys, and are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_json(self) -> Self:
        try:
            json.dumps(self.model_extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"what stands beside the known keys must be JSON with finite numbers: {error}") from None
        return self


class Figures(_Part):
    """How near outputs are to the FP32 reference.

    Attributes:
        sqnr_db: 10 log10 of signal power over error power, in dB. Where the outputs are equal bit for bit it would be
            infinite, which JSON cannot say: then it is None and ``identical`` is True. ``math.inf`` is taken so.
        cosine: cosine similarity, -1 to 1.
        agreement: fraction of samples on which both give the same decision.
    """

    sqnr_db: Annotated[float, Field(allow_inf_nan=True)] | None = None
    identical: bool = False
    cosine: FiniteFloat | None = None
    agreement: Fraction | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        # Not a validator that runs before: it would take JSON out of pydantic's JSON mode, where arrays are tuples.
        if self.sqnr_db == math.inf:
            object.__setattr__(self, "sqnr_db", None)
            object.__setattr__(self, "identical", True)
        if self.sqnr_db is not None and not math.isfinite(self.sqnr_db):
            raise ValueError(f"`sqnr_db` is {self.sqnr_db}: nothing was measured")
        if self.identical and self.sqnr_db is not None:
            raise ValueError("outputs that are identical have no finite `sqnr_db`")
        return self


class RungChain(Figures):
    """A chain of variants that missed its gate with a rung, judged as the whole model; ``name`` is for people,
    ``evidence`` the weakest of its variants'."""

    name: str
    evidence: Evidence
    metric: str | None = None
    reference: FiniteFloat | None = None
    value: FiniteFloat | None = None
    drop: FiniteFloat | None = None
    samples: NonNegativeInt | None = None
    max_drop: NonNegativeFloat | None = None
    gate: Gate


class Rung(Figures):
    """One precision of the ladder, in the order tried, and what became of it. ``reason`` says why it was left.

    ``chain``, where that was not its own gate: all other figures are the variant's own.
    """

    precision: Precision
    gate: Gate
    metric: str | None = None
    value: FiniteFloat | None = None
    drop: FiniteFloat | None = None
    samples: NonNegativeInt | None = None
    reason: str | None = None
    chain: RungChain | None = None


class OutputFigures(Figures):
    """Figures of one output, or of one channel group of it."""

    output: str
    group: str | None = None


class Accuracy(Figures):
    """``reference`` is the metric of FP32 in ONNX Runtime, ``value`` that of the variant, ``drop`` their difference."""

    evidence: Evidence = "none"
    metric: str | None = None
    reference: FiniteFloat | None = None
    value: FiniteFloat | None = None
    drop: FiniteFloat | None = None
    samples: NonNegativeInt | None = None
    max_drop: NonNegativeFloat | None = None
    gate: Gate = "none"
    reason: str | None = None
    per_output: tuple[OutputFigures, ...] | None = None


class Batch(_Part):
    """The batch sizes: a range with the size to optimise for, or the sizes that run fast."""

    min: PositiveInt | None = None
    opt: PositiveInt | None = None
    max: PositiveInt | None = None
    values: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_range = [size for size in (self.min, self.opt, self.max) if size is not None]
        if len(in_range) != (0 if self.values else 3) or in_range != sorted(in_range):
            raise ValueError("give `min` <= `opt` <= `max`, or `values`")
        return self


class Artifact(_Part):
    """The main file of a compiled variant; ``file`` is its title in the bundle."""

    file: str
    digest: Digest
    size: NonNegativeInt

    @field_validator("file")
    @classmethod
    def _plain(cls, file: str) -> str:
        if fault := title_fault(file):
            raise ValueError(f"{file!r} {fault}")
        return file


class Runtime(_OpenPart):
    """What the device needs; builder facts (``sm``, ``cuda``, ...) may stand beside the sentence."""

    requires: str


class Latency(_OpenPart):
    """How fast it ran, and on what; figures in milliseconds stand beside ``evidence``."""

    evidence: Evidence = "none"


class Calibration(_OpenPart):
    """``digest`` is that of the calibration data."""

    samples: PositiveInt
    digest: Digest


class Delegation(_OpenPart):
    """How much runs on the NPU and how much on the CPU beside it, as the vendor's compiler told.

    Attributes:
        operators: count by place, ``npu`` and ``cpu`` at least; None where the compiler does not tell.
        macs: multiply-accumulates of one run by place; likewise.
        off_npu: what the NPU does not run, by the compiler's own names.
        source: where the figures come from.
    """

    operators: dict[str, NonNegativeInt] | None = None
    macs: dict[str, NonNegativeInt] | None = None
    off_npu: tuple[str, ...] = ()
    source: str

    @property
    def npu_share(self) -> float | None:
        """Of the multiply-accumulates, 0 to 1; of the operators where those are unknown or none."""
        for counts in (self.macs, self.operators):
            total = sum((counts or {}).values())
            if counts and total:
                return counts.get("npu", 0) / total
        return None


class VariantRecord(_Part):
    """One target x stage x batch set.

    Attributes:
        target: the target's tag.
        toolchain: version by package.
        precision: the rung that was taken; None where none was.
        batch: None where no input has a bounded first dimension.
        artifact: None unless ``status`` is ``compiled``.
        calibration: None at fp32, and wherever nothing was calibrated.
        delegation: None where the target is no NPU with a CPU beside it.
        commands: what was run, without paths of the build machine.
    """

    target: Annotated[str, Field(pattern=TAG_PATTERN)]
    stage: Annotated[str, Field(min_length=1, max_length=128)] = "main"
    status: Status
    compiler: str | None
    toolchain: dict[str, str] = {}
    precision: Precision | None
    ladder: tuple[Rung, ...] = ()
    batch: Batch | None = None
    artifact: Artifact | None = None
    runtime: Runtime | None = None
    accuracy: Accuracy = Accuracy()
    latency: Latency = Latency()
    calibration: Calibration | None = None
    delegation: Delegation | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        compiled = self.status == "compiled"
        if compiled and (self.artifact is None or self.precision is None or self.compiler is None):
            raise ValueError("a compiled variant has an artifact, a precision and a compiler")
        if compiled and self.runtime is None:
            raise ValueError("a compiled variant says what it requires to run")
        if not compiled and self.artifact is not None:
            raise ValueError(f"a {self.status} variant has no artifact")
        if self.precision == "fp32" and self.calibration is not None:
            raise ValueError("fp32 has no calibration")
        return self

    def to_json(self) -> dict[str, Any]:
        """What ``inspect --json`` prints under ``variants``: every key of the contract, in its order.

        Left out where empty, because they only say more: ``identical``, ``reason`` and ``per_output`` of the accuracy,
        all of a rung but ``precision`` and ``gate``, the half of ``batch`` that is not used, and ``delegation``.
        """
        data = self.model_dump(mode="json")
        data["ladder"] = [_rung(rung) for rung in data["ladder"]]
        data["batch"] = data["batch"] and _given(data["batch"])
        data["accuracy"] = _accuracy(data["accuracy"])
        if data["delegation"] is None:
            del data["delegation"]
        return data

    def to_bytes(self) -> bytes:
        """The config blob: one spelling for one record."""
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        """Read a config blob.

        Raises:
            IntegrityError: it is not JSON, or not a variant record.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise IntegrityError(
                f"is not a variant record: {key + ': ' if key else ''}{first['msg']}",
                where=where,
                fix="get the bundle again from where it came",
            ) from None


_ACCURACY_KEYS = (
    "evidence", "metric", "reference", "value", "drop", "sqnr_db", "cosine", "agreement", "samples", "max_drop", "gate"
)  # fmt: skip


def _accuracy(data: dict[str, Any]) -> dict[str, Any]:
    result = {key: data[key] for key in _ACCURACY_KEYS} | _optional(data, ("identical", "reason"))
    if data["per_output"] is not None:
        result["per_output"] = [
            {"output": row["output"]} | _given({key: row[key] for key in row if key not in ("output", "identical")})
            | _optional(row, ("identical",))
            for row in data["per_output"]
        ]  # fmt: skip
    return result


def _rung(data: dict[str, Any]) -> dict[str, Any]:
    head = {"precision": data["precision"], "gate": data["gate"]}
    rest = _given({key: data[key] for key in data if key not in (*head, "identical", "chain")})
    if data["chain"] is not None:
        rest["chain"] = _rung_chain(data["chain"])
    return head | rest | _optional(data, ("identical",))


def _rung_chain(data: dict[str, Any]) -> dict[str, Any]:
    return _given({key: data[key] for key in data if key != "identical"}) | _optional(data, ("identical",))


def _given(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def _optional(data: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: data[key] for key in keys if data[key]}
