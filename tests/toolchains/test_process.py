"""The one place that starts processes: endings, time limits, groups, environment, logs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from modelforge.toolchains import process
from modelforge.toolchains.process import Finished


def python(code: str, tmp_path: Path, *, timeout: float = 20, env: dict[str, str] | None = None) -> Finished:
    argv = [sys.executable, "-c", code]
    return process.run(argv, cwd=tmp_path, log=tmp_path / "log", timeout=timeout, env=env)


def is_alive(pid: int) -> bool:
    """Whether the process still runs; a zombie that init has not collected yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until_dead(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        os.sched_yield()
    return not is_alive(pid)


def test_a_normal_end_keeps_both_streams(tmp_path: Path) -> None:
    finished = python("import sys; print('out', flush=True); print('err', file=sys.stderr)", tmp_path)
    assert finished.ok
    assert finished.tail().splitlines() == ["out", "err"]
    assert finished.ending() == "ended with exit code 0"


def test_an_exit_code_and_a_signal_are_put_in_words(tmp_path: Path) -> None:
    failed = python("raise SystemExit(3)", tmp_path)
    assert (failed.ok, failed.ending()) == (False, "ended with exit code 3")
    killed = python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", tmp_path)
    assert (killed.ok, killed.ending()) == (False, "was killed by SIGSEGV")
    nameless = python("import os; os.kill(os.getpid(), 40)", tmp_path)
    assert nameless.ending() == "was killed by signal 40"


def test_a_hang_is_stopped_at_its_time_limit(tmp_path: Path) -> None:
    begun = time.monotonic()
    finished = python("import signal; signal.pause()", tmp_path, timeout=0.3)
    assert time.monotonic() - begun < 30
    assert finished.timed_out
    assert not finished.ok
    assert "its time limit" in finished.ending()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("hangs", [False, True], ids=["after a normal end", "at the time limit"])
def test_a_grandchild_left_running_is_killed(tmp_path: Path, hangs: bool) -> None:
    code = (
        "import signal, subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "pathlib.Path('pid').write_text(str(child.pid))\n" + ("signal.pause()" if hangs else "")
    )
    finished = python(code, tmp_path, timeout=5 if hangs else 60)
    assert finished.timed_out is hangs
    assert wait_until_dead(int((tmp_path / "pid").read_text()))


def test_a_program_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        process.run(["/no/such/program"], cwd=tmp_path, log=tmp_path / "log", timeout=1)


def test_the_environment_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    finished = python("import os; print(sorted(os.environ.items()))", tmp_path, env={"EXTRA": "yes"})
    told = finished.tail()
    assert "SECRET_TOKEN" not in told
    assert "PYTHONPATH" not in told
    assert "('PYTHONHASHSEED', '0')" in told
    assert "('EXTRA', 'yes')" in told


def test_the_tail_of_a_huge_log_is_short(tmp_path: Path) -> None:
    finished = python("for i in range(400): print(f'{i:03}' + 'x' * 65536)\nprint('the end')", tmp_path)
    assert finished.log.stat().st_size > 25_000_000
    tail = finished.tail(lines=2)
    assert tail.endswith("the end")
    assert len(tail) < 100_000


def test_output_that_is_not_text_does_not_break_the_tail(tmp_path: Path) -> None:
    finished = python("import os; os.write(1, bytes(range(256)) + b'\\nlast')", tmp_path)
    assert finished.tail().endswith("last")


def test_stdin_is_empty(tmp_path: Path) -> None:
    assert python("import sys; print(repr(sys.stdin.read()))", tmp_path).tail() == "''"


def test_kill_all_ends_what_runs(tmp_path: Path) -> None:
    results: list[Finished] = []

    def work() -> None:
        code = "import pathlib, signal; pathlib.Path('up').touch(); signal.pause()"
        results.append(python(code, tmp_path, timeout=60))

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() and not (tmp_path / "up").exists():
        os.sched_yield()
    process.kill_all()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert results[0].returncode == -signal.SIGKILL
    assert not results[0].timed_out
