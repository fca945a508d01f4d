"""The one place that starts processes: fixed environment, time limit, whole process group killed, log kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What a child may see of the caller's environment. Everything else (PYTHONPATH, LD_PRELOAD, proxies of a vendor
# tool ...) would make the artifact depend on who built it.
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE", "MODELFORGE_HOME", "QEMU_LD_PREFIX")

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 64 * 1024

_running: set[subprocess.Popen[bytes]] = set()
_running_lock = threading.Lock()


@dataclass(frozen=True)
class Finished:
    """How a process ended. ``returncode`` is negative for a signal, as in ``subprocess``."""

    argv: tuple[str, ...]
    returncode: int
    timed_out: bool
    seconds: float
    log: Path

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and not self.timed_out

    def ending(self) -> str:
        """The end of the process in words: ``ended with exit code 3``, ``was killed by SIGSEGV`` ..."""
        if self.timed_out:
            return f"was stopped after {self.seconds:.0f} s, its time limit"
        if self.returncode < 0:
            return f"was killed by {_signal_name(-self.returncode)}"
        return f"ended with exit code {self.returncode}"

    def tail(self, lines: int = 12) -> str:
        """The last lines of its log."""
        try:
            with self.log.open("rb") as stream:
                # A vendor tool may fill gigabytes: its end is enough.
                stream.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                text = stream.read(_TAIL_BYTES).decode("utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-lines:])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The fixed environment of a child process."""
    fixed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # PYTHONHASHSEED: some compilers iterate over sets; one seed, one artifact.
    fixed |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return fixed | dict(extra or {})


def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    timeout: float,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Run ``argv`` to its end, both streams into ``log``; kill its process group at ``timeout`` seconds.

    Raises:
        OSError: the program could not be started.
    """
    begun = time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            list(argv),
            cwd=cwd,
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one call into a loaded library, no lock taken
        )
    with _running_lock:
        _running.add(process)
    timed_out = False
    try:
        _wait(process, timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        # Also after a normal end: a vendor tool may leave a grandchild running.
        _kill_group(process)
        with _running_lock:
            _running.discard(process)
    return Finished(tuple(argv), process.returncode, timed_out, time.monotonic() - begun, log)


def _wait(process: subprocess.Popen[bytes], timeout: float) -> None:
    """``Popen.wait`` looks every 50 ms where there is a time limit; a file descriptor of the process tells at once."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # no Linux, or an old one
        process.wait(timeout=timeout)
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(min(timeout * 1000, 2**31 - 1)):
            raise subprocess.TimeoutExpired(process.args, timeout)
        process.wait()
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Told:
    """What a small program said on its standard output."""

    returncode: int
    output: bytes


def ask(argv: Sequence[str], said: bytes, *, timeout: float, env: Mapping[str, str]) -> Told:
    """Give a small program something on its standard input, and take what it answers. Nothing touches the disk:
    this is for credential helpers. Standard error goes to ours. A time-out counts as a failure.

    Raises:
        OSError: the program could not be started.
    """
    process = subprocess.Popen(
        list(argv),
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - one call into a loaded library, no lock taken
    )
    with _running_lock:
        _running.add(process)
    try:
        output, _ = process.communicate(said, timeout=timeout)
    except subprocess.TimeoutExpired:
        output = b"it did not answer in time"
    finally:
        _kill_group(process)
        with _running_lock:
            _running.discard(process)
    return Told(process.returncode, output)


def _die_with_parent() -> None:
    """In the child, before exec: be killed when the one who started it dies, `kill -9` included (Linux, prctl(2)).

    One call into a library that is loaded already: safe between fork and exec, also of a process with threads.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_all() -> None:
    """Kill every process group that is still running: the build was interrupted."""
    with _running_lock:
        for process in _running:
            _kill_group(process, wait=False)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name of its own
        return f"signal {number}"


def _kill_group(process: subprocess.Popen[bytes], *, wait: bool = True) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone already
        os.killpg(process.pid, signal.SIGKILL)
    if wait:
        process.wait()
