"""Where ATC is and which CANN it belongs to, read from files and names. Starts no process."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelforge.compilers.ascend.limits import parse_version
from modelforge.errors import ToolchainMissing

ATC_VARIABLE = "MODELFORGE_ATC"
"""Where ATC is: a path, ``docker:IMAGE``, ``podman:IMAGE`` or ``ssh:HOST``."""

VERSION_VARIABLE = "MODELFORGE_CANN_VERSION"
"""Which CANN a container or an ssh host has, where its name does not say so."""

PYTHON_VARIABLE = "MODELFORGE_ATC_PYTHON"
"""The python3 that CANN's own compilers import their packages from."""

Kind = Literal["local", "docker", "podman", "ssh"]

# The installers' default places, newest layout first (CANN 8.5 and later; before).
_ROOTS = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/latest")
_HOME_ROOTS = ("Ascend/cann", "Ascend/ascend-toolkit/latest")
_PROGRAMS = ("bin/atc", "compiler/bin/atc", "atc/bin/atc")
_UP = 3
"""How far above bin/atc the install's own files may lie."""


@dataclass(frozen=True)
class Place:
    """One ATC.

    Attributes:
        kind: where it runs.
        where: of a local one its program; else the image or the host.
        version: of CANN, as its own files (or the image's tag) spell it.
        root: the folder of a local install; None elsewhere.
        set_env: the install's script that sets its environment; None where there is none.
        devlib: folders with stub libraries for a host without an NPU, to stand last on the library path.
    """

    kind: Kind
    where: str
    version: str
    root: Path | None = None
    set_env: Path | None = None
    devlib: tuple[Path, ...] = ()


@dataclass(frozen=True)
class NotHere:
    """Why there is none, and what to do."""

    reason: str
    fix: str


def find() -> Place | NotHere:
    """``$MODELFORGE_ATC``, else a local install: ``PATH``, CANN's own variables, the installers' default places."""
    said = os.environ.get(ATC_VARIABLE, "").strip()
    if not said:
        return _local(
            _search(), "no ATC is installed here (looked on PATH, in $ASCEND_TOOLKIT_HOME, /usr/local/Ascend)"
        )
    kind, colon, rest = said.partition(":")
    if colon and kind in ("docker", "podman", "ssh"):
        return _elsewhere(kind, rest)  # type: ignore[arg-type]  # narrowed by the tuple above
    path = Path(said).expanduser()
    programs = [path / each for each in _PROGRAMS] if path.is_dir() else [path]
    found = next((each for each in programs if _is_program(each)), None)
    return _local(found, f"${ATC_VARIABLE} names {said}, which is no ATC")


def require() -> Place:
    """:func:`find`, for who cannot go on without.

    Raises:
        ToolchainMissing: there is none.
    """
    found = find()
    if isinstance(found, NotHere):
        raise ToolchainMissing(found.reason, fix=found.fix)
    return found


def python() -> Path | None:
    """The interpreter that the user wants CANN to use; None: the first ``python3`` that is not ours."""
    said = os.environ.get(PYTHON_VARIABLE, "").strip()
    return Path(said).expanduser() if said else None


def read_version(root: Path) -> str | None:
    """The CANN version of an install from the files that its packages leave, None where none of them says it."""
    for pattern, key in _VERSION_FILES:
        for path in sorted(root.glob(pattern)):
            found = re.search(key, _text(path), re.MULTILINE)
            if found:
                return found.group(1).strip()
    return None


def version_in(text: str) -> str | None:
    """The CANN version in the text of such files, the product's own first."""
    for key in dict.fromkeys(key for _, key in _VERSION_FILES):
        if found := re.search(key, text, re.MULTILINE):
            return found.group(1).strip()
    return None


# What says the product's version comes before what says a package's own (7.1.0.3.220 is CANN 7.0.0).
_VERSION_FILES = (
    ("ascend_toolkit_install.info", r"^version=(.+)$"),
    ("*-linux/ascend_toolkit_install.info", r"^version=(.+)$"),
    ("compiler/version.info", r"^version_dir=(.+)$"),
    ("version.info", r"^version_dir=(.+)$"),
    ("version.cfg", r"^(?:compiler_running|runtime_running|toolkit_running)_version=\[[^:\]]*:([^\]]+)\]"),
    ("compiler/version.info", r"^Version=(.+)$"),
    ("version.info", r"^Version=(.+)$"),
    ("opp/version.info", r"^Version=(.+)$"),
)


def _search() -> Path | None:
    roots = [os.environ[name] for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH") if os.environ.get(name)]
    roots += [*_ROOTS, *(str(Path.home() / each) for each in _HOME_ROOTS)]
    on_path = shutil.which("atc")
    candidates = [Path(on_path)] if on_path else []
    candidates += [Path(root) / each for root in roots for each in _PROGRAMS]
    return next((each for each in candidates if _is_program(each)), None)


def _local(program: Path | None, reason: str) -> Place | NotHere:
    if program is None:
        return NotHere(
            reason, f"install CANN, or let ${ATC_VARIABLE} say where it is: a path, docker:IMAGE or ssh:HOST"
        )
    for root in list(program.resolve().parents)[:_UP]:
        version = read_version(root)
        if version is not None:
            set_env = next((each for each in (root / "set_env.sh", root.parent / "set_env.sh") if each.is_file()), None)
            return Place("local", str(program), version, root, set_env, _stubs(root))
    return NotHere(
        f"an ATC is here ({program.name}), and no version file of CANN beside it",
        "mend the install: version.info or ascend_toolkit_install.info has to say which CANN it is",
    )


def _stubs(root: Path) -> tuple[Path, ...]:
    """Stub libraries that stand in for the driver's: <arch>-linux/devlib, in older releases runtime/lib64/stub."""
    found = [path for path in sorted(root.glob("*-linux/devlib")) if path.is_dir()]
    found += [path for path in (root / "devlib", root / "runtime/lib64/stub") if path.is_dir()]
    return tuple(found)


def _elsewhere(kind: Kind, where: str) -> Place | NotHere:
    # A word that begins with a hyphen would be an option of docker or ssh.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@%+\-\[\]]*", where):
        return NotHere(
            f'${ATC_VARIABLE}: "{where}" is no name of {"a host" if kind == "ssh" else "an image"}', "mend it"
        )
    if shutil.which(kind) is None:
        return NotHere(f"${ATC_VARIABLE} asks for {kind}, which is not installed here", f"install {kind}")
    tag = where.rpartition("/")[2].partition(":")[2] if kind != "ssh" else ""
    version = os.environ.get(VERSION_VARIABLE, "").strip() or _version_of_tag(tag)
    if not version:
        return NotHere(
            f"which CANN {where} has cannot be told from its name",
            f"say it: {VERSION_VARIABLE}=8.2.RC1 (it is compared with what is found there)",
        )
    return Place(kind, where, version)


def _version_of_tag(tag: str) -> str:
    """``8.2.rc1-910b-ubuntu22.04-py3.11`` -> ``8.2.RC1``."""
    word = tag.partition("@")[0].partition("-")[0]
    return word.upper() if parse_version(word) else ""


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
