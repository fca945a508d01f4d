"""Answers to a registry's challenges: Basic, and Bearer tokens of the service that it names.

Formats: RFC 7235 (challenges), distribution.github.io/distribution/spec/auth/{token,oauth} (token and refresh).
Credentials go to a token service only over https, or over http on this machine. Nothing here is logged.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from modelforge.errors import RegistryError
from modelforge.registry import faults
from modelforge.registry.credentials import Login
from modelforge.registry.reference import is_loopback

if TYPE_CHECKING:
    from modelforge.registry.transport import Answer

_PARAMETER = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_SCHEME = re.compile(r"(?:^|,)\s*(Basic|Bearer)(?=\s|$)", re.IGNORECASE)
_CLIENT = "modelforge"
_DEFAULT_LIFE = 60.0


@dataclass(frozen=True)
class Exchange:
    """A request to a token service."""

    method: str
    url: str
    headers: Mapping[str, str]
    form: str | None = None


class Authenticator:
    """Keeps the tokens of one registry, by scope; shared by threads."""

    def __init__(
        self, host: str, login: Login | None, ask: Callable[[Exchange], Answer], *, allow_http: bool = False
    ) -> None:
        self._host = host
        self._login = login
        self._ask = ask
        self._allow_http = allow_http
        self._basic = False
        self._tokens: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        if login is not None and login.registry_token:
            self._tokens[""] = (login.registry_token, float("inf"))

    def header(self, scope: str) -> dict[str, str]:
        """What to send with a request before the registry asks for anything."""
        if self._basic and self._login is not None:
            return {"Authorization": _basic(self._login)}
        token, until = self._tokens.get(scope) or self._tokens.get("", ("", 0.0))
        return {"Authorization": f"Bearer {token}"} if token and time.monotonic() < until else {}

    def renew(self, challenge: str, scope: str, used: Mapping[str, str]) -> dict[str, str]:
        """What to send after a 401; empty where there is nothing better than what was ``used``."""
        kind, parameters = parse_challenge(challenge)
        with self._lock:
            here = self.header(scope)
            if here and here != dict(used):
                return here  # another thread has got it meanwhile
            if kind == "basic":
                if self._basic or self._login is None or not self._login.password:
                    return {}
                self._basic = True
            elif kind == "bearer":
                self._tokens[scope] = self._fetch(parameters, scope)
            fresh = self.header(scope)
            return fresh if fresh != dict(used) else {}

    def _fetch(self, parameters: Mapping[str, str], scope: str) -> tuple[str, float]:
        realm = parameters.get("realm", "")
        where = urlsplit(realm)
        if where.scheme != "https" and not (
            where.scheme == "http" and (is_loopback(where.netloc) or (self._allow_http and where.netloc == self._host))
        ):
            raise RegistryError(
                f"the registry names a token service without https: {faults.printable(realm)}", where=self._host
            )
        if "@" in where.netloc:
            raise RegistryError("the registry names a token service with credentials in its URL", where=self._host)
        query = {"service": parameters.get("service", ""), "scope": scope or parameters.get("scope", "")}
        query = {key: value for key, value in query.items() if value}
        answer = self._ask(_exchange(realm, query, self._login))
        if answer.status != 200:
            raise faults.refusal(answer.status, answer.body, f"{self._host} (token service {where.netloc})")
        try:
            said = json.loads(answer.body)
            token = said.get("token") or said.get("access_token")
            life = float(said.get("expires_in") or _DEFAULT_LIFE)
        except (ValueError, AttributeError, TypeError, RecursionError):
            token, life = None, 0.0
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
            raise RegistryError("the token service gives no token", where=where.netloc)
        # A little early, so that a request under way does not outlive it.
        return token, time.monotonic() + max(life, 5.0) * 0.9


def parse_challenge(header: str) -> tuple[str, dict[str, str]]:
    """Scheme (``bearer``, ``basic`` or empty) and parameters of a WWW-Authenticate header; Bearer where both stand."""
    # Quoted strings may hold anything: blank them out before looking for where a challenge begins.
    plain = re.sub(r'"(?:[^"\\]|\\.)*"', lambda match: '"' + "." * (len(match[0]) - 2) + '"', header)
    found: dict[str, dict[str, str]] = {}
    starts = list(_SCHEME.finditer(plain))
    for index, start in enumerate(starts):
        end = starts[index + 1].start() if index + 1 < len(starts) else len(header)
        parameters = {}
        for match in _PARAMETER.finditer(header, start.end(), end):
            quoted = match[2] if match[2] is not None else match[3]
            parameters[match[1].lower()] = re.sub(r"\\(.)", r"\1", quoted)
        found.setdefault(start[1].lower(), parameters)
    for kind in ("bearer", "basic"):
        if kind in found:
            return kind, found[kind]
    return "", {}


def _exchange(realm: str, query: Mapping[str, str], login: Login | None) -> Exchange:
    if login is not None and login.identity_token:
        form = {"grant_type": "refresh_token", "refresh_token": login.identity_token, "client_id": _CLIENT, **query}
        return Exchange("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, urlencode(form))
    headers = {}
    if login is not None and login.password:
        headers["Authorization"] = _basic(login)
        query = {"account": login.user, **query}
    return Exchange("GET", realm + ("&" if "?" in realm else "?") + urlencode(query), headers)


def _basic(login: Login) -> str:
    return "Basic " + base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
