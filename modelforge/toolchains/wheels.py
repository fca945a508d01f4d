"""Fetches files out of another platform's wheels with pip, and keeps them, with their digests, in the store's home.

A wheel for the device carries the vendor's own build of its runtime: nothing has to be compiled here. Knows no
vendor: which wheels, and which files of them, is said by the caller.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelforge.errors import BuildError, IntegrityError, ToolchainMissing
from modelforge.store import Store, canonical_json, digest_file, write_atomically
from modelforge.toolchains import process

_DIGESTS = "digests.json"
_PIP_SECONDS = 900.0
# pip finds its index and its certificates through these; no other child sees them.
_PIP_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR")


@dataclass(frozen=True)
class Wheel:
    """One wheel to fetch.

    Attributes:
        requirement: an exact one, ``name==version``.
        members: path inside the wheel -> the name that the file gets.
        digests: the ``sha256:`` digest by that name, where it is known beforehand.
    """

    requirement: str
    members: Mapping[str, str]
    digests: Mapping[str, str]


def fetch(
    wheels: Sequence[Wheel], platforms: Sequence[str], *, key: str, store: Store, python: str = "3.11"
) -> dict[str, Path]:
    """The named files of the wheels for ``platforms``; from the network once, from the store's home afterwards.

    Args:
        platforms: platform tags, best first: ``manylinux_2_28_aarch64`` ...
        key: names the kept set; to be changed with the wheels.
        python: the Python version whose wheels are taken. Fixed, so that the same files come on every machine.

    Raises:
        ToolchainMissing: they are not kept yet, and pip cannot fetch them (with the command that would).
        IntegrityError: a file is not the one that is expected.
    """

    def fill(folder: Path) -> None:
        with store.workdir() as workdir:
            _download([wheel.requirement for wheel in wheels], platforms, python, workdir)
            for wheel in wheels:
                _extract(wheel, workdir, folder)

    files = kept(key, fill, store=store)
    for wheel in wheels:
        for name, digest in wheel.digests.items():
            _check(files[name], digest)
    return files


def kept(key: str, fill: Callable[[Path], None], *, store: Store) -> dict[str, Path]:
    """The files of the folder ``runtimes/KEY`` in the store's home, made by ``fill`` when they are not there.

    ``fill`` gets an empty folder; it runs once however many builds ask at the same time. What is kept is hashed
    again at each use, and made anew if it changed.
    """
    folder = store.home / "runtimes" / key
    with store.lock(f"runtime-{key}"):
        files = _intact(folder)
        if files is None:
            with store.workdir() as workdir:
                fresh = workdir / "files"
                fresh.mkdir()
                fill(fresh)
                digests = {path.name: digest_file(path).digest for path in sorted(fresh.iterdir())}
                write_atomically(fresh / _DIGESTS, canonical_json(digests))
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(parents=True, exist_ok=True)
                fresh.rename(folder)
            files = _intact(folder)
    if files is None:
        raise BuildError("what was just written cannot be read back", where=str(folder))
    return files


def _intact(folder: Path) -> dict[str, Path] | None:
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        same = all(digest_file(folder / name).digest == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return None
    return {name: folder / name for name in digests} if same else None


def _download(requirements: Sequence[str], platforms: Sequence[str], python: str, workdir: Path) -> None:
    options = ["download", "--no-deps", "--only-binary=:all:", "--python-version", python]
    options += [word for platform in platforms for word in ("--platform", platform)]
    command = ["-m", "pip", *options, *requirements]
    log = workdir / "pip.log"
    finished = process.run(
        [sys.executable, *command, "--dest", "wheels"],
        cwd=workdir,
        log=log,
        timeout=_PIP_SECONDS,
        env=installer_environment(),
    )
    if not finished.ok:
        raise ToolchainMissing(
            f"pip could not fetch {' and '.join(requirements)} for {platforms[0]}: {_last_error(finished.tail())}",
            fix=f"once, with a network or a package index at hand, this must work: python {shlex.join(command)}",
        )


def installer_environment() -> dict[str, str]:
    """What pip and uv may see of the caller's environment: package indexes, proxies, certificates, caches."""
    names = [name for name in os.environ if name.startswith(("PIP_", "UV_")) or name.upper() in _PIP_VARIABLES]
    return {name: os.environ[name] for name in names} | {
        name: os.environ[name] for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME") if name in os.environ
    }


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1]


def _extract(wheel: Wheel, workdir: Path, folder: Path) -> None:
    prefix = wheel.requirement.replace("==", "-").replace("_", "-")
    archives = [path for path in sorted((workdir / "wheels").glob("*.whl")) if _is_wheel(path, prefix)]
    if len(archives) != 1:
        raise BuildError(f"pip fetched {len(archives)} wheels for {wheel.requirement}, not one")
    with zipfile.ZipFile(archives[0]) as archive:
        for member, name in wheel.members.items():
            try:
                with archive.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            except KeyError:
                raise BuildError(f"{archives[0].name} has no {member}") from None
            if name in wheel.digests:
                _check(folder / name, wheel.digests[name])


def _is_wheel(path: Path, prefix: str) -> bool:
    """Whether the wheel's name and version are these; a wheel's file name has ``_`` for ``-``."""
    return path.name.replace("_", "-").startswith(prefix + "-")


def _check(path: Path, expected: str) -> None:
    found = digest_file(path).digest
    if found != expected:
        raise IntegrityError(
            f"{path.name} is not the file that this version of ModelForge knows: {found}, expected {expected}",
            fix="the package index gave another build of the wheel; take it from pypi.org",
        )
