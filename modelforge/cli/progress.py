"""Live progress of a build: bars on a terminal, one plain line a step elsewhere. Nothing with --quiet."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

from modelforge.cli.console import Console, has_rich

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from modelforge.forge.step import Step
    from modelforge.store import StepRecord


class Progress:
    """A reporter (see :mod:`modelforge.forge.run`) that prints on stderr. Cache hits are counted, not listed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._live: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        self.cached = 0
        self.ran = 0

    def __enter__(self) -> Self:
        if not self._console.quiet and sys.stderr.isatty() and has_rich():
            from rich.progress import Progress as RichProgress
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._live = RichProgress(*columns, console=self._console.rich(stderr=True), transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        if self.ran or self.cached:
            self._console.note(f"{self.ran} steps run, {self.cached} from the cache")

    def started(self, step: Step) -> None:
        with self._lock:
            if self._live is not None:
                self._tasks[step.key] = self._live.add_task(step.title, total=None)
            else:
                self._console.note(f"start  {step.title}")

    def finished(self, step: Step, record: StepRecord, cached: bool) -> None:
        with self._lock:
            self.cached += cached
            self.ran += not cached
            if not cached:
                self._end(step, f"done   {step.title}  {record.seconds:.1f} s")

    def failed(self, step: Step, error: BaseException) -> None:
        with self._lock:
            self._end(step, f"failed {step.title}")

    def _end(self, step: Step, line: str) -> None:
        task = self._tasks.pop(step.key, None)
        if self._live is not None and task is not None:
            self._live.remove_task(task)
            self._live.console.print(line)
        else:
            self._console.note(line)
