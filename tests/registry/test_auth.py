"""Tokens: asked for with the right scope, kept, renewed in the middle of a transfer, and refused when they are none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.bundle.read import Bundle
from modelforge.errors import RegistryError
from modelforge.registry.auth import parse_challenge
from modelforge.registry.session import Connection
from tests.registry.conftest import QUICK
from tests.registry.hostile import Handler, Stub, serving
from tests.registry.pulling import pull_from

CONNECTION = Connection(limits=QUICK)


class TokenService:
    """A registry that wants bearer tokens, and the service that gives them. Tokens work ``uses`` times."""

    def __init__(self, stub: Stub, uses: int) -> None:
        self.uses = uses
        self.asked: list[tuple[str, dict[str, list[str]], str | None]] = []
        self.answer = ""
        self._stub = stub
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        stub.misbehave = self

    def __call__(self, handler: Handler, kind: str, name: str) -> bool:
        parts = urlsplit(handler.path)
        if parts.path == "/token":
            body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)).decode()
            query = parse_qs(parts.query or body)
            self.asked.append((handler.command, query, handler.headers.get("Authorization")))
            token = f"t{len(self.asked)}"
            self._left[token] = self.uses
            handler.answer(200, self.answer.encode() or json.dumps({"token": token, "expires_in": 300}).encode())
            return True
        if kind == "root":
            return False
        with self._lock:
            token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
            if self._left.get(token, 0) > 0:
                self._left[token] -= 1
                return False
        realm = f'Bearer realm="http://{self._stub.host}/token",service="reg,istry",scope="repository:a/b:pull"'
        handler.answer(401, b"", {"WWW-Authenticate": realm})
        return True


@pytest.fixture
def stub(bundle: Bundle) -> Iterator[Stub]:
    with serving(Stub()) as stub:
        stub.take(bundle)
        yield stub


@pytest.fixture
def auth_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "auth.json"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    return path


def test_one_token_serves_a_pull(tmp_path: Path, stub: Stub, bundle: Bundle, auth_file: Path) -> None:
    service = TokenService(stub, 1000)
    auth_file.write_text(json.dumps({"auths": {stub.host: {"auth": "cm9ib3Q6c2VjcmV0"}}}))
    assert pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION).digest == bundle.digest
    ((method, query, authorization),) = service.asked
    assert (method, authorization) == ("GET", "Basic cm9ib3Q6c2VjcmV0")
    assert query == {"service": ["reg,istry"], "scope": ["repository:a/b:pull"], "account": ["robot"]}


def test_without_credentials_a_token_is_asked_for_too(tmp_path: Path, stub: Stub, bundle: Bundle) -> None:
    """As public repositories want it."""
    service = TokenService(stub, 1000)
    assert pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION).digest == bundle.digest
    assert [authorization for _, _, authorization in service.asked] == [None]


def test_a_token_that_ends_is_renewed_on_the_way(tmp_path: Path, stub: Stub, bundle: Bundle) -> None:
    service = TokenService(stub, 2)
    assert pull_from(f"{stub.host}/a/b:1.2.0", None, tmp_path / "out", CONNECTION, jobs=1).digest == bundle.digest
    assert len(service.asked) > 3


def test_an_identity_token_is_exchanged(tmp_path: Path, stub: Stub, bundle: Bundle, auth_file: Path) -> None:
    service = TokenService(stub, 1000)
    auth_file.write_text(json.dumps({"auths": {stub.host: {"identitytoken": "long-lived"}}}))
    assert pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION).digest == bundle.digest
    ((method, query, authorization),) = service.asked
    assert (method, authorization) == ("POST", None)
    assert query["grant_type"] == ["refresh_token"]
    assert query["refresh_token"] == ["long-lived"]


@pytest.mark.parametrize(
    "answer",
    ["[]", "{}", "x", '{"token": 7}', '{"token": "a\\r\\nX: y"}', '{"token": "t", "expires_in": "x"}', "[" * 9999],
)
def test_what_is_no_token(tmp_path: Path, stub: Stub, answer: str) -> None:
    TokenService(stub, 1).answer = answer
    with pytest.raises(RegistryError, match=r"no token|401"):
        pull_from(f"{stub.host}/a/b:1.2.0", "t4", tmp_path / "out", CONNECTION)


@pytest.mark.parametrize(
    ("header", "kind", "parameters"),
    [
        ('Basic realm="x"', "basic", {"realm": "x"}),
        ('bearer realm="https://a/t",service="s"', "bearer", {"realm": "https://a/t", "service": "s"}),
        ('Basic realm="x", Bearer realm="y",scope="a,b"', "bearer", {"realm": "y", "scope": "a,b"}),
        ('Bearer realm="say \\"hi\\", Basic"', "bearer", {"realm": 'say "hi", Basic'}),
        ("Negotiate", "", {}),
        ("", "", {}),
        ("Basic", "basic", {}),
    ],
)
def test_challenges(header: str, kind: str, parameters: dict[str, str]) -> None:
    assert parse_challenge(header) == (kind, parameters)


@given(st.text(alphabet='Basicerl realm="x",\\=1', max_size=80))
def test_any_header_is_read(header: str) -> None:
    kind, parameters = parse_challenge(header)
    assert kind in ("", "basic", "bearer")
    assert all(isinstance(value, str) for value in parameters.values())
