# ruff: noqa: T201 - printing is what this module is for
"""All printing goes through here: the result on stdout, everything else on stderr. `rich` is imported when needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

SCHEMA = 1


class Console:
    """What a command prints with.

    Attributes:
        json: one JSON document on stdout is the whole result; tables and text are left out.
        quiet: no chatter; results and errors only.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def result(self, document: Mapping[str, Any], text: str | None = None) -> None:
        """Print a command's result: ``document`` with ``--json``, else ``text``."""
        if self.json:
            # A document that JSON cannot hold (NaN, infinity) is a bug here, not a puzzle for the reader.
            print(json.dumps({"schema": SCHEMA, **document}, indent=2, allow_nan=False, ensure_ascii=False))
        elif text is not None:
            print(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
        """Print a table on stdout; nothing with ``--json``."""
        if self.json:
            return
        if not has_rich():
            print(*_plain_table(columns, rows, title), sep="\n")
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title, title_justify="left", show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0)
        )
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        self.rich(stderr=False).print(table)

    def text(self, text: str) -> None:
        """Print result text on stdout; nothing with ``--json``."""
        if not self.json:
            print(text)

    def note(self, text: str) -> None:
        """Chatter, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def error(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr)

    def rich(self, *, stderr: bool) -> RichConsole:
        from rich.console import Console as RichConsole

        stream = sys.stderr if stderr else sys.stdout
        # Where nobody looks, no wrapping: a log is searched line by line.
        return RichConsole(stderr=stderr, highlight=False, width=None if stream.isatty() else 200, markup=False)


@cache
def has_rich() -> bool:
    """Whether `rich` is here: it comes with the build extra, and a deployer's install does without its 14 MB."""
    return find_spec("rich") is not None


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None) -> list[str]:
    """The table as lines: no colours, and no folding of long cells."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [title, *lines] if title else lines


def _style(cell: str) -> str:
    return {
        "compiled": "green", "passed": "green", "ready": "green", "failed": "red", "missing": "yellow",
        "skipped": "yellow", "deferred": "yellow", "not built yet": "dim",
    }.get(cell, "")  # fmt: skip


def size_text(size: int | float) -> str:
    """``8475188`` as ``8.1 MiB``."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return ""


def figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
