"""Convolutions of int8, channels last: the same tiles as in float, filled by the machine's integer products.

Idea: ``(q - zero) * w`` summed is ``q * w`` summed less ``zero * sum(w)``, which is known now: activations are multiplied
as they lie in memory, pads hold the zero point, and the sums of a tile stay in registers until the fused epilogue makes
the next layer's int8 of them. Where the instruction reads 16 bits, or the input has to be padded, a copy is made first.
Bound: one product step per instruction (:mod:`.dot`), two instructions a cycle.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np

from modelforge.compilers.tvm.api import (
    OUT_FUSIBLE,
    annotations,
    constant_value,
    dtype_of,
    emit_kernel,
    extent,
    index_map,
    te,
)
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.convolution import Window, window_of
from modelforge.compilers.tvm.kernels.dot import Dot, dot_of, pack, tensorize
from modelforge.compilers.tvm.kernels.loops import neighbours, spread, unroll_tail, vectorize_copy
from modelforge.compilers.tvm.kernels.quantized import Activations, activations_of, as_operand
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class ConvolutionInt8:
    """Convolutions of one group over quantized activations, with constant int8 weights."""

    name: str = "convolution-int8"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window = window_of(call)
        if window is None or int(call.attrs.groups) != 1 or dtype_of(call.args[1]) != "int8":
            return None
        data = activations_of(call.args[0], builder)
        if data is None:
            return None
        return _convolve(window, constant_value(call.args[1]), data, builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        return schedule_products(sch, anchor, machine)


def _convolve(window: Window, weight: np.ndarray[Any, Any], data: Activations, builder: Any, machine: Machine) -> Any:
    """Emit the int32 sums of ``data`` (NHWC) times ``weight`` (OHWI)."""
    depth = weight.shape[3]
    dot = dot_of(machine, depth)
    rows, tile = _tile(window, dot.seen_by_tiles(machine))
    columns = tile.rows // max(rows, 1)
    height, width = window.size
    tall, wide = (_up(height, rows), _up(width, columns)) if rows else (height, width)
    packed = pack(weight, dot, tile.columns)
    blocks, (kernel_height, kernel_width), parts = int(packed.value.shape[0]), window.kernel, int(packed.value.shape[3])
    strides, dilation = window.strides, window.dilation
    zero, correction = data.zero_for(dot), data.correction(weight, dot)
    top, left = window.padding[:2]
    pads = [top, left, *window.padded_for(tall, wide), parts * dot.depth - depth]
    attrs = {
        RULE: ConvolutionInt8.name,
        MACS: window.data[0] * height * width * weight.size,
        TILE: [rows, columns, tile.vectors, depth],
    }

    def compute(stored: Any, weight: Any, *correction: Any) -> Any:
        operand = as_operand(stored, dot, data.zero, zero, pads)
        ry, rx, rk = (
            te.reduce_axis((0, size), name)
            for name, size in (("ry", kernel_height), ("rx", kernel_width), ("rk", parts))
        )
        inner = [te.reduce_axis((0, size), name) for name, size in zip(("rj", "ri"), dot.axes, strict=False)]
        sums = te.compute(
            (window.data[0], tall, wide, blocks * tile.columns),
            lambda n, y, x, c: te.sum(
                operand[
                    n,
                    y * strides[0] + ry * dilation[0],
                    x * strides[1] + rx * dilation[1],
                    rk * dot.depth + dot.of_activations(inner),
                ].astype("int32")
                * weight[
                    c // tile.columns,
                    ry,
                    rx,
                    rk,
                    c % tile.columns // dot.lanes,
                    *dot.of_weights(c % dot.lanes, inner),
                ].astype("int32"),
                axis=[ry, rx, rk, *inner],
            ),
            name="sums",
            attrs=attrs,
        )
        shape = (window.data[0], height, width, window.channels)
        return finished(sums, shape, *correction)

    arguments = [data.stored, packed, *([] if correction is None else [correction])]
    return emit_kernel(builder, compute, *arguments, name="convolution_int8", pattern=OUT_FUSIBLE)


def finished(sums: Any, shape: tuple[int, ...], *correction: Any) -> Any:
    """The sums that are wanted, less the zero point's share of each channel."""
    if not correction and tuple(map(int, sums.shape)) == shape:
        return sums
    return te.compute(
        shape, lambda *i: sums(*i) - correction[0][i[-1]] if correction else sums(*i), name="corrected"
    )


def schedule_products(sch: Any, anchor: Any, machine: Machine) -> str:
    """Schedule a kernel whose ``TILE`` is [rows, columns, vectors, depth]; without rows, pixels are counted in one axis."""
    rows, columns, vectors, depth = (int(value) for value in annotations(sch, anchor)[TILE])
    dot = dot_of(machine, depth)
    pads, after = neighbours(sch, anchor)
    out = after[-1] if after else sch.cache_write(anchor, 0, "local")
    work = prod(extent(sch, loop) for loop in sch.get_loops(anchor)) // dot.depth
    if rows:
        batch, y, x, channel = sch.get_loops(out)
        y, y_tile = sch.split(y, factors=[None, rows])
        x, x_tile = sch.split(x, factors=[None, columns])
        outer, tile = [batch, y, x], [y_tile, x_tile]
    else:
        _flatten(sch, anchor, out)
        pixel, channel = sch.get_loops(out)
        pixel, pixel_tile = sch.split(pixel, factors=[None, columns])
        outer, tile = [pixel], [pixel_tile]
    block, channel = sch.split(channel, factors=[None, vectors * dot.lanes])
    sch.reorder(block, *outer, *tile, channel)
    sch.compute_at(anchor, outer[-1], preserve_unit_loops=True)
    unroll_tail(sch, [*tile, channel], gcd(int(sch.get(out).iter_vars[-1].dom.extent), machine.lanes("int32")))
    spread(sch, [block, *outer], work, machine)
    _products(sch, anchor, vectors, dot)
    for pad in pads:
        vectorize_copy(sch, pad, machine, dot.operand)
    return f"{dot.name} {max(rows, 1) * columns}x{vectors * dot.lanes}"


def _products(sch: Any, anchor: Any, vectors: int, dot: Dot) -> None:
    """The sums of one tile: window and input channels outside, pixels and vectors inside, then one step."""
    loops = sch.get_loops(anchor)[1:]  # the first is shared with the threads
    steps = loops[-len(dot.axes) :]
    loops = loops[: -len(dot.axes)]
    reduction = loops[-3:] if len(loops) > 4 else loops[-1:]
    *tile, channel = loops[: -len(reduction)]
    vector, lane = sch.split(channel, factors=[vectors, dot.lanes])
    sch.reorder(*reduction, *tile, vector, lane, *steps)
    for loop in (*tile, vector):
        sch.unroll(loop)
    init = sch.decompose_reduction(anchor, reduction[0])
    sch.vectorize(sch.get_loops(init)[-1])
    tensorize(sch, lane, dot)
    sch.set_scope(init, 0, "local")


def _flatten(sch: Any, anchor: Any, out: Any) -> None:
    """Count the pixels of a matrix product in one axis: a tile may then span rows of the image."""
    sizes = [int(var.dom.extent) for var in sch.get(out).iter_vars]
    rank = len(sizes)

    def counted(*index: Any) -> Any:
        found = index[0]
        for size, position in zip(sizes[1:-1], index[1 : rank - 1], strict=True):
            found = found * size + position
        return found

    full = len(sch.get(anchor).iter_vars)
    sch.transform_layout(anchor, ("write", 0), index_map(rank, lambda *i: (counted(*i), i[-1])))
    sch.transform_block_layout(anchor, index_map(full, lambda *i: (counted(*i), *i[rank - 1 :])))
    sch.transform_block_layout(out, index_map(rank, lambda *i: (counted(*i), i[-1])))


def _tile(window: Window, machine: Machine) -> tuple[int, tiles.Tile]:
    """Rows of the image in a tile (0: pixels are not told apart), and the tile over rows x columns pixels."""
    height, width = window.size
    pixels = window.data[0] * height * width
    if window.flat:
        tile = tiles.choose(tiles.divisors(pixels, machine), window.channels, machine, "int32")
        if tile.rows * tile.vectors >= 8 or pixels < 8:
            return 0, tile
    single = tiles.choose(tiles.padded(width, machine), window.channels, machine, "int32")
    if width * 2 > machine.registers:
        return 1, single
    several = [(rows * width, _up(height, rows) / height) for rows in range(1, machine.registers // width + 1)]
    tile = tiles.choose([*several, *tiles.padded(width, machine)], window.channels, machine, "int32")
    return (tile.rows // width, tile) if tile.rows % width == 0 else (1, tile)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
