"""Matrix products of int8 with constant weights, 1x1 convolutions among them.

Idea: the tiles of :mod:`.matmul`, filled by the machine's integer products (:mod:`.dot`); all leading axes of the data
count as rows. Few rows take more vectors of columns, so that enough sums are in flight. Bound: as of convolutions; one
row is bound by the bytes of the weights, a quarter of those in float.
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
    extent,
    is_constant,
    shape_of,
    te,
    tirx,
)
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.bands import band_of, before_joining, in_turn, joined
from modelforge.compilers.tvm.kernels.dot import Dot, dot_of, finished, pack, store_products
from modelforge.compilers.tvm.kernels.loops import neighbours
from modelforge.compilers.tvm.kernels.matmul import block_of
from modelforge.compilers.tvm.kernels.quantized import Activations, activations_of
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.kernels.starts import emit_from
from modelforge.compilers.tvm.kernels.views import flat_index, split_index
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class MatmulInt8:
    """Products of quantized activations and a constant int8 matrix."""

    name: str = "matmul-int8"
    operators: tuple[str, ...] = ("relax.matmul",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data, weight = call.args
        if not is_constant(weight) or dtype_of(weight) != "int8" or len(shape_of(weight) or ()) != 2:
            return None
        activations = activations_of(data, builder)
        if activations is None:
            return None
        values = np.ascontiguousarray(constant_value(weight).T)
        return multiply(activations, values.reshape(len(values), 1, 1, -1), builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        rows, vectors, depth, apart = (int(value) for value in block_annotations(sch, anchor)[TILE])
        dot = dot_of(machine, depth)
        if apart:
            pads, out = before_joining(sch, anchor, machine)
            row, group, column = sch.get_loops(out)
        else:
            pads, after = neighbours(sch, anchor, machine)
            out = after[-1]
            count_rows_as_one(sch, out)
            row, column = sch.get_loops(out)
        row, row_tile = sch.split(row, factors=[None, rows])
        block, column = sch.split(column, factors=[None, vectors * dot.lanes])
        outer = [block, row] if extent(sch, row) > 1 else [row, block]
        if apart:
            outer = in_turn(sch, [row], group, block, machine)
        store_products(sch, anchor, out, outer, [row_tile], block, column, vectors, dot, pads, machine)
        return f"{dot.name} {rows}x{vectors * dot.lanes}"


def multiply(data: Activations, weight: np.ndarray[Any, Any], builder: Any, machine: Machine, groups: int = 1) -> Any:
    """Emit the int32 sums of ``data`` [..., inner] times ``weight`` [columns, 1, 1, inner of a group]."""
    *leading, inner = shape_of(data.stored) or ()
    rows, columns, macs = prod(leading), weight.shape[0], prod(leading) * weight.size
    dot = dot_of(machine, inner)
    band = None
    if groups == 1:
        unit, tile = _tile(rows, columns, inner, dot, machine)
    else:
        band = band_of(weight, groups, machine)
        unit = band.width // dot.lanes
        weight, dot = band.weights(weight), dot_of(machine, band.length)
        heights = dot.heights(tiles.padded(rows, machine), band.width, tiles.up(band.length, dot.depth) // dot.depth)
        tile = tiles.choose(heights, band.width, machine, "int32", unit, unit)
    packed = pack(weight, dot, unit * dot.lanes)
    width, blocks, parts = unit * dot.lanes, int(packed.value.shape[0]), int(packed.value.shape[3])
    tall, wide = tiles.up(rows, tile.rows), tiles.up(len(weight), tile.columns)
    depth, apart = (inner, None) if band is None else (band.length, band if band.apart else None)
    attrs = {RULE: MatmulInt8.name, MACS: macs, TILE: [tile.rows, tile.vectors, depth, int(apart is not None)]}
    zero = data.zero_for(dot)

    def compute(stored: Any, weight: Any) -> Any:
        deep = max(inner, parts * dot.depth)
        read = _rows(stored, dot, data.zero, zero, (tuple(leading), tall, inner, deep))
        rk = te.reduce_axis((0, parts), "rk")
        steps = [te.reduce_axis((0, size), name) for name, size in zip(("rj", "ri"), dot.axes, strict=False)]

        def of_weight(c: Any) -> Any:
            block = block_of(c, width, wide, blocks)
            return weight[block, 0, 0, rk, c % width // dot.lanes, *dot.of_weights(c % dot.lanes, steps)]

        def of_data(r: Any, c: Any) -> Any:
            first = 0 if band is None else band.start(block_of(c, width, wide, blocks))
            return read(r, first + rk * dot.depth + dot.of_activations(steps))

        sums = te.compute(
            (tall, wide),
            lambda r, c: te.sum(of_data(r, c).astype("int32") * of_weight(c).astype("int32"), axis=[rk, *steps]),
            name="sums",
            attrs=attrs,
        )
        shape = (*leading, columns)
        if apart is not None:
            return joined(shape, sums, apart, flat=True)
        return finished(shape, lambda *i: sums(flat_index(i[:-1], tuple(leading)), i[-1]))

    start = data.start(weight, dot, wide)
    own = None if apart is None else (apart.share, apart.outputs)
    told: dict[str, Any] = {"start": start, "name": "matmul_int8", "pattern": OUT_FUSIBLE, "apart": own}
    return emit_from(builder, compute, data.stored, packed, **told)


def _rows(stored: Any, dot: Dot, zero: int, operand_zero: int, sizes: tuple[tuple[int, ...], int, int, int]) -> Any:
    """How (row, position) of the data is read as the instruction wants it; from a copy where the data is not so."""
    leading, tall, inner, deep = sizes
    rows = prod(leading)

    def row(r: Any, k: Any) -> Any:
        return stored[(*split_index(r, leading), k)]

    if stored.dtype == dot.operand and tall == rows and deep == inner:
        return row

    def element(r: Any, k: Any) -> Any:
        found = row(r, k)
        if stored.dtype != dot.operand:
            found = (found.astype("int16") + tirx.const(operand_zero - zero, "int16")).astype(dot.operand)
        inside = [*([r < rows] if tall > rows else []), *([k < inner] if deep > inner else [])]
        return tirx.if_then_else(tirx.all(*inside), found, tirx.const(operand_zero, dot.operand)) if inside else found

    return te.compute((tall, deep), element, name="pad_operand")


def _tile(rows: int, columns: int, depth: int, dot: Dot, machine: Machine) -> tuple[int, tiles.Tile]:
    """Vectors of columns that are packed side by side, whatever the rows, and the tile."""
    machine = dot.seen_by_tiles(machine)
    columns = max(columns, dot.lanes)
    unit = tiles.unit(columns, machine, "int32", dot.widest)
    widest = max(dot.widest, (machine.registers - 4) // rows // dot.steps) if rows < 4 else dot.widest
    heights = dot.heights(tiles.padded(rows, machine), columns, tiles.up(depth, dot.depth) // dot.depth)
    return unit, tiles.choose(heights, columns, machine, "int32", widest, unit)
