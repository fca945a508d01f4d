"""Convolutions of several groups with several channels each, channels last.

Idea: every group is a small convolution, and its sums are held in registers as a convolution's are; the groups are
one more loop outside. A group's channels are padded to whole vectors in the weights, and the padding is left out where
tiles are stored. Bound: as for convolutions, times the padding of a group's channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np

from modelforge.compilers.tvm.api import (
    OUT_FUSIBLE,
    block_annotations,
    constant_value,
    dtype_of,
    emit_kernel,
    extent,
    relax,
    te,
    topi,
)
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.convolution import Window, pack, window_of
from modelforge.compilers.tvm.kernels.loops import neighbours, spread, unroll_tail, vectorize_copy
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class Grouped:
    """Convolutions of more than one group with constant weights."""

    name: str = "grouped"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window, groups = window_of(call), int(call.attrs.groups)
        if window is None or groups == 1 or dtype_of(call.args[0]) not in ("float32", "float16"):
            return None
        return _convolve(window, groups, constant_value(call.args[1]), call.args[0], builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        rows, columns, vectors, lanes = (int(value) for value in block_annotations(sch, anchor)[TILE])
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        # What follows is drawn into the block that knows the groups: over joined channels tiles would overlap.
        (out,) = sch.get_consumers(anchor)
        before, after = neighbours(sch, out, machine)
        for block in after:
            sch.reverse_compute_inline(block)
        batch, y, x, group, channel = sch.get_loops(out)
        y, y_tile = sch.split(y, factors=[None, rows])
        x, x_tile = sch.split(x, factors=[None, columns])
        block, channel = sch.split(channel, factors=[None, vectors * lanes])
        outer = [batch, group, block, y, x]
        sch.reorder(*outer, y_tile, x_tile, channel)
        sch.set_scope(anchor, 0, "local")
        sch.compute_at(anchor, x, preserve_unit_loops=True)
        _unroll_stores(sch, [y_tile, x_tile, channel], int(sch.get(out).iter_vars[-1].dom.extent), lanes)
        spread(sch, outer, work, machine)
        self._inner(sch, anchor, vectors, lanes)
        for pad in before[:-1]:
            vectorize_copy(sch, pad, machine)
        return f"{rows * columns}x{vectors * lanes}"

    @staticmethod
    def _inner(sch: Any, anchor: Any, vectors: int, lanes: int) -> None:
        """The sums of one tile: window and input channels outside, pixels and vectors inside."""
        *_, y, x, _, channel, row, column, inner = sch.get_loops(anchor)
        vector, lane = sch.split(channel, factors=[vectors, lanes])
        sch.reorder(row, column, inner, y, x, vector, lane)
        sch.vectorize(lane)
        for loop in (y, x, vector):
            sch.unroll(loop)
        sch.decompose_reduction(anchor, row)


def _unroll_stores(sch: Any, loops: list[Any], share: int, lanes: int) -> None:
    """Write out the stores of a tile. One that holds a whole group ends where that is known now: no test is left."""
    *_, channel = loops
    if share % lanes == 0 or share > extent(sch, channel):
        return unroll_tail(sch, loops, gcd(share, lanes))
    rest, lane = sch.split(channel, factors=[None, lanes])
    sch.vectorize(lane)
    for loop in (*loops[:-1], rest):
        sch.unroll(loop)
    return None


def _convolve(
    window: Window, groups: int, weight: np.ndarray[Any, Any], data: Any, builder: Any, machine: Machine
) -> Any:
    """Emit the convolution of ``data`` (NHWC) with ``weight`` (OHWI)."""
    share, depth = window.channels // groups, weight.shape[3]
    rows, columns, tile = _tile(window, share, machine, str(weight.dtype))
    packed = np.stack([pack(part, tile.columns) for part in np.split(weight, groups)])
    height, width = window.size
    tall, wide = -(-height // rows) * rows, -(-width // columns) * columns
    top, left = window.padding[:2]
    bottom, right = window.padded_for(tall, wide)
    kernel, strides, dilation = window.kernel, window.strides, window.dilation
    macs = window.data[0] * height * width * window.channels * depth * prod(kernel)
    attrs = {RULE: Grouped.name, MACS: macs, TILE: [rows, columns, tile.vectors, tile.lanes]}

    def compute(data: Any, weight: Any) -> Any:
        if any((top, left, bottom, right)):
            data = topi.nn.pad(data, [0, top, left, 0], [0, bottom, right, 0], name="pad_input")
        ry, rx, rc = (
            te.reduce_axis((0, size), name) for size, name in zip((*kernel, depth), ("ry", "rx", "rc"), strict=True)
        )
        full = te.compute(
            (window.data[0], tall, wide, groups, packed.shape[1] * tile.columns),
            lambda n, y, x, g, c: te.sum(
                data[n, y * strides[0] + ry * dilation[0], x * strides[1] + rx * dilation[1], g * depth + rc]
                * weight[g, c // tile.columns, ry, rx, rc, c % tile.columns],
                axis=[ry, rx, rc],
            ),
            name="grouped",
            attrs=attrs,
        )
        shape = (window.data[0], height, width, groups, share)
        parts = te.compute(shape, lambda *at: full[at], name="groups")
        return te.compute(
            (*shape[:3], window.channels), lambda n, y, x, c: parts[n, y, x, c // share, c % share], name="joined"
        )

    return emit_kernel(builder, compute, data, relax.const(packed), name="grouped", pattern=OUT_FUSIBLE)


def _tile(window: Window, channels: int, machine: Machine, dtype: str) -> tuple[int, int, tiles.Tile]:
    """Rows and columns of the image in a tile, and the tile over their product."""
    height, width = window.size
    padding = any(window.padding)
    shapes: dict[int, tuple[float, int, int]] = {}
    for rows in range(1, min(height, machine.registers) + 1):
        for columns in range(1, min(width, machine.registers // rows) + 1) if rows == 1 else (width,):
            # Beyond the image there is only what padding has copied.
            if rows * columns > machine.registers or (not padding and (height % rows or width % columns)):
                continue
            waste = -(-height // rows) * rows * -(-width // columns) * columns / (height * width)
            shapes[rows * columns] = min(shapes.get(rows * columns, (99.0, 1, 1)), (waste, rows, columns))
    tile = tiles.choose([(pixels, shape[0]) for pixels, shape in shapes.items()], channels, machine, dtype)
    _, rows, columns = shapes.get(tile.rows, (1.0, 1, 1))
    return rows, columns, tile
