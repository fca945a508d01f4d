"""The child of a tuning, in which candidates crash: `tuning_double.py HOW TIMES MARKER FUNCTION REQUEST ANSWER`.

HOW: ``segfault`` and ``hang`` when it is run, ``abort`` when it is compiled, ``baseline`` already the untuned kernel.
The first TIMES candidates do, and are named in MARKER; a later process crashes at the same ones again.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modelforge.toolchains import child


def main(how: str, times: str, marker: str, *call: str) -> None:
    if call[0].endswith(":tune"):
        _spoil(how, int(times), Path(marker))
    child.main([*call])


def _spoil(how: str, times: int, marker: Path) -> None:
    from modelforge.compilers.tvm import measuring, tuning

    lowered, compiled, ask = tuning._Search._lowered, tuning._compiled, measuring.Bench._ask
    bad = False

    def crash() -> None:
        if how == "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # code that never looks at signals
            while True:
                signal.pause()
        os.kill(os.getpid(), signal.SIGABRT) if how == "abort" else ctypes.string_at(0)

    def own_lowered(self: Any, site: Any, taken: Mapping[str, str]) -> Any:
        nonlocal bad
        names = marker.read_text(encoding="utf-8").splitlines() if marker.exists() else []
        name = json.dumps([site.geometry, dict(taken)])
        bad = how == "baseline" or (bool(taken) and (name in names or len(names) < times))
        if bad and name not in names:
            marker.write_text("".join(f"{each}\n" for each in [*names, name]), encoding="utf-8")
        return lowered(self, site, taken)

    def own_compiled(*given: Any) -> Any:
        if bad and how == "abort":
            crash()
        return compiled(*given)

    def own_ask(self: Any, question: Callable[[], Any]) -> Any:
        """The first question about a candidate is asked as it is loaded."""
        return ask(self, crash if bad else question)

    measuring._PATIENCE, measuring._GRACE = 1.0, 0.5
    tuning._Search._lowered = own_lowered
    tuning._compiled = own_compiled
    measuring.Bench._ask = own_ask


if __name__ == "__main__":
    main(*sys.argv[1:])
