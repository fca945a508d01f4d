"""The user's policy: which repositories must be signed, and by whose keys.

A policy that is there and cannot be read is a refusal, never "no policy".
"""

from __future__ import annotations

import os
import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelforge.errors import IntegrityError
from modelforge.schema import explain

POLICY_VARIABLE = "MODELFORGE_CONFIG"
_LIMIT = 1 << 20


class Requirement(BaseModel):
    """What one ``[[require]]`` table says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    repository: Annotated[str, Field(min_length=1, description='for example "registry.example.com/team/*"')]
    keys: Annotated[list[str], Field(min_length=1, description="files of public keys; any of them will do")]


class _Policy(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    require: list[Requirement] = []


def policy_keys(repository: str) -> tuple[Path, ...] | None:
    """The keys one of which must have signed what comes from a repository; None where the user demands no signature.

    The first ``[[require]]`` whose pattern fits counts. ``*`` stands for any characters, ``/`` included; case and the
    default ports make no difference. Keys are relative to the policy's folder; ``~`` is the user's.

    Args:
        repository: ``host[:port]/path``, without a tag.

    Raises:
        IntegrityError: the policy cannot be read, says something unknown, or ``$MODELFORGE_CONFIG`` leads nowhere.
    """
    path = policy_path()
    if path is None:
        return None
    wanted = _normal(repository)
    for requirement in _read(path).require:
        if fnmatchcase(wanted, _normal(requirement.repository)):
            return tuple(path.parent / Path(key).expanduser() for key in requirement.keys)
    return None


def policy_path() -> Path | None:
    """``$MODELFORGE_CONFIG`` (a file, or a folder that holds ``policy.toml``), else ``modelforge/policy.toml`` in the
    user's configuration folder; None where there is none and none was named.

    Raises:
        IntegrityError: ``$MODELFORGE_CONFIG`` leads nowhere.
    """
    named = os.environ.get(POLICY_VARIABLE)
    if not named:
        path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "modelforge" / "policy.toml"
        # Not `exists`: a link that leads nowhere, or a folder that may not be entered, is a policy that cannot be read.
        return path if _is_there(path) else None
    path = Path(named)
    path = path / "policy.toml" if path.is_dir() else path
    if not _is_there(path):
        raise IntegrityError(
            f"{POLICY_VARIABLE} names a policy that is not there",
            where=str(path),
            fix=f"write one, or unset {POLICY_VARIABLE}",
        )
    return path


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _read(path: Path) -> _Policy:
    try:
        with path.open("rb") as stream:
            data = stream.read(_LIMIT + 1)
        if len(data) > _LIMIT:
            raise _refusal(path, f"has more than {_LIMIT} bytes")
        value: dict[str, Any] = tomllib.loads(data.decode())
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _refusal(path, f"is not TOML: {error}") from None
    try:
        return _Policy.model_validate(value)
    except ValidationError as error:
        what, where, fix = explain(error, _Policy, path, value)
        raise IntegrityError(f"the policy says something that is not known: {what}", where=where, fix=fix) from None


def _refusal(path: Path, what: str) -> IntegrityError:
    return IntegrityError(
        f"the signature policy {what}; nothing is trusted until it can be read", where=str(path), fix="mend the file"
    )


def _normal(repository: str) -> str:
    """One spelling: lower case, no default port, no dot after the host."""
    return re.sub(r"^([^/:]*?)\.?(?::(?:80|443))?(?=/|\Z)", r"\1", repository.casefold())
