"""The options of atc as data (options.toml): what each takes, excludes and needs, and which CANN has it.

Knows no command line. Keys of a row:
    kind          file, path, text, integer, choice, flag (takes only ``=value``), shapes, shape-ranges, gears, names,
                  booleans, soc
    values        what it may be; values_since: the first CANN that takes a value which came later
    needs, excludes   other options that must, or must not, stand beside it; needs_code, excludes_code: what atc then
                  prints (a need without a code is only documented)
    since         first CANN seen with it; with since_exact the release before it was seen without it
    until         first CANN that refuses it
    deprecated, replaced_by, not_on (families of chips, in the words of limits.Chip.image), in_help
    code          what atc prints when the value is not one of ``values``
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class OptionSpec:
    """One option; see the module for its keys."""

    name: str
    kind: str
    about: str
    since: str
    sources: tuple[str, ...]
    values: tuple[str, ...] = ()
    values_since: Mapping[str, str] = field(default_factory=dict)
    integer: bool = False
    default: str = ""
    needs: tuple[str, ...] = ()
    needs_code: str | None = None
    excludes: tuple[str, ...] = ()
    excludes_code: str | None = None
    since_exact: bool = False
    until: str | None = None
    deprecated: bool = False
    replaced_by: str | None = None
    not_on: tuple[str, ...] = ()
    in_help: bool = True
    code: str = "E10001"

    @property
    def takes_next_word(self) -> bool:
        """Whether ``--name value`` is read as one option; flags take only ``--name=value``."""
        return self.kind != "flag"


@cache
def option_table() -> Mapping[str, OptionSpec]:
    """All options by name."""
    text = (Path(__file__).parent / "options.toml").read_text(encoding="utf-8")
    return MappingProxyType({name: _spec(name, row) for name, row in tomllib.loads(text).items()})


def resolve(name: str, known: Iterable[str]) -> tuple[str | None, tuple[str, ...]]:
    """The option that getopt_long takes ``name`` for, and all that begin with it.

    An exact name wins; else a prefix that only one name has. ``h`` is help's second name.
    """
    names = set(known)
    if name in names:
        return name, (name,)
    if name == "h" and "help" in names:
        return "help", ("help",)
    candidates = tuple(sorted(each for each in names if each.startswith(name)))
    return (candidates[0] if len(candidates) == 1 else None), candidates


def options_in_help(help_text: str) -> frozenset[str]:
    """The names that an installed atc lists: lines of the form ``  --name   text`` of ``atc --help``."""
    found = set(re.findall(r"^\s*--([a-z][a-z0-9_]*)(?:[/\s]|$)", help_text, flags=re.MULTILINE))
    if "h" in found:
        found = found - {"h"} | {"help"}
    return frozenset(found)


def installed_options(help_text: str | None) -> Mapping[str, OptionSpec]:
    """The table, cut down to what the installed atc has: what its help lists and what no help ever lists.

    An option that the help lists and the table does not know is taken as free text: a newer CANN is no error.
    """
    table = option_table()
    if help_text is None:
        return table
    listed = options_in_help(help_text)
    if not listed:
        return table
    known = {name: spec for name, spec in table.items() if name in listed or not spec.in_help}
    for name in listed - table.keys():
        known[name] = OptionSpec(name, "text", "listed by the installed atc only", "0", ("atc --help",))
    return known


def _spec(name: str, row: Mapping[str, Any]) -> OptionSpec:
    lists = {key: tuple(row[key]) for key in ("values", "needs", "excludes", "not_on", "sources") if key in row}
    return OptionSpec(name=name, **{**row, **lists})
