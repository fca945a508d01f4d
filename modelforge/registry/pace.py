"""Connections that a slow peer cannot hold for ever: every wait for bytes is bounded, headers and chunk lines included.

requests' own timeout starts anew with every byte; one byte now and then would keep it waiting without end.
"""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from modelforge.registry.limits import Limits

_BUFFER = 256 << 10


class PacedAdapter(HTTPAdapter):
    """requests' adapter, with paced connections and no retries of its own."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        super().__init__(pool_connections=8, pool_maxsize=max(8, limits.jobs * 2), max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self._limits)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = _pools(self._limits)
        return manager


class TooSlow(TimeoutError):
    """The peer sends, but so slowly that the transfer would not end."""


def _pools(bounds: Limits) -> dict[str, type]:
    class Response(_PacedResponse):
        limits = bounds

    class Plain(_PacedConnection, HTTPConnection):
        limits = bounds
        response_class = Response

    class Secure(_PacedConnection, HTTPSConnection):
        limits = bounds
        response_class = Response

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


class _PacedConnection:
    """TLS handshakes are bounded as a whole; what is sent must be taken, a block at a time, within ``idle``."""

    limits: Limits
    sock: socket.socket | None

    def connect(self) -> None:
        with _closing_after(self.limits.connect * 2, self):
            super().connect()  # type: ignore[misc]  # a mixin
        if self.sock is not None:
            self.sock.settimeout(self.limits.idle)

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(self.limits.idle)
        super().request(*args, **kwargs)  # type: ignore[misc]  # a mixin


@contextlib.contextmanager
def _closing_after(seconds: float, connection: _PacedConnection) -> Iterator[None]:
    """Cut the connection if what is inside does not end in time. The reader then sees an error."""

    def cut() -> None:
        if connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _PacedResponse(HTTPResponse):
    limits: Limits

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        raw = self.fp.detach()
        self.fp = io.BufferedReader(_PacedReader(raw, sock, self.limits), _BUFFER)


class _PacedReader(io.RawIOBase):
    """Reads from a socket; counts the time spent waiting, not the time that the caller takes."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, limits: Limits) -> None:
        self._raw = raw
        self._sock = sock
        self._limits = limits
        self._waited = 0.0
        self._got = 0
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._limits.window - self._waited
        patience = min(self._limits.idle, max(left, 0.001)) if self._begun else self._limits.answer
        self._sock.settimeout(patience)
        begun = time.monotonic()
        try:
            count = self._raw.readinto(buffer)
        except TimeoutError as error:
            raise TooSlow("timed out") from error
        if self._begun:
            self._waited += time.monotonic() - begun
            self._got += count or 0
        self._begun = True
        if self._waited >= self._limits.window:
            if self._got < self._limits.pace * self._waited:
                raise TooSlow(f"{self._got} bytes in {self._waited:.1f} s")
            self._waited, self._got = 0.0, 0
        return int(count or 0)

    def close(self) -> None:
        self._raw.close()
        super().close()
