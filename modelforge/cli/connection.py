"""What the commands that talk to registries have in common: their options, and how a transfer is shown."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modelforge.cli.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

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
        self._console = console
        self._lock = threading.Lock()
        self._live: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if not self._console.quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
            self._live = RichProgress(*columns, console=self._console.rich(stderr=True), transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, name: str, size: int) -> Callable[[int], None]:
        live = self._live
        if live is None or size < _SHOWN:
            return lambda _: None
        with self._lock:
            task = self._tasks[name] = live.add_task(name, total=size)
        return lambda count: live.advance(task, count)

    def end(self, name: str) -> None:
        with self._lock:
            task = self._tasks.pop(name, None)
            if self._live is not None and task is not None:
                self._live.remove_task(task)
