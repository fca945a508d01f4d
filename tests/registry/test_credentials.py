"""Credentials of docker and podman: found by the longest prefix, through helpers, and written for the user's eyes."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from modelforge.errors import InputError
from modelforge.registry import credentials
from modelforge.registry.credentials import Login, erase, find, store

HELPER = """#!/bin/sh
# A credential helper of docker's protocol that keeps one file a host.
case "$1" in
  get) read -r host; if [ -f "$KEPT/$host" ]; then cat "$KEPT/$host"; else echo "credentials not found"; exit 1; fi ;;
  store) input=$(cat); host=$(echo "$input" | sed 's/.*"ServerURL": "\\([^"]*\\)".*/\\1/')
         echo "$input" > "$KEPT/$host" ;;
  erase) read -r host; rm "$KEPT/$host" ;;
esac
"""


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """docker-credential-test on PATH; gives the folder where it keeps credentials."""
    kept = tmp_path / "kept"
    kept.mkdir()
    program = tmp_path / "bin" / "docker-credential-test"
    program.parent.mkdir()
    program.write_text(HELPER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("KEPT", str(kept))
    return kept


def test_the_longest_prefix_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path / "auth.json",
        {"auths": {"h.io": auth("a", "1"), "h.io/team": auth("b", "2:3"), "h.io/team/x": auth("c", "4")}},
    )
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    found = {name: find(name) for name in ("h.io/other", "h.io/team/y/z", "h.io/team/x", "h.io:1/team", "i.io/team")}
    assert [each and (each.user, each.password) for each in found.values()] == [
        ("a", "1"), ("b", "2:3"), ("c", "4"), None, None
    ]  # fmt: skip


def test_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's file, then podman's two; an explicit file is the only one."""
    user = Path(os.environ["HOME"])
    write(user / ".config" / "containers" / "auth.json", {"auths": {"h.io": auth("podman", "1")}})
    assert find("h.io/x") == Login("podman", "1", source=str(user / ".config" / "containers" / "auth.json"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    write(tmp_path / "run" / "containers" / "auth.json", {"auths": {"h.io": auth("running", "1")}})
    assert (find("h.io/x") or Login("")).user == "running"
    write(user / ".docker" / "config.json", {"auths": {"h.io": auth("docker", "1")}})
    assert (find("h.io/x") or Login("")).user == "docker"
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    assert (find("h.io/x") or Login("")).user == "running"
    write(tmp_path / "docker" / "config.json", {"auths": {"h.io": auth("set", "1")}})
    assert (find("h.io/x") or Login("")).user == "set"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none"))
    assert find("h.io/x") is None


def test_helpers(helper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "docker" / "config.json", {"credHelpers": {"h.io": "test"}})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    assert find("h.io/x") is None
    (helper / "h.io").write_text('{"ServerURL": "h.io", "Username": "robot", "Secret": "s"}')
    assert find("h.io/x") == Login("robot", "s", source="docker-credential-test")
    (helper / "h.io").write_text('{"Username": "<token>", "Secret": "identity"}')
    assert find("h.io/x") == Login("", identity_token="identity", source="docker-credential-test")
    (helper / "h.io").write_text("nonsense")
    with pytest.raises(InputError, match="gives no credentials"):
        find("h.io/x")


def test_a_helper_that_is_missing_or_named_badly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    for name in ("no-such", "../../bin/sh", "a b"):
        write(tmp_path / "config.json", {"credsStore": name})
        with pytest.raises(InputError, match="not on PATH"):
            find("h.io/x")


def test_login_and_logout_with_a_store(helper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "docker" / "config.json", {"credsStore": "test", "psFormat": "x"})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    assert not store("h.io", Login("robot", "secret")).plain
    assert json.loads(path.read_text()) == {"credsStore": "test", "psFormat": "x", "auths": {"h.io": {}}}
    assert json.loads((helper / "h.io").read_text())["Secret"] == "secret"
    found = find("h.io/x")
    assert found is not None
    assert (found.user, found.password) == ("robot", "secret")
    assert erase("h.io") is not None
    assert not (helper / "h.io").exists()
    assert erase("h.io") is None


def test_login_and_logout_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only our entry changes; the file is for this user alone; a link to it stays one."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    assert erase("h.io") is None
    real = write(tmp_path / "dotfiles" / "config.json", {"auths": {"i.io": auth("x", "y")}, "detachKeys": "ctrl-e"})
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").symlink_to(real)
    kept = store("h.io", Login("robot", "secret"))
    assert kept.plain
    assert (tmp_path / "docker" / "config.json").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert json.loads(real.read_text()) == {
        "auths": {"i.io": auth("x", "y"), "h.io": auth("robot", "secret")}, "detachKeys": "ctrl-e"
    }  # fmt: skip
    assert erase("h.io") is not None
    assert json.loads(real.read_text())["auths"] == {"i.io": auth("x", "y")}


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", {"auths": {"h.io": {"identitytoken": "i"}, "j.io": {"registrytoken": "r"}}})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    assert (find("h.io/x") or Login("")).identity_token == "i"
    assert (find("j.io/x") or Login("")).registry_token == "r"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"auths": 7}', '{"auths": {"h.io": {"auth": "!!"}}}', '{"auths": {"h.io": {"auth": "YQ=="}}}'],
)
def test_files_of_garbage_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "a").write_text(text)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "a"))
    with pytest.raises(InputError, match="credential"):
        find("h.io/x")


def test_secrets_are_not_printed() -> None:
    login = Login("robot", "hush", "quiet", "still")
    assert "robot" in repr(login)
    assert not any(word in repr(login) for word in ("hush", "quiet", "still"))
    assert credentials.Login("a") == Login("a")
