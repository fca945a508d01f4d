"""Maxima and means over windows, channels last, and over whole images.

Idea: a window is taken in two steps, first down its rows into one line of the image that stays in the first-level
cache, then across that line, so a window of k by k costs 2k steps, not k*k. Vectors run over channels. A maximum needs
no padding: a row beyond the edge is replaced by the edge row, which is in the window already. A mean over the image
keeps several sums in flight, since one sum would wait for the latency of each addition. Bound: reading the image once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    OUT_FUSIBLE,
    block_annotations,
    dtype_of,
    emit_kernel,
    extent,
    numbers,
    op_name,
    relax,
    shape_of,
    te,
    tirx,
)
from modelforge.compilers.tvm.kernels.loops import neighbours, spread, unroll_tail, vectorize_last
from modelforge.compilers.tvm.kernels.rule import RULE, TILE
from modelforge.compilers.tvm.machine import Machine

_UNROLLED: Final = 64
"""Steps of a tile that are written out."""
_SHARED: Final = 1 << 16
"""Elements of an image that several threads sum up: fewer are summed before threads wake."""
_SUMS: Final = 8
"""Sums in flight that hide the latency of an addition: four cycles, two a cycle."""


@dataclass(frozen=True)
class Pool:
    """Maxima and means over windows."""

    name: str = "pooling"
    operators: tuple[str, ...] = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d")

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        shape, out = shape_of(call.args[0]), shape_of(builder.normalize(call))
        attrs = call.attrs
        if shape is None or out is None or str(attrs.layout) != "NHWC" or str(attrs.out_layout) not in ("", "NHWC"):
            return None
        if dtype_of(call.args[0]) not in ("float32", "float16"):
            return None
        window = _Window(
            data=shape,
            out=out,
            kernel=numbers(attrs.pool_size),
            strides=numbers(attrs.strides),
            dilation=numbers(attrs.dilation),
            padding=numbers(attrs.padding),
            maximum="max" in op_name(call),
            counts_padding=bool(attrs.count_include_pad),
        )
        if not window.maximum and window.dilation != (1, 1):
            return None
        if window.is_whole:
            return reduce_image(call.args[0], "max" if window.maximum else "mean", True, builder, machine)
        return _pool(window, call.args[0], builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        columns, channels, lanes = (int(value) for value in block_annotations(sch, anchor)[TILE])
        (lines,), after = neighbours(sch, anchor, machine)
        out = after[-1] if after else sch.cache_write(anchor, 0, "local")
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        batch, y, x, channel = sch.get_loops(out)
        x, x_tile = sch.split(x, factors=[None, columns])
        block, channel = sch.split(channel, factors=[None, channels])
        sch.reorder(batch, y, block, x, x_tile, channel)
        sch.set_scope(anchor, 0, "local")
        sch.compute_at(anchor, x, preserve_unit_loops=True)
        sch.compute_at(lines, block, preserve_unit_loops=True)
        unroll_tail(sch, [x_tile, channel], lanes)
        spread(sch, [batch, y, block], work, machine)
        self._across(sch, anchor, lanes)
        self._down(sch, lines, lanes)
        return f"{columns}x{channels}"

    @staticmethod
    def _across(sch: Any, anchor: Any, lanes: int) -> None:
        *_, tile, channel, column = sch.get_loops(anchor)
        vector, lane = sch.split(channel, factors=[None, lanes])
        sch.reorder(column, tile, vector, lane)
        if lanes > 1:
            sch.vectorize(lane)
        steps = extent(sch, tile) * extent(sch, vector)
        for loop in (tile, vector):
            sch.unroll(loop)
        if steps * extent(sch, column) <= _UNROLLED * 2:
            sch.unroll(column)
        sch.decompose_reduction(anchor, column)

    @staticmethod
    def _down(sch: Any, lines: Any, lanes: int) -> None:
        *_, column, channel, row = sch.get_loops(lines)
        vector, lane = sch.split(channel, factors=[None, lanes])
        sch.reorder(column, vector, row, lane)
        if lanes > 1:
            sch.vectorize(lane)
        if extent(sch, row) <= _UNROLLED // 4:
            sch.unroll(row)
        sch.decompose_reduction(lines, row)


@dataclass(frozen=True)
class _Window:
    """Where windows lie; ``data`` and ``out`` are NHWC, ``padding`` top, left, bottom, right."""

    data: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    maximum: bool
    counts_padding: bool

    @property
    def is_whole(self) -> bool:
        """Whether there is one window, and it is the image."""
        fits = not any(self.padding) if not self.maximum or self.dilation != (1, 1) else True
        return self.out[1:3] == (1, 1) and fits and self.kernel == self.data[1:3]

    def ends(self, axis: int) -> list[tuple[int, int]]:
        """First and last element of each window along an axis, as elements of the data; they may lie outside."""
        span = self.dilation[axis] * (self.kernel[axis] - 1)
        firsts = [step * self.strides[axis] - self.padding[axis] for step in range(self.out[1 + axis])]
        return [(first, first + span) for first in firsts]

    @property
    def edge_stands_in(self) -> bool:
        """Whether an element beyond the edge may be read as the nearest one: it is in the same window."""
        touching = all(first < self.data[1 + axis] and last >= 0 for axis in (0, 1) for first, last in self.ends(axis))
        return self.maximum and self.dilation == (1, 1) and touching

    def counts(self, axis: int) -> np.ndarray[Any, Any]:
        """How many elements each window's mean divides by, along an axis."""
        low, high = 0, self.data[1 + axis]
        if self.counts_padding:
            low, high = -self.padding[axis], high + self.padding[2 + axis]
        return np.array([max(1, min(last + 1, high) - max(first, low)) for first, last in self.ends(axis)], "float64")


def _pool(window: _Window, data: Any, builder: Any, machine: Machine) -> Any:
    """Emit the maxima or means of ``data`` (NHWC) over a window."""
    dtype = dtype_of(data)
    batch, height, width, channels = window.data
    columns, block, lanes = _tile(window, machine, dtype)
    wide = -(-window.out[2] // columns) * columns
    across = (wide - 1) * window.strides[1] + window.dilation[1] * (window.kernel[1] - 1) + 1
    shares = 1.0 / np.outer(window.counts(0), window.counts(1))
    combine, lowest = (te.max, tirx.min_value(dtype)) if window.maximum else (te.sum, tirx.const(0, dtype))
    attrs = {RULE: Pool.name, TILE: [columns, block, lanes]}

    def compute(data: Any, shares: Any = None) -> Any:
        ry, rx = (te.reduce_axis((0, size), name) for size, name in zip(window.kernel, ("ry", "rx"), strict=True))

        def element(n: Any, y: Any, x: Any, c: Any) -> Any:
            row = y * window.strides[0] + ry * window.dilation[0] - window.padding[0]
            column = x - window.padding[1]
            if window.edge_stands_in:
                return data[n, te.max(te.min(row, height - 1), 0), te.max(te.min(column, width - 1), 0), c]
            inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
            return tirx.if_then_else(inside, data[n, row, column, c], lowest)

        lines = te.compute(
            (batch, window.out[1], across, channels), lambda *at: combine(element(*at), axis=[ry]), name="lines"
        )
        full = te.compute(
            (batch, window.out[1], wide, channels),
            lambda n, y, x, c: combine(lines[n, y, x * window.strides[1] + rx * window.dilation[1], c], axis=[rx]),
            name="pool",
            attrs=attrs,
        )
        if window.maximum:
            return full if wide == window.out[2] else te.compute(window.out, lambda *at: full[at], name="crop")
        if shares is None:
            share = tirx.const(float(1 / (window.counts(0)[0] * window.counts(1)[0])), dtype)
            return te.compute(window.out, lambda *at: full(*at) * share, name="mean")
        return te.compute(window.out, lambda n, y, x, c: full(n, y, x, c) * shares[y, x], name="mean")

    varied = [] if window.maximum or np.ptp(shares) == 0 else [relax.const(shares.astype(dtype))]
    return emit_kernel(builder, compute, data, *varied, name="pool", pattern=OUT_FUSIBLE)


def _tile(window: _Window, machine: Machine, dtype: str) -> tuple[int, int, int]:
    """Pixels of a tile, channels of a block, lanes of a vector."""
    channels = window.data[3]
    lanes = gcd(channels, machine.lanes(dtype))
    vectors = next(count for count in (4, 3, 2, 1) if (channels // lanes) % count == 0)
    most = max(1, min(window.out[2], 12 // vectors))
    exact = max(size for size in range(1, most + 1) if window.out[2] % size == 0)
    return (exact if exact * 2 >= most else most), vectors * lanes, lanes


@dataclass(frozen=True)
class ImagePool:
    """Sums, means and maxima over whole images."""

    name: str = "image-pooling"
    operators: tuple[str, ...] = ("relax.mean", "relax.sum", "relax.max", "relax.nn.adaptive_avg_pool2d")

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        shape = shape_of(call.args[0])
        if shape is None or len(shape) != 4 or dtype_of(call.args[0]) not in ("float32", "float16"):
            return None
        kind = op_name(call).rsplit(".", 1)[1]
        if kind == "adaptive_avg_pool2d":
            out = shape_of(builder.normalize(call))
            if str(call.attrs.layout) != "NHWC" or out is None or out[1:3] != (1, 1):
                return None
            return reduce_image(call.args[0], "mean", True, builder, machine)
        axes = sorted(axis % 4 for axis in numbers(call.attrs.axis)) if call.attrs.axis is not None else []
        if axes != [1, 2]:
            return None
        return reduce_image(call.args[0], kind, bool(call.attrs.keepdims), builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        chunks, beside, channels, lanes = (int(value) for value in block_annotations(sch, anchor)[TILE])
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        (total,) = sch.get_consumers(anchor)
        _, after = neighbours(sch, total, machine)
        partial = sch.cache_write(anchor, 0, "local")
        batch, chunk, side, channel, step = sch.get_loops(anchor)
        block, channel = sch.split(channel, factors=[None, channels])
        vector, lane = sch.split(channel, factors=[None, lanes])
        sch.reorder(batch, chunk, block, step, side, vector, lane)
        sch.reverse_compute_at(partial, block, preserve_unit_loops=True)
        if lanes > 1:
            sch.vectorize(lane)
        for loop in (side, vector):
            sch.unroll(loop)
        unroll_tail(sch, sch.get_loops(partial)[3:], lanes)
        spread(sch, [batch, chunk, block], work, machine)
        sch.decompose_reduction(anchor, step)
        self._finish(sch, total, after, lanes)
        return f"{chunks} parts, {beside}x{channels}"

    @staticmethod
    def _finish(sch: Any, total: Any, after: list[Any], lanes: int) -> None:
        """Add up the parts, a vector of channels at a time."""
        *outer, channel, chunk, side = sch.get_loops(total)
        rest, lane = sch.split(channel, factors=[None, lanes])
        sch.reorder(*outer, rest, chunk, side, lane)
        if lanes > 1:
            sch.vectorize(lane)
        sch.decompose_reduction(total, chunk)
        for out in after:
            vectorize_last(sch, out, lanes)


def reduce_image(data: Any, kind: str, keepdims: bool, builder: Any, machine: Machine) -> Any:
    """Emit ``kind`` (``mean``, ``sum``, ``max``) of ``data`` (NHWC) over height and width."""
    dtype = dtype_of(data)
    batch, height, width, channels = shape_of(data) or ()
    lanes = gcd(channels, machine.lanes(dtype))
    pixels = height * width
    threads = machine.cores if pixels * channels >= _SHARED else 1
    chunks = max(size for size in range(1, threads + 1) if pixels % size == 0)
    vectors, beside = _sums(pixels // chunks, channels // lanes)
    steps = pixels // chunks // beside
    combine = te.max if kind == "max" else te.sum
    attrs = {RULE: ImagePool.name, TILE: [chunks, beside, vectors * lanes, lanes]}

    def compute(data: Any) -> Any:
        step = te.reduce_axis((0, steps), "step")

        def element(n: Any, chunk: Any, side: Any, c: Any) -> Any:
            pixel = (chunk * steps + step) * beside + side
            return data[n, pixel // width, pixel % width, c]

        parts = te.compute(
            (batch, chunks, beside, channels),
            lambda *at: combine(element(*at), axis=[step]),
            name="parts",
            attrs=attrs,
        )
        chunk, side = te.reduce_axis((0, chunks), "chunk"), te.reduce_axis((0, beside), "side")
        shape = (batch, 1, 1, channels) if keepdims else (batch, channels)
        total = te.compute(
            shape, lambda *at: combine(parts[at[0], chunk, side, at[-1]], axis=[chunk, side]), name="total"
        )
        if kind != "mean":
            return total
        share = tirx.const(1 / pixels, dtype)
        return te.compute(shape, lambda *at: total(*at) * share, name="mean")

    return emit_kernel(builder, compute, data, name=f"image_{kind}", pattern=OUT_FUSIBLE)


def _sums(pixels: int, vectors: int) -> tuple[int, int]:
    """Vectors of channels, and neighbouring pixels with sums of their own: together enough to hide the latency."""
    pairs = [
        (count, beside)
        for count in (4, 3, 2, 1)
        for beside in range(1, 14)
        if vectors % count == 0 and pixels % beside == 0 and count * beside < 2 * _SUMS
    ]
    return max(pairs, key=lambda pair: (min(_SUMS, pair[0] * pair[1]), pair[0], -pair[1]))
