"""What a tuning has tried, on disk: a candidate that ends the process costs itself, what was measured before it stands.

A line of JSON before each candidate and one after it. The child process writes them; the one that takes its place reads
them, and so does the parent (:mod:`.tuner`). Imports no TVM.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

BEGUN: Final = "begun"
CRASHED: Final = "crashed"


@dataclass(frozen=True)
class Trial:
    """One candidate of one kernel.

    Attributes:
        geometry: the kernel (:func:`.alone.geometry`).
        key, label: the question of its rule, and the answer that is tried (:mod:`.choices`).
        outcome: ``begun``, then ``measured``, ``refused``, ``wrong``, ``same`` (as one before) or ``crashed``.
        said: why it was refused or how it crashed.
        identity: of its code; ``""`` where it never came so far.
        taken: all answers of the kernel, where it became the best.
    """

    geometry: str
    key: str
    label: str
    outcome: str = BEGUN
    said: str = ""
    identity: str = ""
    taken: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """One file; ``trials`` are those that came to an end."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, trial: Trial) -> None:
        """Keep what is about to be tried, or what became of it: on disk before the next instruction may crash."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(trial)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    @property
    def trials(self) -> list[Trial]:
        return [trial for trial in self._read() if trial.outcome != BEGUN]

    def unfinished(self) -> Trial | None:
        """The candidate at which the process ended, if it was one."""
        found = self._read()
        return found[-1] if found and found[-1].outcome == BEGUN else None

    def close_as_crashed(self, trial: Trial, said: str) -> None:
        self.write(replace(trial, outcome=CRASHED, said=said))

    def _read(self) -> list[Trial]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [Trial(**json.loads(line)) for line in lines]
