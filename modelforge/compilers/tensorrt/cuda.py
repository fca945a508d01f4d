"""The CUDA driver through ctypes: which GPUs are here, device memory, streams, events. Importing it needs no GPU.

The driver (``libcuda``) and not the runtime (``libcudart``): it is wherever a GPU is, under one name, however TensorRT
was installed; the runtime's name and place change with the CUDA version. TensorRT works in the same primary context.
Names and numbers: cuda.h, CUDA Driver API.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from modelforge.errors import BuildError

LIBRARY = "libcuda.so.1"

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_NAME_BYTES = 256

_int = ctypes.c_int
_size = ctypes.c_size_t
_handle = ctypes.c_void_p
_address = ctypes.c_uint64
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuDriverGetVersion": [ctypes.POINTER(_int)],
    "cuDeviceGetCount": [ctypes.POINTER(_int)],
    "cuDeviceGet": [ctypes.POINTER(_int), _int],
    "cuDeviceGetName": [ctypes.c_char_p, _int, _int],
    "cuDeviceGetAttribute": [ctypes.POINTER(_int), _int, _int],
    "cuDeviceTotalMem_v2": [ctypes.POINTER(_size), _int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_handle), _int],
    "cuCtxSetCurrent": [_handle],
    "cuMemGetInfo_v2": [ctypes.POINTER(_size), ctypes.POINTER(_size)],
    "cuMemAlloc_v2": [ctypes.POINTER(_address), _size],
    "cuMemFree_v2": [_address],
    "cuMemcpyHtoDAsync_v2": [_address, _handle, _size, _handle],
    "cuMemcpyDtoHAsync_v2": [_handle, _address, _size, _handle],
    "cuStreamCreate": [ctypes.POINTER(_handle), ctypes.c_uint],
    "cuStreamSynchronize": [_handle],
    "cuEventCreate": [ctypes.POINTER(_handle), ctypes.c_uint],
    "cuEventRecord": [_handle, _handle],
    "cuEventSynchronize": [_handle],
    "cuEventElapsedTime": [ctypes.POINTER(ctypes.c_float), _handle, _handle],
    "cuGetErrorName": [_int, ctypes.POINTER(ctypes.c_char_p)],
}


@dataclass(frozen=True)
class Gpu:
    """One GPU: ``sm`` is its compute capability without the dot, ``driver`` the CUDA version that its driver has."""

    index: int
    name: str
    sm: int
    memory: int
    driver: str


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """The GPUs of this machine, as a child process sees them; none where there is no driver."""
    del request
    try:
        found = Driver().gpus()
    except BuildError as error:
        return {"gpus": [], "reason": error.what}
    return {"gpus": [vars(gpu) for gpu in found], "reason": "" if found else "the driver says that there is no GPU"}


class Driver:
    """The loaded driver.

    Raises:
        BuildError: it is not here, or a call fails (the name of CUDA's error is in the message).
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
            for name, arguments in _SIGNATURES.items():
                call = getattr(self._library, name)
                call.argtypes, call.restype = arguments, _int
        except (OSError, AttributeError) as error:
            raise BuildError(f"there is no CUDA driver: {error}", fix="install the driver of the GPU") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """One call; anything but CUDA_SUCCESS is an error."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            told = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(told))
            reason = told.value.decode() if told.value else f"error {code}"
            raise BuildError(f"CUDA: {name} failed, {reason}", fix=_FIXES.get(reason))

    def gpus(self) -> list[Gpu]:
        count, version = _int(), _int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        self.call("cuDriverGetVersion", ctypes.byref(version))
        driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return [self._gpu(index, driver) for index in range(count.value)]

    def use(self, gpu: Gpu) -> None:
        """Make the GPU's primary context current: what TensorRT then works in."""
        context = _handle()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(gpu.index))
        self.call("cuCtxSetCurrent", context)

    def free_bytes(self) -> int:
        free, total = _size(), _size()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        """Device memory; its address. At least one byte, so that every tensor has an address."""
        address = _address()
        self.call("cuMemAlloc_v2", ctypes.byref(address), max(1, size))
        return address.value

    def release(self, address: int) -> None:
        self.call("cuMemFree_v2", address)

    def stream(self) -> int:
        handle = _handle()
        self.call("cuStreamCreate", ctypes.byref(handle), 0)
        return int(handle.value or 0)

    def wait(self, stream: int) -> None:
        """Until all is done. A fault inside a kernel shows here."""
        self.call("cuStreamSynchronize", stream)

    def to_device(self, address: int, host: int, size: int, stream: int) -> None:
        self.call("cuMemcpyHtoDAsync_v2", address, host, size, stream)

    def to_host(self, host: int, address: int, size: int, stream: int) -> None:
        self.call("cuMemcpyDtoHAsync_v2", host, address, size, stream)

    def event(self) -> int:
        handle = _handle()
        self.call("cuEventCreate", ctypes.byref(handle), 0)
        return int(handle.value or 0)

    def record(self, event: int, stream: int) -> None:
        self.call("cuEventRecord", event, stream)

    def milliseconds(self, first: int, second: int) -> float:
        """The GPU's time between two events, the second waited for."""
        self.call("cuEventSynchronize", second)
        elapsed = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(elapsed), first, second)
        return float(elapsed.value)

    def _device(self, index: int) -> int:
        device = _int()
        self.call("cuDeviceGet", ctypes.byref(device), index)
        return device.value

    def _gpu(self, index: int, driver: str) -> Gpu:
        device = self._device(index)
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", name, _NAME_BYTES, device)
        memory = _size()
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        major, minor = self._attribute(_MAJOR, device), self._attribute(_MINOR, device)
        return Gpu(index, name.value.decode(errors="replace"), 10 * major + minor, memory.value, driver)

    def _attribute(self, attribute: int, device: int) -> int:
        value = _int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value


_FIXES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free memory of the GPU, or run a smaller batch",
    "CUDA_ERROR_NO_DEVICE": "the driver is here and no GPU is: check the container's or machine's GPU access",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the loaded kernel driver is of another version than libcuda: restart",
}
