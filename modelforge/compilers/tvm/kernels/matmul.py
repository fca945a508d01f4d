"""Matrix products with constant weights, as sums held in registers.

Idea: the product of :mod:`.convolution` without a window. All leading axes of the data count as rows; the weights are
packed at compile time to [blocks][inner axis][columns of a tile] and read in one stream. One row (a matrix-vector
product) takes as many vectors of columns as there are registers: it is bound by the bytes of the weights, and several
streams of sums hide the latency. Bound: two multiply-adds a cycle, or the weights' bytes where rows are few.

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
)
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.loops import PARALLEL_WORK, neighbours, partition, vectorize_copy
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
        pads, after = neighbours(sch, anchor, machine)
        out = after[-1]
        store_tiles(sch, anchor, out, (rows, vectors, lanes), machine)
        for pad in pads:
            vectorize_copy(sch, pad, machine)
        return f"{rows}x{vectors * lanes}"


def multiply(data: Any, weight: np.ndarray[Any, Any], builder: Any, machine: Machine) -> Any:
    """Emit ``data`` [..., inner] times ``weight`` [inner, columns]."""
    shape = shape_of(data) or ()
    dtype = str(weight.dtype)
    leading, (inner, columns) = shape[:-1], weight.shape
    rows = prod(leading)
    tile = choose(rows, columns, machine, dtype)
    packed = relax.const(pack(weight, tile.columns))
    tall, width = -(-rows // tile.rows) * tile.rows, tile.columns
    wide = int(packed.value.shape[0]) * width
    attrs = {RULE: Matmul.name, MACS: rows * inner * columns, TILE: [tile.rows, tile.vectors, tile.lanes]}

    def compute(data: Any, weight: Any) -> Any:
        k = te.reduce_axis((0, inner), "k")

        def row(r: Any, k: Any) -> Any:
            return data[(*split_index(r, leading), k)]

        if tall != rows:
            zero = tirx.const(0, dtype)
            padded = te.compute(
                (tall, inner), lambda r, k: tirx.if_then_else(r < rows, row(r, k), zero), name="pad_rows"
            )
            read = padded
        else:
            read = row
        full = te.compute(
            (tall, wide),
            lambda r, c: te.sum(read(r, k) * weight[c // width, k, c % width], axis=k),
            name="matmul",
            attrs=attrs,
        )
        return te.compute((*leading, columns), lambda *i: full(flat_index(i[:-1], leading), i[-1]), name="crop")

    return emit_kernel(builder, compute, data, packed, name="matmul", pattern=OUT_FUSIBLE)


def choose(rows: int, columns: int, machine: Machine, dtype: str) -> tiles.Tile:
    """The register tile: few rows take more vectors of columns, so that enough sums are in flight."""
    widest = max(4, (machine.registers - 4) // rows) if rows < 4 else 4
    return tiles.choose(tiles.padded(rows, machine), columns, machine, dtype, widest)


def pack(weight: np.ndarray[Any, Any], columns: int) -> np.ndarray[Any, Any]:
    """[inner, outer] to [blocks, inner, columns], zeros where the last block is not full."""
    inner, outer = weight.shape
    blocks = -(-outer // columns)
    full = np.zeros((inner, blocks * columns), weight.dtype)
    full[:, :outer] = weight
    return np.ascontiguousarray(full.reshape(inner, blocks, columns).transpose(1, 0, 2))


def store_tiles(sch: Any, anchor: Any, out: Any, tile: tuple[int, int, int], machine: Machine) -> None:
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
    sch.set_scope(anchor, 0, "local")
    sch.compute_at(anchor, outer[-1], preserve_unit_loops=True)
    vector, lane = sch.split(column, factors=[vectors, lanes])
    sch.vectorize(lane)
    sch.unroll(row_tile)
    sch.unroll(vector)
    if not whole:
        partition(sch, block if blocks > 1 else vector)
    if work >= PARALLEL_WORK and machine.cores > 1:
        shared = sch.fuse(*outer) if whole else outer[0]
        sch.parallel(shared)
    sum_tile(sch, anchor, vectors, lanes)


def sum_tile(sch: Any, anchor: Any, vectors: int, lanes: int) -> None:
    """The sums of one tile: the inner axis outside, rows and vectors inside."""
    row, column, k = sch.get_loops(anchor)[-3:]
    vector, lane = sch.split(column, factors=[vectors, lanes])
    sch.reorder(k, row, vector, lane)
    sch.vectorize(lane)
    sch.unroll(row)
    sch.unroll(vector)
    sch.decompose_reduction(anchor, k)
