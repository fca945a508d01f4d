"""References: what is one, what is none, and which version a range means."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.errors import InputError
from modelforge.registry.reference import LayoutReference, Range, Reference, is_loopback, parse, registry

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("ghcr.io/acme/model:1.2.0", "ghcr.io", "acme/model", "1.2.0", None),
        ("ghcr.io/acme/model", "ghcr.io", "acme/model", None, None),
        ("localhost:5000/x", "localhost:5000", "x", None, None),
        ("localhost/x:5000", "localhost", "x", "5000", None),
        ("host:5000/x:1_a.b-C", "host:5000", "x", "1_a.b-C", None),
        ("[::1]:5000/a/b/c:t", "[::1]:5000", "a/b/c", "t", None),
        (f"10.0.0.1/a@{DIGEST}", "10.0.0.1", "a", None, DIGEST),
        (f"10.0.0.1/a:1@{DIGEST}", "10.0.0.1", "a", "1", DIGEST),
    ],
)
def test_references(text: str, host: str, repository: str, tag: str | None, digest: str | None) -> None:
    found = parse(text)
    assert found == Reference(host, repository, tag, digest)
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "model", "model:1.2.0", "acme/model:1", "https://ghcr.io/a/b", "ghcr.io/", "ghcr.io/A/b", "ghcr.io/a//b",
        "ghcr.io/a/../b", "ghcr.io/a:", "ghcr.io/a:b c", "ghcr.io/a:-x", "ghcr.io/a@sha256:abc", "ghcr.io/a@md5:00",
        "ghcr.io:0/a", "ghcr.io:99999/a", "ghcr.io:x/a", "user@ghcr.io/a", "ghcr.io/a:>=x", "ghcr.io/a:" + "x" * 129,
        "ghcr.io/" + "a" * 300, "oci:", "oci:dir:-", f"ghcr.io/a:1.x@{DIGEST}", "ghcr.io/a\n", "-x.y/a", "ghcr.io/a?b",
    ],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert caught.value.fix


def test_layouts() -> None:
    assert parse("oci:dist/digits-1.0.0") == LayoutReference(Path("dist/digits-1.0.0"))
    assert parse("oci:dist/digits:1.0.0") == LayoutReference(Path("dist/digits"), "1.0.0")
    assert parse("oci:a:b/c") == LayoutReference(Path("a:b/c"))
    with pytest.raises(InputError, match="a folder"):
        registry("oci:dist")


TAGS = ["1.2.0", "1.10.0", "1.9", "2.0.0", "2.1.0-rc1", "1.10.0-t4", "stable", "v3", "10.0.0"]


@pytest.mark.parametrize(
    ("text", "newest"),
    [
        ("latest", "10.0.0"), ("1.x", "1.10.0"), ("1.*", "1.10.0"), ("1.2.x", "1.2.0"), ("*", "10.0.0"),
        (">=1.2,<2", "1.10.0"), (">1.10", "10.0.0"), ("<=1.9.0", "1.9"), ("=1.9", "1.9"), (">=1, <1.10", "1.9"),
        ("4.x", None), (">=11", None), ("3.x", "v3"),
    ],
)  # fmt: skip
def test_ranges(text: str, newest: str | None) -> None:
    found = parse(f"ghcr.io/a/b:{text}")
    assert isinstance(found, Reference)
    assert found.tag is None
    assert found.wanted is not None
    assert found.wanted.newest(TAGS) == newest


@given(st.lists(st.tuples(*[st.integers(0, 30)] * 3), min_size=1), st.tuples(*[st.integers(0, 30)] * 3))
def test_the_newest_is_the_highest_that_fits(versions: list[tuple[int, int, int]], bound: tuple[int, int, int]) -> None:
    tags = [".".join(map(str, version)) for version in versions]
    text = ".".join(map(str, bound))
    found = parse(f"ghcr.io/a/b:>={text}")
    assert isinstance(found, Reference)
    assert isinstance(found.wanted, Range)
    fitting = [version for version in versions if version >= bound]
    expected = ".".join(map(str, max(fitting))) if fitting else None
    assert found.wanted.newest(tags) == expected


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except InputError:
        return
    assert parse(str(found)) == found


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True), ("127.9.9.9", True),
        ("[::1]:5000", True),
        ("localhost.example.com", False), ("10.0.0.1", False), ("127.0.0.1.example.com", False), ("[::2]", False),
    ],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
