"""Convolutions of int8, channels last: the same tiles as in float, filled by the machine's integer products.

Idea: ``(q - zero) * w`` summed is ``q * w`` summed less ``zero * sum(w)``, which is known now: activations are
multiplied as they lie in memory, pads hold the zero point, and the sums of a tile stay in registers until the fused
epilogue makes the next layer's int8 of them. Where the instruction reads 16 bits, or the input has to be padded, a copy
is made first.
Bound: one product step per instruction (:mod:`.dot`), two instructions a cycle.
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
    dtype_of,
    te,
)
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.bands import band_of, before_joining, in_turn, joined
from modelforge.compilers.tvm.kernels.convolution import Window, window_of
from modelforge.compilers.tvm.kernels.dot import Dot, dot_of, finished, pack, store_products
from modelforge.compilers.tvm.kernels.loops import neighbours
from modelforge.compilers.tvm.kernels.matmul_int8 import multiply
from modelforge.compilers.tvm.kernels.quantized import Activations, activations_of, as_operand
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.kernels.starts import emit_from
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class ConvolutionInt8:
    """Convolutions over quantized activations, in groups or not, with constant int8 weights."""

    name: str = "convolution-int8"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window = window_of(call)
        if window is None or dtype_of(call.args[1]) != "int8":
            return None
        groups = int(call.attrs.groups)
        data = activations_of(call.args[0], builder)
        if data is None:
            return None
        weight = constant_value(call.args[1])
        if window.flat:
            return multiply(data, weight, builder, machine, groups)
        return _convolve(window, weight, data, builder, machine, groups)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        rows, columns, vectors, depth, apart = (int(value) for value in block_annotations(sch, anchor)[TILE])
        dot = dot_of(machine, depth)
        if apart:
            pads, out = before_joining(sch, anchor, machine)
            batch, y, x, group, channel = sch.get_loops(out)
        else:
            pads, after = neighbours(sch, anchor, machine)
            out = after[-1]
            batch, y, x, channel = sch.get_loops(out)
        y, y_tile = sch.split(y, factors=[None, rows])
        x, x_tile = sch.split(x, factors=[None, columns])
        block, channel = sch.split(channel, factors=[None, vectors * dot.lanes])
        outer, tile = [block, batch, y, x], [y_tile, x_tile]
        if apart:
            outer = in_turn(sch, [batch, y, x], group, block, machine)
        store_products(sch, anchor, out, outer, tile, block, channel, vectors, dot, pads, machine)
        return f"{dot.name} {rows * columns}x{vectors * dot.lanes}"


def _convolve(
    window: Window, weight: np.ndarray[Any, Any], data: Activations, builder: Any, machine: Machine, groups: int
) -> Any:
    """Emit the int32 sums of ``data`` (NHWC) times ``weight`` (OHWI, I of a group)."""
    channels, macs = window.data[3], window.data[0] * prod(window.size) * weight.size
    dot = dot_of(machine, channels)
    band = None
    if groups > 1:
        band = band_of(weight, groups, machine)
        weight, dot = band.weights(weight), dot_of(machine, band.length)
    depth, apart = weight.shape[3], band if band is not None and band.apart else None
    rows, tile = _tile(window, dot, machine, window.channels if band is None else band.width)
    columns = tile.rows // rows
    height, width = window.size
    tall, wide = _up(height, rows), _up(width, columns)
    packed = pack(weight, dot, tile.columns)
    blocks, (kernel_height, kernel_width), parts = int(packed.value.shape[0]), window.kernel, int(packed.value.shape[3])
    strides, dilation = window.strides, window.dilation
    zero, full = data.zero_for(dot), blocks * tile.columns
    top, left = window.padding[:2]
    pads = [top, left, *window.padded_for(tall, wide), max(0, parts * dot.depth - channels)]
    attrs = {
        RULE: ConvolutionInt8.name,
        MACS: macs,
        TILE: [rows, columns, tile.vectors, depth, int(apart is not None)],
    }

    def compute(stored: Any, weight: Any) -> Any:
        operand = as_operand(stored, dot, data.zero, zero, pads)
        ry, rx, rk = (
            te.reduce_axis((0, size), name)
            for name, size in (("ry", kernel_height), ("rx", kernel_width), ("rk", parts))
        )
        inner = [te.reduce_axis((0, size), name) for name, size in zip(("rj", "ri"), dot.axes, strict=False)]

        def channel(c: Any) -> Any:
            first = 0 if band is None else band.start(c // band.width)
            return first + rk * dot.depth + dot.of_activations(inner)

        sums = te.compute(
            (window.data[0], tall, wide, full),
            lambda n, y, x, c: te.sum(
                operand[
                    n,
                    y * strides[0] + ry * dilation[0],
                    x * strides[1] + rx * dilation[1],
                    channel(c),
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
        return finished(shape, sums) if apart is None else joined(shape, sums, apart)

    start = data.start(weight, dot, full)
    own = None if apart is None else (apart.share, apart.outputs)
    told: dict[str, Any] = {"start": start, "name": "convolution_int8", "pattern": OUT_FUSIBLE, "apart": own}
    return emit_from(builder, compute, data.stored, packed, **told)


def _tile(window: Window, dot: Dot, machine: Machine, channels: int) -> tuple[int, tiles.Tile]:
    """Rows of the image in a tile, and the tile over rows x columns pixels, of blocks of so many channels."""
    height, width = window.size
    machine = dot.seen_by_tiles(machine)
    channels = max(channels, dot.lanes)  # no narrower instruction is used
    unit = 1 if channels >= window.channels else channels // dot.lanes  # a tile has a block or a part of one
    widest = dot.widest if unit == 1 and channels >= window.channels else unit

    def choose(heights: list[tuple[int, float]]) -> tiles.Tile:
        return tiles.choose(heights, channels, machine, "int32", widest, unit)

    single = choose(tiles.padded(width, machine))
    if width * 2 > machine.registers:
        return 1, single
    several = [(rows * width, _up(height, rows) / height) for rows in range(1, machine.registers // width + 1)]
    tile = choose([*several, *tiles.padded(width, machine)])
    return (tile.rows // width, tile) if tile.rows % width == 0 else (1, tile)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
