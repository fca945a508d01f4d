"""The statement that is signed: which bundle, which variants, and how they were made.

An in-toto Statement v1 (in-toto/attestation, spec/v1/statement.md) with the SLSA provenance predicate v1
(slsa.dev/provenance/v1). Made from the bundle alone: the same bundle gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelforge.bundle.format import is_digest
from modelforge.bundle.read import Bundle, Variant
from modelforge.errors import InputError
from modelforge.store import canonical_json

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:modelforge:build:v1"
"""What ``externalParameters`` mean. A URN, as nothing is to be fetched from it."""
BUILDER = "urn:modelforge:builder:unnamed"
"""``builder.id`` where the signer names none."""


@dataclass(frozen=True)
class Statement:
    """What a statement says, once its signature was checked.

    Attributes:
        index: digest of the image index.
        variants: digests of the variants' manifests by the variants' names.
    """

    name: str
    version: str
    index: str
    variants: Mapping[str, str]
    builder: str


class NotOurs(ValueError):
    """A statement of another kind, or one that says nothing sensible; the message says why."""


def statement(bundle: Bundle, *, builder: str = BUILDER) -> bytes:
    """Say what a bundle is and how it was made.

    Args:
        builder: URI of what ran the build and is answerable for it; taken from the signer, on trust.

    Raises:
        InputError: two variants cannot be told apart by name.
    """
    names = variant_names(bundle.variants)
    if len(names) != len(bundle.variants):
        raise InputError("two variants have one name: target, stage and batch sizes", where=str(bundle.path))
    subjects = {f"{bundle.name}:{bundle.version}": bundle.digest}
    subjects |= {name: variant.digest for name, variant in names.items()}
    return canonical_json(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": _in_toto(digest)} for name, digest in subjects.items()],
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {
                        "name": bundle.name,
                        "version": bundle.version,
                        "targets": sorted({variant.record.target for variant in bundle.variants}),
                    },
                    "resolvedDependencies": _dependencies(bundle),
                },
                "runDetails": {
                    "builder": {"id": builder, "version": _tools(bundle)},
                    # SLSA's rule for keys of others: <vendor>_<name>.
                    "modelforge_variants": {name: _made(variant) for name, variant in names.items()},
                },
            },
        }
    )


def read_statement(payload: bytes) -> Statement:
    """What a statement says. Call it with what was signed by a trusted key, not before.

    Raises:
        NotOurs: the key signed something else than a bundle.
    """
    try:
        value = json.loads(payload)
        if (value["_type"], value["predicateType"]) != (STATEMENT, PREDICATE):
            raise NotOurs(f"it states {str(value['predicateType'])[:80]}, not how a bundle was made")
        definition = value["predicate"]["buildDefinition"]
        if definition["buildType"] != BUILD_TYPE:
            raise NotOurs(f"it is about a build of another kind: {str(definition['buildType'])[:80]}")
        name, version = definition["externalParameters"]["name"], definition["externalParameters"]["version"]
        subjects = {entry["name"]: f"sha256:{entry['digest']['sha256']}" for entry in value["subject"]}
        index = subjects.pop(f"{name}:{version}")
        builder = value["predicate"]["runDetails"]["builder"]["id"]
        whole = len(value["subject"]) == len(subjects) + 1
    except NotOurs:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotOurs("it is not a provenance statement of a bundle") from None
    words = (name, version, builder, *subjects)
    if (
        not whole
        or not all(isinstance(word, str) for word in words)
        or not all(map(is_digest, (index, *subjects.values())))
    ):
        raise NotOurs("its subjects are not those of a bundle")
    return Statement(name, version, index, subjects, builder)


def variant_names(variants: Sequence[Variant]) -> dict[str, Variant]:
    """``TARGET``, ``TARGET/STAGE`` of a split model; with the batch sizes where a stage has several variants."""
    plain = [_name(variant) for variant in variants]
    return {
        f"{name}/{_batch(variant)}" if plain.count(name) > 1 else name: variant
        for name, variant in zip(plain, variants, strict=True)
    }


def _name(variant: Variant) -> str:
    record = variant.record
    return record.target if record.stage == "main" else f"{record.target}/{record.stage}"


def _batch(variant: Variant) -> str:
    batch = variant.record.batch
    if batch is None:
        return "batch-fixed"
    return "batch-" + "-".join(map(str, batch.values or (batch.min, batch.opt, batch.max)))


def _dependencies(bundle: Bundle) -> list[dict[str, Any]]:
    """What the bundle was made from, as far as it says."""
    found: dict[str, str] = {}
    for part in ("recipe", "model"):
        about = bundle.about.get(part)
        if isinstance(about, dict) and is_digest(about.get("digest")):
            found[part] = about["digest"]
    data = {variant.record.calibration.digest for variant in bundle.variants if variant.record.calibration}
    entries = [*found.items(), *(("calibration", digest) for digest in sorted(data))]
    return [{"name": name, "digest": _in_toto(digest)} for name, digest in entries]


def _tools(bundle: Bundle) -> dict[str, str]:
    """Every tool's version; where variants were made with several, all of them."""
    versions: dict[str, set[str]] = {}
    if isinstance(own := bundle.about.get("modelforge"), str):
        versions["modelforge"] = {own}
    for variant in bundle.variants:
        for tool, version in variant.record.toolchain.items():
            versions.setdefault(tool, set()).add(version)
    return {tool: ", ".join(sorted(found)) for tool, found in sorted(versions.items())}


def _made(variant: Variant) -> dict[str, Any]:
    record = variant.record
    return {
        "status": record.status,
        "compiler": record.compiler,
        "precision": record.precision,
        "toolchain": record.toolchain,
        "commands": record.commands,
    }


def _in_toto(digest: str) -> dict[str, str]:
    return {"sha256": digest.removeprefix("sha256:")}
