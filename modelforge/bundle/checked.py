"""Single blobs and JSON values of a bundle that came from outside, each checked before it is believed.

Bounds first, then size, then digest; no link is followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.bundle import format as words
from modelforge.bundle import parts
from modelforge.errors import InputError, IntegrityError
from modelforge.store import CHUNK

AGAIN = "get the bundle again from where it came"

Where = Path | str
"""What a message says it is about: a path, or a place in a registry."""


@dataclass(frozen=True)
class Descriptor:
    """An OCI content descriptor whose fields were checked."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]


def read_bytes(path: Path, digest: str, size: int) -> bytes:
    """A small blob, after its bound, its size and its digest were checked."""
    if size > words.MANIFEST_LIMIT:
        raise damaged(f"a manifest or record of {size} bytes; at most {words.MANIFEST_LIMIT} are allowed", path)
    check_there(path / words.blob_name(digest), size)
    data = read_small(path / words.blob_name(digest))
    if len(data) != size or f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise damaged("is not what its digest says", path / words.blob_name(digest))
    return data


def read_small(file: Path) -> bytes:
    """A file of at most ``MANIFEST_LIMIT`` bytes."""
    try:
        with parts.open_regular(file, follow=False) as stream:
            data = stream.read(words.MANIFEST_LIMIT + 1)
    except InputError as error:
        raise damaged(error.what, file) from None
    except OSError as error:
        raise damaged(f"cannot be read: {error.strerror}", file) from None
    if len(data) > words.MANIFEST_LIMIT:
        raise damaged(f"is larger than {words.MANIFEST_LIMIT} bytes", file)
    return data


def check_there(file: Path, size: int) -> None:
    """No link is followed: a file of a bundle lies in it."""
    try:
        status = os.lstat(file)
    except OSError as error:
        raise damaged(f"a file is missing: {error.strerror}", file) from None
    if not stat.S_ISREG(status.st_mode):
        raise damaged("is not a plain file", file)
    if status.st_size != size:
        raise damaged(f"has {status.st_size} bytes and should have {size}", file)


def content_fault(file: Path, digest: str) -> str | None:
    """Why the file is not what its digest says, or None. Hashes all of it."""
    hasher = hashlib.sha256()
    try:
        with parts.open_regular(file, follow=False) as stream:
            while chunk := stream.read(CHUNK):
                hasher.update(chunk)
    except InputError as error:
        return error.what
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if f"sha256:{hasher.hexdigest()}" == digest else "is not what its digest says"


def json_object(data: bytes, where: Where) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise damaged("is not JSON", where) from None
    if not isinstance(value, dict):
        raise damaged("is not a JSON object", where)
    return value


def descriptor(value: object, where: Where) -> Descriptor:
    if not isinstance(value, dict):
        raise damaged("a content descriptor is not an object", where)
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media_type, str) or not isinstance(digest, str) or not words.is_digest(digest):
        raise damaged("a content descriptor lacks its media type or its sha256 digest", where)
    if type(size) is not int or size < 0:
        raise damaged("a content descriptor lacks its size", where)
    return Descriptor(media_type, digest, size, strings(value.get("annotations", {}), where, "annotations"))


def json_list(value: object, where: Where, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise damaged(f"{what}: not a list", where)
    return value


def strings(value: object, where: Where, what: str) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise damaged(f"{what}: not strings by name", where)
    return value


def damaged(what: str, where: Where) -> IntegrityError:
    return IntegrityError(what, where=str(where), fix=AGAIN)


def newer(where: Where, what: str) -> InputError:
    return InputError(
        f"was written by a later ModelForge ({what}); this one reads schema {words.SCHEMA}",
        where=str(where),
        fix="pip install --upgrade modelforge",
    )
