"""What a bundle is called in a registry: ``HOST[:PORT]/REPO[:TAG|:RANGE][@DIGEST]``, or ``oci:DIR[:TAG]``.

The host is always spelled out: there is no default registry that a typing error could lead to.
Grammar: OCI distribution-spec 1.1 (spec.md, "Pulling manifests"). Knows no network.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from modelforge.bundle import format as words
from modelforge.errors import InputError

REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_HOST = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?\Z"
)
_NUMBERS = r"[0-9]{1,18}(?:\.[0-9]{1,18}){0,3}"
_RELEASE = re.compile(rf"v?(?P<numbers>{_NUMBERS})\Z")
_WILDCARD = re.compile(r"(?:v?[0-9]{1,18}(?:\.[0-9]{1,18}){0,2}\.[xX*](?:\.[xX*]){0,2}|\*)\Z")
_BOUND = re.compile(rf"(?P<sign>>=|<=|>|<|==?)\s*(?P<version>v?{_NUMBERS})\Z")
_PREFIX = "prefix"  # the sign of 1.2.x: all numbers given are equal
_EXAMPLE = "for example registry.example.com/team/model:1.2.0, or oci:DIR"


@dataclass(frozen=True)
class Reference:
    """A bundle in a registry.

    Attributes:
        host: with its port, as given.
        tag: a tag as given; a range or ``latest`` stands in ``wanted`` instead.
        digest: ``sha256:<hex>``; where it is given it decides, and the tag only says what it should be.
        wanted: which of the version tags.
    """

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None
    wanted: Range | None = None

    def __str__(self) -> str:
        tag = self.tag or (self.wanted and self.wanted.text)
        return self.name + (f":{tag}" if tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def name(self) -> str:
        """``HOST/REPO``, what policies and credentials go by."""
        return f"{self.host}/{self.repository}"

    def at(self, tag: str | None = None, digest: str | None = None) -> Reference:
        return replace(self, tag=tag, digest=digest, wanted=None)


@dataclass(frozen=True)
class LayoutReference:
    """A bundle in a folder, an OCI image layout."""

    path: Path
    tag: str | None = None

    def __str__(self) -> str:
        return f"oci:{self.path}" + (f":{self.tag}" if self.tag else "")


@dataclass(frozen=True)
class Range:
    """Which versions: ``latest``, ``1.x``, ``>=1.2,<2``. Pre-releases (``1.2.0-rc1``) are in no range."""

    text: str
    bounds: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def holds(self, version: str) -> bool:
        numbers = release(version)
        return numbers is not None and all(_within(numbers, sign, bound) for sign, bound in self.bounds)

    def newest(self, tags: Iterable[str]) -> str | None:
        """The highest of the tags that are versions in this range; of equal ones (``1.2``, ``1.2.0``) the longest."""
        fitting = [tag for tag in tags if self.holds(tag)]
        return max(fitting, key=lambda tag: (_padded(release(tag) or ()), len(tag), tag), default=None)


def parse(text: str) -> Reference | LayoutReference:
    """Read a reference.

    Raises:
        InputError: it is none; says which part is wrong.
    """
    if text.startswith("oci:"):
        return _layout(text.removeprefix("oci:"))
    rest, at, digest = text.partition("@")
    if at and not words.is_digest(digest):
        raise _wrong(text, f'"{digest}" is no digest: sha256: and 64 hexadecimal digits')
    host, slash, rest = rest.partition("/")
    if "://" in text:
        raise _wrong(text, "a reference is no URL", fix="leave the scheme out; --plain-http asks for http")
    if not slash or not _is_host(host):
        raise _wrong(text, "it does not begin with a registry's host")
    repository, colon, last = rest.partition(":")
    if not REPOSITORY.match(repository):
        raise _wrong(text, f'"{repository}" cannot be a repository: lower-case letters, digits, single . _ - between')
    if len(host) + len(repository) + 1 > 255:
        raise _wrong(text, "host and repository are longer than 255 characters")
    reference = Reference(host, repository, digest=digest or None)
    if not colon:
        return reference
    if wanted := _range(last):
        if digest:
            raise _wrong(text, "a digest and a range of versions cannot both be asked for")
        return replace(reference, wanted=wanted)
    if not TAG.match(last):
        raise _wrong(text, f'"{last}" is neither a tag nor a range of versions (1.x, ">=1.2,<2", latest)')
    return replace(reference, tag=last)


def registry(text: str) -> Reference:
    """Read a reference that must be in a registry, not in a folder."""
    reference = parse(text)
    if isinstance(reference, LayoutReference):
        raise InputError("is a folder, and a registry is wanted here", where=text, fix=_EXAMPLE)
    return reference


def host(text: str) -> str:
    """Read a registry's ``HOST[:PORT]``."""
    if not _is_host(text):
        raise InputError(f'"{text}" is no registry', fix="give HOST or HOST:PORT, without a scheme")
    return text


def is_loopback(host: str) -> bool:
    """Whether this is this very machine: there http needs no permission."""
    name = (_HOST.match(host) or {"name": ""})["name"].strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def release(version: str) -> tuple[int, ...] | None:
    """The numbers of a release's version; None for a pre-release, and for what is no version."""
    match = _RELEASE.match(version)
    return tuple(int(number) for number in match["numbers"].split(".")) if match else None


def _is_host(text: str) -> bool:
    match = _HOST.match(text)
    if match is None or (match["port"] and not 0 < int(match["port"]) < 65536):
        return False
    return "." in text or ":" in text or text == "localhost"


def _layout(text: str) -> LayoutReference:
    path, colon, tag = text.rpartition(":")
    if not colon or "/" in tag:
        path, tag = text, ""
    if not path or (tag and not TAG.match(tag)):
        raise _wrong(f"oci:{text}", "it names no folder, or no tag")
    return LayoutReference(Path(path), tag or None)


def _range(text: str) -> Range | None:
    if text == "latest":
        return Range(text)
    if _WILDCARD.match(text):
        numbers = tuple(int(part) for part in text.removeprefix("v").split(".") if part.isdecimal())
        return Range(text, ((_PREFIX, numbers),) if numbers else ())
    bounds = []
    for part in text.split(","):
        match = _BOUND.match(part.strip())
        if match is None:
            return None
        bounds.append((match["sign"], release(match["version"]) or ()))
    return Range(text, tuple(bounds))


def _within(version: tuple[int, ...], sign: str, bound: tuple[int, ...]) -> bool:
    have, want = _padded(version), _padded(bound)
    if sign == _PREFIX:
        return have[: len(bound)] == bound
    answers = {">=": have >= want, "<=": have <= want, ">": have > want, "<": have < want}
    return answers.get(sign, have == want)


def _padded(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return (*numbers, *(0,) * (4 - len(numbers)))


def _wrong(text: str, what: str, fix: str = _EXAMPLE) -> InputError:
    return InputError(f"is no reference to a bundle: {what}", where=text, fix=fix)
