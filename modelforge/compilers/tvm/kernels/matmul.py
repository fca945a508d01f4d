"""Matrix products with constant weights, as sums held in registers.

Idea: the product of :mod:`.convolution` without a window. All leading axes of the data count as rows; the weights are
packed at compile time to [blocks][inner axis][columns of a block] and read in one stream. Blocks are as wide as suits
many rows, whatever the rows: entries for several batches read the same weights. One row (a matrix-vector product) takes
several blocks at once: it is bound by the bytes of the weights, and several streams of sums hide the latency. Where
instructions multiply by one element of a register, rows are loaded by vectors, and filled up to whole ones. Bound: two
multiply-adds a cycle, or the weights' bytes where rows are few.

Columns beyond the last full vector are computed with zero weights and stored one by one, in a copy of the loop of their
own, so that no predicate reaches the vectors of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from modelforge.compilers.tvm.api import (
    OUT_FUSIBLE,
    block_annotations,
    block_name,
    constant_value,
    count_rows_as_one,
    dtype_of,
    emit_kernel,
    extent,
    is_constant,
    relax,
    shape_of,
    te,
    tirx,
    written_dtype,
)
from modelforge.compilers.tvm.kernels import halves, tiles
from modelforge.compilers.tvm.kernels.loops import (
    PARALLEL_WORK,
    neighbours,
    partition,
    spread,
    unroll_tail,
    vectorize_copy,
)
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.kernels.views import flat_index, split_index
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class Matmul:
    """Products of an activation and a constant matrix."""

    name: str = "matmul"
    operators: tuple[str, ...] = ("relax.matmul",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data, weight = call.args
        shape = shape_of(data)
        if shape is None or len(shape) < 2 or not is_constant(weight) or len(shape_of(weight) or ()) != 2:
            return None
        if dtype_of(data) not in ("float32", "float16") or dtype_of(weight) != dtype_of(data) or 0 in shape:
            return None
        return multiply(data, constant_value(weight), builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        rows, vectors, lanes = (int(value) for value in block_annotations(sch, anchor)[TILE])
        total = halves.total_of(sch, anchor)
        prepared, after = neighbours(sch, total, machine)
        pads, loads = split_off_loads(sch, prepared if total is anchor else prepared[:-1])
        store_tiles(sch, anchor, after[-1], (rows, vectors, lanes), loads, machine)
        for pad in pads:
            copy_rows(sch, pad, machine)
        return f"{rows}x{vectors * lanes}"


def multiply(data: Any, weight: np.ndarray[Any, Any], builder: Any, machine: Machine) -> Any:
    """Emit ``data`` [..., inner] times ``weight`` [inner, columns]."""
    shape = shape_of(data) or ()
    dtype = str(weight.dtype)
    leading, (inner, columns) = shape[:-1], weight.shape
    rows = prod(leading)
    unit = tiles.unit(columns, machine, dtype)
    tile = choose(rows, columns, machine, dtype, unit)
    depth = lanewise(inner, machine, dtype)
    tall, deep = tiles.up(rows, tile.rows), tiles.up(inner, depth)
    packed = relax.const(pack(weight, unit * tile.lanes, deep))
    width, blocks = unit * tile.lanes, int(packed.value.shape[0])
    wide = tiles.up(columns, tile.columns)
    attrs = {RULE: Matmul.name, MACS: rows * inner * columns, TILE: [tile.rows, tile.vectors, tile.lanes]}

    start, marked = halves.starts((deep,), wide, machine, dtype)

    def compute(data: Any, weight: Any, *start: Any) -> Any:
        def row(r: Any, k: Any) -> Any:
            return data[(*split_index(r, leading), k)]

        read = in_tiles(row, (), (rows, inner), (tall, deep), depth, dtype)

        def product(r: Any, c: Any, k: Any) -> Any:
            return read(r, k) * weight[block_of(c, width, wide, blocks), k, c % width]

        full = halves.total((tall, wide), (deep,), product, machine, dtype, *start, name="matmul", attrs=attrs)
        return te.compute((*leading, columns), lambda *i: full(flat_index(i[:-1], leading), i[-1]), name="crop")

    return emit_kernel(builder, compute, data, packed, *start, name="matmul", pattern=OUT_FUSIBLE, **marked)


def choose(rows: int, columns: int, machine: Machine, dtype: str, unit: int = 1) -> tiles.Tile:
    """The register tile: few rows take more vectors of columns, so that enough sums are in flight."""
    widest = 4
    if rows < 4:  # eight where several steps stand in a row: LLVM loads weights early, and spills beside more sums
        widest = 8 if tiles.depth(machine, dtype) > 1 else max(4, (machine.registers - 4) // rows)
    return tiles.choose(tiles.padded(rows, machine), columns, machine, dtype, widest, unit)


def lanewise(inner: int, machine: Machine, dtype: str) -> int:
    """How many values of a row are loaded at once (:func:`.tiles.depth`); 1 where rows are too short for it."""
    depth = tiles.depth(machine, dtype)
    return depth if inner >= 2 * depth else 1


def in_tiles(
    read: Any, batch: tuple[int, ...], size: tuple[int, int], whole: tuple[int, int], depth: int, dtype: str
) -> Any:
    """The left operand of a product: ``read(*batch, row, inner)``, from a copy with zeros up to ``whole`` tiles where
    it must be, and a tile at a time where ``depth`` values of a row are loaded at once."""
    if whole != size:
        read = te.compute((*batch, *whole), _filled(read, size, whole, dtype), name="pad_left")
    if depth > 1:
        read = te.compute((*batch, *whole), lambda *i: read(*i), name="load_left")  # noqa: PLW0108  # it may be a tensor
    return read


def _filled(read: Any, size: tuple[int, int], whole: tuple[int, int], dtype: str) -> Any:
    zero = tirx.const(0, dtype)

    def element(*index: Any) -> Any:
        found = read(*index)
        # One test in the other, the one that rows are cut at inside: loops are partitioned by it.
        for at in (1, 0):
            if whole[at] != size[at]:
                found = tirx.if_then_else(index[at - 2] < size[at], found, zero)
        return found

    return element


def pack(weight: np.ndarray[Any, Any], columns: int, deep: int = 0) -> np.ndarray[Any, Any]:
    """[inner, outer] to [blocks, inner or ``deep``, columns], zeros where the last block or the axis is not full."""
    inner, outer = weight.shape
    blocks = -(-outer // columns)
    full = np.zeros((max(inner, deep), blocks * columns), weight.dtype)
    full[:inner, :outer] = weight
    return np.ascontiguousarray(full.reshape(-1, blocks, columns).transpose(1, 0, 2))


def store_tiles(
    sch: Any, anchor: Any, out: Any, tile: tuple[int, int, int], loads: list[Any], machine: Machine
) -> None:
    """Drive a product of rows by columns from the loops of its result, tile by tile; the sums stay in registers."""
    rows, vectors, lanes = tile
    work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
    columns = extent(sch, sch.get_loops(out)[-1])
    count_rows_as_one(sch, out)
    row, column = sch.get_loops(out)
    row, row_tile = sch.split(row, factors=[None, rows])
    block, column = sch.split(column, factors=[None, vectors * lanes])
    whole = columns % lanes == 0
    blocks, chunks = extent(sch, block), extent(sch, row)
    blocks_outside = whole or blocks >= 4 * machine.cores or chunks < 2 * machine.cores
    outer = [block, row] if blocks_outside else [row, block]
    sch.reorder(*outer, row_tile, column)
    total = halves.total_of(sch, anchor)
    sch.set_scope(total, 0, "local")
    sch.compute_at(total, outer[-1], preserve_unit_loops=True)
    begin = halves.sum_blocks(sch, anchor, total, lanes)
    vector, lane = sch.split(column, factors=[vectors, lanes])
    sch.vectorize(lane)
    sch.unroll(row_tile)
    sch.unroll(vector)
    if not whole:
        partition(sch, block if blocks > 1 else vector)
    if work >= PARALLEL_WORK and machine.cores > 1:
        shared = sch.fuse(*outer) if whole else outer[0]
        sch.parallel(shared)
    sum_tile(sch, anchor, vectors, lanes, loads, machine)
    if begin is not None:
        sch.decompose_reduction(total, begin)


def sum_tile(sch: Any, anchor: Any, vectors: int, lanes: int, loads: list[Any], machine: Machine) -> None:
    """The sums of one tile: the inner axis outside, rows and vectors inside.

    ``loads`` of the left operand, if there are any, bring as many values of each row as steps follow.
    """
    row, column, k = sch.get_loops(anchor)[-3:]
    vector, lane = sch.split(column, factors=[vectors, lanes])
    steps: list[Any] = []
    dtype = written_dtype(sch, anchor)
    if loads:
        k, step = sch.split(k, factors=[None, tiles.steps(extent(sch, k), machine, dtype)])
        steps = [step]
    sch.reorder(k, *steps, row, vector, lane)
    for load in loads:
        sch.set_scope(load, 0, "local")
        sch.compute_at(load, k, preserve_unit_loops=True)
        unroll_tail(sch, sch.get_loops(load)[-2:], tiles.depth(machine, dtype))
    sch.vectorize(lane)
    for loop in (*steps, row, vector):
        sch.unroll(loop)
    sch.decompose_reduction(anchor, k)


def split_off_loads(sch: Any, prepared: list[Any]) -> tuple[list[Any], list[Any]]:
    """What is prepared before a product: whole copies, and loads of a tile."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for block in prepared:
        parts["load" in block_name(sch, block)].append(block)
    return parts


def copy_rows(sch: Any, pad: Any, machine: Machine) -> None:
    """Vectors of rows that are filled up with zeros, at their ends too."""
    *outer, last = sch.get_loops(pad)
    lanes = machine.lanes(written_dtype(sch, pad))
    if extent(sch, last) % lanes:
        vectorize_copy(sch, pad, machine)
        return
    work = prod(extent(sch, loop) for loop in (*outer, last))
    last, vector = sch.split(last, factors=[None, lanes])
    sch.vectorize(vector)
    partition(sch, last)
    spread(sch, outer, work, machine)


def block_of(column: Any, width: int, wide: int, blocks: int) -> Any:
    """The block of packed weights that a column is in. A tile of several may reach beyond the last one (``wide``
    columns in all): what it makes of the last one's columns there again is cut off."""
    return column // width if wide <= blocks * width else tirx.min(column // width, blocks - 1)
