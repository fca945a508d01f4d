"""What `about` of a bundle says for all variants, part by part: serving, targets, the split.

A part of another shape is left out and told; the others stand. Its JSON may come from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from modelforge.report.documents import (
    Candidate,
    ChainDocument,
    OutputSource,
    PartitionCost,
    PlacementFacts,
    ServingFacts,
    StageDocument,
    TargetFacts,
    TierChoices,
    Way,
)

Part = TypeVar("Part")


@dataclass(frozen=True)
class Split:
    """How the model is split.

    Attributes:
        sizes: of the open dimensions, at which bytes and times hold.
        transport: by tensor that crosses otherwise than as it is.
        candidates: other places to cut; ``tiers`` the ways over tiers and links: one of them, or neither.
        costs: of a partition, what each stage on the NPU costs to hand over to.
    """

    stages: tuple[StageDocument, ...]
    outputs: tuple[OutputSource, ...]
    sizes: dict[str, int]
    transport: dict[str, Way]
    chains: tuple[ChainDocument, ...]
    candidates: tuple[Candidate, ...]
    tiers: TierChoices | None
    notes: tuple[str, ...]
    costs: tuple[PartitionCost, ...] = ()


@dataclass(frozen=True)
class BundleFacts:
    """The parts of `about` that a report draws, checked; ``left_out`` says what had another shape, and where.

    Attributes:
        partitions: by target, how its NPU and the CPU beside it share the model.
    """

    serving: ServingFacts
    targets: Mapping[str, TargetFacts]
    split: Split | None
    placement: PlacementFacts | None
    left_out: tuple[str, ...]
    partitions: Mapping[str, Split] = field(default_factory=dict)

    @property
    def budget_ms(self) -> float | None:
        return self.serving.latency_budget_ms


def read_about(about: Mapping[str, Any]) -> BundleFacts:
    reader = _Reader(about)
    serving = reader.take(_SERVING, "serving") or ServingFacts()
    targets = reader.take(_TARGETS, "targets") or {}
    split, placement = _split(reader, "split"), reader.take(_PLACEMENT, "placement")
    parts = {tag: found for tag in _tags(reader) if (found := _split(reader, "partitions", tag)) is not None}
    return BundleFacts(serving, targets, split, placement, tuple(reader.left_out), parts)


def _tags(reader: _Reader) -> list[str]:
    found = reader.about.get("partitions")
    if found is None or isinstance(found, dict):
        return sorted(found or {})
    reader.left_out.append("partitions: is no object")
    return []


def _split(reader: _Reader, *keys: str) -> Split | None:
    found: Any = reader.about
    for key in keys:
        found = found.get(key)
    if found is None:
        return None
    if not isinstance(found, dict):
        reader.left_out.append(f"{'.'.join(keys)}: is no object")
        return None
    return Split(
        stages=reader.take(_STAGES, *keys, "stages") or (),
        outputs=reader.take(_OUTPUTS, *keys, "outputs") or (),
        sizes=reader.take(_SIZES, *keys, "sizes") or {},
        transport=reader.take(_WAYS, *keys, "transport") or {},
        chains=reader.take(_CHAINS, *keys, "chains") or (),
        candidates=reader.take(_CANDIDATES, *keys, "candidates") or (),
        tiers=reader.take(_TIERS, *keys, "tiers"),
        notes=reader.take(_NOTES, *keys, "notes") or (),
        costs=reader.take(_COSTS, *keys, "costs") or (),
    )


_SERVING = TypeAdapter(ServingFacts)
_TARGETS = TypeAdapter(dict[str, TargetFacts])
_PLACEMENT = TypeAdapter(PlacementFacts)
_STAGES = TypeAdapter(tuple[StageDocument, ...])
_OUTPUTS = TypeAdapter(tuple[OutputSource, ...])
_SIZES = TypeAdapter(dict[str, int])
_WAYS = TypeAdapter(dict[str, Way])
_CHAINS = TypeAdapter(tuple[ChainDocument, ...])
_CANDIDATES = TypeAdapter(tuple[Candidate, ...])
_TIERS = TypeAdapter(TierChoices)
_NOTES = TypeAdapter(tuple[str, ...])
_COSTS = TypeAdapter(tuple[PartitionCost, ...])


def checked(adapter: TypeAdapter[Part], value: Any, where: str) -> tuple[Part | None, str | None]:
    """A part of its shape, or what is wrong with it. None and ``null`` are no part, and nothing is wrong."""
    if value is None:
        return None, None
    try:
        # Through JSON, not from the value: in pydantic's JSON mode arrays are tuples.
        return adapter.validate_json(json.dumps(value)), None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return None, f"{'.'.join([where, *map(str, first['loc'])])}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        return None, f"{where}: {error}"


@dataclass
class _Reader:
    about: Mapping[str, Any]
    left_out: list[str] = field(default_factory=list)

    def take(self, adapter: TypeAdapter[Part], *keys: str) -> Part | None:
        value: Any = self.about
        for key in keys:
            value = value.get(key)
        found = checked(adapter, value, ".".join(keys))
        if found[1] is not None:
            self.left_out.append(found[1])
        return found[0]
