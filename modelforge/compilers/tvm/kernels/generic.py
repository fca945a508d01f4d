"""One plain schedule for every kernel: tiles held in registers, vectors along the last axis, threads outside.

No measurement and no per-model constant. Elements that do not fill a vector at the end of an axis are done one by one,
in a loop of their own. What has no vectors at all is named "scalar" in the report: a search for a position, a reduction
to one number of a type that no other rule takes, or an axis shorter than a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

from modelforge.compilers.tvm.api import (
    DATA_PARALLEL,
    REDUCTION,
    block_name,
    blocks,
    extent,
    is_reduction,
    written_dtype,
)
from modelforge.compilers.tvm.kernels.loops import partition, spread, vectorize_copy
from modelforge.compilers.tvm.machine import Machine

_ROWS: Final = 4
"""Rows of the register tile: with two vectors per row it takes 8 of the 16 registers that AVX2 has, 32 on Arm."""


@dataclass(frozen=True)
class Generic:
    """What no other rule wants."""

    name: str = "generic"

    def schedule(self, sch: Any, machine: Machine) -> str:
        """Schedule every block by itself."""
        _inline(sch)
        scalar = []
        for block in blocks(sch):
            lanes = machine.lanes(written_dtype(sch, block))
            if is_reduction(sch, block):
                width = _reduce(sch, block, lanes, machine)
            else:
                width = vectorize_copy(sch, block, machine, written_dtype(sch, block))
            if width == 1:
                scalar.append(block_name(sch, block))
        return f"scalar: {', '.join(scalar)}" if scalar else ""


def _inline(sch: Any) -> None:
    """Merge chains of elementwise blocks. Padding stays: inlined, it would put a branch into the inner loop."""
    for block in blocks(sch)[:-1]:
        if is_reduction(sch, block) or "pad" in sch.get(block).name_hint:
            continue
        try:
            sch.compute_inline(block)
        except Exception:  # ScheduleError: an output of the function, or read in a way that cannot be inlined
            continue


def _reduce(sch: Any, block: Any, lanes: int, machine: Machine) -> int:
    """Order the loops: outer tiles (threads), reduction, rows of the tile (unrolled), columns of the tile (vectors).

    Returns the width of the vectors, 1 without any.
    """
    loops = sch.get_loops(block)
    kinds = [int(var.iter_type) for var in sch.get(block).iter_vars]
    if len(kinds) != len(loops) or set(kinds) != {DATA_PARALLEL, REDUCTION}:
        return 1
    work = prod(extent(sch, loop) for loop in loops)
    spatial = [at for at, kind in enumerate(kinds) if kind == DATA_PARALLEL]
    column = next((at for at in reversed(spatial) if extent(sch, loops[at]) > 1), None)
    if column is None or len(sch.get(block).writes) > 1:
        return 1
    return _tile(sch, block, spatial, column, lanes, work, machine)


def _tile(sch: Any, block: Any, spatial: list[int], column: int, lanes: int, work: int, machine: Machine) -> int:
    """Sums of a tile in a buffer of its own, fully unrolled: LLVM keeps them in registers.

    The tile's results are copied out by a block that the loops are driven from.
    """
    places = {at: position for position, at in enumerate(spatial)}
    count = extent(sch, sch.get_loops(block)[column])
    # The axis whose elements share what is read along the columns: output channels, or rows of a matrix.
    row = places[spatial[1] if len(spatial) == 4 else spatial[-2]] if len(spatial) > 1 else None
    out = sch.cache_write(block, 0, "local")
    loops = sch.get_loops(out)
    own = places[column]
    width = min(lanes, 1 << (count.bit_length() - 1))
    columns = 2 * width if count >= 2 * width and (count % (2 * width) == 0 or count >= 8 * width) else width
    tiles = {own: columns}
    if row is not None and row != own:
        tiles[row] = _divisor(extent(sch, loops[row]), _ROWS)
    outer, inner = [], {}
    for position, loop in enumerate(loops):
        rest, inner[position] = sch.split(loop, factors=[None, tiles[position]]) if position in tiles else (loop, None)
        outer.append(rest)
    own_rest, own_tile = outer.pop(own), inner[own]
    rows = [inner[row]] if row is not None and row != own else []
    sch.reorder(*outer, own_rest, *rows, own_tile)
    sch.compute_at(block, own_rest, preserve_unit_loops=True)
    for tile in rows:
        sch.unroll(tile)
    _lanes(sch, own_tile, width)
    if count % columns:
        partition(sch, own_rest)
        spread(sch, outer, work, machine)
    else:
        spread(sch, [*outer, own_rest], work, machine)
    _sums(sch, block, len(spatial), own, width)
    return width


def _sums(sch: Any, block: Any, spatial: int, own: int, width: int) -> None:
    """The loops of a tile's sums: reduction outside, rows unrolled, columns in vectors."""
    kinds = [int(var.iter_type) for var in sch.get(block).iter_vars]
    loops = sch.get_loops(block)[-len(kinds) :]
    axes = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == DATA_PARALLEL]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCTION]
    assert len(axes) == spatial, "a reduction keeps its axes"
    columns = axes.pop(own)
    sch.reorder(*reduction, *axes, columns)
    for axis in axes:
        sch.unroll(axis)
    _lanes(sch, columns, width)
    sch.decompose_reduction(block, reduction[0])


def _lanes(sch: Any, loop: Any, width: int) -> None:
    """A short loop as vectors, unrolled."""
    if width > 1:
        vector, lane = sch.split(loop, factors=[None, width])
        sch.vectorize(lane)
        sch.unroll(vector)
    else:
        sch.unroll(loop)


def _divisor(count: int, most: int) -> int:
    """The largest divisor up to ``most``: a tile that is always full needs no mask."""
    return max(size for size in range(1, most + 1) if count % size == 0)
