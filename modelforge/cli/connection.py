"""What the commands that talk to registries have in common: their options, and how a transfer is shown."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from modelforge.cli.console import Console

if TYPE_CHECKING:
    from tqdm import tqdm

    from modelforge.registry.session import Connection

_SHOWN = 8 << 20
"""Bytes: what is smaller comes and goes before anybody could read its bar."""


def add_connection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("connection")
    group.add_argument("--plain-http", action="store_true", help="speak http to a registry on another machine")
    group.add_argument("--ca-file", type=Path, metavar="PEM", help="trust this CA instead of the system's")


def connection(args: argparse.Namespace) -> Connection:
    from modelforge.registry.session import Connection

    return Connection(plain_http=args.plain_http, ca_file=args.ca_file)


class Transfers:
    """Bars of a transfer on a terminal; nothing elsewhere (see ``registry.pull.Reporter``)."""

    def __init__(self, console: Console) -> None:
        self._live = not console.quiet and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._bars: dict[str, tqdm[Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for name in list(self._bars):
            self.end(name)

    def begin(self, name: str, size: int) -> Callable[[int], None]:
        if not self._live or size < _SHOWN:
            return lambda _: None
        from tqdm import tqdm

        with self._lock:
            bar = self._bars[name] = tqdm(total=size, desc=name, unit="B", unit_scale=True, leave=False, miniters=1)

        def advance(count: int) -> None:
            bar.update(count)

        return advance

    def end(self, name: str) -> None:
        with self._lock:
            bar = self._bars.pop(name, None)
        if bar is not None:
            bar.close()
