"""Writing a bundle: an OCI image layout folder that appears whole, or not at all.

The same content gives the same digest, whatever the order in which it is given: no times, no host, no paths.
docs/bundle-format.md describes what is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelforge.bundle import format as words
from modelforge.bundle import parts
from modelforge.bundle.documents import top_document
from modelforge.bundle.members import keep_signatures, signature_strays
from modelforge.bundle.read import open_bundle, recorded_digest
from modelforge.bundle.record import VariantRecord
from modelforge.errors import InputError, IntegrityError
from modelforge.store import Blob, canonical_json, digest_bytes, digest_file

_RESERVED = frozenset({"schema", "name", "version", "digest", "path", "variants"})
_BLOB_MODE = 0o444


@dataclass(frozen=True)
class BundleFile:
    """A file to go into a bundle.

    Attributes:
        name: its title: a plain file name, unique in its variant.
        role: one of ``format.ROLES``.
        path: where it lies now; it is only read.
        digest: ``sha256:<hex>`` if it is known: what is copied must have it. Without it the file is read twice.
    """

    name: str
    role: str
    media_type: str
    path: Path
    digest: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class VariantContent:
    """A variant's record and files. A compiled one holds the artifact that its record names, with role ``artifact``."""

    record: VariantRecord
    files: Sequence[BundleFile] = ()


@dataclass(frozen=True)
class BundleContent:
    """All that goes into a bundle.

    Attributes:
        about: what holds for all variants (serving, model, recipe ...): JSON, printed by ``inspect --json``. Not the
            keys ``schema``, ``name``, ``version``, ``digest``, ``path``, ``variants``.
        files: files that belong to no variant.
    """

    name: str
    version: str
    about: Mapping[str, Any]
    variants: Sequence[VariantContent]
    files: Sequence[BundleFile] = field(default=())


@dataclass(frozen=True)
class Written:
    """What was written; ``unchanged``: this very bundle stood there already, whole, and was not touched."""

    path: Path
    digest: str
    unchanged: bool


def write_bundle(destination: Path, content: BundleContent, *, force: bool = False) -> Written:
    """Write a bundle as the folder ``destination``.

    Args:
        force: replace a bundle of another digest. What is not a bundle is never replaced.

    Raises:
        InputError: the content cannot be a bundle; or another bundle, or something else, stands at ``destination``;
            or it cannot be written there.
        IntegrityError: a file is not what its digest says.
        BuildError: no space.
    """
    image = _assemble(content)
    if _must_write(destination, image.digest, force=force):
        parent = destination.absolute().parent
        with parts.writing_to(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with parts.part_folder(parent) as part:
                _fill(part, image)
                with parts.locked(parent):
                    # Again, under the lock: another build may have finished meanwhile.
                    if _must_write(destination, image.digest, force=force):
                        if recorded_digest(destination) == image.digest:
                            keep_signatures(destination, part)
                        parts.put_in_place(part, parent / destination.name)
                        return Written(destination, image.digest, unchanged=False)
    return Written(destination, image.digest, unchanged=True)


def _must_write(destination: Path, digest: str, *, force: bool) -> bool:
    """Whether ``destination`` is free, or holds a bundle that may be replaced; False if it is this one, whole."""
    if not os.path.lexists(destination):
        return True
    try:
        standing: str | None = open_bundle(destination).digest
        if standing == digest:
            return False
    except (InputError, IntegrityError):
        standing = recorded_digest(destination)
    if destination.is_symlink():
        raise InputError("is a symbolic link, and is not replaced", where=str(destination), fix="remove the link")
    if standing is None:
        raise InputError(
            "something stands there that is not a bundle, and is not replaced",
            where=str(destination),
            fix="move it away, or give another folder with -o",
        )
    if strays := sorted(set(os.listdir(destination)) - words.MEMBERS) + signature_strays(destination):
        raise InputError(
            f"holds files that are no part of the bundle: {', '.join(strays)}",
            where=str(destination),
            fix="move them away: the folder is about to be replaced",
        )
    # The same digest, but not whole: writing it again mends it.
    if standing != digest and not force:
        raise InputError(
            f"another bundle of this version stands there: {standing}; this one is {digest}",
            where=str(destination),
            fix="raise the version in the recipe, or replace it with --force",
        )
    return True


# -- from content to blobs


@dataclass(frozen=True)
class _Image:
    """``documents`` (JSON) and ``files`` by digest; ``top`` is ``index.json``."""

    digest: str
    top: bytes
    documents: Mapping[str, bytes]
    files: Mapping[str, tuple[Path, int]]


class _Blobs:
    """Collects blobs, each once, and gives their descriptors."""

    def __init__(self) -> None:
        self.documents: dict[str, bytes] = {}
        self.files: dict[str, tuple[Path, int]] = {}

    def document(self, media_type: str, data: bytes, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
        if len(data) > words.MANIFEST_LIMIT:
            raise InputError(f"a manifest or record of {len(data)} bytes; at most {words.MANIFEST_LIMIT} are allowed")
        digest = digest_bytes(data)
        self.documents[digest] = data
        return words.descriptor(media_type, digest, len(data), labels)

    def file(self, file: BundleFile) -> dict[str, Any]:
        blob = _blob(file)
        if self.files.setdefault(blob.digest, (file.path, blob.size))[1] != blob.size:
            raise InputError(f"two files of different sizes are said to have the digest {blob.digest}", where=file.name)
        return words.descriptor(
            file.media_type, blob.digest, blob.size, {words.TITLE: file.name, words.ROLE: file.role}
        )

    def manifest(
        self, kind: str, config: bytes, files: Sequence[BundleFile], labels: Mapping[str, str]
    ) -> dict[str, Any]:
        """A manifest whose ``artifactType`` and config media type are both ``kind``."""
        if fault := words.titles_fault(file.name for file in files):
            raise InputError(fault, where=labels.get("io.modelforge.target"))
        ordered = sorted(files, key=lambda file: (_role_order(file), file.name))
        layers = [self.file(file) for file in ordered]
        manifest = {
            "schemaVersion": 2,
            "mediaType": words.MANIFEST_TYPE,
            "artifactType": kind,
            "config": self.document(kind, config),
            # image-spec manifest.md: at least one layer, for portability.
            "layers": layers or [self.document(words.EMPTY_TYPE, words.EMPTY_JSON)],
        }
        return self.document(words.MANIFEST_TYPE, words.go_json(manifest), labels)


def _assemble(content: BundleContent) -> _Image:
    _check_names(content)
    blobs = _Blobs()
    manifests = []
    for variant in sorted(content.variants, key=lambda variant: _place(variant.record)):
        _check_artifact(variant)
        record = variant.record
        labels = words.variant_labels(record.to_json())
        manifests.append(blobs.manifest(words.VARIANT_TYPE, record.to_bytes(), variant.files, labels))
    # Last: a client that knows no targets takes the first manifest, which is right where there is but one variant.
    manifests.append(blobs.manifest(words.ABOUT_TYPE, _about(content), content.files, {words.KIND: "about"}))
    index = {
        "schemaVersion": 2,
        "mediaType": words.INDEX_TYPE,
        "manifests": manifests,
        "annotations": {
            words.NAME: content.name,
            words.SCHEMA_KEY: str(words.SCHEMA),
            words.VERSION: content.version,
        },
    }
    entry = blobs.document(words.INDEX_TYPE, words.go_json(index))
    top = top_document(entry["digest"], entry["size"], content.name, content.version)
    return _Image(entry["digest"], top, blobs.documents, blobs.files)


def _about(content: BundleContent) -> bytes:
    if taken := _RESERVED.intersection(content.about):
        raise InputError(f"`about` may not hold {', '.join(sorted(taken))}: these are the bundle's own keys")
    try:
        json.dumps(content.about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"`about` must be JSON with finite numbers: {error}") from None
    return canonical_json({"schema": words.SCHEMA, "name": content.name, "version": content.version, **content.about})


def _blob(file: BundleFile) -> Blob:
    """Digest and size of a file: as given, else found by reading it."""
    try:
        with parts.open_regular(file.path) as stream:
            size = os.fstat(stream.fileno()).st_size
        blob = Blob(file.digest, size) if file.digest is not None else digest_file(file.path)
    except OSError as error:
        raise InputError(f'the file "{file.name}" cannot be read: {error.strerror}', where=str(file.path)) from error
    if file.size is not None and file.size != size:
        raise IntegrityError(f"has {size} bytes and should have {file.size}", where=str(file.path))
    if not words.is_digest(blob.digest):
        raise InputError(f'"{blob.digest}" is not a sha256 digest', where=file.name)
    return blob


def _check_names(content: BundleContent) -> None:
    if not re.match(words.NAME_PATTERN, content.name):
        raise InputError(f'"{content.name}" cannot name a bundle: lower-case letters, digits, single . _ - between')
    if not re.match(words.VERSION_PATTERN, content.version):
        raise InputError(f'"{content.version}" cannot be a version: letters, digits and . _ - only, at most 128')
    places = [_place(variant.record) for variant in content.variants]
    for place in places:
        if places.count(place) > 1:
            raise InputError(f"two variants for target {place[0]}, stage {place[1]} and the same batch sizes")


def _check_artifact(variant: VariantContent) -> None:
    """The record names exactly the file that has the role ``artifact``."""
    artifact = variant.record.artifact
    files = [file for file in variant.files if file.role == "artifact"]
    said = [] if artifact is None else [(artifact.file, Blob(artifact.digest, artifact.size))]
    if [(file.name, _blob(file)) for file in files] != said:
        raise InputError(
            f"the record names the artifact {said}, the files are {[file.name for file in files]}",
            where=f"{variant.record.target}/{variant.record.stage}",
        )


def _place(record: VariantRecord) -> tuple[str, str, str]:
    return record.target, record.stage, canonical_json(record.to_json()["batch"]).decode()


def _role_order(file: BundleFile) -> int:
    if file.role not in words.ROLES:
        raise InputError(f'"{file.role}" is no role; known: {", ".join(words.ROLES)}', where=file.name)
    return words.ROLES.index(file.role)


def _fill(part: Path, image: _Image) -> None:
    folder = part / words.BLOBS / "sha256"
    folder.mkdir(parents=True)
    for digest, (path, size) in image.files.items():
        if digest not in image.documents:
            parts.copy_file(path, part / words.blob_name(digest), digest, size, mode=_BLOB_MODE)
    for digest, data in image.documents.items():
        parts.write_file(part / words.blob_name(digest), data, mode=_BLOB_MODE)
    parts.write_file(part / words.LAYOUT_FILE, words.LAYOUT_JSON, mode=0o666)
    parts.write_file(part / words.INDEX_FILE, image.top, mode=0o666)
    for changed in (folder, folder.parent, part):
        parts.sync_folder(changed)
