"""Where a rule picks numbers (a tile, a chunk, an algorithm), a measured pick may stand in for its cost model.

A rule asks :func:`chosen` with what it would take itself; a tuning database only ever selects among the candidates that
the rule names, so that no database, however it came here, can make a rule do what it would not do. Imports no TVM.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Site:
    """An operator that became a kernel.

    Attributes:
        call: the operator, as :func:`made` was given it.
        geometry: its name, sizes, types and attributes: two sites of one geometry get the same kernel.
        asked: by key, the labels of all candidates, the rule's own pick first.
    """

    call: Any
    geometry: str
    asked: Mapping[str, tuple[str, ...]]


@dataclass
class Session:
    """What was asked while kernels were made.

    Attributes:
        taken: label by key, what a database says; for other keys the rule's own pick stands.
        listing: whether to keep ``sites``: it costs time, and only a search needs them.
        applied: keys whose pick came from ``taken``.
        refused: keys of ``taken`` whose label names none of the candidates: of another version of the rule.
    """

    taken: Mapping[str, str] = field(default_factory=dict)
    listing: bool = False
    applied: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    sites: list[Site] = field(default_factory=list)
    _geometry: str = ""
    _rule: str = ""
    _asked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _count: dict[str, int] = field(default_factory=dict)


_SESSION: ContextVar[Session | None] = ContextVar("session", default=None)


@contextmanager
def session(taken: Mapping[str, str] | None = None, *, listing: bool = False) -> Iterator[Session]:
    """Make kernels with these picks, and see what the rules ask."""
    own = Session(dict(taken or {}), listing)
    token = _SESSION.set(own)
    try:
        yield own
    finally:
        _SESSION.reset(token)


def about(geometry: Callable[[], str]) -> None:
    """Say which operator the next questions are about. Nothing happens outside a session, here and below."""
    if (own := _SESSION.get()) is not None:
        own._geometry = geometry()
        own._asked = {}


def asks(rule: str) -> None:
    """Say which rule asks the next questions."""
    if (own := _SESSION.get()) is not None:
        own._rule = rule
        own._count = {}


def chosen(question: str, usual: Candidate, others: Callable[[], Iterable[Candidate]]) -> Candidate:
    """What to take for one question of a rule.

    Args:
        question: what is asked; where a rule asks the same twice about one operator, their order tells them apart.
        usual: the rule's own pick.
        others: the other candidates, best first by the rule's cost model; called only where they matter.
    """
    own = _SESSION.get()
    if own is None or not own._geometry:
        return usual
    count = own._count[question] = own._count.get(question, 0) + 1
    key = f"{own._rule} {question}{'' if count == 1 else f' {count}'}: {own._geometry}"
    wanted = own.taken.get(key)
    mine = label(usual)
    if own.listing:
        own._asked[key] = tuple(dict.fromkeys([mine, *map(label, others())]))
    if wanted is None:
        return usual
    for candidate in (usual, *others()):
        if label(candidate) == wanted:
            own.applied.add(key)
            return candidate
    own.refused.add(key)
    return usual


def made(call: Callable[[], Any]) -> None:
    """Say that the operator became a kernel; ``call`` gives what to keep of it."""
    own = _SESSION.get()
    if own is None:
        return
    if own.listing and own._asked:
        own.sites.append(Site(call(), own._geometry, dict(own._asked)))
    own._geometry = ""


def label(candidate: Any) -> str:
    """The one spelling of a candidate, as JSON without spaces: ``[14,2,16]``."""
    return json.dumps(_plain(candidate), separators=(",", ":"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, each.name)) for each in dataclasses.fields(value)]
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value
