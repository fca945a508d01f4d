"""HTTP with one registry: authenticated, redirected with care, retried where that can help, and bounded in every way.

Credentials go to the registry itself and to the token service that it names over https, and nowhere else. Knows no
bundles and no blobs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from requests.utils import get_environ_proxies
from urllib3.exceptions import HTTPError, NameResolutionError, ReadTimeoutError

from modelforge import __version__
from modelforge.errors import InputError, RegistryError
from modelforge.registry import faults
from modelforge.registry.auth import Authenticator, Exchange
from modelforge.registry.credentials import Login
from modelforge.registry.limits import Limits
from modelforge.registry.pace import PacedAdapter, TooSlow
from modelforge.registry.patience import Patience, Transient
from modelforge.registry.reference import is_loopback

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BLOCK = 256 << 10
_CRUMB, _CRUMBS = 16 << 10, 256
# Docker's hub has its API on another host than its name says.
_API_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_E = TypeVar("_E", bound=BaseException)


class Body(Protocol):
    """What is uploaded: iterated once, of a known length."""

    def __iter__(self) -> Iterator[bytes]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Answer:
    """A whole small answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class Transport:
    """A conversation with one registry, safe to share between threads.

    Args:
        host: with its port.
        login: the user's credentials for it, if any.
        plain_http: speak http where the host is another machine. On this machine http is found out by asking.
        ca_file: certificates to trust instead of the system's.
    """

    def __init__(
        self,
        host: str,
        *,
        login: Login | None = None,
        plain_http: bool = False,
        ca_file: Path | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.host = host
        self._api = _API_HOSTS.get(host, host)
        self.limits = limits or Limits()
        self._plain_http = plain_http
        self._verify = _certificates(ca_file)
        self._adapter = PacedAdapter(self.limits)
        self._met = False
        self._stopped = threading.Event()
        self._base = self._find_base()
        self._auth = Authenticator(host, login, self._ask_token_service, allow_http=self._base.startswith("http://"))

    @property
    def secure(self) -> bool:
        return self._base.startswith("https://")

    def patience(self) -> Patience:
        return Patience(self.limits, self._stopped)

    def stop(self) -> None:
        """Another thread has failed: what runs ends at its next step."""
        self._stopped.set()

    def ask(
        self,
        method: str,
        path: str,
        *,
        scope: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        expect: Collection[int] = (200,),
    ) -> Answer:
        """One small request and its whole answer, tried again where that can help.

        Raises:
            RegistryError: the registry cannot be reached, refuses, or answers with another status than expected.
        """
        patience = self.patience()
        while True:
            try:
                with self.exchange(method, path, scope=scope, headers=headers, body=lambda: body) as response:
                    answer = self.whole(response, wanted=method != "HEAD")
                if answer.status in expect:
                    return answer
                raise self.refused(answer)
            except Transient as fault:
                patience.after(fault)

    @contextlib.contextmanager
    def exchange(
        self,
        method: str,
        path: str,
        *,
        scope: str = "",
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Body | bytes | None] = lambda: None,
    ) -> Iterator[requests.Response]:
        """One attempt: gives the answer with its body unread. Authenticates and follows redirects.

        Args:
            path: under the registry, or the URL of an upload that it gave.
            body: makes the body; called again where a request is sent again.

        Raises:
            Transient: another attempt may help. RegistryError: none will.
        """
        url = join(self._base, path)
        response: requests.Response | None = None
        try:
            with self._told(url):
                response = self._follow(method, url, scope, dict(headers or {}), body)
                self._met = True
                yield response
        finally:
            if response is not None:
                response.close()

    def whole(self, response: requests.Response, *, wanted: bool = True) -> Answer:
        """Read a small answer to its end, within size and time."""
        data = b""
        url = response.url or self._base
        if wanted:
            data = b"".join(self.blocks(response, self.limits.document_size, seconds=self.limits.document))
        if response.ok and len(data) > self.limits.document_size:
            raise RegistryError(f"answers with more than {self.limits.document_size} bytes", where=_place(url))
        return Answer(response.status_code, response.headers, data, url)

    def blocks(self, response: requests.Response, limit: int, *, seconds: float | None = None) -> Iterator[bytes]:
        """The body as it comes, at most ``limit`` + 1 bytes of it: one more is enough to know."""
        until = None if seconds is None else time.monotonic() + seconds
        left = limit + 1
        crumbs: list[bytes] = []  # a server that sends crumbs makes us work for each; together they are a block
        while left > 0:
            try:
                # read1: what has come, without waiting until a block is full.
                block = response.raw.read1(min(_BLOCK, left), decode_content=False)
            except (HTTPError, OSError):
                yield b"".join(crumbs)
                raise
            if self._stopped.is_set():
                raise RegistryError("stopped", where=self.host)
            if until is not None and time.monotonic() > until:
                raise TooSlow(f"no whole answer in {seconds} s")
            left -= len(block)
            crumbs.append(block)
            if not block or len(block) >= _CRUMB or len(crumbs) >= _CRUMBS:
                yield b"".join(crumbs)
                crumbs.clear()
            if not block:
                return
        yield b"".join(crumbs)

    def refused(self, answer: Answer) -> Transient | RegistryError:
        """What to raise for an answer with an unwanted status."""
        error = faults.refusal(answer.status, answer.body, _place(answer.url))
        if answer.status in faults.TRANSIENT:
            return Transient(error, faults.retry_after(answer.headers))
        return error

    def upload_url(self, location: str | None, asked: str) -> str:
        """The URL of an upload that the registry gave; data goes nowhere but to the registry itself."""
        if not location:
            raise RegistryError("the registry begins an upload and does not say where", where=self.host)
        url = join(join(self._base, asked), location)
        if _origin(url) != _origin(self._base):
            raise RegistryError(
                f"the registry sends an upload to another place: {faults.printable(_place(url))}",
                where=self.host,
                fix="behind a proxy, have it pass on Host and X-Forwarded-Proto",
            )
        return url

    # -- one request

    def _follow(
        self, method: str, url: str, scope: str, headers: dict[str, str], body: Callable[[], Body | bytes | None]
    ) -> requests.Response:
        for _ in range(self.limits.redirects + 1):
            response = self._authenticated(method, url, scope, headers, body)
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or location is None:
                return response
            response.close()
            if method not in ("GET", "HEAD"):
                raise RegistryError(f"the registry redirects a {method}", where=_place(url))
            target = join(url, location)
            if urlsplit(target).scheme not in ("https", urlsplit(url).scheme):
                raise RegistryError(
                    f"the registry redirects from https to {faults.printable(target, 60)}", where=_place(url)
                )
            url = target
        raise RegistryError(f"more than {self.limits.redirects} redirects", where=_place(url))

    def _authenticated(
        self, method: str, url: str, scope: str, headers: dict[str, str], body: Callable[[], Body | bytes | None]
    ) -> requests.Response:
        if _origin(url) != _origin(self._base):
            return self._send(method, url, headers, body())
        used = self._auth.header(scope)
        response = self._send(method, url, headers | used, body())
        if response.status_code != 401:
            return response
        challenge = response.headers.get("WWW-Authenticate", "")
        answer = self.whole(response, wanted=method != "HEAD")
        response.close()
        fresh = self._auth.renew(challenge, scope, used)
        if not fresh:
            raise faults.refusal(401, answer.body, _place(url))
        return self._send(method, url, headers | fresh, body())

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: Body | bytes | str | None
    ) -> requests.Response:
        fixed = {"User-Agent": f"modelforge/{__version__}", "Accept-Encoding": "identity"}
        prepared = requests.Request(method, url, headers=fixed | dict(headers), data=body).prepare()
        limits = self.limits
        proxies = {} if is_loopback(urlsplit(url).netloc.rpartition("@")[2]) else get_environ_proxies(url)
        return self._adapter.send(
            prepared, stream=True, timeout=(limits.connect, limits.answer), verify=self._verify, proxies=proxies
        )

    def _ask_token_service(self, request: Exchange) -> Answer:
        """Ask a token service, which may be another host. Redirects are not followed: they would carry credentials."""
        patience = self.patience()
        while True:
            try:
                with self._told(request.url):
                    response = self._send(request.method, request.url, request.headers, request.form)
                    with contextlib.closing(response):
                        answer = self.whole(response)
                if answer.status in faults.TRANSIENT:
                    raise self.refused(answer)
                return answer
            except Transient as fault:
                patience.after(fault)

    def _find_base(self) -> str:
        if self._plain_http:
            return f"http://{self._api}/"
        if not is_loopback(self.host):
            return f"https://{self._api}/"
        # What speaks TLS answers a plain request with 400 or nothing of sense. No credentials are sent here.
        base = f"http://{self._api}/"
        try:
            with self._told(base):
                response = self._send("GET", base + "v2/", {}, None)
                response.close()
                return base if response.status_code != 400 else f"https://{self._api}/"
        except Transient as fault:
            if isinstance(fault.__cause__, requests.ConnectionError) and not _chain(fault, TimeoutError):
                return f"https://{self._api}/"
            raise fault.final from None

    @contextlib.contextmanager
    def _told(self, url: str) -> Iterator[None]:
        """Turn what can go wrong on the way into Transient and RegistryError."""
        try:
            yield
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            # ValueError: URLs and header values of a hostile answer that the libraries cannot read.
            if isinstance(error, OSError) and error.filename is not None:
                raise  # a file of ours, not the network
            raise self._network_fault(error, url) from error

    def _network_fault(self, error: Exception, url: str) -> Transient | RegistryError:
        where = _place(url)
        if _chain(error, ConnectionRefusedError):
            final = RegistryError(
                "nothing listens there: the connection was refused", where=where, fix="is the registry up?"
            )
            return Transient(final) if self._met else final
        if _chain(error, NameResolutionError) or _chain(error, socket.gaierror):
            return RegistryError("there is no such host", where=where, fix="check the spelling, and the network")
        if certificate := _chain(error, ssl.SSLCertVerificationError):
            why = faults.printable(str(getattr(certificate, "verify_message", certificate)))
            return RegistryError(
                f"the registry's certificate is not trusted: {why}",
                where=where,
                fix="give the CA's certificate with --ca-file, or in REQUESTS_CA_BUNDLE",
            )
        if wrong := _chain(error, ssl.SSLError):
            text = faults.printable(str(getattr(wrong, "reason", None) or wrong))
            return RegistryError(f"no TLS with it: {text}", where=where, fix="--plain-http, if it speaks http")
        if isinstance(error, requests.exceptions.InvalidURL | ValueError) and not isinstance(
            error, requests.ConnectionError
        ):
            return RegistryError(f"an answer cannot be read: {faults.printable(str(error))}", where=where)
        if _chain(error, TooSlow) or _chain(error, TimeoutError) or _chain(error, ReadTimeoutError):
            return Transient(RegistryError("it answers too slowly, or not at all", where=where))
        return Transient(RegistryError(f"the connection broke: {_shortly(error)}", where=where))


def join(base: str, location: str) -> str:
    """A URL that the registry gave, absolute."""
    try:
        url = urljoin(base, location)
        _origin(url)
    except ValueError as error:
        raise RegistryError(f"gives a URL that is none: {faults.printable(location)}", where=_place(base)) from error
    return url


def _certificates(ca_file: Path | None) -> str | bool:
    if ca_file is not None:
        if not ca_file.is_file():
            raise InputError("there is no such file", where=str(ca_file), fix="--ca-file names a PEM file")
        return str(ca_file)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        if value := os.environ.get(name):
            return value
    return True


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _place(url: str) -> str:
    """A URL for messages: without its query, which may hold secrets of an upload or a store."""
    parts = urlsplit(url)
    return faults.printable(f"{parts.netloc.rpartition('@')[2]}{parts.path}", 300)


def _chain(error: BaseException | None, kind: type[_E]) -> _E | None:
    """The first of this kind among an error, what it wraps and what caused it."""
    seen: list[BaseException] = []
    todo: list[object] = [error]
    while todo:
        here = todo.pop(0)
        if not isinstance(here, BaseException) or here in seen:
            continue
        if isinstance(here, kind):
            return here
        seen.append(here)
        todo += [here.__cause__, here.__context__, getattr(here, "reason", None), *here.args]
    return None


def _shortly(error: Exception) -> str:
    inner = _chain(error, OSError)
    while inner is not None and isinstance(inner, requests.RequestException):
        inner = next((each for each in inner.args if isinstance(each, OSError)), None)
    text = inner.strerror if inner is not None and inner.strerror else type(error).__name__
    return faults.printable(text)
