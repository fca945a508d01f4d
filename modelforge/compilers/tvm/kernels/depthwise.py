"""Depthwise convolutions, channels last: every channel has a window of its own.

Idea: vectors run over channels, so nothing is broadcast; a tile of pixels keeps its sums in registers while the whole
window is unrolled, and the window's weights stay in registers over a row of tiles where they fit. Bound: one load for
each multiply-add (two a cycle), or memory for large images. Padding is written for a block of rows and channels at a
time into a buffer that stays in the first-level cache, so the padded image never exists in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any, Final

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
    tirx,
)
from modelforge.compilers.tvm.choices import chosen
from modelforge.compilers.tvm.kernels.convolution import Window, window_of
from modelforge.compilers.tvm.kernels.loops import neighbours, partition, spread, unroll_tail, vectorize_last
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.kernels.starts import emit_from
from modelforge.compilers.tvm.machine import Machine

_UNROLLED: Final = 256
"""Multiply-adds of a tile that are written out: more no longer fit the decoded-instruction cache."""

_TRIED: Final = 16
"""Tiles that a search measures at most."""


@dataclass(frozen=True)
class Depthwise:
    """Convolutions with as many groups as input channels, and constant weights."""

    name: str = "depthwise"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window = window_of(call)
        if window is None or int(call.attrs.groups) == 1 or int(call.attrs.groups) != window.data[3]:
            return None
        if dtype_of(call.args[0]) not in ("float32", "float16"):
            return None
        return convolve(window, constant_value(call.args[1]), call.args[0], builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        rows, columns, vectors, lanes = (int(value) for value in block_annotations(sch, anchor)[TILE])
        pads, after = neighbours(sch, anchor, machine)
        out = after[-1] if after else sch.cache_write(anchor, 0, "local")
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        batch, y, x, channel = sch.get_loops(out)
        y, y_row = sch.split(y, factors=[None, rows])
        x, x_tile = sch.split(x, factors=[None, columns])
        block, channel = sch.split(channel, factors=[None, vectors * lanes])
        sch.reorder(batch, y, block, y_row, x, x_tile, channel)
        exact = gcd(int(sch.get(out).iter_vars[-1].dom.extent), lanes)
        sch.set_scope(anchor, 0, "local")
        sch.compute_at(anchor, x, preserve_unit_loops=True)
        for pad in pads:
            sch.compute_at(pad, block, preserve_unit_loops=True)
            for loop in sch.get_loops(pad)[-3:-1]:  # rows and pixels: most of them have no border in them
                partition(sch, loop)
            vectorize_last(sch, pad, exact)
        unroll_tail(sch, [x_tile, channel], exact)
        spread(sch, [batch, y, block], work, machine)
        self._inner(sch, anchor, vectors, lanes)
        return f"{columns}x{vectors * lanes} in {rows} rows"

    @staticmethod
    def _inner(sch: Any, anchor: Any, vectors: int, lanes: int) -> None:
        """The sums of one tile: the window outside, pixels and vectors inside, all written out while they are few."""
        *_, tile, channel, row, column = sch.get_loops(anchor)
        vector, lane = sch.split(channel, factors=[vectors, lanes])
        sch.reorder(row, column, tile, vector, lane)
        sch.vectorize(lane)
        steps = extent(sch, tile) * vectors
        for loop in (vector, tile, column, row):
            if loop in (column, row) and steps * extent(sch, loop) > _UNROLLED:
                break
            steps *= extent(sch, loop) if loop in (column, row) else 1
            sch.unroll(loop)
        sch.decompose_reduction(anchor, row)


def convolve(
    window: Window,
    weight: np.ndarray[Any, Any],
    data: Any,
    builder: Any,
    machine: Machine,
    rule: str = "depthwise",
    zero: int | None = None,
) -> Any:
    """Emit the convolution of ``data`` (NHWC) with ``weight`` (OHW1).

    With a ``zero`` point, ``data`` is quantized, and ``data - zero`` is widened to the type of ``weight`` as it is
    padded; int16 is summed in int32.
    """
    window, weight = met(window, weight)
    batch, _, _, groups = window.data
    times = window.channels // groups
    dtype = "int32" if weight.dtype == np.int16 else str(weight.dtype)
    tile = _tile(window, machine, str(weight.dtype), dtype)
    width = tile.vectors * tile.lanes
    full = -(-window.channels // width) * width
    kernel, strides, dilation = window.kernel, window.strides, window.dilation
    height, wide = window.size[0], -(-window.size[1] // tile.columns) * tile.columns
    tall = -(-height // tile.rows) * tile.rows
    top, left = window.padding[:2]
    bottom, right = window.padded_for(tall, wide)
    packed = np.zeros((*kernel, full), weight.dtype)
    packed[:, :, : window.channels] = np.moveaxis(weight[..., 0], 0, -1)
    macs = batch * prod(window.size) * window.channels * prod(kernel)
    attrs = {RULE: rule, MACS: macs, TILE: [tile.rows, tile.columns, tile.vectors, tile.lanes]}

    def compute(data: Any, weight: Any) -> Any:
        if any((top, left, bottom, right)) or times > 1 or full != window.channels or zero is not None:
            data = _padded(data, (top, left, bottom, right), times, full, str(weight.dtype), zero)
        ry, rx = (te.reduce_axis((0, size), name) for size, name in zip(kernel, ("ry", "rx"), strict=True))
        sums = te.compute(
            (batch, tall, wide, full),
            lambda n, y, x, c: te.sum(
                data[n, y * strides[0] + ry * dilation[0], x * strides[1] + rx * dilation[1], c].astype(dtype)
                * weight[ry, rx, c].astype(dtype),
                axis=[ry, rx],
            ),
            name="depthwise",
            attrs=attrs,
        )
        shape = (batch, *window.size, window.channels)
        return sums if tuple(map(int, sums.shape)) == shape else te.compute(shape, lambda *at: sums[at], name="crop")

    arguments = (data, relax.const(packed))
    if dtype == "int32":
        start = np.zeros(full, np.int32)
        return emit_from(builder, compute, *arguments, start=start, name="depthwise", pattern=OUT_FUSIBLE)
    return emit_kernel(builder, compute, *arguments, name="depthwise", pattern=OUT_FUSIBLE)


def met(window: Window, weight: np.ndarray[Any, Any]) -> tuple[Window, np.ndarray[Any, Any]]:
    """The window and its weight (OHW1) without outer rows that meet nothing but padding, as a tall one has over an
    image of few rows. What is left may start below the image's first row: padding is negative then."""
    first, last = ((size - 1) * window.strides[0] for size in (1, window.size[0]))
    top, height, step = window.padding[0], window.data[1], window.dilation[0]
    rows = [row for row in range(window.kernel[0]) if last + row * step >= top and first + row * step < top + height]
    if not rows:
        return window, weight
    begin, end = rows[0], rows[-1] + 1
    _, left, bottom, right = window.padding
    padding = (top - begin * step, left, bottom - (window.kernel[0] - end) * step, right)
    return replace(window, kernel=(end - begin, window.kernel[1]), padding=padding), weight[:, begin:end]


def _padded(
    data: Any, padding: tuple[int, int, int, int], times: int, channels: int, dtype: str, zero: int | None
) -> Any:
    """``data`` (less its ``zero`` point) with zeros around it, each channel repeated ``times`` times, and zero channels
    up to ``channels``."""
    batch, height, width, depth = (int(size) for size in data.shape)
    top, left, bottom, right = padding

    def element(n: Any, y: Any, x: Any, c: Any) -> Any:
        inside = [low for low, pad in ((y >= top, top), (x >= left, left)) if pad]
        inside += [high for high, pad in ((y < top + height, bottom), (x < left + width, right)) if pad]
        inside += [c < depth * times] if channels > depth * times else []
        value = data[n, y - top, x - left, c // times]
        value = value if zero is None else value.astype(dtype) - tirx.const(zero, dtype)
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, dtype)) if inside else value

    return te.compute((batch, top + height + bottom, left + width + right, channels), element, name="pad_input")


@dataclass(frozen=True)
class _Tile:
    """``columns`` pixels by ``vectors`` of ``lanes`` channels in registers; padding is written for ``rows`` at once."""

    rows: int
    columns: int
    vectors: int
    lanes: int


def _tile(window: Window, machine: Machine, read: str, dtype: str) -> _Tile:
    """The measured tile, or that with the least cost per sum: the pipes, the latency, weights that are loaded again,
    and the waste. A vector is one of the type that is ``read``; its sums, of ``dtype``, may take several registers."""
    width, taps = window.size[1], prod(window.kernel)
    wide = machine.lanes(read) // machine.lanes(dtype)
    found: list[tuple[float, int, int, int]] = []
    for lanes in _lanes(window.channels, machine.lanes(read)):
        for vectors in range(1, 5):
            channels = -(-window.channels // (vectors * lanes)) * vectors / window.channels
            for columns in range(1, min(width, 12) + 1):
                sums = vectors * columns * wide
                if sums + 2 > machine.registers:
                    continue
                waste = channels * (-(-width // columns) * columns / width)
                spilled = max(0, taps * vectors + sums + 1 - machine.registers) / taps / vectors
                cost = waste * (max(sums, 6) + spilled * vectors * 0.5 + 0.5) / sums
                if machine.isa == "aarch64":  # loads are instructions, in a narrow front end
                    reach = (columns - 1) * window.strides[1] + window.kernel[1]
                    kept = sums + vectors * reach < machine.registers
                    loads = vectors * (reach / window.kernel[1] if kept else columns) + vectors * (spilled > 0)
                    cost = waste * (max(sums, 6) + loads) / sums
                found.append((round(cost, 9), columns, vectors, lanes))
    found.sort(key=lambda each: each[0])
    ranked = [
        _Tile(_rows(window, columns, vectors * lanes, machine, read), columns, vectors, lanes)
        for _, columns, vectors, lanes in found[:_TRIED] or [(0.0, 1, 1, 1)]
    ]
    return chosen("tile", ranked[0], lambda: ranked[1:])


def _rows(window: Window, columns: int, channels: int, machine: Machine, dtype: str) -> int:
    """Rows of output whose padded input takes half of the first-level cache, with little waste in the last block."""
    height, width = window.size
    across = (
        ((-(-width // columns) * columns) - 1) * window.strides[1] + window.dilation[1] * (window.kernel[1] - 1) + 1
    )
    row = across * channels * np.dtype(dtype).itemsize
    span = window.dilation[0] * (window.kernel[0] - 1) + 1
    most = max(4, (machine.l1d // 2 // row - span) // window.strides[0] + 1)
    blocks = -(-height // min(most, height))
    return -(-height // blocks)


def _lanes(channels: int, lanes: int) -> set[int]:
    """Lanes worth a try: all that a vector has, with channels to pad, and the most that leave none to pad."""
    full = lanes
    while full > 4 and channels <= full // 2:
        full //= 2
    return {full, max(gcd(channels, lanes), min(4, full))}
