"""Where a product is installed: in this interpreter, or in another one that an environment variable names.

JetPack 6 has TensorRT for its own Python 3.10, and ModelForge needs a newer one: the child processes that load NVIDIA's
module then run in that interpreter (:mod:`~modelforge.compilers.tensorrt.foreign`), everything else in this one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modelforge.compilers.tensorrt import foreign, product
from modelforge.compilers.tensorrt.product import Product
from modelforge.errors import ModelForgeError, ToolchainMissing
from modelforge.toolchains import worker

_SYSTEM = Path("/usr")
_ASKING = 60.0
"""Seconds for an interpreter to say what it has; a Jetson that was just started is slow."""


@dataclass(frozen=True)
class Installed:
    """A product as found.

    Attributes:
        folder: where its module lies. The child process looks there too, so that it loads what was found, also where
            the caller's PYTHONPATH led to it, which the child does not have.
        python: the other interpreter that has it; None where it is this one.
        python_version: of that interpreter.
    """

    version: str
    folder: Path
    python: Path | None = None
    python_version: str | None = None

    @property
    def versions(self) -> dict[str, str]:
        return {} if self.python_version is None else {"python": self.python_version}


@dataclass(frozen=True)
class Absent:
    """Why it is not to be had, and how to get it."""

    reason: str
    fix: str


def locate(wanted: Product) -> Installed | Absent:
    """Find a product, without importing it.

    Costs milliseconds; where ``wanted.python_variable`` names another interpreter, one short child process, once.
    """
    named = os.environ.get(wanted.python_variable)
    if named:
        return _in_other(wanted, named)
    found = product.find(wanted)
    if found is not None:
        return Installed(*found)
    return Absent(f"{wanted.title} is not installed", _system_hint(wanted) or wanted.install)


def find(wanted: Product) -> Installed | None:
    """As :func:`locate`, where the reason does not matter."""
    found = locate(wanted)
    return found if isinstance(found, Installed) else None


def require(wanted: Product) -> Installed:
    """As :func:`locate`.

    Raises:
        ToolchainMissing: it is not to be had.
    """
    found = locate(wanted)
    if isinstance(found, Absent):
        raise ToolchainMissing(found.reason, fix=found.fix)
    return found


def call(
    installed: Installed,
    function: str,
    request: Mapping[str, Any],
    *,
    workdir: Path,
    timeout: float,
    what: str,
    env: Mapping[str, str],
) -> dict[str, Any]:
    """:func:`modelforge.toolchains.worker.call` in the interpreter that has the product."""
    if installed.python is None:
        return worker.call(function, request, workdir=workdir, timeout=timeout, what=what, env=env)
    argv = _argv(installed.python, function)
    return worker.exchange(argv, request, workdir=workdir, timeout=timeout, what=what, env=env)


def _argv(python: Path, function: str) -> list[str]:
    """``-I``: neither PYTHONPATH nor packages of ours, which are made for another Python; ``-B``: no bytecode of that
    interpreter beside our sources."""
    return [str(python), "-I", "-B", str(Path(foreign.__file__).resolve()), function]


def _in_other(wanted: Product, named: str) -> Installed | Absent:
    path = shutil.which(named)
    if path is None:
        reason = f"{wanted.python_variable} names {named}, which is no program here"
        return Absent(reason, _fix(wanted))
    answer = _ask(wanted, path, Path(path).stat().st_mtime_ns)
    if isinstance(answer, str):
        return Absent(f"{wanted.python_variable} names {named}: {answer}", _fix(wanted))
    if answer["version"] is None:
        return Absent(
            f"{wanted.python_variable} names {named}, and that Python {answer['python']} has no {wanted.title}",
            _system_hint(wanted) or _fix(wanted),
        )
    if not answer["numpy"]:
        return Absent(
            f"{wanted.title} {answer['version']} is in {named}, and NumPy is not, which running an engine needs",
            "install it there; on a Jetson: sudo apt install python3-numpy",
        )
    return Installed(answer["version"], Path(answer["folder"]), Path(path), answer["python"])


@cache
def _ask(wanted: Product, path: str, _modified: int) -> dict[str, Any] | str:
    """What an interpreter has, or why it does not answer."""
    with tempfile.TemporaryDirectory(prefix="modelforge-python-") as folder:
        try:
            return worker.exchange(
                _argv(Path(path), "modelforge.compilers.tensorrt.product:describe"),
                {"product": wanted.name},
                workdir=Path(folder),
                timeout=_ASKING,
                what=f"asking {path} for {wanted.title}",
            )
        except ModelForgeError as error:
            return error.what
        except OSError as error:  # a file that may be executed and is no program
            return error.strerror or str(error)


def _system_hint(wanted: Product) -> str | None:
    """The operating system's own Python has it, as on a stock JetPack; where this one lies, by looking at files."""
    for package in sorted(_SYSTEM.glob(f"lib/python3*/dist-packages/{wanted.module}/__init__.py")):
        python = _SYSTEM / "bin" / package.parents[2].name
        if not python.exists():
            python = _SYSTEM / "bin" / "python3"
        return f"the system's own Python has it: set {wanted.python_variable}={python}"
    return None


def _fix(wanted: Product) -> str:
    return f"name a Python 3.10 or newer that has {wanted.title} and NumPy; on a Jetson: /usr/bin/python3"
