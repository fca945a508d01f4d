"""What is in a repository: its tags, and the variants of one version. Reads documents only."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from modelforge.bundle import documents
from modelforge.bundle import format as words
from modelforge.bundle.checked import Descriptor
from modelforge.errors import InputError, IntegrityError, RegistryError
from modelforge.registry.client import Client
from modelforge.registry.source import Found, Source


@dataclass(frozen=True)
class TagLine:
    """One tag. ``kind``: ``bundle``, ``variant`` (one manifest, for generic clients), or ``other``."""

    tag: str
    digest: str
    kind: str
    name: str | None = None
    version: str | None = None
    targets: tuple[str, ...] = ()
    size: int | None = None


def list_tags(client: Client) -> list[TagLine]:
    """Every tag of a repository, with what it leads to.

    Raises:
        RegistryError: there is no such repository, or the registry refuses.
    """
    tags = client.tags()
    if tags is None:
        raise RegistryError("there is no such repository", where=client.where, fix="check the spelling")
    with ThreadPoolExecutor(max_workers=client.transport.limits.jobs) as pool:
        return [line for line in pool.map(lambda tag: _line(client, tag), tags) if line is not None]


def list_variants(source: Source, found: Found) -> list[dict[str, Any]]:
    """The variants of one bundle: target, stage, precision, status, digest, and the size of their files in bytes."""
    lines = []
    for entry in found.index.entries:
        if entry.annotations.get(words.KIND) != "variant":
            continue
        manifest = documents.read_manifest(source.manifest(entry.digest, entry.size), source.where)
        size = sum(file.size for file in manifest.files.values())
        lines.append({**words.labels_json(entry.annotations), "digest": entry.digest, "size": size})
    return lines


def _line(client: Client, tag: str) -> TagLine | None:
    document = client.manifest(tag)
    if document is None:
        return None  # taken away since it was listed
    where = f"{client.where}:{tag}"
    try:
        if document.media_type == words.INDEX_TYPE:
            index = documents.read_index(document.data, where)
            return TagLine(tag, document.digest, "bundle", index.name, index.version, _targets(index.entries))
        manifest = documents.read_manifest(document.data, where)
        if manifest.kind == words.VARIANT_TYPE:
            size = sum(file.size for file in manifest.files.values())
            return TagLine(tag, document.digest, "variant", size=size)
    except (InputError, IntegrityError):
        pass  # not ours: other things may lie in the same repository
    return TagLine(tag, document.digest, "other")


def _targets(entries: Sequence[Descriptor]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(entry.annotations[words.TARGET] for entry in entries if words.TARGET in entry.annotations)
    )
