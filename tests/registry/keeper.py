"""A small registry that takes pushes, keeps what broken uploads brought, and knows the referrers API.

docker-registry does neither: it throws a broken upload away, and answers 404 for referrers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from modelforge.bundle import format as words
from modelforge.store import digest_bytes
from tests.registry.hostile import Handler, Stub


class Keeper:
    """Turns a :class:`Stub` into a registry that takes pushes.

    Attributes:
        cut: where to cut the connection: called with the upload's length, gives how many bytes more to read.
        received: bytes of blobs that came in.
    """

    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.uploads: dict[str, bytearray] = {}
        self.received = 0
        self._numbers = itertools.count()
        self.cut: Callable[[int], int | None] = lambda _: None
        self.refuse: Callable[[Handler], bool] = lambda _: False
        self.mountable: dict[str, bytes] = {}
        stub.misbehave = self

    def __call__(self, handler: Handler, kind: str, name: str) -> bool:
        if self.refuse(handler):
            return True
        command, path = handler.command, urlsplit(handler.path).path
        if upload := re.search(r"/blobs/uploads/(\w*)\Z", path):
            getattr(self, f"_{command.lower()}")(handler, upload[1])
        elif kind == "manifests" and command == "PUT":
            self._manifest(handler, name)
        elif kind == "referrers":
            self._referrers(handler, name)
        else:
            return False
        return True

    def _post(self, handler: Handler, _: str) -> None:
        query = parse_qs(urlsplit(handler.path).query)
        mounted = query.get("mount", [""])[0]
        if mounted in self.mountable:
            self.stub.blobs[mounted] = self.mountable[mounted]
            handler.answer(201)
            return
        name = f"u{next(self._numbers)}"
        self.uploads[name] = bytearray()
        handler.answer(202, headers={"Location": f"/v2/a/b/blobs/uploads/{name}?state=0"})

    def _get(self, handler: Handler, name: str) -> None:
        if name not in self.uploads:
            handler.answer(404)
        else:
            self._where(handler, name, 204)

    def _patch(self, handler: Handler, name: str) -> None:
        upload = self.uploads[name]
        begin = int(handler.headers["Content-Range"].partition("-")[0])
        if begin != len(upload):
            handler.answer(416)
        elif self._take(handler, upload):
            self._where(handler, name, 202)

    def _put(self, handler: Handler, name: str) -> None:
        if name not in self.uploads:
            handler.answer(404)
            return
        upload = self.uploads[name]
        if not self._take(handler, upload):
            return
        digest = parse_qs(urlsplit(handler.path).query)["digest"][0]
        data = bytes(self.uploads.pop(name))
        if digest_bytes(data) != digest:
            handler.answer(400, b'{"errors": [{"code": "DIGEST_INVALID"}]}')
            return
        self.stub.blobs[digest] = data
        handler.answer(201)

    def _take(self, handler: Handler, upload: bytearray) -> bool:
        """Read the body; False where the connection is cut in the middle of it."""
        length = int(handler.headers.get("Content-Length") or 0)
        limit = self.cut(len(upload))
        while length:
            count = min(length, 8192 if limit is None else min(limit, 8192))
            if count == 0:
                handler.close_connection = True
                with contextlib.suppress(OSError):
                    handler.connection.shutdown(2)
                return False
            data = handler.rfile.read(count)
            upload += data
            self.received += len(data)
            length -= len(data)
            limit = None if limit is None else limit - len(data)
        return True

    def _where(self, handler: Handler, name: str, status: int) -> None:
        count = len(self.uploads[name])
        headers = {"Location": f"/v2/a/b/blobs/uploads/{name}?state={count}", "Range": f"0-{max(count - 1, 0)}"}
        handler.answer(status, headers=headers)

    def _manifest(self, handler: Handler, name: str) -> None:
        data = handler.rfile.read(int(handler.headers["Content-Length"]))
        document = (handler.headers["Content-Type"], data)
        self.stub.manifests |= {name: document, digest_bytes(data): document}
        subject = json.loads(data).get("subject")
        handler.answer(201, headers={"OCI-Subject": subject["digest"]} if subject else {})

    def _referrers(self, handler: Handler, name: str) -> None:
        entries = []
        for digest, (media_type, data) in self.stub.manifests.items():
            manifest = json.loads(data)
            if words.is_digest(digest) and manifest.get("subject", {}).get("digest") == name:
                entry = words.descriptor(media_type, digest, len(data))
                entries.append({**entry, "artifactType": manifest["artifactType"]})
        index = {"schemaVersion": 2, "mediaType": words.INDEX_TYPE, "manifests": entries}
        handler.answer(200, words.go_json(index), {"Content-Type": words.INDEX_TYPE})
