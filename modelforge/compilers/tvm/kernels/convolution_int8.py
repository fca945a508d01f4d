"""Convolutions of int8, channels last: the same tiles as in float, filled by the machine's integer products.

Idea: ``(q - zero) * w`` summed is ``q * w`` summed less ``zero * sum(w)``, which is known now: activations are
multiplied as they lie in memory, pads hold the zero point, and the sums of a tile stay in registers until the fused
epilogue makes the next layer's int8 of them. Where the instruction reads 16 bits, or the input has to be padded, a copy
is made first. Where pixels have few channels, a row of the window is read as one run of bytes, and not pixel by pixel.
Bound: one product step per instruction (:mod:`.dot`), two instructions a cycle.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

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

_ROUNDED: Final = 1.15
"""What a run of bytes may grow by to be whole steps of the longest kind."""


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
    runs = groups == 1 and _has_runs(window, dot, machine)
    if groups > 1:
        band = band_of(weight, groups, machine)
        weight, dot = band.weights(weight), dot_of(machine, band.length)
    elif runs:
        weight = _in_runs(weight, machine)
        dot = dot_of(machine, weight.shape[3])
    depth, apart = weight.shape[3], band if band is not None and band.apart else None
    rows, tile = _tile(window, dot, machine, window.channels if band is None else band.width, depth)
    columns = tile.rows // rows
    height, width = window.size
    tall, wide = tiles.up(height, rows), tiles.up(width, columns)
    packed = pack(weight, dot, tile.columns)
    blocks, kernel_height, kernel_width, parts = (int(size) for size in packed.value.shape[:4])
    strides, dilation = window.strides, window.dilation
    zero, full = data.zero_for(dot), blocks * tile.columns
    top, left = window.padding[:2]
    bottom, right = window.padded_for(tall, wide)
    before, after = [0, top, left, 0], [0, bottom, right, max(0, parts * dot.depth - channels)]
    if runs:
        length = window.kernel[1] * channels
        before, after = [0, top, left * channels], [0, bottom, right * channels + parts * dot.depth - length]
    attrs = {
        RULE: ConvolutionInt8.name,
        MACS: macs,
        TILE: [rows, columns, tile.vectors, depth, int(apart is not None)],
    }

    def compute(stored: Any, weight: Any) -> Any:
        operand = as_operand(stored, dot, data.zero, zero, before, after, runs=runs)
        ry, rx, rk = (
            te.reduce_axis((0, size), name)
            for name, size in (("ry", kernel_height), ("rx", kernel_width), ("rk", parts))
        )
        inner = [te.reduce_axis((0, size), name) for name, size in zip(("rj", "ri"), dot.axes, strict=False)]

        def activation(x: Any, c: Any) -> tuple[Any, ...]:
            channel = rk * dot.depth + dot.of_activations(inner)
            if runs:
                return (x * strides[1] * channels + channel,)
            first = 0 if band is None else band.start(c // band.width)
            return x * strides[1] + rx * dilation[1], first + channel

        sums = te.compute(
            (window.data[0], tall, wide, full),
            lambda n, y, x, c: te.sum(
                operand[
                    n,
                    y * strides[0] + ry * dilation[0],
                    *activation(x, c),
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


def _has_runs(window: Window, dot: Dot, machine: Machine) -> bool:
    """Whether the rows of a window, each as one run of bytes, take no more steps than filled up pixels.

    Whole pixels take as many either way, and longer loops are better ones; but the input must be copied for runs, which
    only padding makes necessary anyway.
    """
    channels, width = window.data[3], window.kernel[1]
    if width == 1 or window.dilation[1] != 1:
        return False
    if channels % dot.depth == 0:
        return any(window.padding)
    return _whole(width * channels, machine) <= width * tiles.up(channels, dot.depth)


def _whole(length: int, machine: Machine) -> int:
    """A length of whole steps, of the longest that cost little."""
    depths = sorted({dot_of(machine, size).depth for size in (16, 8, 4)}, reverse=True)
    return next(
        rounded for depth in depths if (rounded := tiles.up(length, depth)) <= _ROUNDED * length or depth == depths[-1]
    )


def _in_runs(weight: np.ndarray[Any, Any], machine: Machine) -> np.ndarray[Any, Any]:
    """OHWI as [O, H, 1, W * I], filled up with zeros to whole steps."""
    outputs, height, width, inputs = weight.shape
    length = width * inputs
    found = np.zeros((outputs, height, 1, _whole(length, machine)), weight.dtype)
    found[:, :, 0, :length] = weight.reshape(outputs, height, length)
    return found


def _tile(window: Window, dot: Dot, machine: Machine, channels: int, depth: int) -> tuple[int, tiles.Tile]:
    """Rows of the image in a tile, and the tile over rows x columns pixels, of blocks of so many channels."""
    height, width = window.size
    machine = dot.seen_by_tiles(machine)
    channels = max(channels, dot.lanes)  # no narrower instruction is used
    unit = 1 if channels >= window.channels else channels // dot.lanes  # a tile has a block or a part of one
    widest = dot.widest if unit == 1 and channels >= window.channels else unit

    def choose(heights: list[tuple[int, float]]) -> tiles.Tile:
        heights = dot.heights(heights, channels, tiles.up(depth, dot.depth) // dot.depth)
        return tiles.choose(heights, channels, machine, "int32", widest, unit)

    single = choose(tiles.padded(width, machine))
    if width * 2 > machine.registers:
        return 1, single
    several = [(rows * width, tiles.up(height, rows) / height) for rows in range(1, machine.registers // width + 1)]
    tile = choose([*several, *tiles.padded(width, machine)])
    return (tile.rows // width, tile) if tile.rows % width == 0 else (1, tile)
