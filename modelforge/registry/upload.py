"""Uploading one blob: mounted where the registry has it already, in chunks, going on where a broken upload stopped.

Also after `kill -9`: the URL of a begun upload is noted in the store's folder. Protocol: distribution-spec 1.1, "Push".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from modelforge.bundle import checked, parts
from modelforge.errors import IntegrityError, RegistryError
from modelforge.registry.client import Client
from modelforge.registry.patience import Transient
from modelforge.registry.transport import Answer
from modelforge.store import write_atomically

_BLOCK = 256 << 10
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)\Z")
Told = Callable[[int], None]


class Notes:
    """Where begun uploads are, by registry, repository and digest: a file each, for this user only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> str | None:
        try:
            location = json.loads(self._path(key).read_bytes())["location"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return location if isinstance(location, str) else None

    def write(self, key: str, location: str) -> None:
        # Without a note an upload begins anew: a folder that cannot be written is no reason to fail.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(key), json.dumps({"location": location}).encode())

    def forget(self, key: str) -> None:
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def upload(
    client: Client,
    digest: str,
    size: int,
    file: Path | bytes,
    *,
    notes: Notes,
    mount_from: str | None = None,
    told: Told = lambda _: None,
) -> int:
    """Bring a blob into the repository; gives how many bytes were sent: none, where it was mounted from another one.

    Raises:
        IntegrityError: the file is not what its digest says: it was not released. RegistryError: the registry refuses.
    """
    attempt = _Upload(client, digest, notes, told)
    if mount_from is not None and attempt.mount(mount_from):
        told(size)
        return 0
    patience = client.transport.patience()
    sent = credited = 0
    with _Source(file, digest, size) as source:
        while True:
            try:
                attempt.run(source)
                return sent + attempt.sent
            except Transient as fault:
                sent += attempt.sent
                # By what the registry has, not by what was sent: a broken upload may be lost as a whole.
                if attempt.reached - credited >= client.transport.limits.progress:
                    credited = attempt.reached
                    patience.progressed()
                patience.after(fault)
                attempt = _Upload(client, digest, notes, told)


class _Upload:
    """One attempt, which goes on where the one before stopped, if the registry has kept it."""

    def __init__(self, client: Client, digest: str, notes: Notes, told: Told) -> None:
        self._client = client
        self._digest = digest
        self._notes = notes
        self._key = f"{client.where}@{digest}"
        self._told = told
        self.sent = 0
        self.reached = 0
        self._begun: str | None = None

    def mount(self, repository: str) -> bool:
        """Have the registry take the blob from another of its repositories."""
        query = urlencode({"mount": self._digest, "from": repository})
        scope = f"{self._client.scope} repository:{repository}:pull"
        answer = self._ask("POST", f"{self._client.path('blobs', 'uploads/')}?{query}", (201, 202, 403, 404), scope)
        if answer.status == 202:  # it has begun an upload instead
            self._begun = self._location(answer)
        return answer.status == 201

    def run(self, source: _Source) -> None:
        url, offset = self._begin(source.size)
        self.reached = offset
        if offset:
            self._told(offset)
        chunk = self._client.transport.limits.chunk
        if not offset and source.size <= chunk:
            self._finish(url, source, 0)
            return
        try:
            while offset < source.size:
                end = min(offset + chunk, source.size)
                url, reached = self._patch(url, source, offset, end)
                offset = self.reached = reached
        except Transient:
            self._told(-offset)  # the next attempt says it again, for what the registry has kept
            raise
        self._finish(url, source, source.size)

    def _begin(self, size: int) -> tuple[str, int]:
        """The URL of an upload and how much the registry has of it: a noted one, else a new one."""
        noted = self._notes.read(self._key)
        if noted is not None:
            with contextlib.suppress(RegistryError):
                url = self._client.transport.upload_url(noted, "")
                answer = self._ask("GET", url, (204, 202, 200))
                # A registry that has nothing yet says 0-0, as it does for one byte: then begin at the beginning.
                reached = _reached(answer)
                if 1 < reached <= size:
                    return self._location(answer, url), reached
            self._notes.forget(self._key)
        begun = self._begun
        if begun is None:
            begun = self._location(self._ask("POST", self._client.path("blobs", "uploads/"), (202,)))
        self._notes.write(self._key, begun)
        return begun, 0

    def _patch(self, url: str, source: _Source, begin: int, end: int) -> tuple[str, int]:
        headers = {"Content-Range": f"{begin}-{end - 1}", "Content-Type": "application/octet-stream"}
        answer = self._send("PATCH", url, headers, source, begin, end)
        if answer.status == 416:
            # The registry has another part of it than we think: its note is of no use.
            self._notes.forget(self._key)
            raise Transient(RegistryError("the registry lost a part of an upload", where=self._client.where))
        if answer.status != 202:
            raise self._client.transport.refused(answer)
        url = self._location(answer, url)
        self._notes.write(self._key, url)
        reached = _reached(answer) if "Range" in answer.headers else end
        if not begin < reached <= end:
            raise RegistryError("the registry does not take what is sent", where=self._client.where)
        return url, reached

    def _finish(self, url: str, source: _Source, begin: int) -> None:
        """The last request, with all of a small blob in it. Before it goes out, the file is known to be right."""
        if begin:
            source.check()
        parts_of = urlsplit(url)
        query = "&".join(part for part in (parts_of.query, f"digest={quote(self._digest, safe=':')}") if part)
        headers = {"Content-Type": "application/octet-stream"}
        answer = self._send("PUT", urlunsplit(parts_of._replace(query=query)), headers, source, begin, source.size)
        if not begin:
            source.check()
        if answer.status != 201:
            self._notes.forget(self._key)
            if answer.status in (404, 416):
                # The upload is gone: begun long ago and swept, or finished by an answer that we did not get.
                if self._client.has_blob(self._digest):
                    return
                raise Transient(RegistryError("the registry lost an upload", where=self._client.where))
            raise self._client.transport.refused(answer)
        self._notes.forget(self._key)

    def _send(self, method: str, url: str, headers: dict[str, str], source: _Source, begin: int, end: int) -> Answer:
        transport = self._client.transport
        blocks = _Blocks(source, begin, end, self._told)
        try:
            with transport.exchange(
                method, url, scope=self._client.scope, headers=headers, body=lambda: blocks if end > begin else b""
            ) as response:
                return transport.whole(response)
        except Transient:
            self._told(-blocks.sent)
            raise
        finally:
            self.sent += blocks.sent

    def _ask(self, method: str, path: str, expect: tuple[int, ...], scope: str | None = None) -> Answer:
        body = b"" if method == "POST" else None
        return self._client.transport.ask(method, path, scope=scope or self._client.scope, body=body, expect=expect)

    def _location(self, answer: Answer, otherwise: str | None = None) -> str:
        return self._client.transport.upload_url(answer.headers.get("Location") or otherwise, answer.url)


class _Source:
    """The bytes of a blob, hashed as they are read, each once however often they are sent."""

    def __init__(self, file: Path | bytes, digest: str, size: int) -> None:
        self.size = size
        self._file = file
        self._digest = digest
        self._hasher = hashlib.sha256()
        self._hashed = 0
        self._stream: BinaryIO | None = None

    def __enter__(self) -> _Source:
        if isinstance(self._file, Path):
            try:
                self._stream = parts.open_regular(self._file, follow=False)
            except OSError as error:
                raise checked.damaged(f"cannot be read: {error.strerror}", self._file) from None
            if os.fstat(self._stream.fileno()).st_size != self.size:
                raise checked.damaged("has another size than it should have", self._file)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def blocks(self, begin: int, end: int) -> Iterator[bytes]:
        if begin > self._hashed:
            for _ in self._read(self._hashed, begin):
                pass
        yield from self._read(begin, end)

    def check(self) -> None:
        for _ in self._read(self._hashed, self.size):
            pass
        if f"sha256:{self._hasher.hexdigest()}" != self._digest:
            name = self._file if isinstance(self._file, Path) else self._digest
            raise IntegrityError("is not what its digest says, and is not released", where=str(name), fix=checked.AGAIN)

    def _read(self, begin: int, end: int) -> Iterator[bytes]:
        while begin < end:
            block = self._block(begin, min(_BLOCK, end - begin))
            if not block:
                raise checked.damaged("became shorter while it was read", str(self._file))
            if begin <= self._hashed < begin + len(block):
                self._hasher.update(memoryview(block)[self._hashed - begin :])
                self._hashed = begin + len(block)
            yield block
            begin += len(block)

    def _block(self, begin: int, count: int) -> bytes:
        if isinstance(self._file, bytes):
            return self._file[begin : begin + count]
        if self._stream is None:
            raise ValueError("the source is not open")
        return os.pread(self._stream.fileno(), count, begin)


class _Blocks:
    """The body of one request: a part of the source."""

    def __init__(self, source: _Source, begin: int, end: int, told: Told) -> None:
        self._source = source
        self._begin = begin
        self._end = end
        self._told = told
        self.sent = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def __iter__(self) -> Iterator[bytes]:
        self._told(-self.sent)  # sent again, after a 401
        self.sent = 0
        for block in self._source.blocks(self._begin, self._end):
            yield block
            self.sent += len(block)
            self._told(len(block))


def _reached(answer: Answer) -> int:
    """How many bytes the registry has, by its Range header; 0 where it does not say."""
    match = _RANGE.match(answer.headers.get("Range", ""))
    return int(match[1]) + 1 if match else 0
