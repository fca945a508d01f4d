"""A module of graphs in, object files out: lowered to kernels, scheduled by rules, compiled by LLVM."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.tvm import lowering, scheduling
from modelforge.compilers.tvm.api import target, tvm
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.scheduling import KernelReport


@dataclass(frozen=True)
class Objects:
    """Object files to link, in order, and what became of the kernels in them."""

    files: tuple[Path, ...]
    kernels: tuple[KernelReport, ...]


def build(module: Any, machine: Machine, folder: Path) -> Objects:
    """Lower, schedule and generate code; the object files go into ``folder``."""
    module = lowering.lower(module, machine)
    module, kernels = scheduling.schedule_all(module, machine)
    executable = tvm.compile(module, target(machine))
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "scratch"
    scratch.mkdir()
    collected: list[Path] = []

    def collect(_: str, files: Sequence[str], **__: Any) -> None:
        collected.extend(Path(shutil.copy(file, folder / Path(file).name)) for file in files)

    executable.export_library(str(folder / "unlinked.so"), fcompile=collect, workspace_dir=str(scratch))
    shutil.rmtree(scratch)
    return Objects(tuple(collected), tuple(kernels))
