"""Idioms of schedules that several rules share."""

from __future__ import annotations

from math import gcd, prod
from typing import Any, Final

from modelforge.compilers.tvm.api import block_name, blocks, extent, is_reduction
from modelforge.compilers.tvm.machine import Machine

PARALLEL_WORK: Final = 16384
"""Scalar steps below which waking the threads costs more than it gives."""


def neighbours(sch: Any, anchor: Any) -> tuple[list[Any], list[Any]]:
    """The blocks before and after the main one, after all that can be inlined has been: pads before, one block after.

    What stands before is merged into its readers except padding and what reduces, what stands after into the last.
    """
    own = block_name(sch, anchor)
    names = [block_name(sch, block) for block in blocks(sch)]
    before, after = names[: names.index(own)], names[names.index(own) + 1 :]
    for name in before:
        if "pad" not in name and not is_reduction(sch, sch.get_sblock(name)):
            sch.compute_inline(sch.get_sblock(name))
    for name in after[:-1]:
        sch.compute_inline(sch.get_sblock(name))
    names = [block_name(sch, block) for block in blocks(sch)]
    at = names.index(own)
    return [sch.get_sblock(name) for name in names[:at]], [sch.get_sblock(name) for name in names[at + 1 :]]


def vector_width(count: int, lanes: int) -> int:
    """The widest vector up to ``lanes`` that divides ``count``: it needs no mask."""
    return gcd(count, lanes) if lanes & (lanes - 1) == 0 else 1


def spread(sch: Any, loops: list[Any], work: int, machine: Machine) -> None:
    """Fuse loops into one, and share it among threads where there is work for them."""
    if not loops:
        return
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    if work >= PARALLEL_WORK and machine.cores > 1 and extent(sch, fused) > 1:
        sch.parallel(fused)


def vectorize_copy(sch: Any, block: Any, machine: Machine, dtype: str = "float32") -> None:
    """Vectors along the last axis, threads over the rest: for blocks that move or map elements."""
    loops = sch.get_loops(block)
    while loops and extent(sch, loops[-1]) == 1:
        loops = loops[:-1]
    if not loops:
        return
    work = prod(extent(sch, loop) for loop in loops)
    *outer, last = loops
    lanes = machine.lanes(dtype)
    width = vector_width(extent(sch, last), lanes)
    if width > 1:
        rest, vector = sch.split(last, factors=[None, width])
        sch.vectorize(vector)
        outer.append(rest)
    else:
        outer.append(last)
    spread(sch, outer, work, machine)


def vectorize_last(sch: Any, block: Any, lanes: int) -> None:
    """Vectors along the last axis of a block that stands inside the loops of another."""
    last = sch.get_loops(block)[-1]
    width = vector_width(extent(sch, last), lanes)
    if width > 1:
        sch.vectorize(sch.split(last, factors=[None, width])[1])


def unroll_tail(sch: Any, loops: list[Any], lanes: int) -> None:
    """The loops of a register tile's results: the last one in vectors, the others unrolled."""
    *outer, last = loops
    width = vector_width(extent(sch, last), lanes)
    if width > 1:
        rest, vector = sch.split(last, factors=[None, width])
        sch.vectorize(vector)
        outer.append(rest)
    for loop in outer:
        sch.unroll(loop)


def partition(sch: Any, loop: Any) -> None:
    """Cut a loop in two where a predicate below it stops being always true: the first part, nearly all of it, then has
    no predicate, and its vectors stay vectors. TVM's LoopPartition does it when code is generated."""
    sch.annotate(loop, "pragma_loop_partition_hint", 1)


def reductions(sch: Any) -> list[Any]:
    """The blocks that reduce."""
    return [block for block in blocks(sch) if is_reduction(sch, block)]
