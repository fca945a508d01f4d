"""Words of a command line -> options and values, as atc's own parser reads them (getopt_long).

Source: hicann/ge api/atc/cmd_flag_info.cc (ParseCommandLine): `-name` with two or more letters becomes `--name`, `-`
becomes `_` in names, a prefix that only one option has stands for it, what is left over is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelforge.compilers.ascend.option_table import OptionSpec, option_table, resolve
from modelforge.errors import nearest


@dataclass(frozen=True)
class Given:
    """One option as it was given.

    Attributes:
        name: its full name.
        value: what atc reads as its value.
        spelled: the word as written, up to ``=``.
        separate: the value was the next word.
    """

    name: str
    value: str
    spelled: str
    separate: bool = False

    @property
    def abbreviated(self) -> bool:
        return canonical_name(self.spelled) != self.name


@dataclass(frozen=True)
class Fault:
    """A word that atc's parser stops at: ``unknown-flag``, ``missing-argument`` or ``non-option``."""

    code: str
    word: str
    what: str
    guess: str | None = None


@dataclass(frozen=True)
class Arguments:
    given: tuple[Given, ...]
    faults: tuple[Fault, ...]

    @property
    def last(self) -> dict[str, str]:
        """The value that counts for each option: the last one."""
        return {each.name: each.value for each in self.given}


def read_arguments(words: Sequence[str], known: Mapping[str, OptionSpec] | None = None) -> Arguments:
    """Read words (without the program) as atc does. Unlike atc, goes on after a fault, to tell all of them.

    Never raises; what atc would stop at is in ``faults``.
    """
    table = option_table() if known is None else known
    rewritten = [_rewrite(word) for word in words]
    given: list[Given] = []
    faults: list[Fault] = []
    at = 0
    while at < len(rewritten):
        word, original = rewritten[at], words[at]
        at += 1
        if word == "--":
            faults.extend(_left_over(rest) for rest in words[at:])
            break
        if not word.startswith("-") or word == "-":
            faults.append(_left_over(original))
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("--") and word != "-h":
            faults.append(_unknown(original, name, table))
            continue
        found, _ = resolve(name, table)
        if found is None:
            faults.append(_unknown(original, name, table))
            # What follows was meant as its value: one mistake, one fault.
            if not equals and at < len(words) and not words[at].startswith("-"):
                at += 1
            continue
        spelled = original.partition("=")[0]
        if equals:
            given.append(Given(found, value, spelled))
        elif not table[found].takes_next_word:
            given.append(Given(found, "", spelled))
        elif at < len(rewritten):
            given.append(Given(found, rewritten[at], spelled, separate=True))
            at += 1
        else:
            faults.append(Fault("missing-argument", original, f"--{found} has no value"))
    return Arguments(tuple(given), tuple(faults))


def canonical_name(spelled: str) -> str:
    """``--soc-version``, ``-soc_version`` -> ``soc_version``."""
    return spelled.lstrip("-").replace("-", "_")


def _rewrite(word: str) -> str:
    # atc rewrites every word before it parses, values that stand alone too.
    if re.match(r"-[A-Za-z]{2}", word):
        word = "-" + word
    if not re.match(r"--[A-Za-z]{2}", word):
        return word
    name, equals, value = word.partition("=")
    return name[:4] + name[4:].replace("-", "_") + equals + value


def _left_over(word: str) -> Fault:
    return Fault("non-option", word, f'"{word}" belongs to no option (atc: Non-option parameter)')


def _unknown(word: str, name: str, table: Mapping[str, OptionSpec]) -> Fault:
    _, candidates = resolve(name, table)
    if len(candidates) > 1 and name:
        listed = ", ".join("--" + each for each in candidates)
        return Fault("unknown-flag", word, f"--{name} is the beginning of several options: {listed}")
    hint = nearest(name, table)
    guess = re.search(r'"(.+)"', hint)
    what = f"atc has no option --{name}" + (f"; {hint}" if guess else "")
    return Fault("unknown-flag", word, what, guess[1] if guess else None)
