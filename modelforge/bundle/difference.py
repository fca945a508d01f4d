"""What differs between two bundles: targets, precisions, artifacts, accuracy, latency, toolchains, inputs, serving.

Compares records and "about"; opens no file of a variant. Pure, but for the two bundles that it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelforge.bundle.read import Bundle, Variant
from modelforge.store import canonical_json

Value = Any
"""JSON."""

# What is compared as one value: an order or a sentence, of which a part says nothing alone.
_WHOLE = frozenset({"batch", "ladder", "commands", "notes", "shape", "fallback", "values", "per_output"})


@dataclass(frozen=True)
class Change:
    """One key that differs, dotted (``accuracy.value``); ``delta`` is ``after - before`` of two numbers."""

    key: str
    before: Value
    after: Value

    @property
    def delta(self) -> float | None:
        numbers = [value for value in (self.before, self.after) if _is_number(value)]
        return numbers[1] - numbers[0] if len(numbers) == 2 else None

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "before": self.before, "after": self.after, "delta": self.delta}


@dataclass(frozen=True)
class VariantChange:
    """A variant that both bundles have and that is not the same; ``name`` tells target, stage and batch sizes."""

    name: str
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Difference:
    """``added`` and ``removed`` are names of variants; all empty: the bundles say the same.

    ``not_compared``: variants of one side that the other has too, but that were not pulled there.
    """

    before: Bundle
    after: Bundle
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[VariantChange, ...]
    about: tuple[Change, ...]
    not_compared: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        return self.before.digest == self.after.digest

    def to_json(self) -> dict[str, Any]:
        return {
            "before": _identity(self.before),
            "after": _identity(self.after),
            "same": self.is_same,
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": [
                {"variant": each.name, "changes": [change.to_json() for change in each.changes]}
                for each in self.changed
            ],
            "about": [change.to_json() for change in self.about],
            "not_compared": list(self.not_compared),
        }


def compare(before: Bundle, after: Bundle) -> Difference:
    """Compare two bundles, whatever their names and versions.

    Variants are paired by target and stage, and by their batch sizes too where a stage has several.
    """
    old, new = _variants(before), _variants(after)
    changed = [
        VariantChange(name, changes)
        for name in old
        if name in new and (changes := _compare_variants(old[name], new[name]))
    ]
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    left = [name for name in added if _is_absent(before, new[name])]
    left += [name for name in removed if _is_absent(after, old[name])]
    return Difference(
        before,
        after,
        tuple(name for name in added if name not in left),
        tuple(name for name in removed if name not in left),
        tuple(changed),
        tuple(_changes(_whole(before), _whole(after))),
        tuple(left),
    )


def _is_absent(bundle: Bundle, variant: Variant) -> bool:
    """Whether a bundle that was pulled in part left out such a variant."""
    labels = {"io.modelforge.target": variant.record.target, "io.modelforge.stage": variant.record.stage}
    return any(labels.items() <= entry.annotations.items() for entry in bundle.absent)


def _variants(bundle: Bundle) -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for variant in bundle.variants:
        record = variant.record
        name = record.target if record.stage == "main" else f"{record.target}/{record.stage}"
        if len(bundle.select(record.target, record.stage)) > 1:
            name += f" batch {canonical_json(record.to_json()['batch']).decode()}"
        found[name] = variant
    return found


def _compare_variants(before: Variant, after: Variant) -> tuple[Change, ...]:
    return tuple(_changes(_told(before), _told(after)))


def _told(variant: Variant) -> dict[str, Any]:
    """The record, with the digests of the files that it does not name, by role and title."""
    record = variant.record.to_json()
    named = None if variant.record.artifact is None else variant.record.artifact.file
    files = {title: entry.digest for title, entry in sorted(variant.files.items()) if title != named}
    return {key: value for key, value in record.items() if key not in ("target", "stage")} | {"files": files}


def _whole(bundle: Bundle) -> dict[str, Any]:
    about = {key: value for key, value in bundle.about.items() if key not in ("inputs", "outputs")}
    for key in ("inputs", "outputs"):
        about[key] = _by_name(bundle.about.get(key))
    files = {title: entry.digest for title, entry in sorted(bundle.files.items())}
    return {"name": bundle.name, "version": bundle.version} | about | ({"files": files} if files else {})


def _by_name(tensors: Any) -> Any:
    """Tensors by their names, so that one that is new does not shift the others."""
    if not isinstance(tensors, list) or not all(isinstance(each, dict) and "name" in each for each in tensors):
        return tensors
    return {str(each["name"]): {key: value for key, value in each.items() if key != "name"} for each in tensors}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], above: Sequence[str] = ()) -> Iterator[Change]:
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        place = [*above, str(key)]
        if key not in _WHOLE and isinstance(old, dict | None) and isinstance(new, dict | None):
            yield from _changes(old or {}, new or {}, place)
        else:
            yield Change(".".join(place), old, new)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _identity(bundle: Bundle) -> dict[str, Any]:
    return {"name": bundle.name, "version": bundle.version, "digest": bundle.digest, "path": str(bundle.path)}
