"""One repository of an OCI registry: manifests, tags, blobs, referrers (distribution-spec 1.1, spec.md).

What comes in is held against its digest here, and against nothing that the registry says of itself. Knows no bundles.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import requests

from modelforge.bundle import checked
from modelforge.bundle import format as words
from modelforge.errors import IntegrityError, RegistryError
from modelforge.registry import faults
from modelforge.registry.patience import Transient
from modelforge.registry.reference import TAG
from modelforge.registry.transport import Answer, Transport, join
from modelforge.store import digest_bytes

_ACCEPT = ", ".join(
    (
        words.INDEX_TYPE,
        words.MANIFEST_TYPE,
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_FALLBACK_TAG = re.compile(r"sha256-[0-9a-f]{64}(\.[a-z]+)?\Z")
# What registries answer that have never heard of the referrers API.
_NO_REFERRERS = (400, 404, 405, 501)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\Z")
_NEXT = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')


@dataclass(frozen=True)
class Document:
    """A manifest or an index, as received; ``digest`` is that of its bytes."""

    media_type: str
    digest: str
    data: bytes


class Sink(Protocol):
    """Where a download goes. ``size`` bytes are in it; what goes wrong with files is told as ModelForgeError."""

    size: int

    def write(self, block: bytes) -> None: ...
    def restart(self) -> None: ...


class Client:
    """One repository. ``writing`` asks a token service for the right to push too."""

    def __init__(self, transport: Transport, repository: str, *, writing: bool = False) -> None:
        self.transport = transport
        self.repository = repository
        self.scope = f"repository:{repository}:pull" + (",push" if writing else "")
        self.where = f"{transport.host}/{repository}"

    # -- manifests

    def digest_of(self, reference: str) -> str | None:
        """Digest of the manifest under a tag or digest; None where there is none."""
        answer = self.transport.ask(
            "HEAD", self.path("manifests", reference), scope=self.scope, headers={"Accept": _ACCEPT}, expect=(200, 404)
        )
        if answer.status == 404:
            return None
        said = answer.headers.get("Docker-Content-Digest", "")
        if words.is_digest(said):
            return said
        found = self.manifest(reference)
        return found.digest if found else None

    def manifest(self, reference: str, *, size: int | None = None) -> Document | None:
        """The manifest or index under a tag or digest; None where there is none.

        Raises:
            IntegrityError: it has another digest, or another size, than was asked for.
            RegistryError: the registry refuses.
        """
        answer = self.transport.ask(
            "GET", self.path("manifests", reference), scope=self.scope, headers={"Accept": _ACCEPT}, expect=(200, 404)
        )
        if answer.status == 404:
            return None
        where = f"{self.where}{'@' if ':' in reference else ':'}{reference}"
        found = digest_bytes(answer.body)
        said = answer.headers.get("Docker-Content-Digest", found)
        wanted = reference if words.is_digest(reference) else said if words.is_digest(said) else found
        if found != wanted:
            raise checked.damaged(f"the registry answers with another manifest: {found}", where)
        if size is not None and len(answer.body) != size:
            raise checked.damaged(f"a manifest has {len(answer.body)} bytes and should have {size}", where)
        media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        value = checked.json_object(answer.body, where)
        if isinstance(value.get("mediaType"), str):
            media_type = value["mediaType"]
        return Document(media_type, found, answer.body)

    def put_manifest(self, reference: str, document: Document) -> bool:
        """Store a manifest under a tag or its digest; gives whether the registry keeps it as a referrer."""
        answer = self.transport.ask(
            "PUT",
            self.path("manifests", reference),
            scope=self.scope,
            headers={"Content-Type": document.media_type},
            body=document.data,
            expect=(201,),
        )
        return bool(answer.headers.get("OCI-Subject"))

    # -- tags

    def tags(self) -> list[str] | None:
        """All tags, the tags that only stand in for the referrers API left out; None: no such repository."""
        found: list[str] = []
        path: str | None = f"/v2/{self.repository}/tags/list?n=1000"
        for _ in range(self.transport.limits.pages):
            answer = self.transport.ask("GET", path or "", scope=self.scope, expect=(200, 404))
            if answer.status == 404:
                return found or None
            page = checked.json_object(answer.body, self.where).get("tags") or []
            if not isinstance(page, list) or not all(isinstance(tag, str) and TAG.match(tag) for tag in page):
                raise RegistryError("the registry's list of tags cannot be read", where=self.where)
            found += [tag for tag in page if not _FALLBACK_TAG.match(tag)]
            path = self._next(answer)
            if path is None:
                return sorted(set(found))
        raise RegistryError("the registry's list of tags does not end", where=self.where)

    # -- referrers

    def referrers(self, digest: str, artifact_type: str) -> list[checked.Descriptor]:
        """Manifests whose subject is ``digest``: by the API, else by the fallback tag."""
        path: str | None = f"/v2/{self.repository}/referrers/{digest}?artifactType={quote(artifact_type, safe='')}"
        found: list[dict[str, Any]] = []
        for _ in range(self.transport.limits.pages):
            answer = self.transport.ask(
                "GET", path or "", scope=self.scope, expect=(200, *_NO_REFERRERS), headers={"Accept": words.INDEX_TYPE}
            )
            if answer.status != 200 or answer.headers.get("Content-Type", "").partition(";")[0] != words.INDEX_TYPE:
                fallback = self.manifest(fallback_tag(digest))
                found = self.entries(fallback) if fallback else []
                break
            found += self.entries(Document(words.INDEX_TYPE, "", answer.body))
            path = self._next(answer)
            if path is None:
                break
        else:
            raise RegistryError("the registry's list of referrers does not end", where=self.where)
        return [checked.descriptor(entry, self.where) for entry in found if entry.get("artifactType") == artifact_type]

    def entries(self, index: Document) -> list[dict[str, Any]]:
        """The descriptors of an index, as they stand there."""
        entries = checked.json_list(
            checked.json_object(index.data, self.where).get("manifests"), self.where, "an index"
        )
        if not all(isinstance(entry, dict) for entry in entries):
            raise checked.damaged("an index holds something else than descriptors", self.where)
        return entries

    # -- blobs

    def has_blob(self, digest: str) -> bool:
        return self.transport.ask("HEAD", self.path("blobs", digest), scope=self.scope, expect=(200, 404)).status == 200

    def small_blob(self, digest: str, size: int) -> bytes:
        """A small blob (a record, a signature), whole."""
        where = f"{self.where}@{digest}"
        if size > words.MANIFEST_LIMIT:
            raise checked.damaged(f"a document of {size} bytes; at most {words.MANIFEST_LIMIT} are allowed", where)
        answer = self.transport.ask("GET", self.path("blobs", digest), scope=self.scope)
        if len(answer.body) != size or digest_bytes(answer.body) != digest:
            raise checked.damaged("the registry answers with another blob than its digest says", where)
        return answer.body

    def download(self, digest: str, size: int, sink: Sink, told: Callable[[int], None] = lambda _: None) -> None:
        """Bring ``size`` bytes into the sink, going on from what is in it. The sink holds them against the digest.

        Args:
            told: called with the number of bytes that have come.

        Raises:
            IntegrityError: the registry sends more than that. RegistryError: it does not send them all.
        """
        patience = self.transport.patience()
        credited = sink.size
        while sink.size < size:
            try:
                self._attempt(digest, size, sink, told)
            except Transient as fault:
                if sink.size - credited >= self.transport.limits.progress:
                    credited = sink.size
                    patience.progressed()
                patience.after(fault)

    def _attempt(self, digest: str, size: int, sink: Sink, told: Callable[[int], None]) -> None:
        where = f"{self.where}@{digest}"
        headers = {"Range": f"bytes={sink.size}-{size - 1}"} if sink.size else {}
        with self.transport.exchange("GET", self.path("blobs", digest), scope=self.scope, headers=headers) as response:
            if response.status_code == 416:
                sink.restart()
                raise Transient(RegistryError("the registry does not go on with a broken download", where=where))
            if response.status_code not in (200, 206):
                raise self.transport.refused(self.transport.whole(response))
            if response.status_code == 200 and sink.size:
                told(-sink.size)
                sink.restart()  # it sends all from the beginning, whatever was asked for
            self._check_length(response, sink.size, size, where)
            for block in self.transport.blocks(response, size - sink.size):
                if sink.size + len(block) > size:
                    raise checked.damaged(f"the registry sends more than the {size} bytes of the blob", where)
                sink.write(block)
                told(len(block))
        if sink.size < size:
            raise Transient(RegistryError(f"the download ended after {sink.size} of {size} bytes", where=where))

    def _check_length(self, response: requests.Response, begin: int, size: int, where: str) -> None:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise IntegrityError("the registry sends a blob compressed, which nobody asked for", where=where)
        if response.status_code == 206:
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != begin or match[3] not in ("*", str(size)):
                raise checked.damaged("the registry sends another part of the blob than was asked for", where)
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > size - begin:
            raise checked.damaged(f"the registry announces {length} bytes where {size - begin} belong", where)

    # -- where things are

    def path(self, kind: str, name: str) -> str:
        return f"/v2/{self.repository}/{kind}/{name}"

    def _next(self, answer: Answer) -> str | None:
        match = _NEXT.search(answer.headers.get("Link", ""))
        if match is None:
            return None
        url = join(answer.url, match[1])
        if urlsplit(url)[:2] != urlsplit(answer.url)[:2]:
            raise RegistryError(f"a list goes on elsewhere: {faults.printable(url)}", where=self.where)
        return url


def fallback_tag(digest: str) -> str:
    """The tag that stands in for the referrers API (spec.md, "Referrers Tag Schema")."""
    return digest.replace(":", "-")
