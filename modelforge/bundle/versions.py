"""Versions of vendor software, which no single standard spells: compared with what a variant needs.

Knows no device and no record.
"""

from __future__ import annotations

import operator
import re

_OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CLAUSE = re.compile(r"\s*(==|!=|>=|<=|>|<)\s*([0-9A-Za-z][0-9A-Za-z._+-]{0,63}?)(\.\*)?\s*\Z")
_PARTS = re.compile(r"[0-9]+|[A-Za-z]+")
# What comes before a release, in order; anything else after a number is a build label and says nothing of age.
_BEFORE = {"dev": -5, "a": -4, "alpha": -4, "b": -3, "beta": -3, "rc": -2}
_LIMIT = 10**9
"""Above this a number is no part of a version: what comes from a file of somebody else stays small."""


def satisfies(found: str, wanted: str) -> bool | None:
    """Whether a version is one that is wanted; None where that cannot be told.

    Args:
        found: as the vendor spells it: ``10.3.0.30``, ``8.0.RC1``, ``535.104.05``, ``2.3.2 (429f97ae6b)``.
        wanted: clauses joined by commas: ``==1.7.1.116``, ``==1.7.*``, ``>=8.0.RC1,<9``.

    It cannot be told where ``found`` is less exact than what is wanted: 10.3.0 may or may not be 10.3.0.30.

    Raises:
        ValueError: ``wanted`` is not of that form.

    Example:
        >>> satisfies("8.0.RC3", ">=8.0.RC1,<8.1"), satisfies("10.3.0", "==10.3.0.30")
        (True, None)
    """
    clauses = [_CLAUSE.match(clause) for clause in wanted.split(",")]
    if not all(clauses):
        raise ValueError(f"{wanted!r} is no version condition: ==1.7.1, ==1.7.*, >=8.0,<9")
    here = parse(found)
    if not here:
        return None
    answers = [_clause(here, match[1], parse(match[2]), bool(match[3])) for match in clauses if match]
    if False in answers:
        return False
    return None if None in answers else True


def parse(text: str) -> tuple[int, ...]:
    """A version as numbers that sort by age; empty where ``text`` begins with none.

    Release candidates sort before their release (Huawei's ``8.0.RC1`` before ``8.0.0``); Debian's revision
    (``10.3.0.30-1+cuda12.5``), a local label and whatever follows a blank are left out.
    """
    head = re.split(r"[\s(+~]|-(?=[0-9])", text.strip().removeprefix("v"), maxsplit=1)[0]
    numbers: list[int] = []
    for part in _PARTS.findall(head[:64]):
        if part.isdigit():
            numbers.append(min(int(part), _LIMIT))
        elif part.lower() in _BEFORE and numbers:
            numbers.append(_BEFORE[part.lower()])
        else:
            break
    return tuple(numbers)


def _clause(here: tuple[int, ...], sign: str, wanted: tuple[int, ...], is_prefix: bool) -> bool | None:
    if is_prefix:
        if len(here) < len(wanted):
            return None if here == wanted[: len(here)] else sign == "!="
        return bool(_OPERATORS[sign](here[: len(wanted)], wanted))
    if len(here) < len(wanted) and here == wanted[: len(here)] and any(wanted[len(here) :]):
        return None
    length = max(len(here), len(wanted))
    left, right = (value + (0,) * (length - len(value)) for value in (here, wanted))
    return bool(_OPERATORS[sign](left, right))
