"""Finds what runs an arm64 program on this machine: QEMU's user mode and an arm64 C library. Starts nothing.

QEMU's ``-L`` names the root under which the emulated program finds its loader and libraries.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROGRAMS = ("qemu-aarch64-static", "qemu-aarch64")
LIBRARIES = ("ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1")
"""What the runner and the TVM runtime need of the device's system."""
INSTALL = (
    "apt-get install qemu-user-static libc6-arm64-cross libstdc++6-arm64-cross libgcc-s1-arm64-cross "
    "(Debian, Ubuntu), or set QEMU_LD_PREFIX to the root of an arm64 system"
)
_LIBRARY_FOLDERS = ("lib", "lib64", "lib/aarch64-linux-gnu", "usr/lib", "usr/lib64", "usr/lib/aarch64-linux-gnu")


@dataclass(frozen=True)
class Emulator:
    """``sysroot`` is the root of an arm64 system, as QEMU's ``-L`` takes it."""

    program: Path
    sysroot: Path

    def command(self, *argv: str, cpu: str | None = None) -> list[str]:
        """The command that runs ``argv`` emulated; ``cpu`` is one of QEMU's models (``-cpu help``)."""
        return [str(self.program), "-L", str(self.sysroot), *(["-cpu", cpu] if cpu else []), *argv]

    def version(self) -> str:
        return version(self.program)


def find() -> Emulator | None:
    """The emulator of this machine, or None where QEMU or the arm64 libraries are missing."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    sysroot = next((root for root in _sysroots() if not missing_libraries(root)), None)
    return Emulator(Path(program), sysroot) if program and sysroot else None


def missing_libraries(root: Path) -> list[str]:
    """Which of :data:`LIBRARIES` are not under ``root``."""
    return [name for name in LIBRARIES if not any((root / folder / name).exists() for folder in _LIBRARY_FOLDERS)]


def why_not() -> str:
    """What is missing, in one clause; empty where :func:`find` finds an emulator."""
    if find() is not None:
        return ""
    if not any(shutil.which(name) for name in PROGRAMS):
        return "qemu-aarch64 is not on PATH"
    root = _sysroots()[0]
    return f"{', '.join(missing_libraries(root))} for arm64 not found under {root}"


@cache
def version(program: Path) -> str:
    """QEMU's version, read out of the program, which carries the line that ``--version`` prints."""
    found = re.search(rb"qemu-aarch64 version ([0-9][0-9.]*)", program.read_bytes())
    return found.group(1).decode() if found else "unknown"


def _sysroots() -> list[Path]:
    named = os.environ.get("QEMU_LD_PREFIX")
    return [Path(named)] if named else [Path("/usr/aarch64-linux-gnu")]
