"""A bundle as a CycloneDX 1.6 ML-BOM: its variants with hashes, what made them, and how accurate they are.

cyclonedx.org/docs/1.6/json. Made from the bundle alone, without a time or a random serial number: the same bundle
gives the same bytes. Nothing in it was measured for the BOM; it says what the records say.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from modelforge.bundle.format import is_digest
from modelforge.bundle.provenance import variant_names
from modelforge.bundle.read import Bundle, FileEntry, Variant
from modelforge.bundle.record import Accuracy

MEDIA_TYPE = "application/vnd.cyclonedx+json"
FILE_END = ".cdx.json"
"""What the file is called by CycloneDX's convention."""

_BY_DIGEST = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 4122's namespace for URLs
_METRICS = ("sqnr_db", "cosine", "agreement")


def bill_of_materials(bundle: Bundle) -> bytes:
    """The BOM as JSON, UTF-8."""
    names = variant_names(bundle.variants)
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_BY_DIGEST, bundle.digest)}",
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": _tools(bundle)},
            "component": _bundle(bundle, names),
        },
        "components": [_variant(name, variant) for name, variant in names.items()] + _sources(bundle),
        "dependencies": [
            {"ref": bundle.digest, "dependsOn": [variant.digest for variant in names.values()]},
            *(
                {"ref": variant.digest, "dependsOn": [source["bom-ref"] for source in _sources(bundle)]}
                for variant in names.values()
            ),
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _bundle(bundle: Bundle, names: Mapping[str, Variant]) -> dict[str, Any]:
    metrics = [metric for name, variant in names.items() for metric in _metrics(name, variant.record.accuracy)]
    card: dict[str, Any] = {"quantitativeAnalysis": {"performanceMetrics": metrics}}
    if parameters := _parameters(bundle.about):
        card["modelParameters"] = parameters
    return {
        "type": "machine-learning-model",
        "bom-ref": bundle.digest,
        "name": bundle.name,
        "version": bundle.version,
        "hashes": [_hash(bundle.digest)],
        "modelCard": card,
    }


def _variant(name: str, variant: Variant) -> dict[str, Any]:
    """A variant: its own hash is that of its manifest, its files are components inside."""
    record = variant.record
    facts = {
        "target": record.target,
        "stage": record.stage,
        "status": record.status,
        "compiler": record.compiler,
        "precision": record.precision,
        "evidence": record.accuracy.evidence,
        "gate": record.accuracy.gate,
        "requires": record.runtime.requires if record.runtime else None,
    }
    files = [_file(variant.digest, title, entry) for title, entry in variant.files.items()]
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": variant.digest,
        "name": name,
        "hashes": [_hash(variant.digest)],
        "properties": _properties(facts),
        "modelCard": {"quantitativeAnalysis": {"performanceMetrics": _metrics(name, record.accuracy)}},
    }
    return component | ({"components": files} if files else {})


def _file(manifest: str, title: str, entry: FileEntry) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"{manifest}/{title}",
        "mime-type": entry.media_type,
        "name": title,
        "hashes": [_hash(entry.digest)],
        "properties": _properties({"role": entry.role}),
    }


def _metrics(name: str, accuracy: Accuracy) -> list[dict[str, str]]:
    """The figures that were measured, each with the variant as its slice; CycloneDX has them as strings."""
    figures: dict[str, float | None] = {}
    if accuracy.metric is not None:
        figures = {
            accuracy.metric: accuracy.value,
            f"{accuracy.metric} (fp32 reference)": accuracy.reference,
            f"{accuracy.metric} (drop)": accuracy.drop,
        }
    figures |= {key: getattr(accuracy, key) for key in _METRICS}
    given = {kind: value for kind, value in figures.items() if value is not None}
    return [{"type": kind, "value": json.dumps(value), "slice": name} for kind, value in given.items()]


def _parameters(about: Mapping[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    serving = about.get("serving")
    if isinstance(serving, dict) and isinstance(serving.get("task"), str):
        parameters["task"] = serving["task"]
    for key in ("inputs", "outputs"):
        if isinstance(tensors := about.get(key), list) and tensors:
            parameters[key] = [{"format": _tensor(tensor)} for tensor in tensors]
    return parameters


def _tensor(tensor: object) -> str:
    if not isinstance(tensor, dict):
        return str(tensor)
    shape = tensor.get("shape")
    sizes = "x".join(map(str, shape)) if isinstance(shape, list) else "?"
    return f"{tensor.get('name')}: {tensor.get('dtype')}[{sizes}]"


def _sources(bundle: Bundle) -> list[dict[str, Any]]:
    """The model and the recipe that it was made from, as far as the bundle says."""
    found = []
    for key, kind in (("model", "machine-learning-model"), ("recipe", "file")):
        about = bundle.about.get(key)
        if isinstance(about, dict) and is_digest(about.get("digest")):
            digest = about["digest"]
            name = f"{bundle.name} {key}"
            found.append({"type": kind, "bom-ref": f"{key}:{digest}", "name": name, "hashes": [_hash(digest)]})
    return found


def _tools(bundle: Bundle) -> list[dict[str, Any]]:
    own = bundle.about.get("modelforge")
    tools = {("modelforge", own)} if isinstance(own, str) else set()
    tools |= {tool for variant in bundle.variants for tool in variant.record.toolchain.items()}
    return [{"type": "application", "name": name, "version": version} for name, version in sorted(tools)]


def _properties(facts: Mapping[str, str | None]) -> list[dict[str, str]]:
    return [{"name": f"modelforge:{key}", "value": value} for key, value in facts.items() if value is not None]


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}
