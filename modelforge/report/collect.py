"""From a bundle to what a report says of it: the records, and the report files beside them, each checked.

Files are hashed as they are read, and bounded; nothing but JSON of the known shapes gets through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from modelforge.bundle import checked, parts
from modelforge.bundle.read import Bundle, FileEntry, Variant
from modelforge.bundle.record import VariantRecord
from modelforge.errors import InputError
from modelforge.report.about import BundleFacts, read_about
from modelforge.report.documents import (
    AccuracyDocument,
    BuildDocument,
    CalibrationDocument,
    Layer,
    LayersDocument,
    OutputFigures,
    RungFigures,
    SensitivityDocument,
)
from modelforge.report.timing import Timing, timing_of

FILE_LIMIT = 32 << 20
"""Bytes that a report file may have: some 50,000 histograms."""

PRECISIONS = ("int8", "mixed", "fp16", "fp32")
_ROLE = "report"
_LATENCIES = ("p50_ms", "median_ms", "mean_ms", "min_ms")

Document = TypeVar("Document", bound=BaseModel)


@dataclass(frozen=True)
class VariantReport:
    """One variant: its record, its files, and those of the five report files that it carries.

    Attributes:
        digest: of the variant's manifest.
        calibration_digest: of `calibration.json`: variants that share it were calibrated together.
        timing: by batch size, measured and estimated, and the batch sizes recommended.
    """

    record: VariantRecord
    digest: str
    files: Mapping[str, FileEntry]
    accuracy: AccuracyDocument | None
    calibration: CalibrationDocument | None
    calibration_digest: str | None
    sensitivity: SensitivityDocument | None
    build: BuildDocument | None
    timing: Timing
    layer_times: LayersDocument | None = None

    @property
    def title(self) -> str:
        """The target's tag, with the stage where the model was split."""
        return self.record.target if self.record.stage == "main" else f"{self.record.target} / {self.record.stage}"

    @property
    def rungs(self) -> tuple[RungFigures, ...]:
        """The ladder in the order tried: the record's figures, and what `accuracy.json` adds to them."""
        more = {rung.precision: rung for rung in self.accuracy.ladder} if self.accuracy else {}
        found = []
        for rung in self.record.ladder:
            said = rung.model_dump(exclude_none=True)
            added = more.pop(rung.precision, None)
            found.append(RungFigures.model_validate((added.model_dump(exclude_none=True) if added else {}) | said))
        return (*found, *more.values())

    @property
    def outputs(self) -> tuple[OutputFigures, ...]:
        if self.accuracy and self.accuracy.per_output:
            return self.accuracy.per_output
        largest = _largest_errors(self.build)
        return tuple(
            OutputFigures.model_validate(row.model_dump() | {"max_abs": largest.get(row.output)})
            for row in self.record.accuracy.per_output or ()
        )

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the gate failed or was overridden, each once."""
        said = [self.record.accuracy.reason] if self.record.accuracy.reason else []
        return tuple(dict.fromkeys([*said, *(self.accuracy.reasons if self.accuracy else ())]))

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.accuracy.layers if self.accuracy else ()

    def kept_higher(self) -> dict[str, tuple[str, ...]]:
        """Nodes that stayed at a higher precision than the variant's own, by the reason: sorted by their number.

        From the layers of `accuracy.json` and from what the lowering reported.
        """
        reasons: dict[str, str] = {}
        lower = self.build.lower if self.build else {}
        for facts in (lower, lower.get("quantize"), lower.get("fp16")):
            kept = facts.get("kept") if isinstance(facts, dict) else None
            if isinstance(kept, dict):
                reasons |= {node: reason for node, reason in kept.items() if isinstance(reason, str)}
        for layer in self.layers:
            if self.is_higher(layer):
                reasons[layer.node] = layer.reason or reasons.get(layer.node) or "no reason was recorded"
        groups: dict[str, list[str]] = {}
        for node, reason in reasons.items():
            groups.setdefault(reason, []).append(node)
        return {reason: tuple(groups[reason]) for reason in sorted(groups, key=lambda each: (-len(groups[each]), each))}

    def is_higher(self, layer: Layer) -> bool:
        """Whether a layer has a higher precision than what its variant is named for."""
        own = "int8" if self.record.precision == "mixed" else self.record.precision
        return layer.precision is not None and own is not None and layer.precision != own

    def faster_or_slower(self) -> tuple[tuple[str, str], ...]:
        """How the speed compares with every other rung that was timed, in words, and whether that is good or bad."""
        own = self.latency_ms
        found = []
        for rung in self.rungs:
            if own and rung.latency_ms and rung.precision != self.record.precision:
                ratio = rung.latency_ms / own
                word, kind = ("faster", "good") if ratio >= 1 else ("slower", "bad")
                found.append((f"{max(ratio, 1 / ratio):.2f}x {word} than {rung.precision}", kind))
        return tuple(found)

    @property
    def latency_ms(self) -> float | None:
        """The median of one inference call, in milliseconds, where it was measured."""
        return _latency(self.record.latency.model_dump())


@dataclass(frozen=True)
class Report:
    """All that a report says of a bundle; ``about`` is JSON of any shape, ``facts`` its parts that were checked."""

    name: str
    version: str
    digest: str
    about: Mapping[str, Any]
    facts: BundleFacts
    variants: tuple[VariantReport, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the bundle says in a shape that this version does not know, each with its place."""
        of_variants = [
            f"{each.title}: {each.timing.left_out}" for each in self.variants if each.timing.left_out is not None
        ]
        return (*self.facts.left_out, *of_variants)

    def to_json(self) -> dict[str, Any]:
        """JSON: each variant's record as `inspect --json` prints it, its report files under ``reports``, and the batch
        sizes recommended for it under ``batching``; ``split`` as the bundle says it, where the model was split.
        """
        split = self.about.get("split")
        return {
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            **({} if split is None else {"split": split}),
            "left_out": list(self.left_out),
            "variants": [
                variant.record.to_json() | {"batching": _batching(variant), "reports": _documents(variant)}
                for variant in self.variants
            ],
        }


def collect(bundle: Bundle) -> Report:
    """Read the report files of all variants.

    Raises:
        IntegrityError: a file is not what its digest says, is no JSON, or is not of its shape.
        InputError: a file was written by a later ModelForge.
    """
    facts = read_about(bundle.about)
    variants = tuple(_collect(bundle, variant, facts.budget_ms) for variant in bundle.variants)
    return Report(bundle.name, bundle.version, bundle.digest, bundle.about, facts, variants)


def _collect(bundle: Bundle, variant: Variant, budget_ms: float | None) -> VariantReport:
    calibration = variant.files.get("calibration.json")
    return VariantReport(
        record=variant.record,
        digest=variant.digest,
        files=variant.files,
        accuracy=_read(bundle, variant, "accuracy.json", AccuracyDocument),
        calibration=_read(bundle, variant, "calibration.json", CalibrationDocument),
        calibration_digest=calibration.digest if calibration and calibration.role == _ROLE else None,
        sensitivity=_read(bundle, variant, "sensitivity.json", SensitivityDocument),
        build=_read(bundle, variant, "report.json", BuildDocument),
        timing=timing_of(variant.record, budget_ms),
        layer_times=_read(bundle, variant, "layers.json", LayersDocument),
    )


def _read(bundle: Bundle, variant: Variant, title: str, kind: type[Document]) -> Document | None:
    entry = variant.files.get(title)
    if entry is None or entry.role != _ROLE:
        return None
    where = bundle.file(variant, title)
    data = _read_checked(where, entry)
    named = f"{title} of {variant.record.target}/{variant.record.stage}"
    try:
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise checked.damaged(f"{named} is not JSON: {error}", where) from None
    schema = value.get("schema") if isinstance(value, dict) else None
    if type(schema) is int and schema > 1:
        raise checked.newer(where, f"{named}, schema {schema}")
    try:
        # From the bytes, not from the value: in pydantic's JSON mode arrays are tuples.
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise checked.damaged(f"{named}: {key + ': ' if key else ''}{first['msg']}", where) from None


def _read_checked(where: Path, entry: FileEntry) -> bytes:
    """A report file's bytes, after bound, size and digest were checked."""
    if entry.size > FILE_LIMIT:
        raise checked.damaged(f"a report file of {entry.size} bytes; at most {FILE_LIMIT} are read", where)
    checked.check_there(where, entry.size)
    try:
        with parts.open_regular(where, follow=False) as stream:
            data = stream.read(entry.size + 1)
    except (InputError, OSError) as error:
        raise checked.damaged(f"cannot be read: {error}", where) from None
    if len(data) != entry.size or f"sha256:{hashlib.sha256(data).hexdigest()}" != entry.digest:
        raise checked.damaged("is not what its digest says", where)
    return data


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _documents(variant: VariantReport) -> dict[str, Any]:
    """The report files by name, with what they said alone: absent keys stay absent."""
    found = {
        "accuracy": variant.accuracy,
        "calibration": variant.calibration,
        "sensitivity": variant.sensitivity,
        "build": variant.build,
        "layers": variant.layer_times,
    }
    return {
        name: document.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for name, document in found.items()
        if document is not None
    }


def _batching(variant: VariantReport) -> dict[str, Any] | None:
    batching = variant.timing.batching
    return None if batching is None else batching.to_json()


def _largest_errors(build: BuildDocument | None) -> dict[str, float]:
    rows = build.accuracy.get("per_output") if build else None
    found: dict[str, float] = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and isinstance(row.get("output"), str) and isinstance(row.get("max_abs"), float):
            found[row["output"]] = row["max_abs"]
    return found


def _latency(facts: Mapping[str, Any]) -> float | None:
    for name in _LATENCIES:
        figure = facts.get(name)
        if isinstance(figure, int | float) and not isinstance(figure, bool) and figure >= 0:
            return float(figure)
    return None
