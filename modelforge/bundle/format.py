"""The words of the bundle format: media types, annotation keys, roles, file titles, and how its JSON is spelled.

Specified by the OCI image-spec 1.1 (image-layout.md, image-index.md, manifest.md); docs/bundle-format.md explains the
choices. Knows no file system.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

SCHEMA = 1
"""Raised when a reader of the previous number would misread a bundle. New keys do not raise it."""

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY_JSON = b"{}"
VARIANT_TYPE = "application/vnd.modelforge.variant.v1+json"
ABOUT_TYPE = "application/vnd.modelforge.about.v1+json"
OCTETS = "application/octet-stream"

REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
SCHEMA_KEY = "io.modelforge.schema"
NAME = "io.modelforge.name"
KIND = "io.modelforge.kind"
TARGET = "io.modelforge.target"
STAGE = "io.modelforge.stage"
ROLE = "io.modelforge.role"

ROLES = ("artifact", "artifact-data", "runner", "runtime-library", "lowered-model", "golden", "report", "log", "job")
"""What a file of a bundle is for, in the order of a manifest's layers."""

LAYOUT_FILE = "oci-layout"
LAYOUT_JSON = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_FILE = "index.json"
BLOBS = "blobs"
SIGNATURES = "signatures"
MEMBERS = frozenset({LAYOUT_FILE, INDEX_FILE, BLOBS, SIGNATURES})
"""All that lies at the top of a bundle folder."""
SIGNATURE_END = ".sigstore.json"

MANIFEST_LIMIT = 4 << 20
"""Bytes that an index, manifest or record may have: what registries accept, and a bound for readers."""

DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}\Z"
NAME_PATTERN = r"^[a-z0-9]+(?:[._-][a-z0-9]+)*\Z"
VERSION_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z"
"""A tag of the OCI distribution-spec: the version is one."""

_SIGNATURE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}" + re.escape(SIGNATURE_END) + r"\Z")
_WINDOWS_DEVICES = re.compile(r"^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|\Z)", re.IGNORECASE)
_NOT_IN_TITLES = frozenset('/\\:*?"<>|')


def is_digest(value: object) -> bool:
    return isinstance(value, str) and re.match(DIGEST_PATTERN, value) is not None


def blob_name(digest: str) -> str:
    """Where a blob lies, relative to the bundle: ``blobs/sha256/<hex>``."""
    return f"{BLOBS}/sha256/{digest.removeprefix('sha256:')}"


def is_signature_name(name: str) -> bool:
    """Whether a file in ``signatures/`` is a signature by its name; anything else there is a stray."""
    return _SIGNATURE_NAME.match(name) is not None


def title_fault(title: str) -> str | None:
    """Why a file of a bundle may not be called so, or None.

    A title is one plain name that means the same file on every system: no folder, no drive, no device, nothing that
    a shell or a log would take for something else.
    """
    if not title or title in (".", ".."):
        return "is not a file name"
    if not title.isprintable():
        return "holds a control character or a broken one"
    if bad := sorted(_NOT_IN_TITLES.intersection(title)):
        return f"holds {' '.join(bad)}"
    if title[0] in ".-~ " or title[-1] in ". ":
        return f"begins with {title[0]!r} or ends with {title[-1]!r}"
    if len(title.encode()) > 200:
        return "is longer than 200 bytes"
    if _WINDOWS_DEVICES.match(title):
        return "is the name of a device on Windows"
    if unicodedata.normalize("NFC", title) != title:
        return "is not in Unicode's composed form (NFC)"
    return None


def titles_fault(titles: Iterable[str]) -> str | None:
    """Why these files may not lie in one folder, or None: a bad title, or two that some file systems hold for one."""
    seen: dict[str, str] = {}
    for title in titles:
        if fault := title_fault(title):
            return f"the file title {title!r} {fault}"
        folded = unicodedata.normalize("NFC", title.casefold())
        if folded in seen:
            return f"the file titles {seen[folded]!r} and {title!r} are one file on some systems"
        seen[folded] = title
    return None


def go_json(value: Mapping[str, Any]) -> bytes:
    """JSON as Go's ``encoding/json`` writes it: compact, keys in the order given, ``< > &`` escaped.

    skopeo 1.9 decodes an index into Go structs and encodes it again: what is not spelled in Go's way, with the
    fields in the structs' order, comes out with another digest.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()


def descriptor(media_type: str, digest: str, size: int, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A content descriptor, its fields in the order of Go's ``v1.Descriptor``."""
    result: dict[str, Any] = {"mediaType": media_type, "digest": digest, "size": size}
    if annotations:
        result["annotations"] = dict(sorted(annotations.items()))
    return result


def variant_labels(record: Mapping[str, Any]) -> dict[str, str]:
    """Annotations of a variant's descriptor in the index: enough to choose by, before any manifest is fetched.

    Args:
        record: what ``VariantRecord.to_json`` gives.
    """
    labels = {f"io.modelforge.{key}": record[key] for key in ("target", "stage", "precision", "status", "compiler")}
    return {KIND: "variant"} | {key: value for key, value in labels.items() if value is not None}


def labels_json(annotations: Mapping[str, str]) -> dict[str, str | None]:
    """What the labels of a variant's descriptor say of it, as JSON; None where they say nothing."""
    return {key: annotations.get(f"io.modelforge.{key}") for key in ("target", "stage", "precision", "status")}
