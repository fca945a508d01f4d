"""A registry that serves one bundle from a folder, and misbehaves as a test tells it to. Loopback only."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from modelforge.bundle import format as words
from modelforge.bundle.read import Bundle

Misbehave = Callable[["Handler", str, str], bool]
"""Called with the kind (``manifests``, ``blobs``, ``tags``, ``referrers``, ``root``) and the name; True: answered."""


class Handler(BaseHTTPRequestHandler):
    """One request. ``server.stub`` says what to serve and how to misbehave."""

    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 20
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        stub = self.server.stub
        kind, name = _parse(self.path)
        stub.seen.append((self.command, self.path, self.headers.get("Authorization"), self.headers.get("Range")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if stub.misbehave(self, kind, name):
                return
            self.serve(kind, name)

    do_HEAD = do_GET  # noqa: N815 - http.server's names
    do_POST = do_GET  # noqa: N815  # http.server's names
    do_PUT = do_GET  # noqa: N815  # http.server's names
    do_PATCH = do_GET  # noqa: N815  # http.server's names

    def serve(self, kind: str, name: str) -> None:
        """The honest answer."""
        stub = self.server.stub
        if kind == "root":
            self.answer(200, b"{}")
        elif kind == "tags":
            self.answer(200, b'{"name": "a/b", "tags": ["1.2.0"]}')
        elif kind == "manifests" and name in stub.manifests:
            media_type, data = stub.manifests[name]
            self.answer(200, data, {"Content-Type": media_type})
        elif kind == "blobs" and name in stub.blobs:
            data = stub.blobs[name]
            asked = self.headers.get("Range")
            if asked:
                begin = int(asked.removeprefix("bytes=").partition("-")[0])
                headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
                self.answer(206, data[begin:], headers)
            else:
                self.answer(200, data)
        else:
            self.answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "unknown"}]}')

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, length: int | None = None
    ) -> None:
        """Send an answer; ``length`` lies about its length."""
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if length is not None:
            self.close_connection = True

    def begin(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Send the head of an answer that ends when the connection does."""
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Stub:
    """What is served: manifests by tag and digest, blobs by digest; ``seen`` holds method, path, credentials, range."""

    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    misbehave: Misbehave = lambda *_: False
    seen: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    host: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def take(self, bundle: Bundle) -> None:
        """Serve a bundle under its version."""
        for digest, size in bundle.blobs.items():
            data = (bundle.path / words.blob_name(digest)).read_bytes()
            assert len(data) == size
            self.blobs[digest] = data
        for digest in bundle.manifests:
            self.manifests[digest] = (words.MANIFEST_TYPE, self.blobs[digest])
        index = (words.INDEX_TYPE, self.blobs[bundle.digest])
        self.manifests |= {bundle.digest: index, bundle.version: index}

    def drip(self, handler: Handler, data: bytes) -> None:
        """Send a byte now and then, until the client or the test has gone."""
        for byte in data:
            if self.ended.wait(0.02):
                return
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    stub: Stub

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what these tests are about."""


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    server = _Server(("127.0.0.1", 0), Handler)
    server.stub = stub
    stub.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.ended.set()
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silent_port() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def _parse(path: str) -> tuple[str, str]:
    path = path.partition("?")[0]
    parts = Path(path).parts
    for kind in ("manifests", "blobs", "tags", "referrers"):
        if kind in parts:
            return kind, parts[-1]
    return "root", path
