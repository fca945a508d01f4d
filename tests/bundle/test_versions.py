"""Versions as vendors spell them, against conditions; plain ones agree with Python's own rules."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from modelforge.bundle.versions import parse, satisfies


@pytest.mark.parametrize(
    ("found", "wanted", "answer"),
    [
        ("1.7.1.116", "==1.7.1.116", True),
        ("1.7.1.117", "==1.7.1.116", False),
        ("1.7.1", "==1.7.1.116", None),  # the library's name has no build number
        ("1.6.0", "==1.7.1.116", False),
        ("10.3.0.30-1+cuda12.5", "==10.3.0.30", True),  # Debian
        ("10.3.0.30-1+cuda12.5", "==10.3.*", True),
        ("10", "==10.3.*", None),
        ("8.0.RC3", ">=8.0.RC1,<8.1", True),
        ("8.0.RC1", ">=8.0.0", False),
        ("8.0.0", ">=8.0.RC3", True),
        ("8.5.0", ">=8.0.RC1", True),
        ("8.3.RC1.alpha002", ">=8.2.RC1", True),
        ("9.2.0-beta.1", ">=9.2.0", False),
        ("2.3.2", ">=2.5.0", False),
        ("2.0.0b0 (35a6907d79@2024-03-24T10:31:14)", ">=1.6", True),
        ("535.104.05", ">=525", True),
        ("6.2+b77", ">=6.1", True),
        ("6", ">=6.1", None),  # JetPack's major number alone
        ("6", ">=6.0", True),
        ("6", ">=5.1", True),
        ("v0.9.8", ">=0.9.8", True),
        ("2.36", ">=2.28", True),
        ("something", ">=1", None),
        ("1.7.1", "!=1.7.*", False),
    ],
)
def test_satisfies(found: str, wanted: str, answer: bool | None) -> None:
    assert satisfies(found, wanted) is answer


@pytest.mark.parametrize("wanted", ["", "1.7", "=1.7", ">=", ">=1.7;<2", "==1.7.*.2", ">=1 <2", "==" + "9" * 200])
def test_no_condition(wanted: str) -> None:
    with pytest.raises(ValueError, match="no version condition"):
        satisfies("1.7", wanted)


NUMBERS = st.lists(st.integers(0, 12), min_size=3, max_size=3).map(lambda parts: ".".join(map(str, parts)))


@given(NUMBERS, NUMBERS, st.sampled_from(["==", "!=", ">=", "<=", ">", "<"]))
def test_plain_versions_are_pythons(found: str, wanted: str, sign: str) -> None:
    assert satisfies(found, sign + wanted) == SpecifierSet(sign + wanted).contains(Version(found))


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_text_is_answered(found: str, wanted: str) -> None:
    with contextlib.suppress(ValueError):  # the one way out that is documented
        assert satisfies(found, wanted) in (True, False, None)


@given(st.text(max_size=200))
def test_numbers_stay_small(text: str) -> None:
    assert all(abs(number) <= 10**9 for number in parse(text))
