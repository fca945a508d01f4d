"""NVIDIA GPUs, asked of the driver's management library (NVML) with ctypes: no process, no vendor module.

NVML API reference, https://docs.nvidia.com/deploy/nvml-api/; its structures and names have stood since driver 285.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NAMES = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "usr/lib/wsl/lib")
_LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0
_TEXT_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
_MOST_GPUS = 64


@dataclass(frozen=True)
class Card:
    """One GPU; ``sm`` is its compute capability without the dot."""

    name: str
    sm: int
    memory_bytes: int | None


@dataclass(frozen=True)
class Answer:
    gpus: tuple[Card, ...]
    versions: Mapping[str, str]


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def ask(root: Path = Path("/")) -> Answer | None:
    """What NVML says; None where there is no NVML, or where it does not work (no driver loaded, no GPU passed on)."""
    library = _load(root)
    if library is None:
        return None
    try:
        if library.nvmlInit_v2() != _SUCCESS:
            return None
        try:
            return Answer(_gpus(library), _versions(library))
        finally:
            library.nvmlShutdown()
    except AttributeError:  # a function that this library does not have: too old, or no NVML
        return None


def _load(root: Path) -> ctypes.CDLL | None:
    wanted = [_LIBRARY] if root == Path("/") else []
    wanted += [str(root / folder / _LIBRARY) for folder in _NAMES if (root / folder / _LIBRARY).is_file()]
    for name in wanted:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _gpus(library: ctypes.CDLL) -> tuple[Card, ...]:
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _SUCCESS:
        return ()
    cards = (_card(library, index) for index in range(min(count.value, _MOST_GPUS)))
    return tuple(card for card in cards if card is not None)


def _card(library: ctypes.CDLL, index: int) -> Card | None:
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != _SUCCESS:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    asked = library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    if asked != _SUCCESS:
        return None
    name = ctypes.create_string_buffer(_TEXT_BYTES)
    named = library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_TEXT_BYTES)) == _SUCCESS
    memory = _Memory()
    # Not supported on Jetson and GB10, whose memory is the CPU's.
    has_memory = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == _SUCCESS
    return Card(
        name.value.decode(errors="replace") if named else "",
        major.value * 10 + minor.value,
        memory.total if has_memory and memory.total else None,
    )


def _versions(library: ctypes.CDLL) -> dict[str, str]:
    found = {}
    driver = ctypes.create_string_buffer(_TEXT_BYTES)
    if library.nvmlSystemGetDriverVersion(driver, ctypes.c_uint(_TEXT_BYTES)) == _SUCCESS:
        found["nvidia_driver"] = driver.value.decode(errors="replace")
    cuda = ctypes.c_int()
    if library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda)) == _SUCCESS and cuda.value:
        found["cuda"] = f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"
    return found
