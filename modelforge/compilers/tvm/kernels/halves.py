"""Sums of products in half precision: short ones in FP16 registers, added up in FP32.

Idea: FMLA of FP16 makes eight products at once, and rounds the sum after each. N of them in a row err by u sqrt(N / 2)
of the sum, root mean square (u: one rounding; the k-th partial sum is sqrt(k / N) of the last). So N products are
summed in FP16, widened and added to FP32 sums: the error does not grow with the length of the whole sum any more.
Cores without FMLAL (FEAT_FHM; Cortex-A76 and Neoverse N1 have none) cannot add FP16 products to FP32 sums at once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log2, prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import REDUCTION, block_name, relax, te
from modelforge.compilers.tvm.kernels.loops import unroll_tail
from modelforge.compilers.tvm.kernels.starts import STARTS
from modelforge.compilers.tvm.machine import Machine

_LENGTH: Final = 32
"""Products in a block: it errs by u sqrt(32 / 2), four roundings of the block's sum, however long the whole sum is.
A block costs seven instructions for each register of sums beside its 32 multiply-adds: a zero, two conversions, two
additions, and half of four for loads and stores by pairs."""
_TOTAL: Final = "in_single"


def starts(
    sizes: tuple[int, ...], columns: int, machine: Machine, dtype: str
) -> tuple[tuple[Any, ...], dict[str, int]]:
    """One more argument for a kernel, and an attribute of it, where it sums in blocks: what is added to the FP32 sums
    of its columns. :func:`.starts.with_constant` puts the bias there: one rounding to FP16 is left."""
    if _block(sizes, machine, dtype) == sizes:
        return (), {}
    return (relax.const(np.zeros(columns, np.float32)),), {STARTS: 1}


def total(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    term: Callable[..., Any],
    machine: Machine,
    dtype: str,
    *start: Any,
    **told: Any,
) -> Any:
    """``shape`` of sums over axes of ``sizes``, where ``term(*index, *reduced)`` is a product; ``told`` names and
    annotates the main block. In half precision, where the machine has it, they are summed in blocks; ``start``, if
    there is one, holds what is added to the sums of each column."""
    block = _block(sizes, machine, dtype)
    inner = _axes("r", block)
    if block == sizes:
        return te.compute(shape, lambda *at: te.sum(term(*at, *inner), axis=inner), **told)
    outer = _axes("step", tuple(size // length for size, length in zip(sizes, block, strict=True)))

    def part(*at: Any) -> Any:
        steps, index = at[: len(sizes)], at[len(sizes) :]
        reduced = [step * size + axis for step, size, axis in zip(steps, block, inner, strict=True)]
        return te.sum(term(*index, *reduced), axis=inner)

    parts = te.compute((*(int(axis.dom.extent) for axis in outer), *shape), part, **told)
    sums = te.compute(shape, lambda *at: te.sum(parts(*outer, *at).astype("float32"), axis=outer), name=_TOTAL)

    def rounded(*at: Any) -> Any:
        value = sums(*at)
        for values in start:
            value = value + values[at[-1]]
        return value.astype(dtype)

    return te.compute(shape, rounded, name="rounded")


def total_of(sch: Any, anchor: Any) -> Any:
    """The FP32 sums of the blocks that ``anchor`` sums; ``anchor`` itself where it sums all."""
    found = [block for block in sch.get_consumers(anchor) if block_name(sch, block) == _TOTAL]
    return found[0] if found else anchor


def sum_blocks(sch: Any, anchor: Any, total: Any, lanes: int) -> Any:
    """Put the blocks inside their FP32 sums, which stand in the loops of the result already. Returns the loop where
    those start from zero: to be split off (``decompose_reduction``) when all else is done."""
    if total is anchor:
        return None
    kinds = [int(var.iter_type) for var in sch.get(total).iter_vars]
    loops = sch.get_loops(total)[-len(kinds) :]
    tile, steps = loops[: kinds.index(REDUCTION)], loops[kinds.index(REDUCTION) :]
    sch.reorder(*steps, *tile)
    sch.set_scope(anchor, 0, "local")
    sch.compute_at(anchor, steps[-1], preserve_unit_loops=True)
    unroll_tail(sch, tile, lanes)
    return steps[0]


def _block(sizes: tuple[int, ...], machine: Machine, dtype: str) -> tuple[int, ...]:
    return block_of(sizes, machine.lanes(dtype)) if dtype == "float16" and machine.fp16 else sizes


def _axes(name: str, sizes: tuple[int, ...]) -> list[Any]:
    return [te.reduce_axis((0, size), f"{name}{at}") for at, size in enumerate(sizes)]


def block_of(sizes: tuple[int, ...], lanes: int) -> tuple[int, ...]:
    """How much of each axis a block has: whole ones from the last on, as near to the wanted length as they divide."""
    block: list[int] = []
    for size in reversed(sizes):
        whole = len(block) == 0 or block[-1] == sizes[len(sizes) - len(block)]
        step = lanes if not block and size % lanes == 0 else 1
        lengths = [length for length in range(step, size + 1, step) if size % length == 0] if whole else [1]
        block.append(min(lengths, key=lambda length: abs(log2(length * prod(block) / _LENGTH))))
    return tuple(reversed(block))
