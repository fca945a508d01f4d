"""What Vela's own configuration file (``Arm/vela.ini``, ethos-u-vela 5.2.0) offers: systems by NPU, memory modes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from modelforge.compilers.protocol import Refusal
from modelforge.target import EthosUArchitecture

CONFIG_FILE = "Arm/vela.ini"

ACCELERATORS: Mapping[str, tuple[int, ...]] = {
    "ethos-u55": (32, 64, 128, 256),
    "ethos-u65": (256, 512),
    "ethos-u85": (128, 256, 512, 1024, 2048),
}
"""MACs per cycle by family: ``--accelerator-config`` of vela."""
SYSTEMS: Mapping[str, tuple[str, ...]] = {
    "ethos-u55": ("Ethos_U55_Deep_Embedded", "Ethos_U55_High_End_Embedded"),
    "ethos-u65": (
        "Ethos_U65_Embedded", "Ethos_U65_Mid_End", "Ethos_U65_High_End", "Ethos_U65_Client_Server",
    ),
    "ethos-u85": (
        "Ethos_U85_SYS_Flash_Low", "Ethos_U85_SYS_Flash_High", "Ethos_U85_SYS_DRAM_Low", "Ethos_U85_SYS_DRAM_Mid",
        "Ethos_U85_SYS_DRAM_High",
    ),
}  # fmt: skip
MEMORY_MODES = (
    "Sram_Only", "Shared_Sram", "Dedicated_Sram",
    "Dedicated_Sram_256KB", "Dedicated_Sram_384KB", "Dedicated_Sram_512KB",
)  # fmt: skip
_NO_DEDICATED = "ethos-u55"
"""``vela.ini``: "The Dedicated SRAM memory mode is valid for the Ethos-U65 and the Ethos-U85"."""


def family_of(accelerator: str) -> str:
    """``ethos-u55-128`` is of ``ethos-u55``."""
    return accelerator.rpartition("-")[0]


def refusals(arch: EthosUArchitecture) -> Iterator[Refusal]:
    """Why this is no configuration of Vela's. Left out, its defaults would give other cycles without a word."""
    family, _, macs = arch.accelerator.rpartition("-")
    if family not in ACCELERATORS or macs not in map(str, ACCELERATORS[family]):
        known = ", ".join(f"{name}-{each}" for name, sizes in ACCELERATORS.items() for each in sizes)
        yield Refusal("accelerator", f"Vela knows no {arch.accelerator}", f"choose from {known}", CONFIG_FILE)
        return
    if arch.system_config not in SYSTEMS[family]:
        what = f"{arch.system_config} is no system of {family} in {CONFIG_FILE}"
        yield Refusal("system-config", what, f"choose from {', '.join(SYSTEMS[family])}", CONFIG_FILE)
    dedicated = arch.memory_mode.startswith("Dedicated") and family == _NO_DEDICATED
    if arch.memory_mode not in MEMORY_MODES or dedicated:
        modes = [mode for mode in MEMORY_MODES if family != _NO_DEDICATED or not mode.startswith("Dedicated")]
        what = f"{arch.memory_mode} is no memory mode for {family}"
        yield Refusal("memory-mode", what, f"choose from {', '.join(modes)}", CONFIG_FILE)
