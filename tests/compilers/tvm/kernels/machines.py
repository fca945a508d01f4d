"""The machines that every rule must serve, as :class:`modelforge.compilers.tvm.machine.Machine`."""

from pathlib import Path

import pytest

from modelforge.compilers.tvm.machine import Machine

AVX512 = Machine("x86_64-linux-gnu", "cascadelake", ("-prefer-256-bit",), 2, 512, 32 << 10, 1 << 20, "vnni")
AVX2 = Machine("x86_64-linux-gnu", "x86-64-v3", (), 2, 256, 32 << 10, 256 << 10)
CORTEX_A53 = Machine("aarch64-linux-gnu", "cortex-a53", (), 4, 128, 32 << 10, 512 << 10)
CORTEX_A72 = Machine("aarch64-linux-gnu", "cortex-a72", (), 4, 128, 32 << 10, 1 << 20)
CORTEX_A76 = Machine("aarch64-linux-gnu", "cortex-a76", (), 4, 128, 64 << 10, 512 << 10, "sdot", True)

MACHINES = {
    "avx512-vnni": AVX512,
    "avx2": AVX2,
    "cortex-a53": CORTEX_A53,
    "cortex-a72": CORTEX_A72,
    "cortex-a76": CORTEX_A76,
}

_FLAGS = {"cascadelake": ("avx512f", "avx512bw", "avx512vl", "avx512_vnni"), "x86-64-v3": ("avx2", "fma", "bmi2")}


def runs_here(machine: Machine) -> bool:
    """Whether this processor has the instructions that code for the machine uses."""
    information = Path("/proc/cpuinfo")
    found = set(information.read_text(encoding="utf-8").split()) if information.exists() else set()
    return machine.mcpu in _FLAGS and found.issuperset(_FLAGS[machine.mcpu])


def runnable(*machines: Machine) -> list[object]:
    """Parameters of a test that runs what it compiles: machines, skipped where this processor is another."""
    return [
        pytest.param(
            machine,
            id=machine.mcpu,
            marks=[] if runs_here(machine) else pytest.mark.skip(reason=f"this processor is no {machine.mcpu}"),
        )
        for machine in machines
    ]
