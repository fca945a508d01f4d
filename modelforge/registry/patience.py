"""When to try again, how long to wait before, and when to give up."""

from __future__ import annotations

import random
import threading
import time

from modelforge.errors import RegistryError
from modelforge.registry.limits import Limits


class Transient(Exception):
    """An attempt failed in a way that the next one may not. ``final`` is what to raise when no attempt is left."""

    def __init__(self, final: RegistryError, wait: float | None = None) -> None:
        super().__init__(str(final))
        self.final = final
        self.wait = wait


class Patience:
    """Counts attempts and waits between them; `progressed` begins to count anew."""

    def __init__(self, limits: Limits, stopped: threading.Event | None = None) -> None:
        self._limits = limits
        self._stopped = stopped or threading.Event()
        self.progressed()

    def progressed(self) -> None:
        self._failed = 0
        self._until = time.monotonic() + self._limits.patience

    def after(self, fault: Transient) -> None:
        """Wait before the next attempt, or raise the fault's final error."""
        self._failed += 1
        pause = self._limits.backoff * 2 ** (self._failed - 1) * random.uniform(0.5, 1.0)
        pause = min(max(pause, fault.wait or 0.0), self._limits.longest_wait)
        if self._failed >= self._limits.attempts or time.monotonic() + pause > self._until:
            fault.final.what += f"; tried {self._failed} times"
            raise fault.final from fault
        if self._stopped.wait(pause):
            raise fault.final from fault
