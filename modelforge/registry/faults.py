"""What registries answer, in words: their error documents, and which answers may be different next time."""

from __future__ import annotations

import json
from collections.abc import Mapping

from modelforge.errors import RegistryError

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses worth another attempt."""

_FIXES = {
    401: "modelforge login HOST",
    403: "ask for the right to this repository, or `modelforge login HOST` as somebody who has it",
    413: "raise the body limit of the proxy in front of the registry (nginx: client_max_body_size 0)",
    429: "wait: the registry limits how often it is asked",
}
_WORDS = {
    401: "wants other credentials",
    403: "forbids it",
    404: "has no such thing",
    413: "takes no upload of this size",
    429: "was asked too often",
}


def refusal(status: int, body: bytes, where: str) -> RegistryError:
    """An error from an answer of 4xx or 5xx."""
    said = said_by(body)
    words = _WORDS.get(status, "refuses" if status < 500 else "fails")
    text = f"the registry {words} (HTTP {status}{': ' + said if said else ''})"
    host = where.partition("/")[0]
    return RegistryError(text, where=where, fix=_FIXES.get(status, "").replace("HOST", host) or None, status=status)


def said_by(body: bytes) -> str:
    """The codes and messages of a registry's error document (distribution-spec, "Error Codes"), made printable."""
    try:
        errors = json.loads(body)["errors"]
        parts = [f"{error.get('code', '')} {error.get('message', '')}".strip() for error in errors[:3]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return printable("; ".join(parts))


def codes(body: bytes) -> set[str]:
    try:
        return {str(error["code"]) for error in json.loads(body)["errors"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


def printable(text: str, limit: int = 200) -> str:
    """Text of a stranger for a terminal: no control characters, not long."""
    return "".join(character if character.isprintable() else "?" for character in text[:limit])


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the registry asks us to wait; None where it says nothing (dates are not read)."""
    value = headers.get("Retry-After", "").strip()
    return float(value) if value.isdecimal() and len(value) < 7 else None
