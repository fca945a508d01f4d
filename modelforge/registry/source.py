"""Where bundles are pulled from: a repository of a registry, or an OCI layout folder, behind one small protocol."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from modelforge.bundle import checked, documents, parts
from modelforge.bundle import format as words
from modelforge.bundle.documents import Index
from modelforge.errors import InputError, IntegrityError, RegistryError, nearest
from modelforge.registry.client import Client, Document, Sink
from modelforge.registry.reference import LayoutReference, Range, Reference, release
from modelforge.store import CHUNK

SIGNATURE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_SIGNATURES = 64
_ALIASES = 20


@dataclass(frozen=True)
class Found:
    """The image index that a reference leads to.

    Attributes:
        asked: the version that was asked for, by tag or as the newest of a range; None where only a digest was given.
    """

    document: Document
    index: Index
    asked: str | None


class Source(Protocol):
    """``where`` names it in messages; ``repository`` is what policies go by (None: a folder)."""

    where: str
    repository: str | None

    def find(self) -> Found: ...
    def manifest(self, digest: str, size: int) -> bytes: ...
    def small_blob(self, digest: str, size: int) -> bytes: ...
    def signatures(self, digest: str) -> list[bytes]: ...
    def download(self, digest: str, size: int, sink: Sink, told: Callable[[int], None]) -> None: ...
    def stop(self) -> None: ...


class RegistrySource:
    """A bundle in a registry."""

    def __init__(self, client: Client, reference: Reference) -> None:
        self._client = client
        self._reference = reference
        self.where = str(reference)
        self.repository: str | None = reference.name

    def find(self) -> Found:
        reference = self._reference
        if reference.digest:
            return self._read(self._get(reference.digest), reference.tag)
        if reference.tag:
            return self._read(self._get(reference.tag), reference.tag)
        wanted = reference.wanted
        if wanted is None:
            raise InputError(
                "which version? There is no tag", where=self.where, fix=f"{self.where}:VERSION; {self._known()}"
            )
        return self._newest(wanted)

    def manifest(self, digest: str, size: int) -> bytes:
        if size > words.MANIFEST_LIMIT:
            raise checked.damaged(f"a manifest of {size} bytes", self.where)
        document = self._client.manifest(digest, size=size)
        if document is None:
            raise RegistryError(f"the registry lost a manifest of the bundle: {digest}", where=self.where)
        return document.data

    def small_blob(self, digest: str, size: int) -> bytes:
        return self._client.small_blob(digest, size)

    def signatures(self, digest: str) -> list[bytes]:
        """The Sigstore bundles beside an index; not verified here."""
        found = []
        referrers = self._client.referrers(digest, SIGNATURE_TYPE)
        if len(referrers) > _SIGNATURES:
            raise checked.damaged(f"{len(referrers)} signatures; at most {_SIGNATURES} are looked at", self.where)
        for entry in referrers:
            manifest = checked.json_object(self.manifest(entry.digest, entry.size), self.where)
            for layer in checked.json_list(manifest.get("layers"), self.where, "layers of a signature")[:1]:
                each = checked.descriptor(layer, self.where)
                if each.media_type == SIGNATURE_TYPE:
                    found.append(self._client.small_blob(each.digest, each.size))
        return found

    def download(self, digest: str, size: int, sink: Sink, told: Callable[[int], None]) -> None:
        self._client.download(digest, size, sink, told)

    def stop(self) -> None:
        self._client.transport.stop()

    def _newest(self, wanted: Range) -> Found:
        """The newest release in the range. A tag that leads to another version is an alias, and passed over."""
        tags = set(self._tags())
        for _ in range(_ALIASES):
            tag = wanted.newest(tags)
            if tag is None:
                break
            document = self._client.manifest(tag)
            if document is not None and document.media_type == words.INDEX_TYPE:
                found = self._read(document, tag)
                if found.index.version == tag:
                    return found
            tags.discard(tag)
        raise InputError(f'there is no version in the range "{wanted.text}"; {self._known()}', where=self.where)

    def _get(self, reference: str) -> Document:
        document = self._client.manifest(reference)
        if document is None:
            what = f'there is no tag "{reference}"' if ":" not in reference else f"there is no {reference}"
            raise InputError(f"{what}; {self._known(reference)}", where=self._client.where)
        return document

    def _read(self, document: Document, asked: str | None) -> Found:
        if document.media_type != words.INDEX_TYPE:
            raise InputError(
                "is no bundle but one manifest, such as a generic client pulls",
                where=self.where,
                fix="give the tag of the version, and --target TAG",
            )
        return Found(document, documents.read_index(document.data, self.where), asked)

    def _known(self, word: str = "") -> str:
        versions = [tag for tag in self._tags() if release(tag)] or self._tags()
        shown = versions[-20:]
        return nearest(word, shown) if shown else "the repository has no tags"

    def _tags(self) -> list[str]:
        tags = self._client.tags()
        if tags is None:
            raise RegistryError(
                "there is no such repository", where=self._client.where, fix="check the spelling, or your rights to it"
            )
        return tags


class LayoutSource:
    """A bundle in a folder, as `build` writes it and as skopeo copies it."""

    def __init__(self, reference: LayoutReference) -> None:
        self._path = reference.path
        self._tag = reference.tag
        self.where = str(reference)
        self.repository: str | None = None

    def find(self) -> Found:
        from modelforge.bundle.read import open_bundle

        bundle = open_bundle(self._path)
        if bundle.is_checkout:
            raise InputError("was pulled, and holds a part of the bundle only", where=self.where)
        if self._tag not in (None, bundle.version):
            raise InputError(f'there is no tag "{self._tag}"; {nearest("", [bundle.version])}', where=self.where)
        data = checked.read_bytes(self._path, bundle.digest, bundle.blobs[bundle.digest])
        index = documents.read_index(data, self.where)
        return Found(Document(words.INDEX_TYPE, bundle.digest, data), index, self._tag)

    def manifest(self, digest: str, size: int) -> bytes:
        return checked.read_bytes(self._path, digest, size)

    def small_blob(self, digest: str, size: int) -> bytes:
        return checked.read_bytes(self._path, digest, size)

    def signatures(self, digest: str) -> list[bytes]:
        from modelforge.bundle.signing import signatures

        return [document for _, document in signatures(self._path)]

    def download(self, digest: str, size: int, sink: Sink, told: Callable[[int], None]) -> None:
        file = self._path / words.blob_name(digest)
        try:
            with parts.open_regular(file, follow=False) as stream:
                if os.fstat(stream.fileno()).st_size != size:
                    raise checked.damaged("a blob has another size than it should have", file)
                stream.seek(sink.size)
                while sink.size < size and (block := stream.read(min(CHUNK, size - sink.size))):
                    sink.write(block)
                    told(len(block))
        except OSError as error:
            raise IntegrityError(f"a blob cannot be read: {error.strerror}", where=str(file)) from None

    def stop(self) -> None:
        """Reading a file ends by itself."""
