"""Vendor environments: a toolchain's own virtual environment, made by uv, whole or not at all.

Layout: ``$MODELFORGE_HOME/toolchains/<name>/<digest of the definition>/``, with ``installed.json`` written last. An
environment without it, or whose packages are not those that it lists, is broken: that is told, and installing again
mends it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from modelforge.errors import BuildError, InputError, ToolchainMissing
from modelforge.store import canonical_json, default_home, digest_file, write_atomically
from modelforge.toolchains import process
from modelforge.toolchains.definition import Definition
from modelforge.toolchains.wheels import installer_environment

INSTALL_TIMEOUT = 3600.0
MANIFEST = "installed.json"


@dataclass(frozen=True)
class Environment:
    """An installed toolchain.

    Attributes:
        python: its interpreter.
        version: of the package that ``probe`` names.
        identity: digest of what is installed (the wheels' own records), of the definition and of the worker file: goes
            into content keys and into the variant record.
        accepted: the licence that was accepted when it was installed, where the vendor demands it.
    """

    definition: Definition
    folder: Path
    python: Path
    version: str
    identity: str
    accepted: str | None

    @property
    def versions(self) -> dict[str, str]:
        """For :class:`modelforge.compilers.protocol.Toolchain`: name of the package -> version, and the identity."""
        return {self.definition.probe: self.version, f"{self.definition.name}-environment": self.identity[:23]}


@dataclass(frozen=True)
class Broken:
    """An environment that is there and cannot be used."""

    reason: str


def find(definition: Definition, home: Path | None = None) -> Environment | Broken | None:
    """The environment of a toolchain: usable, broken, or None where there is none. Costs milliseconds."""
    folder = _folder(definition, home)
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        records, version, accepted = manifest["records"], str(manifest["version"]), manifest["licence"]
    except (OSError, ValueError, KeyError, TypeError):
        return Broken(f"its {MANIFEST} is missing or cannot be read: the installation was cut off, or spoiled since")
    python = folder / "bin" / "python"
    if not python.exists():
        return Broken("its Python interpreter is gone")
    for name, digest in records.items():
        record = folder / name
        if not record.is_file() or digest_file(record).digest != digest:
            return Broken(f"{Path(name).parent.name} is gone or was changed")
    return Environment(definition, folder, python, version, _identity(definition, records), accepted)


def install(definition: Definition, *, accept_license: bool, home: Path | None = None) -> tuple[Environment, bool]:
    """Install a toolchain; nothing is done where it stands whole. Gives the environment, and whether it was made now.

    Raises:
        InputError: the vendor's licence was not accepted.
        ToolchainMissing: uv, a fitting Python or the platform is missing.
        BuildError: a package could not be fetched or installed; nothing is left behind then.
    """
    folder = _folder(definition, home)
    found = find(definition, home)
    if isinstance(found, Environment):
        return found, False
    licence = definition.licence
    if licence.accept and not accept_license:
        raise InputError(
            f"{definition.title} is under the {licence.name}, which you must accept before it is fetched",
            where=f"toolchain {definition.name}",
            fix=f"read it at {licence.read}, then run again with --accept-license",
        )
    uv, python = _uv(), _python(definition)
    _check_room(definition, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        found = find(definition, home)
        if isinstance(found, Environment):  # another process was first
            return found, False
        _sweep(folder)
        part = folder.parent / f".part-{folder.name}"
        try:
            _fill(definition, part, uv, python)
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    made = find(definition, home)
    if not isinstance(made, Environment):
        raise BuildError("the environment is not whole after it was installed", where=str(folder), fix="install again")
    return made, True


def remove(definition: Definition, home: Path | None = None) -> bool:
    """Remove every environment of a toolchain; False where there was none."""
    base = _folder(definition, home).parent
    if not base.exists():
        return False
    with FileLock(base / ".lock"):
        for folder in [each for each in base.iterdir() if each.is_dir()]:
            shutil.rmtree(folder)
    shutil.rmtree(base)
    return True


def require(definition: Definition, home: Path | None = None) -> Environment:
    """The usable environment of a toolchain.

    Raises:
        ToolchainMissing: there is none, or it is broken.
    """
    found = find(definition, home)
    if isinstance(found, Environment):
        return found
    reason = "is not installed" if found is None else f"is broken: {found.reason}"
    raise ToolchainMissing(f"{definition.title} {reason}", fix=install_command(definition))


def install_command(definition: Definition) -> str:
    """What the user types to get it."""
    return f"modelforge toolchain install {definition.name}" + (
        " --accept-license" if definition.licence.accept else ""
    )


def _folder(definition: Definition, home: Path | None) -> Path:
    """Named by what is installed: other pins are another environment beside it."""
    facts = {"packages": list(definition.packages), "python": list(definition.python)}
    digest = hashlib.sha256(canonical_json(facts)).hexdigest()[:16]
    return (home or default_home()) / "toolchains" / definition.name / digest


def _identity(definition: Definition, records: Mapping[str, str]) -> str:
    facts = {
        "records": dict(records),
        "definition": digest_file(definition.path).digest,
        "worker": digest_file(definition.worker).digest,
    }
    return "sha256:" + hashlib.sha256(canonical_json(facts)).hexdigest()


def _uv() -> list[str]:
    """How uv is called: its wheel first, so that everyone has the same; else the one on the path."""
    import importlib.util

    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    if found := shutil.which("uv"):
        return [found]
    raise ToolchainMissing("uv is not installed, which makes the environment", fix="pip install uv")


def _python(definition: Definition) -> str:
    """The interpreter to make the environment from: this one if it fits, else one on the path."""
    here = f"{sys.implementation.name}-{sys.platform}"
    machine = f"{sys.platform}-{platform.machine()}"
    if definition.platforms and machine not in definition.platforms:
        raise ToolchainMissing(
            f"{definition.title} runs on {', '.join(definition.platforms)} only; this machine is {machine}",
            fix="build this target on such a machine",
        )
    if here.startswith("cpython") and f"3.{sys.version_info.minor}" in definition.python:
        return sys.executable
    for version in definition.python:
        if found := shutil.which(f"python{version}"):
            return found
    raise ToolchainMissing(
        f"{definition.title} needs Python {' or '.join(definition.python)}; none is on the path",
        fix=f"install python{definition.python[0]}",
    )


def _check_room(definition: Definition, folder: Path) -> None:
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < definition.install_bytes:
        raise BuildError(
            f"{definition.title} takes about {definition.install_bytes >> 20} MiB, and {free >> 20} MiB are free",
            where=str(place),
            fix="free some space, or set MODELFORGE_HOME to another disk",
        )


def _sweep(folder: Path) -> None:
    """What a killed or spoiled installation left. Called under the lock."""
    for leftover in (folder, folder.parent / f".part-{folder.name}"):
        if leftover.exists():
            shutil.rmtree(leftover)


def _fill(definition: Definition, part: Path, uv: list[str], python: str) -> None:
    """Make the environment in ``part``; its manifest comes last."""
    log = part.parent / "install.log"
    log.unlink(missing_ok=True)
    # Relocatable: it is made under another name, and renamed when it is whole.
    _run([*uv, "venv", "--quiet", "--relocatable", "--no-project", "--python", python, str(part)], definition, log)
    interpreter = part / "bin" / "python"
    packages = ["--no-deps", "--link-mode", "copy", "--python", str(interpreter), *definition.packages]
    _run([*uv, "pip", "install", "--quiet", *packages], definition, log)
    records = {str(path.relative_to(part)): digest_file(path).digest for path in _records(part)}
    manifest = {
        "schema": 1,
        "name": definition.name,
        "version": _installed_version(definition, part),
        "packages": list(definition.packages),
        "licence": definition.licence.name if definition.licence.accept else None,
        "records": records,
    }
    write_atomically(part / MANIFEST, canonical_json(manifest))


def _records(part: Path) -> list[Path]:
    """RECORD of each wheel lists all its files with their digests: together they say what is installed."""
    return sorted(part.glob("lib/python*/site-packages/*.dist-info/RECORD"))


def _installed_version(definition: Definition, part: Path) -> str:
    wanted = re.sub(r"[-_.]+", "-", definition.probe).lower()
    for record in _records(part):
        name, _, version = record.parent.name.removesuffix(".dist-info").rpartition("-")
        if re.sub(r"[-_.]+", "-", name).lower() == wanted:
            return version
    raise BuildError(f"{definition.probe} is not there after it was installed", where=f"toolchain {definition.name}")


def _run(argv: list[str], definition: Definition, log: Path) -> None:
    finished = process.run(argv, cwd=log.parent, log=log, timeout=INSTALL_TIMEOUT, env=installer_environment())
    if not finished.ok:
        raise BuildError(
            f"installing {definition.title} {finished.ending()}",
            where=f"toolchain {definition.name}",
            fix=f"the last lines of {log}:\n{finished.tail()}",
        )


def call(
    environment: Environment, request: Mapping[str, Any], *, workdir: Path, timeout: float, what: str
) -> dict[str, Any]:
    """Run a toolchain's worker on a request: ``python FLAGS worker.py REQUEST.json ANSWER.json``, in ``workdir``.

    The worker is one file of the standard library and the vendor's modules; it answers ``{"result": {...}}`` or
    ``{"error": {"type", "what", "where", "fix"}}``. What it prints goes to ``workdir/worker.log``.

    Raises:
        BuildError: it crashed, ran out of time, or left no whole answer.
        ModelForgeError: the branch that its error names.
    """
    from modelforge.toolchains.worker import exchange

    definition = environment.definition
    start = _fixed_addresses() if definition.fixed_addresses else []
    argv = [*start, str(environment.python), *definition.flags, str(definition.worker)]
    return exchange(argv, request, workdir=workdir, timeout=timeout, what=what, env=definition.environment)


def _fixed_addresses() -> list[str]:
    """``setarch -R``, where it is installed and allowed: in a container, seccomp mostly forbids personality(2)."""
    found = shutil.which("setarch")
    if found is None:
        return []
    start = [found, platform.machine(), "-R"]
    tried = process.ask([*start, "true"], b"", timeout=10, env={"PATH": os.environ.get("PATH", os.defpath)})
    return start if tried.returncode == 0 else []
