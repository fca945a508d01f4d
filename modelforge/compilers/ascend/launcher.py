"""Where ATC runs: on this machine, in a container, on another host. One small session behind which all three are alike.

Commands are lists of words; nothing that a recipe says is ever read by a shell.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from modelforge.compilers.ascend.install import Place
from modelforge.errors import BuildError
from modelforge.toolchains import process
from modelforge.toolchains.process import Finished

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")
"""Names of files that go in and out: no absolute path, no `..`, no option, at most one folder."""

_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Sets CANN's environment and becomes the program. Fixed text: all that varies comes as arguments and is only expanded
# in quotes. set_env.sh is not safe under `set -u`, and reads positional arguments, so it gets none. Everything that
# CANN writes beside the .om (logs, caches) stays in the private folder.
_ENTER = r"""
set_env=$1 stubs=$2 python=$3 memory=$4
shift 4
words=("$@")
set --
IFS=: read -r -a scripts <<< "$set_env"
for script in "${scripts[@]}"; do
    if [ -f "$script" ]; then . "$script"; break; fi
done
if ! ls /dev/davinci[0-9]* > /dev/null 2>&1; then
    home=${ASCEND_TOOLKIT_HOME:-${ASCEND_HOME_PATH:-}}
    for stub in "$home"/*-linux/devlib "$home"/runtime/lib64/stub; do
        if [ -n "$home" ] && [ -d "$stub" ]; then stubs="$stubs:$stub"; fi
    done
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}${stubs:+:${stubs#:}}"
fi
if [ -n "$python" ]; then export PATH="$python:$PATH"; fi
unset PYTHONHOME VIRTUAL_ENV
export ASCEND_WORK_PATH="$PWD" ASCEND_CACHE_PATH="$PWD" ASCEND_PROCESS_LOG_PATH="$PWD"
if [ "$memory" != 0 ]; then ulimit -v "$memory"; fi
exec "${words[@]}"
"""

_USUAL_SET_ENV = "/usr/local/Ascend/cann/set_env.sh:/usr/local/Ascend/ascend-toolkit/set_env.sh"

# What says which CANN a container or a host has; its output is read as an install's files are.
_TELL_VERSION = r"""
home=${ASCEND_TOOLKIT_HOME:-${ASCEND_HOME_PATH:-/usr/local/Ascend/ascend-toolkit/latest}}
cat "$home"/ascend_toolkit_install.info "$home"/*-linux/ascend_toolkit_install.info "$home"/compiler/version.info \
    2> /dev/null
true
"""


@dataclass(frozen=True)
class Settings:
    """How a program is run, beside its words.

    Attributes:
        environment: variables that CANN reads.
        python: the folder whose ``python3`` comes first.
        memory: bytes of address space that it may take; None: no limit.
        timeout: seconds.
    """

    timeout: float
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    memory: int | None = None


class Session(Protocol):
    """A private empty folder where ATC is, gone when the session ends."""

    def put(self, source: Path, name: str) -> None:
        """Copy a file in."""

    def run(self, words: Sequence[str], settings: Settings) -> Finished:
        """Run a program there, in CANN's environment, both streams into the log."""

    def names(self) -> list[str]:
        """All files there, sorted, as paths relative to the folder."""

    def get(self, name: str, target: Path) -> None:
        """Copy a file out."""


@contextlib.contextmanager
def open_session(place: Place, workdir: Path, log: Path) -> Iterator[Session]:
    """A session where ``place`` says. ``workdir`` is this machine's; ``log`` gets what is said.

    Raises:
        BuildError: it cannot be opened.
    """
    folder = workdir / "atc"
    folder.mkdir(parents=True, exist_ok=False)
    try:
        if place.kind == "local":
            yield _Local(place, folder, log)
        elif place.kind == "ssh":
            with _Remote.opened(place, workdir, log) as remote:
                yield remote
        else:
            yield _Contained(place, folder, log)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell_version(session: Session, log: Path) -> str:
    """What the version files of a container or a host say; empty where there are none."""
    begin = log.stat().st_size if log.exists() else 0
    session.run(["bash", "-c", _TELL_VERSION], Settings(timeout=120))
    with log.open("rb") as stream:
        stream.seek(begin)
        return stream.read().decode("utf-8", errors="replace")


def _entered(words: Sequence[str], settings: Settings, set_env: str, stubs: str) -> list[str]:
    """The words behind the fixed script that sets CANN's environment."""
    variables = [f"{name}={value}" for name, value in sorted(settings.environment.items())]
    kilobytes = str((settings.memory or 0) // 1024)
    return [
        *("bash", "-c", _ENTER, "modelforge-atc", set_env, stubs, settings.python, kilobytes),
        *("env", *variables, *words),
    ]


class _Folder:
    """A session whose files lie in a folder of this machine."""

    def __init__(self, place: Place, folder: Path, log: Path) -> None:
        self.place, self.folder, self.log = place, folder, log

    def put(self, source: Path, name: str) -> None:
        target = self.folder / _plain(name)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)

    def names(self) -> list[str]:
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def get(self, name: str, target: Path) -> None:
        shutil.copyfile(self.folder / _plain(name), target)


class _Local(_Folder):
    def run(self, words: Sequence[str], settings: Settings) -> Finished:
        set_env = "" if self.place.set_env is None else str(self.place.set_env)
        argv = _entered(words, settings, set_env, ":".join(map(str, self.place.devlib)))
        env = {"PATH": _search_path()}
        return process.run(argv, cwd=self.folder, log=self.log, timeout=settings.timeout, env=env)


class _Contained(_Folder):
    """A new container for each program: no network, the caller's user, the session's folder as /session."""

    def run(self, words: Sequence[str], settings: Settings) -> Finished:
        name = f"modelforge-{secrets.token_hex(8)}"
        memory = [] if settings.memory is None else [f"--memory={settings.memory}"]
        argv = [
            *(self.place.kind, "run", "--rm", "--init", f"--name={name}", "--network=none"),
            *(f"--user={os.getuid()}:{os.getgid()}", "--env=HOME=/tmp", *memory),
            *(f"--volume={self.folder}:/session", "--workdir=/session", "--entrypoint=bash", self.place.where),
            # The container holds the limit of memory itself: ulimit would count what is only mapped.
            *_entered(words, _unlimited(settings), _USUAL_SET_ENV, "")[1:],
        ]
        env = _client_environment()
        finished = process.run(argv, cwd=self.folder, log=self.log, timeout=settings.timeout, env=env)
        if finished.timed_out:
            # Killing the client leaves the container running.
            kill = [self.place.kind, "rm", "--force", name]
            process.run(kill, cwd=self.folder, log=self.log, timeout=60, env=env)
        return finished


class _Remote:
    """A folder on another host. The far end has its own time limit: killing ssh here would leave ATC running there."""

    def __init__(self, place: Place, workdir: Path, log: Path, folder: str) -> None:
        self.place, self.workdir, self.log, self.folder = place, workdir, log, folder
        self._calls = itertools.count()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, place: Place, workdir: Path, log: Path) -> Iterator[_Remote]:
        remote = cls(place, workdir, log, "")
        made = remote._small(["mktemp", "-d", "-t", "modelforge.XXXXXXXXXX"]).strip()
        if not re.fullmatch(r"/[A-Za-z0-9_./\-]+", made):
            raise BuildError("the host made no temporary folder", where=place.where, fix=made[-400:] or None)
        remote.folder = made
        try:
            yield remote
        finally:
            with contextlib.suppress(BuildError):  # the result is fetched already; a folder in /tmp stays behind
                remote._small(["rm", "-rf", "--", made])

    def put(self, source: Path, name: str) -> None:
        folder = _plain(name).rpartition("/")[0]
        if folder:
            self._small(["mkdir", "-p", "--", f"{self.folder}/{folder}"])
        self._copy(str(source), f"{self.place.where}:{self.folder}/{name}", f"copying {name} to")

    def get(self, name: str, target: Path) -> None:
        self._copy(f"{self.place.where}:{self.folder}/{_plain(name)}", str(target), f"copying {name} from")

    def names(self) -> list[str]:
        found = self._small(["find", self.folder, "-type", "f"]).splitlines()
        return sorted(line.removeprefix(f"{self.folder}/") for line in found if line.startswith(f"{self.folder}/"))

    def run(self, words: Sequence[str], settings: Settings) -> Finished:
        limit = ["timeout", "--kill-after=10", str(int(settings.timeout) + 1)]
        entered = shlex.join([*limit, *_entered(words, settings, _USUAL_SET_ENV, "")])
        command = f"cd {shlex.quote(self.folder)} && exec {entered}"
        argv = [*_SSH, "--", self.place.where, command]
        finished = process.run(
            argv, cwd=self.workdir, log=self.log, timeout=settings.timeout + 30, env=_client_environment()
        )
        if finished.returncode == 255 and "ATC run" not in finished.tail(40):
            # ssh itself ends with 255, as ATC does; only ATC says so.
            raise BuildError("ssh could not run ATC", where=self.place.where, fix=finished.tail(3) or None)
        return finished

    def _small(self, words: Sequence[str]) -> str:
        """A short command there; its output."""
        log = self.workdir / f"ssh-{next(self._calls)}.log"
        argv = [*_SSH, "--", self.place.where, shlex.join(words)]
        finished = process.run(argv, cwd=self.workdir, log=log, timeout=60, env=_client_environment())
        if not finished.ok:
            raise BuildError(f"ssh {finished.ending()}", where=self.place.where, fix=finished.tail(3) or None)
        return log.read_text(encoding="utf-8", errors="replace")

    def _copy(self, source: str, target: str, what: str) -> None:
        log = self.workdir / f"ssh-{next(self._calls)}.log"
        argv = ["scp", "-q", "-B", "--", source, target]
        finished = process.run(argv, cwd=self.workdir, log=log, timeout=3600, env=_client_environment())
        if not finished.ok:
            raise BuildError(
                f"{what} the host {finished.ending()}", where=self.place.where, fix=finished.tail(3) or None
            )


_SSH = ("ssh", "-q", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20")


def _client_environment() -> dict[str, str]:
    """What the clients need to reach an agent or a daemon; ATC itself sees none of it."""
    names = ("SSH_AUTH_SOCK", "DOCKER_HOST", "DOCKER_CONFIG", "CONTAINER_HOST", "XDG_RUNTIME_DIR")
    return {name: os.environ[name] for name in names if name in os.environ}


def _plain(name: str) -> str:
    if not _PLAIN.fullmatch(name):
        raise BuildError(f'"{name}" is no plain file name')
    return name


def _search_path() -> str:
    """The system's folders: nothing of our own environment, whose python3 would break CANN's operator compiler."""
    own = {os.path.join(prefix, "bin") for prefix in (sys.prefix, os.environ.get("VIRTUAL_ENV", ""))}
    given = os.environ.get("PATH", "").split(os.pathsep)
    kept = [each for each in given if each and os.path.normpath(each) not in own and not _is_venv(each)]
    return os.pathsep.join([*kept, *(each for each in _SEARCH_PATH.split(":") if each not in kept)])


def _is_venv(folder: str) -> bool:
    return (Path(folder).parent / "pyvenv.cfg").is_file()


def _unlimited(settings: Settings) -> Settings:
    return Settings(settings.timeout, settings.environment, settings.python)
