"""The user's credentials for a registry, where docker and podman keep them: files and credential helpers.

Formats: docker `config.json` (docs.docker.com/reference/cli/docker/login), podman `auth.json`
(containers-auth.json(5)), helpers' protocol (github.com/docker/docker-credential-helpers). Nothing is kept anywhere
else, and nothing is printed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from modelforge.errors import InputError
from modelforge.store import write_atomically

_HELPER_SECONDS = 60.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_FILE_LIMIT = 1 << 20
_IDENTITY_USER = "<token>"  # what a helper gives as user name with an identity token
_DOCKER_HUB = "https://index.docker.io/v1/"  # docker's own key for docker.io, from its first days


@dataclass(frozen=True)
class Login:
    """Credentials for one registry. Secrets are not shown when it is printed."""

    user: str
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    source: str = ""


@dataclass(frozen=True)
class Stored:
    """Where `login` put credentials, or `logout` took them from; ``plain``: readable by whoever reads the file."""

    place: str
    plain: bool


def find(name: str) -> Login | None:
    """The credentials for ``HOST[:PORT]/REPO``: those of the longest prefix that any file has, first file first.

    Raises:
        InputError: a credential file or helper cannot be used.
    """
    for path in files():
        config = _read(path)
        if config is None:
            continue
        for key in _keys(name):
            if login := _of(config, key, path):
                return login
    return None


def store(host: str, login: Login) -> Stored:
    """Keep credentials for a registry in the first of :func:`files`, or with its helper.

    Raises:
        InputError: it cannot be written, or the helper refuses.
    """
    path = _writable()
    with _changing(path) as config:
        if helper := _helper(config, host):
            secret = {"ServerURL": host, "Username": login.user, "Secret": login.password}
            if login.identity_token:
                secret |= {"Username": _IDENTITY_USER, "Secret": login.identity_token}
            _call_helper(helper, "store", json.dumps(secret), path)
            config.setdefault("auths", {}).setdefault(host, {})
            return Stored(f"the credential helper {helper}", plain=False)
        entry = {"auth": base64.b64encode(f"{login.user}:{login.password}".encode()).decode()}
        if login.identity_token:
            entry = {"identitytoken": login.identity_token}
        config.setdefault("auths", {})[host] = entry
    return Stored(str(path), plain=True)


def erase(host: str) -> Stored | None:
    """Forget the credentials for a registry; None where there were none in the file that `login` writes."""
    path = _writable()
    if _read(path) is None:
        return None
    with _changing(path) as config:
        entry = config.get("auths", {}).pop(host, None)
        if helper := _helper(config, host):
            if entry is not None:
                _call_helper(helper, "erase", host, path)
                return Stored(f"the credential helper {helper}", plain=False)
            return None
    return None if entry is None else Stored(str(path), plain=True)


def files() -> list[Path]:
    """The files that are looked into, in order. An explicit one, in the environment, is the only one of its tool."""
    if explicit := os.environ.get("REGISTRY_AUTH_FILE"):
        return [Path(explicit)]
    home = Path.home()
    found = [Path(os.environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "containers" / "auth.json")
    found.append(Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json")
    return found


def _writable() -> Path:
    return files()[0]


def _keys(name: str) -> Iterator[str]:
    """``host/a/b``, ``host/a``, ``host``, and what docker calls its own hub."""
    parts = name.split("/")
    for end in range(len(parts), 0, -1):
        yield "/".join(parts[:end])
    if parts[0] in ("docker.io", "registry-1.docker.io", "index.docker.io"):
        yield _DOCKER_HUB


def _of(config: Mapping[str, Any], key: str, path: Path) -> Login | None:
    if "/" not in key and (helper := _helper(config, key)):
        return _from_helper(helper, key, path)
    auths = config.get("auths", {})
    entry = auths.get(key) or auths.get(f"https://{key}") or auths.get(f"https://{key}/v2/")
    if not isinstance(entry, dict):
        return None
    user, password = entry.get("username", ""), entry.get("password", "")
    if encoded := entry.get("auth"):
        try:
            user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (ValueError, TypeError):
            colon = ""
        if not colon:
            raise InputError(
                f"the credentials for {key} cannot be read", where=str(path), fix=f"modelforge login {key}"
            )
        password = password.rstrip("\0")
    login = Login(user, password, entry.get("identitytoken", ""), entry.get("registrytoken", ""), str(path))
    return login if login.password or login.identity_token or login.registry_token else None


def _helper(config: Mapping[str, Any], key: str) -> str | None:
    name = config.get("credHelpers", {}).get(key) or config.get("credsStore")
    return name if isinstance(name, str) and name else None


def _from_helper(helper: str, host: str, path: Path) -> Login | None:
    said = _call_helper(helper, "get", host, path)
    if said is None:
        return None
    try:
        answer = json.loads(said)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"the credential helper {helper} gives no credentials", where=str(path)) from None
    source = f"docker-credential-{helper}"
    if user == _IDENTITY_USER:
        return Login("", identity_token=secret, source=source)
    return Login(user, secret, source=source)


def _call_helper(helper: str, action: str, said: str, path: Path) -> str | None:
    """What the helper printed; None where it has nothing for this registry.

    The user's own environment goes along: helpers reach key rings and cloud profiles by it.
    """
    from modelforge.toolchains import process

    program = shutil.which(f"docker-credential-{helper}") if _HELPER_NAME.match(helper) else None
    if program is None:
        raise InputError(
            f"wants the credential helper docker-credential-{helper}, which is not on PATH",
            where=str(path),
            fix="install it, or take it out of the file",
        )
    done = process.ask([program, action], said.encode(), timeout=_HELPER_SECONDS, env=os.environ)
    text = done.output.decode("utf-8", errors="replace").strip()
    if done.returncode == 0:
        return text
    if action == "get" and "not found" in text.lower():
        return None
    # What a failed helper prints is its complaint (by its protocol), on stdout.
    why = "".join(character for character in text[:200] if character.isprintable())
    raise InputError(f"the credential helper {helper} failed: {why or 'no word of why'}", where=str(path))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as stream:
            config = json.loads(stream.read(_FILE_LIMIT))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise InputError(f"the credential file cannot be read: {why}", where=str(path)) from None
    for key in ("auths", "credHelpers"):
        if not isinstance(config, dict) or not isinstance(config.get(key, {}), dict):
            raise InputError("is not a credential file of docker or podman", where=str(path))
    return dict(config)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[dict[str, Any]]:
    """The file's content, written back as a whole, for the user's eyes only. What we do not know in it stays."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.modelforge.lock"):
            config = _read(path) or {}
            before = json.dumps(config)
            yield config
            if json.dumps(config) != before:
                target = path.resolve()  # dotfiles may be links; the link stays
                write_atomically(target, json.dumps(config, indent="\t").encode())
    except OSError as error:
        raise InputError(
            f"the credential file cannot be written: {error.strerror}", where=str(path), fix="set DOCKER_CONFIG"
        ) from error
