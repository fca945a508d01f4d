"""A module of graphs in, object files and weights out: lowered to kernels, scheduled by rules, compiled by LLVM."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.tvm import lowering, pipeline, scheduling, weights
from modelforge.compilers.tvm.api import empty_kernel, target
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.scheduling import KernelReport
from modelforge.compilers.tvm.signature import WEIGHTS_NAME
from modelforge.compilers.tvm.weights import Weights


@dataclass(frozen=True)
class Objects:
    """Object files to link, in order, what became of the kernels in them, and the weights that they read."""

    files: tuple[Path, ...]
    weights: Weights
    kernels: tuple[KernelReport, ...]


def build(module: Any, machine: Machine, folder: Path) -> Objects:
    """Lower, schedule and generate code; the object files and the weights go into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    module = lowering.lower(module, machine)
    module, kernels = scheduling.schedule_all(module, machine)
    if not kernels:  # constants, views and calls of the runtime's own: TVM would write C++ instead of an object file
        module["nothing"] = empty_kernel()
    module, lifted = weights.lift(module, folder / WEIGHTS_NAME)
    executable = pipeline.compile_module(module, target(machine))
    scratch = folder / "scratch"
    scratch.mkdir()
    collected: list[Path] = []

    def collect(_: str, files: Sequence[str], **__: Any) -> None:
        collected.extend(Path(shutil.copy(file, folder / Path(file).name)) for file in files)

    executable.export_library(str(folder / "unlinked.so"), fcompile=collect, workspace_dir=str(scratch))
    shutil.rmtree(scratch)
    return Objects(tuple(collected), lifted, tuple(kernels))
