"""One plain schedule for every kernel: tiles held in registers, vectors along the last axis, threads outside.

No measurement and no per-model constant. A kernel that a rule cannot have is left as TVM wrote it. Works through the
``tvm.s_tir.Schedule`` that it is given and imports nothing, so only :mod:`.api` knows TVM.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from modelforge.compilers.tvm.api import DATA_PARALLEL, REDUCTION, blocks, extent, is_reduction
from modelforge.compilers.tvm.kernels.loops import PARALLEL_WORK, vectorize_copy
from modelforge.compilers.tvm.machine import Machine

_ROWS = 4
"""Rows of the register tile: with two vectors per row it takes 8 of the 16 registers that AVX2 has, 32 on Arm."""


@dataclass(frozen=True)
class Generic:
    """What no other rule wants."""

    name: str = "generic"

    def schedule(self, sch: Any, machine: Machine) -> str:
        """Schedule every block by itself."""
        _inline(sch)
        for block in blocks(sch):
            if is_reduction(sch, block):
                _reduce(sch, block, machine.lanes())
            else:
                vectorize_copy(sch, block, machine)
        return ""


def _inline(sch: Any) -> None:
    """Merge chains of elementwise blocks. Padding stays: inlined, it would put a branch into the inner loop."""
    for block in blocks(sch)[:-1]:
        if is_reduction(sch, block) or "pad" in sch.get(block).name_hint:
            continue
        try:
            sch.compute_inline(block)
        except Exception:  # ScheduleError: an output of the function, or read in a way that cannot be inlined
            continue


def _reduce(sch: Any, block: Any, lanes: int) -> None:
    """Reorder to: outer tiles (threads), reduction, rows of the tile (unrolled), columns of the tile (vectors)."""
    loops = sch.get_loops(block)
    kinds = [int(var.iter_type) for var in sch.get(block).iter_vars]
    if len(kinds) != len(loops) or set(kinds) != {DATA_PARALLEL, REDUCTION}:
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == DATA_PARALLEL]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCTION]
    work = prod(extent(sch, loop) for loop in loops)
    wide = [loop for loop in spatial if extent(sch, loop) > 1]
    if not wide:
        return
    column = wide[-1]
    # The axis whose elements share what is read along the columns: output channels, or rows of a matrix.
    row = spatial[1] if len(spatial) == 4 else spatial[-2] if len(spatial) > 1 else None
    width = _width(extent(sch, column), 2 * lanes)
    height = _width(extent(sch, row), _ROWS) if row is not None and row is not column else 1
    outer, inner = [], []
    for loop in spatial:
        factor = width if loop is column else height if loop is row else 1
        if factor == 1:
            outer.append(loop)
            continue
        rest, tile = sch.split(loop, factors=[None, factor])
        outer.append(rest)
        inner.append(tile)
    sch.reorder(*outer, *reduction, *inner)
    # The tile's sums in a buffer of its own, small and fully unrolled: LLVM keeps it in registers.
    write = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(write, outer[-1], preserve_unit_loops=True)
    copies = sch.get_loops(write)[len(outer) :]
    if width > 1:
        sch.vectorize(inner[-1])
        sch.vectorize(copies[-1])
        inner, copies = inner[:-1], copies[:-1]
    for loop in (*inner, *copies):
        sch.unroll(loop)
    _spread(sch, outer, work)
    # Last: the block that remains for the updates alone can no longer be made parallel.
    sch.decompose_reduction(block, reduction[0])


def _spread(sch: Any, loops: list[Any], work: int) -> None:
    if work >= PARALLEL_WORK:
        sch.parallel(sch.fuse(*loops) if len(loops) > 1 else loops[0])


def _width(extent: int, most: int) -> int:
    """The largest divisor of ``extent`` up to ``most``: a tile that is always full needs no mask."""
    return max(size for size in range(1, most + 1) if extent % size == 0)
