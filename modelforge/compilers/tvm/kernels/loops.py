"""Idioms of schedules that several rules share."""

from __future__ import annotations

from math import gcd, prod
from typing import Any, Final

from modelforge.compilers.tvm.api import (
    DATA_PARALLEL,
    block_name,
    blocks,
    extent,
    is_choice,
    is_reduction,
    variables,
    written_dtype,
)
from modelforge.compilers.tvm.machine import Machine

PARALLEL_WORK: Final = 16384
"""Scalar steps below which waking the threads costs more than it gives."""
_KEPT: Final = ("pad", "load")
"""Blocks of a name with one of these stay blocks."""


def neighbours(sch: Any, anchor: Any, machine: Machine) -> tuple[list[Any], list[Any]]:
    """The blocks before and after the main one, after all that can be inlined has been: pads before, one block after.

    What stands before is merged into its readers except padding, loads of a tile and what reduces, what stands after
    into the last.
    Where a result is broadcast (the factors of a squeeze-and-excitation over an image), the larger part is a loop of
    its own, scheduled here: the rule shall not compute its sums again for every pixel.
    """
    own = block_name(sch, anchor)
    names = [block_name(sch, block) for block in blocks(sch)]
    before, after = names[: names.index(own)], names[names.index(own) + 1 :]
    for name in before:
        if not any(kind in name for kind in _KEPT) and not is_reduction(sch, sch.get_sblock(name)):
            sch.compute_inline(sch.get_sblock(name))
    sizes = [spatial_size(sch, sch.get_sblock(name)) for name in after]
    widest = spatial_size(sch, anchor)
    cut = next((at for at, size in enumerate(sizes) if size > widest), len(after))
    for name in [*after[: max(0, cut - 1)], *after[cut:-1]]:
        sch.compute_inline(sch.get_sblock(name))
    if cut < len(after):
        vectorize_copy(sch, sch.get_sblock(after[-1]), machine, written_dtype(sch, sch.get_sblock(after[-1])))
    names = [block_name(sch, block) for block in blocks(sch)]
    at, end = names.index(own), len(names) - (cut < len(after))
    return [sch.get_sblock(name) for name in names[:at]], [sch.get_sblock(name) for name in names[at + 1 : end]]


def spatial_size(sch: Any, block: Any) -> int:
    """How many elements a block writes."""
    axes = (var for var in sch.get(block).iter_vars if int(var.iter_type) == DATA_PARALLEL)
    return prod(int(var.dom.extent) for var in axes)


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


def vectorize_copy(sch: Any, block: Any, machine: Machine, dtype: str = "float32") -> int:
    """Vectors along the last axis, threads over the rest: for blocks that move or map elements.

    Axes that all operands share in the same order count as one where the last alone has no whole vectors. What does not
    fill a vector at the end is done one by one in a loop of its own. Returns the width of the vectors; 1 where the last
    axis is too short for any.
    """
    loops = sch.get_loops(block)
    work = prod(extent(sch, loop) for loop in loops)
    lanes = machine.lanes(dtype)
    while loops and extent(sch, loops[-1]) == 1:
        loops = loops[:-1]
    if not loops:
        return 1
    if len(loops) > 1 and extent(sch, loops[-1]) % lanes and _counts_as_one(sch, loops, lanes):
        loops = [sch.fuse(*loops)] if same_order(sch, block) else loops
    *outer, last = loops
    count = extent(sch, last)
    width = vector_width(count, lanes)
    cut = count > lanes and (2 * width < lanes or has_border(sch, block))
    width = lanes if cut else width
    rest = last
    if width > 1:
        rest, vector = sch.split(last, factors=[None, width])
        sch.vectorize(vector)
    if cut:
        partition(sch, rest)
        spread(sch, outer, work, machine)
    else:
        spread(sch, [*outer, rest], work, machine)
    return int(width)


def has_border(sch: Any, block: Any) -> bool:
    """Whether a block pads along its last axis: the lanes of a vector would not all do the same."""
    body = sch.get(block)
    value: Any = getattr(body.body, "value", None)
    return is_choice(value) and any(var.same_as(body.iter_vars[-1].var) for var in variables(value.args[0]))


def _counts_as_one(sch: Any, loops: list[Any], lanes: int) -> bool:
    """Whether TVM finds that the index of a vector over all of these loops is the number of its elements.

    Where axes share different parts of a vector it divides what they share out of each first, and lanes are left with
    an index each (measured over shapes: a gather, five times the instructions).
    """
    sizes = [extent(sch, loop) for loop in loops]
    shared = {vector_width(prod(sizes[at:]), lanes) for at in range(1, len(sizes)) if prod(sizes[:at]) > 1}
    own = vector_width(sizes[-1], lanes)
    return own == 1 or len(shared) == 1 or (own == sizes[-1] and len(shared - {lanes}) == 1)


def same_order(sch: Any, block: Any) -> bool:
    """Whether every operand of a block has the shape of its result, and is read where the result is written."""
    body = sch.get(block)
    axes = [str(var.var) for var in body.iter_vars]
    shape = [str(size) for size in body.writes[0].source.shape]
    regions = [*body.reads, *body.writes]
    return all(
        [str(axis.min) for axis in region.region] == axes and [str(size) for size in region.source.shape] == shape
        for region in regions
    )


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
