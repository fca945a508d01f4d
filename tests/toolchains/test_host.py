"""The host reader, against the texts of real kernels and this machine's own."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from modelforge.target import CpuArchitecture
from modelforge.toolchains.host import Host, isa_of, parse_flags, this_host, why_not

X86 = """processor\t: 0
model name\t: Some CPU
flags\t\t: fpu sse2 avx avx2 fma avx512f
vmx flags\t: vnmi

processor\t: 1
flags\t\t: fpu sse2 avx avx2 fma
"""

# A76 cores beside A55 ones (an RK3588): only the first have no `crc32` here.
ARM = """processor\t: 0
Features\t: fp asimd fphp asimdhp asimddp crc32

processor\t: 4
Features\t: fp asimd fphp asimdhp asimddp
CPU part\t: 0xd0b
"""


def arch(isa: str, *flags: str) -> CpuArchitecture:
    return CpuArchitecture(kind="cpu", isa=isa, mcpu="generic", cpuinfo=flags, cores=4, vector_bits=128)  # type: ignore[arg-type]  # a literal


def test_flags_are_those_that_all_cores_share() -> None:
    assert parse_flags(X86) == {"fpu", "sse2", "avx", "avx2", "fma"}
    assert parse_flags(ARM) == {"fp", "asimd", "fphp", "asimdhp", "asimddp"}


def test_no_flags_are_known_from_no_text() -> None:
    assert parse_flags("") == frozenset()


@pytest.mark.parametrize(
    ("machine", "isa"),
    [("x86_64", "x86-64"), ("AMD64", "x86-64"), ("aarch64", "aarch64"), ("arm64", "aarch64"), ("riscv64", "riscv64")],
)
def test_instruction_sets_have_one_name(machine: str, isa: str) -> None:
    assert isa_of(machine) == isa


def test_why_not_names_what_is_missing() -> None:
    host = Host("x86-64", frozenset({"avx2", "fma"}), 2)
    assert why_not(arch("x86-64", "avx2", "fma"), host) is None
    assert why_not(arch("x86-64"), host) is None
    assert why_not(arch("x86-64", "avx2", "avx512f", "avx512_vnni"), host) == (
        "this machine's CPU lacks avx512f, avx512_vnni"
    )
    assert why_not(arch("aarch64"), host) == "this machine is x86-64, the target aarch64"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_this_machine_is_read_from_its_kernel() -> None:
    host = this_host()
    assert host.isa == isa_of(platform.machine())
    assert host.cores >= 1
    text = Path("/proc/cpuinfo").read_text()
    assert host.flags
    assert all(flag in text for flag in host.flags)
    assert why_not(arch(host.isa, *sorted(host.flags))) is None
    assert why_not(arch(host.isa, "no-such-flag")) == "this machine's CPU lacks no-such-flag"
