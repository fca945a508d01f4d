"""Which GPUs this machine has, and why an engine for a target can or cannot be built and run here."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from modelforge.compilers.tensorrt.cuda import LIBRARY, Gpu
from modelforge.errors import ModelForgeError
from modelforge.target import CudaArchitecture, Target
from modelforge.toolchains import worker

# Where the kernel driver shows itself: discrete GPUs, Jetson (older and newer), WSL 2.
_DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
_PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
_TIMEOUT = 60.0


def environment(gpu: Gpu | None = None) -> dict[str, str]:
    """What our children that load NVIDIA's libraries see of the caller's environment, and other children do not.

    TensorRT from a tar archive, and the driver in many containers, are found only by ``LD_LIBRARY_PATH``. With ``gpu``
    the child sees that one alone: the builder takes the first one that it sees.
    """
    passed = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    if gpu is None:
        return passed
    visible = passed.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = visible[gpu.index] if len(visible) > gpu.index and visible[0] else str(gpu.index)
    return passed | {"CUDA_VISIBLE_DEVICES": chosen}


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine. Costs nothing where there is no driver, else one child process, once."""
    return _gpus(tuple(sorted(environment().items())))


def fitting(target: Target) -> Gpu | None:
    """The first GPU here that has the target's compute capability."""
    arch = target.arch
    return next((gpu for gpu in gpus() if isinstance(arch, CudaArchitecture) and gpu.sm == arch.sm), None)


def why_not(target: Target) -> str | None:
    """Why no GPU here can build or run engines of this target; None where one can: it has its compute capability."""
    if not isinstance(target.arch, CudaArchitecture):
        return f"{target.tag} is no NVIDIA GPU"
    if fitting(target) is not None:
        return None
    here = gpus()
    wanted = f"compute capability {dotted(target.arch.sm)}"
    if not here:
        return f"no NVIDIA GPU is here, and {target.tag} has {wanted}"
    found = ", ".join(f"{gpu.name} ({dotted(gpu.sm)})" for gpu in here)
    return f"the GPU here is {found}, and {target.tag} has {wanted}"


def dotted(sm: int) -> str:
    """75 as 7.5, 120 as 12.0."""
    return f"{sm // 10}.{sm % 10}"


@cache
def _gpus(seen: tuple[tuple[str, str], ...]) -> tuple[Gpu, ...]:
    search = dict(seen).get("LD_LIBRARY_PATH", "")
    in_path = any((Path(folder) / LIBRARY).exists() for folder in search.split(os.pathsep) if folder)
    if not in_path and not any(Path(node).exists() for node in _DEVICE_NODES):
        return ()
    with tempfile.TemporaryDirectory(prefix="modelforge-gpus-") as folder:
        try:
            answer = worker.call(
                "modelforge.compilers.tensorrt.cuda:describe",
                {},
                workdir=Path(folder),
                timeout=_TIMEOUT,
                what="asking the CUDA driver",
                env=dict(seen),
            )
        except ModelForgeError:  # a driver that crashes or hangs serves nobody: there is no GPU to count on
            return ()
    return tuple(Gpu(**gpu) for gpu in answer["gpus"])
