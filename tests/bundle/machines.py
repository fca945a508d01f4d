"""File systems of machines that are not here, as their vendors document them; and doubles of two vendor interfaces."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

# `npu-smi info` of an Atlas server, as users print it in issue reports.
NPU_SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.2                   Version: 25.5.2                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     {name:<20}| OK            | 89.9        39                0    / 0             |
| 0                         | 0000:41:00.0  | 0           0    / 0          2922 / 32768         |
+===========================+===============+====================================================+
| 1     {name:<20}| OK            | 89.9        39                0    / 0             |
| 0                         | 0000:42:00.0  | 0           0    / 0          2922 / 32768         |
+===========================+===============+====================================================+
"""

# A double of NVML with the signatures of NVIDIA's nvml.h: one Tesla T4, and a second GPU that is lost.
NVML = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  *device = (void *)0x7f0000000001; return index ? 15 : 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
  if (device != (void *)0x7f0000000001 || length < 64) return 2;
  strcpy(name, "Tesla T4"); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 7; *minor = 5; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, nvmlMemory_t *memory) { memory->total = 16106127360ULL; return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strcpy(version, "535.104.05"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12020; return 0; }
"""

CPU_ARM = (
    "processor\t: 0\nFeatures\t: fp asimd atomics fphp asimdhp crc32 asimddp\n\nprocessor\t: 1\nFeatures\t: fp asimd\n"
)
CPU_X86 = "processor\t: 0\nflags\t\t: fpu avx avx2 bmi1 bmi2 f16c fma abm movbe\n"


def lay_out(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files below ``root``."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def nvml(root: Path, *, init: int = 0) -> Path:
    """A machine whose driver has NVML; ``init`` is what ``nvmlInit`` answers (9: the driver is not loaded)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler makes the double of NVML"
    folder = root / "usr/lib/x86_64-linux-gnu"
    folder.mkdir(parents=True, exist_ok=True)
    source = root / "nvml.c"
    source.write_text(NVML)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", f"-DINIT={init}", "-o", library, source], check=True)
    return root


def npu_smi(folder: Path, name: str, code: int = 0) -> str:
    """A program that prints the table of ``npu-smi info``."""
    path = folder / "npu-smi"
    path.write_text(f'#!/bin/sh\n[ "$1" = info ] || exit 2\ncat <<"END"\n{NPU_SMI.format(name=name)}END\nexit {code}\n')
    path.chmod(0o755)
    return str(path)


JETSON = {
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/cpuinfo": CPU_ARM,
    "proc/meminfo": "MemTotal:       64349200 kB\nMemFree: 1 kB\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
    "var/lib/dpkg/status": (
        "Package: libc6\nVersion: 2.35-0ubuntu3\n\nPackage: libnvinfer10\nStatus: install ok installed\n"
        "Architecture: arm64\nVersion: 10.3.0.30-1+cuda12.5\nDescription: TensorRT\n\n"
        "Package: nvidia-jetpack\nVersion: 6.2+b77\n\n"
    ),
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10": "",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
}

ROCK_5B = {
    "proc/device-tree/compatible": "radxa,rock-5b\0rockchip,rk3588\0",
    "proc/device-tree/model": "Radxa ROCK 5B\0",
    "proc/cpuinfo": CPU_ARM,
    "usr/lib/librknnrt.so": b"\x7fELF\0\0librknnrt version: 2.3.2 (429f97ae6b@2025-04-09T09:09:27)\0\0",
    "sys/kernel/debug/rknpu/version": "RKNPU driver: v0.9.8\n",
}

ATLAS = {
    "sys/bus/pci/devices/0000:41:00.0/vendor": "0x19e5\n",
    "sys/bus/pci/devices/0000:41:00.0/class": "0x120000\n",
    "proc/cpuinfo": CPU_ARM,
    "usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info": (
        "package_name=Ascend-cann-toolkit\nversion=8.0.RC3\narch=aarch64\nos=linux\n"
    ),
}

PHONE = {
    "proc/device-tree/compatible": "qcom,kalama-qrd\0qcom,sm8550\0",
    "vendor/lib64/libQnnSystem.so": b"\x7fELF\0v2.51.0.260929181845\0",
}
