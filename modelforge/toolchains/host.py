"""What this machine is: its instruction set and CPU flags, and whether code for a CPU target runs on it.

Reads ``/proc/cpuinfo``. Asks no vendor software.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from modelforge.target import CpuArchitecture

_CPUINFO = Path("/proc/cpuinfo")

# What the kernel calls an instruction set -> what a target profile calls it.
_ISA = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Host:
    """This machine.

    Attributes:
        isa: ``x86-64``, ``aarch64``, or the kernel's own word for another one.
        flags: CPU flags that every core has, in the kernel's words (``avx2``, ``asimddp``); empty where the kernel
            does not tell.
        cores: how many logical cores this process may use.
    """

    isa: str
    flags: frozenset[str]
    cores: int


def this_host() -> Host:
    """Look at the machine that this process runs on."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""  # not Linux: no flag is known to be there
    return Host(isa_of(platform.machine()), parse_flags(text), _usable_cores())


def cpu_name() -> str:
    """What this machine's CPU calls itself; its instruction set where the kernel does not tell (Arm)."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return found.group(1) if found else isa_of(platform.machine())


def isa_of(machine: str) -> str:
    """``x86_64`` as ``x86-64``, ``arm64`` as ``aarch64``; other words as they are."""
    return _ISA.get(machine.lower(), machine.lower())


def parse_flags(cpuinfo: str) -> frozenset[str]:
    """The flags that all cores share: a thread may land on any core of a big.LITTLE machine.

    x86 kernels write ``flags``, Arm kernels ``Features`` (Linux, Documentation/arch/arm64/cpu-feature-registers).
    """
    cores = [frozenset(line.split()) for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)]
    return frozenset.intersection(*cores) if cores else frozenset()


def why_not(arch: CpuArchitecture, host: Host | None = None) -> str | None:
    """Why code for ``arch`` does not run on this machine, in words; None where it does."""
    host = host or this_host()
    if host.isa != arch.isa:
        return f"this machine is {host.isa}, the target {arch.isa}"
    missing = [flag for flag in arch.cpuinfo if flag not in host.flags]
    if missing:
        return f"this machine's CPU lacks {', '.join(missing)}"
    return None


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
