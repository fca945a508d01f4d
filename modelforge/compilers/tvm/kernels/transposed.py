"""Transposed convolutions, channels last, as one ordinary convolution for each phase of the output.

Idea (Shi et al. 2016, arXiv:1609.05158): with stride s the outputs at (y % s, x % s) read the same few input pixels
with their own s-th part of the window, so each of the s*s phases is a convolution of stride 1 and nothing is scattered:
outputs are driven, inputs gathered. A window larger than the stride is filled up with zero weights to a multiple of it.
Where phases read the same pixel (window <= stride, no padding) and have few channels, they lie side by side in one
register tile. Bound: as for convolutions.
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
    is_constant,
    numbers,
    relax,
    shape_of,
    te,
    topi,
)
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.convolution import pack
from modelforge.compilers.tvm.kernels.loops import neighbours, spread, unroll_tail, vector_width, vectorize_copy
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class Transposed:
    """Transposed convolutions with constant weights."""

    name: str = "transposed"
    operators: tuple[str, ...] = ("relax.nn.conv2d_transpose",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data, weight = call.args
        layout, shape = str(call.attrs.data_layout), shape_of(data)
        if shape is None or layout not in ("NHWC", "NCHW") or not is_constant(weight):
            return None
        if dtype_of(data) not in ("float32", "float16"):
            return None
        values = constant_value(weight).transpose([str(call.attrs.kernel_layout).index(axis) for axis in "IOHW"])
        if layout == "NHWC":
            return _convolve(_phases(call, shape, values), values, data, builder, machine)
        data = builder.emit(relax.op.permute_dims(data, [0, 2, 3, 1]))
        found = _convolve(_phases(call, shape_of(data) or (), values), values, data, builder, machine)
        return relax.op.permute_dims(builder.emit(found), [0, 3, 1, 2])

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        columns, vectors, lanes, together, high, wide = (int(value) for value in block_annotations(sch, anchor)[TILE])
        pads, after = neighbours(sch, anchor, machine)
        out = after[-1]
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        channels = int(sch.get(out).iter_vars[-1].dom.extent)
        batch, y, x, channel = sch.get_loops(out)
        y, y_phase = sch.split(y, factors=[None, high])
        x, x_tile, x_phase = sch.split(x, factors=[None, columns, wide])
        if together:
            outer = [batch, y, x]
            sch.reorder(*outer, y_phase, x_tile, x_phase, channel)
            tail = [y_phase, *([sch.fuse(x_tile, x_phase, channel)] if channels == 1 else [x_tile, x_phase, channel])]
        else:
            block, channel = sch.split(channel, factors=[None, vectors * lanes])
            outer = [block, batch, y, y_phase, x]
            sch.reorder(*outer, x_tile, x_phase, channel)
            tail = [x_tile, x_phase, channel]
        width = lanes if together and channels == 1 else gcd(channels, lanes)
        sch.set_scope(anchor, 0, "local")
        sch.compute_at(anchor, outer[-1], preserve_unit_loops=True)
        unroll_tail(sch, tail, width)
        spread(sch, outer, work, machine)
        self._inner(sch, anchor, vectors, lanes)
        for pad in pads:
            vectorize_copy(sch, pad, machine)
        return f"{columns}x{vectors * lanes} of {high * wide if together else wide} phases"

    @staticmethod
    def _inner(sch: Any, anchor: Any, vectors: int, lanes: int) -> None:
        """The sums of one tile: taps and input channels outside, pixels and vectors inside."""
        *_, tile, _, phase, column, row_tap, column_tap, inner = sch.get_loops(anchor)
        vector, lane = sch.split(column, factors=[vectors, lanes])
        sch.reorder(row_tap, column_tap, inner, tile, phase, vector, lane)
        sch.vectorize(lane)
        for loop in (tile, phase, vector):
            sch.unroll(loop)
        sch.decompose_reduction(anchor, row_tap)


@dataclass(frozen=True)
class _Phases:
    """The geometry: ``taps`` of each phase, ``padding`` top and left, ``size`` of the output; ``data`` is NHWC."""

    data: tuple[int, ...]
    channels: int
    groups: int
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    taps: tuple[int, int]
    size: tuple[int, int]

    @property
    def same_pixel(self) -> bool:
        """Whether every phase of an output pixel reads one and the same input pixel."""
        return self.taps == (1, 1) and not any(self.padding)


def _phases(call: Any, shape: tuple[int, ...], weight: np.ndarray[Any, Any]) -> _Phases:
    """The geometry of a call with data of ``shape`` (NHWC); ``weight`` is IOHW."""
    strides, dilation = numbers(call.attrs.strides), numbers(call.attrs.dilation)
    top, left, bottom, right = numbers(call.attrs.padding)
    extra = numbers(call.attrs.output_padding)
    spans = [dilation[axis] * (weight.shape[2 + axis] - 1) + 1 for axis in (0, 1)]
    ends = ((top + bottom), (left + right))
    height, width = ((shape[1 + axis] - 1) * strides[axis] + spans[axis] - ends[axis] + extra[axis] for axis in (0, 1))
    groups = int(call.attrs.groups)
    rows, columns = (-(-spans[axis] // strides[axis]) for axis in (0, 1))
    return _Phases(
        data=shape,
        channels=weight.shape[1] * groups,
        groups=groups,
        strides=(strides[0], strides[1]),
        dilation=(dilation[0], dilation[1]),
        padding=(top, left),
        taps=(rows, columns),
        size=(height, width),
    )


def _convolve(phases: _Phases, weight: np.ndarray[Any, Any], data: Any, builder: Any, machine: Machine) -> Any:
    """Emit the transposed convolution of ``data`` (NHWC) with ``weight`` (IOHW)."""
    together, tile = _tile(phases, machine, str(weight.dtype))
    (high, wide), (rows, columns), (top, left) = phases.strides, phases.taps, phases.padding
    channels, groups = phases.channels, phases.groups
    per_phase = np.stack([_taps(weight, phases, phase) for phase in range(high * wide)])
    if together:
        per_phase = per_phase.reshape(1, -1, *per_phase.shape[2:])
    packed = np.stack([pack(values, tile.columns) for values in per_phase])
    packed = packed.reshape(*((1, 1) if together else phases.strides), *packed.shape[1:])
    tall, broad = -(-phases.size[0] // high), -(-phases.size[1] // (wide * tile.rows)) * tile.rows
    before = (rows - 1, columns - 1)
    after = [
        max(0, size + (stride - 1 + pad) // stride - have)
        for size, stride, pad, have in zip((tall, broad), phases.strides, phases.padding, phases.data[1:3], strict=True)
    ]
    depth, share = weight.shape[0] // groups, channels // groups
    macs = prod(phases.data) // groups * channels * prod(weight.shape[2:])
    attrs = {RULE: Transposed.name, MACS: macs, TILE: [tile.rows, tile.vectors, tile.lanes, int(together), high, wide]}
    width = tile.columns

    def compute(data: Any, weight: Any) -> Any:
        if any((*before, *after)):
            data = topi.nn.pad(data, [0, *before, 0], [0, *after, 0], name="pad_input")
        ty, tx, rc = (te.reduce_axis((0, size), name) for size, name in ((rows, "ty"), (columns, "tx"), (depth, "rc")))

        def product(n: Any, y: Any, x: Any, down: Any, right: Any, c: Any) -> Any:
            row = y + (down + top) // high + before[0] - ty
            column = x + (right + left) // wide + before[1] - tx
            source = rc if groups == 1 else te.min(c, channels - 1) // share * depth + rc
            return te.sum(
                data[n, row, column, source] * weight[down, right, c // width, ty, tx, rc, c % width], axis=[ty, tx, rc]
            )

        full = te.compute(
            (phases.data[0], tall, broad, *packed.shape[:2], packed.shape[2] * width),
            product,
            name="transposed",
            attrs=attrs,
        )

        def gather(n: Any, y: Any, x: Any, c: Any) -> Any:
            at = (0, 0, (y % high * wide + x % wide) * channels + c) if together else (y % high, x % wide, c)
            return full[(n, y // high, x // wide, *at)]

        return te.compute((phases.data[0], *phases.size, channels), gather, name="gather")

    return emit_kernel(builder, compute, data, relax.const(packed), name="transposed", pattern=OUT_FUSIBLE)


def _taps(weight: np.ndarray[Any, Any], phases: _Phases, phase: int) -> np.ndarray[Any, Any]:
    """The weights of one phase: [outputs, rows of taps, columns of taps, inputs of a group], zero beyond the window."""
    inputs, outputs, *_ = weight.shape
    high, wide = (stride * taps for stride, taps in zip(phases.strides, phases.taps, strict=True))
    whole = np.zeros((inputs, outputs, high, wide), weight.dtype)
    down, right = (step * (size - 1) + 1 for step, size in zip(phases.dilation, weight.shape[2:], strict=True))
    whole[:, :, : down : phases.dilation[0], : right : phases.dilation[1]] = weight
    row, column = divmod(phase, phases.strides[1])
    part = whole[
        :,
        :,
        (row + phases.padding[0]) % phases.strides[0] :: phases.strides[0],
        (column + phases.padding[1]) % phases.strides[1] :: phases.strides[1],
    ]
    split = part.reshape(phases.groups, inputs // phases.groups, outputs, *part.shape[2:])
    return np.moveaxis(split, 1, -1).reshape(phases.groups * outputs, *part.shape[2:], inputs // phases.groups)


def _tile(phases: _Phases, machine: Machine, dtype: str) -> tuple[bool, tiles.Tile]:
    """Whether all phases share a tile, and the tile: pixels of one phase by columns."""
    width = -(-phases.size[1] // phases.strides[1])
    columns = prod(phases.strides) * phases.channels
    lanes = vector_width(columns, machine.lanes(dtype))
    vectors = columns // lanes
    if phases.same_pixel and phases.groups == 1 and lanes >= min(4, columns) and vectors * 3 + 1 <= machine.registers:
        most = min((machine.registers - 1 - vectors) // vectors, 16)
        fitting = [rows for rows, _ in tiles.padded(width, machine) if rows <= most]
        best = min(fitting, key=lambda rows: -(-width // rows) * rows / width * (1 + 1 / (rows * vectors)))
        return True, tiles.Tile(best, vectors, lanes)
    # The phases of a row lie side by side in the tile; each reads weights of its own, so some registers are left free.
    beside = phases.strides[1]
    heights = [
        (rows * beside, waste)
        for rows, waste in tiles.padded(width, machine)
        if rows == 1 or rows * beside * 4 <= machine.registers * 3
    ]
    tile = tiles.choose(heights, phases.channels, machine, dtype)
    return False, tiles.Tile(max(1, tile.rows // beside), tile.vectors, tile.lanes)
