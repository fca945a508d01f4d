"""One remark about an atc command line: what is wrong or worth knowing, and how to mend it. Knows no rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "fixed"]


@dataclass(frozen=True)
class Finding:
    """Attributes:
    level: ``error`` stays wrong, ``fixed`` is put right in the corrected line, ``warning`` is only told.
    code: the code that atc itself prints for it (``E10001`` ...), else a word of ours (``non-option`` ...).
    option: the option's name without dashes, or None for the line as a whole.
    what: what is wrong, one sentence.
    fix: what to do, or what was done in the corrected line.
    refuses: whether atc refuses the line as written because of this.
    """

    level: Level
    code: str
    option: str | None
    what: str
    fix: str
    refuses: bool


def error(code: str, option: str | None, what: str, fix: str) -> Finding:
    """What atc refuses, and what only the user can mend."""
    return Finding("error", code, option, what, fix, refuses=True)


def fixed(code: str, option: str | None, what: str, fix: str, *, refuses: bool = True) -> Finding:
    """What the corrected line has right."""
    return Finding("fixed", code, option, what, fix, refuses=refuses)


def warning(code: str, option: str | None, what: str, fix: str) -> Finding:
    """What atc takes, but the user should know."""
    return Finding("warning", code, option, what, fix, refuses=False)
