"""Kernels that only move elements: concatenations, slices, transposes, nearest and linear resizing.

Idea: the vectors of one row are written out, so that a test of which input of a concatenation they come from is
decided when code is generated; a transpose goes tile by tile, so that each cache line is read once while it is in the
first-level cache; positions of a resize are computed at compile time. Bound: the bytes read and written.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    DATA_PARALLEL,
    INJECTIVE,
    blocks,
    dtype_of,
    emit_kernel,
    extent,
    is_reduction,
    numbers,
    relax,
    shape_of,
    te,
    tirx,
    written_dtype,
)
from modelforge.compilers.tvm.kernels.loops import partition, same_order, spread, vector_width
from modelforge.compilers.tvm.machine import Machine

_UNROLLED: Final = 128
"""Vectors of a row times operands that are written out: nested concatenations take long to compile otherwise."""
_TILE: Final = 16
"""Elements of FP32 in a cache line: the side of a transpose's tile."""


@dataclass(frozen=True)
class Copies:
    """Kernels of one block, after merging, in which the last axis is read otherwise than it is written."""

    name: str = "copies"

    def schedule(self, sch: Any, machine: Machine) -> str | None:
        *inner, block = blocks(sch)
        if any(is_reduction(sch, each) for each in (*inner, block)) or len(sch.get_loops(block)) < 2:
            return None
        for each in inner:
            sch.compute_inline(each)
        loops = sch.get_loops(block)
        if len(loops) != len(sch.get(block).iter_vars) or same_order(sch, block):
            return None
        work = prod(extent(sch, loop) for loop in loops)
        lanes = machine.lanes(written_dtype(sch, block))
        turned = _turned(sch, block)
        if turned is not None:
            return _transpose(sch, loops, turned, lanes, work, machine)
        *outer, last = loops
        count = extent(sch, last)
        width = vector_width(count, lanes)
        cut = 2 * width < lanes <= count
        width = lanes if cut else width
        if width == 1:
            return None
        rest, vector = sch.split(last, factors=[None, width])
        sch.vectorize(vector)
        if cut or count // width * len(sch.get(block).reads) > _UNROLLED:
            partition(sch, rest)
        else:
            sch.unroll(rest)
        spread(sch, outer, work, machine)
        return f"rows of {extent(sch, rest)}x{width}"


def _turned(sch: Any, block: Any) -> int | None:
    """The axis along which a block reads neighbours in memory, where it is not the last one that it writes."""
    body = sch.get(block)
    axes = [str(var.var) for var in body.iter_vars]
    if any(int(var.iter_type) != DATA_PARALLEL for var in body.iter_vars):
        return None
    for read in body.reads:
        *others, nearest = [str(axis.min) for axis in read.region] or [""]
        if nearest in axes[:-1] and axes[-1] in others:
            return axes.index(nearest)
    return None


def _transpose(sch: Any, loops: list[Any], turned: int, lanes: int, work: int, machine: Machine) -> str:
    """Tiles of a cache line by a cache line."""
    across = loops[turned]
    *outer, last = [loop for at, loop in enumerate(loops) if at != turned]
    count = extent(sch, last)
    width = count if count <= _TILE else max(vector_width(count, _TILE), 4)
    last, last_tile = sch.split(last, factors=[None, width])
    across, across_tile = sch.split(across, factors=[None, min(_TILE, extent(sch, across))])
    sch.reorder(*outer, across, last, across_tile, last_tile)
    if width % lanes == 0 and count % width == 0:
        sch.vectorize(last_tile)
    else:
        sch.unroll(last_tile)
    spread(sch, [*outer, across, last], work, machine)
    return f"tiles of {_TILE}x{width}"


@dataclass(frozen=True)
class Resize:
    """Nearest and linear resizing of images."""

    name: str = "resize"
    operators: tuple[str, ...] = ("relax.image.resize2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data, attrs = call.args[0], call.attrs
        shape, out = shape_of(data), shape_of(builder.normalize(call))
        if shape is None or out is None or str(attrs.layout) not in ("NHWC", "NCHW") or dtype_of(data) != "float32":
            return None
        rows = str(attrs.layout).index("H")
        sizes = [(shape[axis], out[axis]) for axis in (rows, rows + 1)]
        places = [_places(have, want, str(attrs.coordinate_transformation_mode)) for have, want in sizes]
        if any(place is None for place in places):
            return None
        if str(attrs.method) == "nearest_neighbor":
            method = str(attrs.rounding_method)
            found = [_nearest(place, have, method) for place, (have, _) in zip(places, sizes, strict=True)]
            if any(order is None for order in found):
                return None
            return _emit_nearest(data, out, rows, found, builder)
        if str(attrs.method) != "linear":
            return None
        return _emit_linear(data, out, rows, places, [have for have, _ in sizes], builder)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        raise NotImplementedError("resizes carry no anchor: they are scheduled with what they fuse into")


def _places(have: int, want: int, mode: str) -> np.ndarray[Any, Any] | None:
    """Where each output element lies in the input (ONNX, operator Resize), in single precision as runtimes do."""
    at, scale = np.arange(want, dtype="float32"), np.float32(have / want)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and want > 1):
        return (at + np.float32(0.5)) * scale - np.float32(0.5)
    if mode == "pytorch_half_pixel":
        return np.zeros(1, "float32")
    if mode == "asymmetric":
        return at * scale
    if mode == "align_corners":
        return at * np.float32((have - 1) / (want - 1)) if want > 1 else np.zeros(1, "float32")
    return (at + np.float32(0.5)) * scale if mode == "tf_half_pixel_for_nn" else None


def _nearest(places: np.ndarray[Any, Any] | None, have: int, method: str) -> np.ndarray[Any, Any] | None:
    """The nearest element of each place. A place next to a whole number is that number: scales are not exact."""
    if places is None:
        return None
    whole = np.rint(places)
    places = np.where(np.abs(places - whole) < 1e-5, whole, places)
    rounded = {
        "floor": np.floor(places),
        "ceil": np.ceil(places),
        "round_prefer_floor": np.ceil(places - 0.5),
        "round_prefer_ceil": np.floor(places + 0.5),
    }.get(method)
    return None if rounded is None else np.clip(rounded, 0, have - 1).astype("int64")


def _emit_nearest(data: Any, out: tuple[int, ...], rows: int, found: list[Any], builder: Any) -> Any:
    (row, row_table), (column, column_table) = (_position(order) for order in found)

    def compute(data: Any, *tables: Any) -> Any:
        first = tables[0] if row_table else None
        second = tables[-1] if column_table else None

        def element(*at: Any) -> Any:
            return data[(*at[:rows], row(at[rows], first), column(at[rows + 1], second), *at[rows + 2 :])]

        return te.compute(out, element, name="resize")

    return emit_kernel(builder, compute, data, *row_table, *column_table, name="resize", pattern=INJECTIVE)


def _emit_linear(data: Any, out: tuple[int, ...], rows: int, places: list[Any], have: list[int], builder: Any) -> Any:
    lows = [np.floor(place) for place in places]
    shares = [(place - low).astype("float32") for place, low in zip(places, lows, strict=True)]
    ends = [
        [np.clip(low + step, 0, size - 1).astype("int32") for step in (0, 1)]
        for low, size in zip(lows, have, strict=True)
    ]
    tables = [relax.const(table) for table in (*ends[0], *ends[1], *shares)]

    def compute(data: Any, top: Any, bottom: Any, left: Any, right: Any, down: Any, along: Any) -> Any:
        def element(*at: Any) -> Any:
            y, x = at[rows], at[rows + 1]

            def line(row: Any) -> Any:
                first, second = (data[(*at[:rows], row, end[x], *at[rows + 2 :])] for end in (left, right))
                return first + (second - first) * along[x]

            upper = line(top[y])
            return upper + (line(bottom[y]) - upper) * down[y]

        return te.compute(out, element, name="resize")

    return emit_kernel(builder, compute, data, *tables, name="resize", pattern=INJECTIVE)


def _position(order: np.ndarray[Any, Any]) -> tuple[Any, list[Any]]:
    """A function of an output's index (and a table) for the input's, and the table if arithmetic does not give it."""
    count = len(order)
    step = max(1, int(count // (order.max() + 1)))
    if np.array_equal(order, np.arange(count) // step):
        return (lambda at, _: at // step if step > 1 else at), []
    return (lambda at, table: tirx.Cast("int32", table[at])), [relax.const(order.astype("int32"))]


@dataclass(frozen=True)
class Split:
    """Splits as slices: each fuses with what reads it, and one that is only concatenated again is never copied."""

    name: str = "split"
    operators: tuple[str, ...] = ("relax.split",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data = call.args[0]
        shape, sections = shape_of(data), call.attrs.indices_or_sections
        if shape is None:
            return None
        axis = int(call.attrs.axis) % len(shape)
        size = shape[axis]
        if hasattr(sections, "__len__"):
            cuts = [0, *numbers(sections), size]
        else:
            step = -(-size // int(sections))
            cuts = [min(size, step * part) for part in range(int(sections) + 1)]
        parts = [
            builder.emit(relax.op.strided_slice(data, [axis], [start], [end], assume_inbound=True))
            for start, end in pairwise(cuts)
        ]
        return relax.Tuple(parts)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        raise NotImplementedError("slices carry no anchor: they are scheduled with what they fuse into")
