"""One run of ATC: stage, run, judge, fetch. Success is exit code 0, the success line, and exactly the .om expected."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelforge.compilers.ascend.failures import Diagnosis, diagnose
from modelforge.compilers.ascend.install import Place, version_in
from modelforge.compilers.ascend.launcher import Settings, open_session, tell_version
from modelforge.errors import BuildError, ModelForgeError, UnsupportedError
from modelforge.toolchains.process import Finished

SUCCESS = "ATC run success"
MAGIC = b"IMOD"
"""What an .om file begins with."""

_WEIGHTS = "weight/"
_REFUSALS = ("usage", "model", "unsupported-op")
"""Classes of failure that say something of the model or the options: another machine would refuse them, too."""

_MOST_OPS = 5


@dataclass(frozen=True)
class Run:
    """One call.

    Attributes:
        words: the command, with names relative to the session's folder.
        files: what has to lie there, by name.
        stem: ``--output``.
        weights: whether a folder of weights is expected, too.
    """

    words: tuple[str, ...]
    files: Mapping[str, Path]
    stem: str
    weights: bool = False


def run_atc(place: Place, run: Run, settings: Settings, workdir: Path, log: Path, what: str) -> dict[str, Path]:
    """Run ATC in a private empty folder and fetch what it made: file name -> path in ``workdir``.

    The .om comes first; weights of ``weight/NAME`` come as ``weight-NAME``.

    Raises:
        BuildError: ATC failed, crashed, ran out of time or memory, or did not leave exactly the .om that was asked for.
        UnsupportedError: it says that it cannot have this model or these options.
    """
    begin = log.stat().st_size if log.exists() else 0
    with open_session(place, workdir, log) as session:
        for name, path in run.files.items():
            session.put(path, name)
        try:
            finished = session.run([_program(place), *run.words[1:]], settings)
        except OSError as error:
            raise BuildError(f"{what}: ATC could not be started: {error.strerror}", where=place.where) from error
        said = _since(log, begin)
        if not finished.ok or SUCCESS not in said:
            raise _failure(finished, said, what)
        names = [name for name in session.names() if name not in run.files]
        om = _expected(names, run.stem, what)
        fetched = {om: workdir / om}
        weights = [name for name in names if name.startswith(_WEIGHTS)] if run.weights else []
        fetched |= {name.replace("/", "-"): workdir / name.replace("/", "-") for name in weights}
        session.get(om, fetched[om])
        for name in weights:
            session.get(name, fetched[name.replace("/", "-")])
    _read_back(fetched[om], what)
    return fetched


def survey(place: Place, settings: Settings, workdir: Path, log: Path) -> str:
    """What ``atc --help`` of this ATC prints: the options that it has. Tells early that it cannot run at all.

    Raises:
        BuildError: it does not start, or is of another CANN than was said of the container or the host.
    """
    begin = log.stat().st_size if log.exists() else 0
    what = f"ATC of CANN {place.version}"
    with open_session(place, workdir, log) as session:
        try:
            if place.kind != "local":
                found = version_in(tell_version(session, log))
                if found is not None and found.upper() != place.version.upper():
                    raise BuildError(
                        f"{place.where} has CANN {found}, and {place.version} was said of it",
                        fix="mend MODELFORGE_CANN_VERSION: versions go into the record",
                    )
            begin = log.stat().st_size if log.exists() else 0
            finished = session.run([_program(place), "--help"], settings)
        except OSError as error:
            raise BuildError(f"{what} could not be started: {error.strerror}", where=place.where) from error
    said = _since(log, begin)
    if not finished.ok:
        raise _failure(finished, said, what)
    return said


def _program(place: Place) -> str:
    return place.where if place.kind == "local" else "atc"


def _expected(names: Sequence[str], stem: str, what: str) -> str:
    """The one .om, found by listing: the name may carry the host that it is bound to (main_linux_x86_64.om)."""
    models = [name for name in names if name.endswith(".om")]
    pattern = rf"{re.escape(stem)}(_(linux|minios)_[a-z0-9_]+)?\.om"
    fitting = [name for name in models if re.fullmatch(pattern, name)]
    if len(fitting) == 1 and len(models) == 1:
        return fitting[0]
    if not models:
        raise BuildError(f"{what}: ATC said it succeeded and left no .om", fix="its log is in the bundle's compile.log")
    raise BuildError(f"{what}: ATC left {', '.join(models)}, where {stem}.om was expected")


def _read_back(om: Path, what: str) -> None:
    with om.open("rb") as stream:
        begin = stream.read(len(MAGIC))
    if begin != MAGIC:
        size = om.stat().st_size
        raise BuildError(f"{what}: {om.name} ({size} bytes) is no offline model: it does not begin with IMOD")


def _failure(finished: Finished, said: str, what: str) -> ModelForgeError:
    if finished.timed_out or finished.returncode == _TIMEOUT:
        return BuildError(
            f"{what}: it {finished.ending()} without coming to an end",
            fix="gears multiply the time; give fewer, or build on a machine with more cores",
        )
    found = diagnose(said, exit_code=finished.returncode)
    if finished.ok or found is None:
        return BuildError(f"{what}: it {finished.ending()} and did not say that it succeeded", fix=_last(said))
    return _as_error(found, what, finished.ending(), said)


_TIMEOUT = 124
"""timeout(1)'s exit code: what ends a run on another host."""


def _as_error(found: Diagnosis, what: str, ending: str, said: str) -> ModelForgeError:
    kind = found.failure_class if found.code is None else f"{found.failure_class}, {found.code}"
    ops = [f"{op.name or '?'} ({op.type or '?'}{f', opset {op.opset}' if op.opset else ''})" for op in found.ops]
    where = f"node {', '.join(ops[:_MOST_OPS])}" if ops else None
    text = f"{what}: it {ending} ({kind}): {found.cause}"
    if found.message and found.message not in text:
        text += f'; it said "{found.message}"'
    error = UnsupportedError if found.failure_class in _REFUSALS else BuildError
    return error(text, where=where, fix=found.fix or _last(said))


def _last(said: str, lines: int = 6) -> str:
    return "the last lines of its log:\n" + "\n".join(said.strip().splitlines()[-lines:])


def _since(log: Path, begin: int) -> str:
    with log.open("rb") as stream:
        stream.seek(begin)
        return stream.read().decode("utf-8", errors="replace")
