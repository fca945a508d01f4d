"""Calls a function of ours in a child process: JSON request in, JSON answer out, by file.

A crash, an out-of-memory kill or a vendor library's own ``exit(0)`` ends as an error here, never as a success:
success is an answer file that says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelforge import errors
from modelforge.toolchains import process


def call(
    function: str,
    request: Mapping[str, Any],
    *,
    workdir: Path,
    timeout: float,
    what: str,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run ``module:function`` on ``request`` in a fresh interpreter, in ``workdir``.

    The function takes and returns a dict that JSON can hold; files are named by path. Its output and traceback go
    to ``workdir/worker.log``. Several calls may share a folder, one after the other.

    Args:
        what: what is being done, for messages: ``"TVM, compiling for cortex-a76"``.

    Raises:
        BuildError: the child crashed, ran out of time, or answered nothing.
        ModelForgeError: the branch that the function itself raised.
    """
    argv = [sys.executable, "-P", "-m", "modelforge.toolchains.child", function]
    return exchange(argv, request, workdir=workdir, timeout=timeout, what=what, env=env)


def exchange(
    argv: Sequence[str],
    request: Mapping[str, Any],
    *,
    workdir: Path,
    timeout: float,
    what: str,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run ``argv REQUEST ANSWER``, two file names, and give what it answered. As :func:`call` does, for any program."""
    workdir.mkdir(parents=True, exist_ok=True)
    request_file, answer_file, log = (workdir / name for name in ("request.json", "answer.json", "worker.log"))
    answer_file.unlink(missing_ok=True)
    request_file.write_text(json.dumps(request, sort_keys=True), encoding="utf-8")
    finished = process.run([*argv, str(request_file), str(answer_file)], cwd=workdir, log=log, timeout=timeout, env=env)
    answer = _read(answer_file)
    if answer is not None and "error" in answer:
        raise _revive(answer["error"], what)
    if not finished.ok or answer is None:
        tail = finished.tail()
        raise errors.BuildError(
            f"{what} {finished.ending()}" + ("" if answer is not None else " and gave no answer"),
            fix=f"the last lines of its log:\n{tail}" if tail else "its log is empty; try again with --debug",
        )
    result: dict[str, Any] = answer["result"]
    return result


def _read(answer_file: Path) -> dict[str, Any] | None:
    try:
        answer = json.loads(answer_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    told = isinstance(error, dict) and isinstance(error.get("what"), str)
    return answer if told or isinstance(answer.get("result"), dict) else None


def _revive(fault: Mapping[str, Any], what: str) -> errors.ModelForgeError:
    kind = getattr(errors, str(fault.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, errors.ModelForgeError)):
        kind = errors.BuildError
    return kind(f"{what}: {fault['what']}", where=fault.get("where"), fix=fault.get("fix"))
