"""The JSON documents of a bundle, from bytes whose digest was checked: index, manifests, "about".

Knows no file system and no network: the same reading serves a folder and a registry. `where` only names the source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.bundle import checked
from modelforge.bundle import format as words
from modelforge.bundle.checked import Descriptor, Where
from modelforge.bundle.record import VariantRecord
from modelforge.errors import InputError


@dataclass(frozen=True)
class FileEntry:
    """A file in a bundle; ``digest`` is ``sha256:<hex>``, ``role`` one of ``format.ROLES``, or a later one."""

    digest: str
    size: int
    media_type: str
    role: str


@dataclass(frozen=True)
class Index:
    """The image index: name and version of the bundle, and the descriptors of its manifests, in their order."""

    name: str
    version: str
    entries: tuple[Descriptor, ...]


@dataclass(frozen=True)
class Manifest:
    """One manifest: its config, its files by title, and the descriptors of all blobs that it leads to."""

    config: Descriptor
    files: Mapping[str, FileEntry]
    blobs: tuple[Descriptor, ...]

    @property
    def kind(self) -> str:
        return self.config.media_type


def read_index(data: bytes, where: Where) -> Index:
    """Read an image index.

    Raises:
        InputError: it is no bundle's, or a later format's.
        IntegrityError: damaged.
    """
    index = checked.json_object(data, where)
    annotations = checked.strings(index.get("annotations", {}), where, "index annotations")
    if words.SCHEMA_KEY not in annotations:
        raise InputError("is an OCI image, but not a bundle", where=str(where), fix="`modelforge build` makes one")
    if annotations[words.SCHEMA_KEY] != str(words.SCHEMA):
        raise checked.newer(where, f"schema {annotations[words.SCHEMA_KEY]}")
    name, version = annotations.get(words.NAME, ""), annotations.get(words.VERSION, "")
    if not re.match(words.NAME_PATTERN, name) or not re.match(words.VERSION_PATTERN, version):
        raise checked.damaged("the index names no bundle and version", where)
    entries = [checked.descriptor(entry, where) for entry in checked.json_list(index.get("manifests"), where, "index")]
    for entry in entries:
        if entry.media_type != words.MANIFEST_TYPE:
            raise checked.damaged(f"the index leads to something unknown: {entry.media_type}", where)
    return Index(name, version, tuple(entries))


def read_manifest(data: bytes, where: Where) -> Manifest:
    """Read a manifest; the titles in it may all lie in one folder.

    Raises:
        InputError: it is a later format's.
        IntegrityError: damaged.
    """
    manifest = checked.json_object(data, where)
    config = checked.descriptor(manifest.get("config"), where)
    if config.media_type not in (words.VARIANT_TYPE, words.ABOUT_TYPE) and config.media_type.startswith(
        "application/vnd.modelforge."
    ):
        raise checked.newer(where, config.media_type)
    layers = [
        checked.descriptor(layer, where)
        for layer in checked.json_list(manifest.get("layers"), where, "layers of a manifest")
    ]
    files: dict[str, FileEntry] = {}
    for layer in layers:
        title = layer.annotations.get(words.TITLE)
        if title is None and layer.media_type == words.EMPTY_TYPE:
            continue
        if title is None or title in files:
            raise checked.damaged(f"a manifest has a file without a title, or twice the title {title!r}", where)
        files[title] = FileEntry(layer.digest, layer.size, layer.media_type, layer.annotations.get(words.ROLE, ""))
    if fault := words.titles_fault(files):
        raise checked.damaged(fault, where)
    return Manifest(config, files, (config, *layers))


def read_record(data: bytes, entry: Descriptor, manifest: Manifest, where: Where) -> VariantRecord:
    """The record of a variant, after it was held against its labels in the index and its files.

    Args:
        data: the config blob.
        entry: the manifest's descriptor in the index.

    Raises:
        IntegrityError: they disagree, or it is no variant record.
    """
    record = VariantRecord.from_bytes(data, where=str(where))
    for key, value in words.variant_labels(record.to_json()).items():
        if entry.annotations.get(key, value) != value:
            raise checked.damaged(
                f"the index labels a variant {key}={entry.annotations[key]!r}, its record says {value!r}", where
            )
    if record.artifact is not None:
        file = manifest.files.get(record.artifact.file)
        if file is None or (file.digest, file.size) != (record.artifact.digest, record.artifact.size):
            raise checked.damaged(
                f"the artifact {record.artifact.file!r} of {record.target} is not in its manifest", where
            )
    return record


def read_about(data: bytes, index: Index, where: Where) -> Mapping[str, Any]:
    """What holds for all variants: the config blob of "about" without the bundle's own keys."""
    about = checked.json_object(data, where)
    if (about.get("schema"), about.get("name"), about.get("version")) != (words.SCHEMA, index.name, index.version):
        raise checked.damaged("the bundle's parts disagree about its name, version or schema", where)
    return {key: value for key, value in about.items() if key not in ("schema", "name", "version")}


def read_top(data: bytes, where: Path) -> Descriptor:
    """The descriptor of the image index, as ``index.json`` gives it.

    ``index.json`` has no digest, so nothing may stand in it that is not checked against the index itself
    (:func:`check_labels`).
    """
    top = checked.json_object(data, where)
    entries = checked.json_list(top.get("manifests"), where, words.INDEX_FILE)
    known = top.keys() <= {"schemaVersion", "mediaType", "manifests"}
    if not known or top.get("schemaVersion") != 2 or top.get("mediaType", words.INDEX_TYPE) != words.INDEX_TYPE:
        raise checked.damaged("is not an OCI image index", where)
    if len(entries) != 1:
        raise InputError(f"holds {len(entries)} images; a bundle is one", where=str(where))
    entry = checked.descriptor(entries[0], where)
    if entry.media_type == words.MANIFEST_TYPE:
        raise InputError(
            "holds one manifest, not a whole bundle", where=str(where), fix="copy bundles with `skopeo copy --all`"
        )
    if entry.media_type != words.INDEX_TYPE or not entries[0].keys() <= {"mediaType", "digest", "size", "annotations"}:
        raise checked.damaged("does not lead to an OCI image index", where)
    return entry


def check_labels(labels: Mapping[str, str], index: Index, where: Where) -> None:
    """Other tools may leave the labels of ``index.json`` out; those that are there must tell the truth."""
    truth = {words.NAME: index.name, words.REF_NAME: index.version}
    for key, label in labels.items():
        if truth.get(key) != label:
            raise checked.damaged(
                f"labels the bundle {key}={label!r}, which it is not ({index.name} {index.version})", where
            )


def top_document(digest: str, size: int, name: str, version: str) -> bytes:
    """``index.json``: one descriptor, labelled with name and version."""
    labels = {words.NAME: name, words.REF_NAME: version}
    entry = words.descriptor(words.INDEX_TYPE, digest, size, labels)
    return words.go_json({"schemaVersion": 2, "mediaType": words.INDEX_TYPE, "manifests": [entry]})
