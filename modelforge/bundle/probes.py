"""Reads what a machine is from its file system: device tree, PCI, package databases, names and texts of libraries.

Every probe takes the root folder, so that another machine's files can stand for it. What is not found is absent.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelforge.bundle import nvml
from modelforge.toolchains import process

_LIBRARY_FOLDERS = (
    "usr/lib", "usr/lib64", "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/local/lib", "lib", "lib64",
    "usr/local/tensorrt/lib", "usr/src/tensorrt/lib", "opt/tensorrt/lib", "usr/local/cuda/lib64",
    "vendor/lib64", "vendor/lib", "system/lib64", "oem/usr/lib", "usr/lib/wsl/lib",
)  # fmt: skip
_TEXT_LIMIT = 16 << 20
_PCI_NVIDIA, _PCI_HUAWEI = "0x10de", "0x19e5"

# The GPU of a Tegra SoC by its device-tree name (linux, Documentation/devicetree/bindings/arm/tegra.yaml; compute
# capabilities: NVIDIA, CUDA GPU Compute Capability table).
_TEGRA_SM = {"nvidia,tegra194": 72, "nvidia,tegra234": 87, "nvidia,tegra264": 110}

# Device-tree name -> rknn-toolkit2's target_platform. Chips of one row run each other's files (rknn-toolkit2, user
# guide: `rk3566/rk3568`, `rk3588/rk3588s`; `rv1103/rv1106` share a library but not their files).
_ROCKCHIP = {
    "rockchip,rk3562": "rk3562",
    "rockchip,rk3566": "rk3566",
    "rockchip,rk3568": "rk3566",
    "rockchip,rk3576": "rk3576",
    "rockchip,rk3588": "rk3588",
    "rockchip,rk3588s": "rk3588",
    "rockchip,rv1103": "rv1103",
    "rockchip,rv1106": "rv1106",
}

# Device-tree name (linux, include/dt-bindings/arm/qcom,ids.h) -> Hexagon version and QNN's SoC model, as the target
# profiles have them (ExecuTorch backends/qualcomm/serialization/qc_schema.py).
_QUALCOMM = {
    "qcom,sm8350": (68, 30),
    "qcom,qcm6490": (68, 93),
    "qcom,sm8450": (69, 36),
    "qcom,sm8550": (73, 43),
    "qcom,qcs9100": (73, 77),
    "qcom,sm8650": (75, 57),
    "qcom,sm8750": (79, 69),
}

# Python packages that carry a runtime, by the key that they tell the version of.
_PACKAGES = {
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11", "tensorrt"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}

# Debian packages, for versions with a build number that the library's name does not have.
_DEBIAN = {"tensorrt": rb"libnvinfer[0-9]+", "jetpack": rb"nvidia-jetpack"}

# Shared libraries whose file name ends in their version.
_SONAMES = {
    "tensorrt": "libnvinfer.so.*",
    "tensorrt_rtx": "libtensorrt_rtx.so.*",
    "onnxruntime": "libonnxruntime.so.*",
}


@dataclass(frozen=True)
class Probe:
    """What was found: None where that cannot be told; ``note`` says why."""

    found: Any
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def nvidia(root: Path, compatible: tuple[str, ...] | None) -> Probe:
    """NVIDIA GPUs, from the driver's management library or the SoC's name, with the versions around them."""
    versions = _driver_version(root) | _jetson_versions(root)
    asked = nvml.ask(root)
    if asked is not None and asked.gpus:
        return Probe([vars(gpu) for gpu in asked.gpus], {**versions, **asked.versions})
    for name in compatible or ():
        if name in _TEGRA_SM:
            gpu = {"name": model(root), "sm": _TEGRA_SM[name], "memory_bytes": memory(root)}
            return Probe([gpu], {**versions, **(asked.versions if asked else {})})
    traces = [root / "proc/driver/nvidia", root / "dev/nvidiactl", root / "dev/nvidia0", root / "dev/dxg"]
    if any(path.exists() for path in traces) or _on_pci(root, _PCI_NVIDIA, "0x03"):
        return Probe(None, versions, "an NVIDIA GPU seems to be here, but its driver (NVML) does not tell which")
    return Probe([], versions)


def ascend(root: Path, program: str = "npu-smi") -> Probe:
    """Ascend processors: only ``npu-smi`` tells their names. It is started only where there is a sign of one."""
    versions = _cann_version(root)
    if not _on_pci(root, _PCI_HUAWEI, "0x12") and not any((root / "dev").glob("davinci[0-9]*")):
        return Probe((), versions)
    names = _npu_names(program)
    if names:
        return Probe(names, versions)
    return Probe(None, versions, "an Ascend processor is here, but `npu-smi info` does not tell its exact name")


def device_tree(root: Path) -> tuple[str, ...] | None:
    """What the board calls itself, most exact first; None where the machine has no device tree."""
    for place in ("proc/device-tree/compatible", "sys/firmware/devicetree/base/compatible"):
        if content := text(root / place):
            return tuple(part for part in content.split("\0") if part)
    return None


def rockchip(compatible: tuple[str, ...] | None, isa: str | None) -> tuple[str, ...] | None:
    """Rockchip NPUs, as ``target_platform`` words."""
    if compatible is None:
        return _none_without_device_tree(isa)
    found = dict.fromkeys(_ROCKCHIP[name] for name in compatible if name in _ROCKCHIP)
    unknown = [name for name in compatible if name.startswith("rockchip,") and name not in _ROCKCHIP]
    return tuple(found) or (None if unknown else ())


def qualcomm(compatible: tuple[str, ...] | None, isa: str | None) -> tuple[dict[str, Any], ...] | None:
    """Qualcomm Hexagon tensor processors."""
    if compatible is None:
        return _none_without_device_tree(isa)
    names = [name for name in compatible if name.startswith("qcom,")]
    known = [name for name in names if name in _QUALCOMM]
    if not known:
        return None if names else ()
    arch, soc_model = _QUALCOMM[known[0]]
    return ({"soc": known[0].removeprefix("qcom,"), "htp_arch": arch, "soc_model": soc_model},)


def libraries(root: Path) -> dict[str, str]:
    """Versions that the names of installed libraries and Debian's package database tell."""
    found = {}
    for key, pattern in _SONAMES.items():
        numbers = [path.name.partition(".so.")[2] for path in _libraries(root, pattern)]
        # The file itself has the longest name; its links are cut after the major number.
        if numbers:
            found[key] = max(numbers, key=lambda number: (number.count("."), number))
    status = _read(root / "var/lib/dpkg/status", _TEXT_LIMIT)
    for key, name in _DEBIAN.items():
        if match := re.search(rb"^Package: %b$(?:\n(?!$).*)*?\nVersion: (\S+)" % name, status, re.MULTILINE):
            found[key] = match[1].decode(errors="replace")
    if symbols := re.findall(rb"GLIBCXX_3\.4\.([0-9]+)\0", _library(root, "libstdc++.so.6")):
        found["glibcxx"] = f"3.4.{max(map(int, symbols))}"
    return found


def of_this_process() -> dict[str, str]:
    """Versions that only this process can tell: of its C library, and of the packages of its Python."""
    found = {}
    try:
        name, _, number = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        if name == "glibc":
            found["glibc"] = number
    except (ValueError, OSError):  # musl knows no such name
        pass
    for key, packages in _PACKAGES.items():
        for package in packages:
            try:
                found[key] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
            break
    return found


def rockchip_versions(root: Path) -> dict[str, str]:
    """The version text inside ``librknnrt.so`` (``librknnmrt.so`` on RV1103 and RV1106), and that of the driver."""
    found = {}
    for name in ("librknnrt.so", "librknnmrt.so"):
        if match := re.search(rb"librknnm?rt version: ([0-9][0-9A-Za-z.]*)", _library(root, name)):
            found["rknn"] = match[1].decode()
            break
    if match := re.search(rb"v?([0-9]+(?:\.[0-9]+)+)", _read(root / "sys/kernel/debug/rknpu/version")):
        found["rknpu_driver"] = match[1].decode()
    return found


def qualcomm_versions(root: Path) -> dict[str, str]:
    """The SDK version inside QNN's libraries: ``v2.51.0.260929181845``."""
    for name in ("libQnnSystem.so", "libQnnHtp.so"):
        if match := re.search(rb"\0v(2\.[0-9]{1,3}\.[0-9]{1,3})\.[0-9]{12}", _library(root, name)):
            return {"qnn": match[1].decode()}
    return {}


def memory(root: Path) -> int | None:
    match = re.search(r"^MemTotal:\s+([0-9]+) kB", text(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def model(root: Path) -> str:
    """The board's name, as its device tree has it."""
    return text(root / "proc/device-tree/model").strip("\0\n ")


def text(path: Path) -> str:
    return _read(path).decode("utf-8", errors="replace")


# -- parts of the probes


def _driver_version(root: Path) -> dict[str, str]:
    """``NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build ...``."""
    match = re.search(
        r"^NVRM version:.*?\s([0-9]{3,}\.[0-9]+(?:\.[0-9]+)?)\s", text(root / "proc/driver/nvidia/version")
    )
    return {"nvidia_driver": match[1]} if match else {}


def _jetson_versions(root: Path) -> dict[str, str]:
    """``# R36 (release), REVISION: 4.3, ...`` is Jetson Linux 36.4.3. JetPack's major number follows from it."""
    match = re.match(r"# R([0-9]+) ?\(release\), REVISION: ([0-9.]+)", text(root / "etc/nv_tegra_release"))
    if not match:
        return {}
    found = {"l4t": f"{match[1]}.{match[2]}"}
    # https://developer.nvidia.com/embedded/jetpack-archive; the minor number is told by the Debian package only.
    major = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7"}.get(match[1])
    jetpack = libraries(root).get("jetpack") or major
    return found | ({"jetpack": jetpack} if jetpack else {})


def _cann_version(root: Path) -> dict[str, str]:
    """``version=8.0.RC1`` in the install record of the toolkit or the inference-only package.

    Before 8.5 it lies under ``ascend-toolkit/latest`` (or ``nnrt/latest``), since then under ``cann``.
    """
    homes = [root / "usr/local/Ascend" / part for part in ("cann", "ascend-toolkit/latest", "nnrt/latest")]
    if root == Path("/"):
        named = [os.environ.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
        homes = [Path(name) for name in named if name] + homes
    for home in homes:
        for path in sorted(home.glob("*-linux/ascend_*_install.info")):
            if match := re.search(r"^version=(\S+)", text(path), re.MULTILINE):
                return {"cann": match[1]}
    return {}


def _npu_names(program: str) -> tuple[str, ...]:
    """``soc_version`` words from the table of ``npu-smi info``: ``| 0     310P3  | OK  | ...`` is Ascend310P3.

    The bare family name that newer tables show (``Ascend910``) is no ``soc_version`` and is left out.
    """
    path = shutil.which(program) or shutil.which(
        program, path="/usr/local/sbin:/usr/local/bin:/usr/local/Ascend/driver/tools"
    )
    if path is None:
        return ()
    env = {"LD_LIBRARY_PATH": os.environ["LD_LIBRARY_PATH"]} if "LD_LIBRARY_PATH" in os.environ else None
    with tempfile.TemporaryDirectory(prefix="modelforge-probe-") as folder:
        log = Path(folder) / "npu-smi.log"
        try:
            done = process.run([path, "info"], cwd=Path(folder), log=log, timeout=20.0, env=env)
        except OSError:
            return ()
        table = text(log) if done.ok else ""
    names = re.findall(r"^\|\s*[0-9]+\s+(?:Ascend)?([0-9]{3}[A-Za-z0-9_-]+)\s*\|", table, re.MULTILINE)
    return tuple(dict.fromkeys(f"Ascend{name}" for name in names))


def _none_without_device_tree(isa: str | None) -> tuple[Any, ...] | None:
    """A machine without a device tree is a PC or server; an Arm one (Windows laptops, Android) may hide its SoC."""
    return () if isa == "x86-64" else None


def _on_pci(root: Path, vendor: str, kind: str) -> bool:
    """Whether a PCI device of this vendor has a class that begins so (0x03 display, 0x12 processing accelerator)."""
    devices = root / "sys/bus/pci/devices"
    return any(
        text(path).strip() == vendor and text(path.with_name("class")).startswith(kind)
        for path in devices.glob("*/vendor")
    )


def _libraries(root: Path, pattern: str) -> Iterator[Path]:
    for folder in _LIBRARY_FOLDERS:
        yield from (root / folder).glob(pattern)


def _library(root: Path, name: str) -> bytes:
    path = next(_libraries(root, name), None)
    return b"" if path is None else _read(path, 256 << 20)


def _read(path: Path, limit: int = 1 << 20) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(limit)
    except OSError:
        return b""
