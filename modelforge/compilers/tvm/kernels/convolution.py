"""Two-dimensional convolutions, channels last, as sums held in registers.

Idea: a tile of output pixels by a few vectors of output channels stays in registers while the kernel window and the
input channels are walked; per step one vector of packed weights is loaded per column and one input element per row is
broadcast. Weights are packed at compile time to [blocks][window][input channels][columns of a tile], to be read in one
stream. Bound: two multiply-adds a cycle; the tile is chosen so that loads and latency stay below it.

The sums of a tile never leave registers; the epilogue (bias, activation, residual sum) is applied as they are stored.
Pixels beyond the output (a tile that does not divide it) are computed from a padded input and cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    is_constant,
    numbers,
    op_name,
    relax,
    shape_of,
    te,
    tirx,
    topi,
    written_dtype,
)
from modelforge.compilers.tvm.choices import chosen
from modelforge.compilers.tvm.kernels import halves, tiles
from modelforge.compilers.tvm.kernels.loops import neighbours, partition, spread, unroll_tail, vectorize_copy
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.machine import Machine

_PLANES: Final = 4
"""Up to so many input channels are read plane by plane: an image's colours lie so when it comes in."""


@dataclass(frozen=True)
class Window:
    """A convolution's geometry. ``data`` is NHWC, ``kernel`` (height, width), ``padding`` top, left, bottom, right."""

    data: tuple[int, ...]
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the output."""
        top, left, bottom, right = self.padding
        spans = [self.dilation[axis] * (self.kernel[axis] - 1) + 1 for axis in (0, 1)]
        height = (self.data[1] + top + bottom - spans[0]) // self.strides[0] + 1
        width = (self.data[2] + left + right - spans[1]) // self.strides[1] + 1
        return height, width

    @property
    def flat(self) -> bool:
        """Whether it is a matrix product: pixels need not be told apart."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.padding)

    def padded_for(self, height: int, width: int) -> list[int]:
        """Bottom and right padding that makes the input large enough for an output of this size."""
        wanted = [
            (size - 1) * self.strides[axis] + self.dilation[axis] * (self.kernel[axis] - 1) + 1
            for axis, size in ((0, height), (1, width))
        ]
        return [max(0, wanted[axis] - self.data[1 + axis] - self.padding[axis]) for axis in (0, 1)]


def window_of(call: Any) -> Window | None:
    """The geometry of a convolution with channels last and constant weights (OHWI), or None."""
    data, weight = call.args
    shape = shape_of(data)
    attrs = call.attrs
    if shape is None or not is_constant(weight) or (attrs.data_layout, attrs.kernel_layout) != ("NHWC", "OHWI"):
        return None
    kernel = shape_of(weight)
    if kernel is None:
        return None
    return Window(
        shape,
        kernel[0],
        (kernel[1], kernel[2]),
        numbers(attrs.strides),
        numbers(attrs.padding),
        numbers(attrs.dilation),
    )


@dataclass(frozen=True)
class Convolution:
    """Convolutions of one group with constant weights."""

    name: str = "convolution"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window = window_of(call)
        if window is None or int(call.attrs.groups) != 1 or dtype_of(call.args[0]) not in ("float32", "float16"):
            return None
        data = call.args[0]
        planes = _planes(data, builder) if window.data[3] <= _PLANES else None
        weight = constant_value(call.args[1])
        return convolve(window, weight, data if planes is None else planes, builder, machine, planar=planes is not None)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        rows, columns, vectors, lanes, chunk = (int(value) for value in block_annotations(sch, anchor)[TILE])
        total = halves.total_of(sch, anchor)
        before, after = neighbours(sch, total, machine)
        pads = before if total is anchor else before[:-1]
        out = after[-1] if after else sch.cache_write(anchor, 0, "local")
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        if rows:  # a tile of rows by columns of the image
            batch, y, x, channel = sch.get_loops(out)
            y, y_tile = sch.split(y, factors=[None, rows])
            x, x_tile = sch.split(x, factors=[None, columns])
            outer, tile = [batch, y, x], [y_tile, x_tile]
        else:
            _flatten(sch, anchor, total, out)
            pixel, channel = sch.get_loops(out)
            pixel, pixel_tile = sch.split(pixel, factors=[None, columns])
            outer, tile = [pixel], [pixel_tile]
        block, channel = sch.split(channel, factors=[None, vectors * lanes])
        outer = [*_chunked(sch, outer, chunk, block), *tile, channel]
        sch.reorder(*outer)
        outer = outer[: -len(tile) - 1]
        sch.set_scope(total, 0, "local")
        sch.compute_at(total, outer[-1], preserve_unit_loops=True)
        begin = halves.sum_blocks(sch, anchor, total, lanes)
        unroll_tail(sch, [*tile, channel], gcd(int(sch.get(out).iter_vars[-1].dom.extent), lanes))
        spread(sch, outer, work, machine)
        self._inner(sch, anchor, vectors, lanes, rows > 0, machine)
        if begin is not None:
            sch.decompose_reduction(total, begin)
        for pad in pads:
            _schedule_pad(sch, pad, machine)
        return f"{max(rows, 1) * columns}x{vectors * lanes}"

    @staticmethod
    def _inner(sch: Any, anchor: Any, vectors: int, lanes: int, by_rows: bool, machine: Machine) -> None:
        """The sums of one tile: window and input channels outside, pixels and vectors inside.

        Where instructions multiply by one element of a register, vectors of channels of each pixel are loaded at once.
        """
        *tile, channel, row, column, inner = sch.get_loops(anchor)[-7 if by_rows else -5 :]  # the tile's own
        vector, lane = sch.split(channel, factors=[vectors, lanes])
        steps: list[Any] = []
        dtype = written_dtype(sch, anchor)
        together = tiles.steps(extent(sch, inner), machine, dtype)
        if together > 1:
            inner, step = sch.split(inner, factors=[None, together])
            steps = [step]
        sch.reorder(row, column, inner, *steps, *tile, vector, lane)
        if steps:
            loaded = sch.cache_read(anchor, 0, "local")
            if len(tile) == 1:
                _flatten_copy(sch, loaded)
            sch.compute_at(loaded, inner, preserve_unit_loops=True)
            unroll_tail(sch, sch.get_loops(loaded)[-1 - len(tile) :], tiles.depth(machine, dtype))
        sch.vectorize(lane)
        for loop in (*steps, *tile, vector):
            sch.unroll(loop)
        sch.decompose_reduction(anchor, row)


def _flatten_copy(sch: Any, block: Any) -> None:
    """Count the pixels of a copied image in one axis."""
    height, width = (int(sch.get(block).iter_vars[axis].dom.extent) for axis in (1, 2))
    sch.transform_layout(block, ("write", 0), lambda n, y, x, c: ((n * height + y) * width + x, c))
    sch.transform_block_layout(block, lambda n, y, x, c: ((n * height + y) * width + x, c))


def _schedule_pad(sch: Any, pad: Any, machine: Machine) -> None:
    """Vectors over channels, or over what lies between the borders of each row of a plane."""
    *outer, last = sch.get_loops(pad)
    if extent(sch, last) % machine.lanes() == 0 or extent(sch, last) < 4 * machine.lanes():
        vectorize_copy(sch, pad, machine)
        return
    work = prod(extent(sch, loop) for loop in (*outer, last))
    last, vector = sch.split(last, factors=[None, machine.lanes()])
    sch.vectorize(vector)
    partition(sch, last)
    spread(sch, outer, work, machine)


def _planes(data: Any, builder: Any) -> Any | None:
    """The NCHW tensor that ``data`` is a turned copy of: few channels are read plane by plane without turning them."""
    bound = builder.lookup_binding(data) if isinstance(data, relax.Var) else None
    if bound is None or op_name(bound) != "relax.permute_dims" or bound.attrs.axes is None:
        return None
    return bound.args[0] if numbers(bound.attrs.axes) == (0, 2, 3, 1) else None


def _chunked(sch: Any, outer: list[Any], chunk: int, block: Any) -> list[Any]:
    """The loops around a tile: all tiles of a chunk of rows (or pixels) for one block of channels, then the next."""
    if chunk == 0:
        return [block, *outer]
    *before, across = outer if len(outer) == 1 else outer[:-1]
    within = outer[len(before) + 1 :]
    if chunk >= extent(sch, across):
        return [*before, block, across, *within]
    even = max(size for size in range(1, chunk + 1) if extent(sch, across) % size == 0)
    across, inner = sch.split(across, factors=[None, even if 2 * even >= chunk else chunk])  # an even cut needs no test
    return [*before, across, block, inner, *within]


def _flatten(sch: Any, anchor: Any, total: Any, out: Any) -> None:
    """Count the pixels of a matrix product in one axis: a tile may then span rows of the image."""
    height, width = (int(sch.get(out).iter_vars[axis].dom.extent) for axis in (1, 2))

    dtype = str(sch.get(sch.get_loops(out)[0]).loop_var.ty.dtype)

    def joined(before: int, after: int) -> Any:
        def index(*at: Any) -> tuple[Any, ...]:
            n, y, x, *rest = at[before:]
            return (*at[:before], (n * height + y) * width + x, *rest)

        return tirx.IndexMap.from_func(index, ndim=before + 4 + after, index_dtype=dtype)

    for block, before in [(anchor, 0)] if total is anchor else [(anchor, 3), (total, 0)]:
        sch.transform_layout(block, ("write", 0), joined(before, 0))
        sch.transform_block_layout(block, joined(before, 3))
    sch.transform_block_layout(out, joined(0, 0))


def convolve(
    window: Window, weight: np.ndarray[Any, Any], data: Any, builder: Any, machine: Machine, planar: bool = False
) -> Any:
    """Emit the convolution of ``data`` (NHWC, or NCHW where ``planar``) with ``weight`` (OHWI)."""
    dtype = str(weight.dtype)
    rows, tile = _tile(window, machine, dtype)
    packed = relax.const(pack(weight, tile.columns))
    blocks = packed.value.shape[0]
    height, width = window.size
    kernel, depth, strides, dilation = window.kernel, weight.shape[3], window.strides, window.dilation
    columns = tile.rows // max(rows, 1)
    tall, wide = (tiles.up(height, rows), tiles.up(width, columns)) if rows else (height, width)
    top, left = window.padding[:2]
    bottom, right = window.padded_for(tall, wide)
    macs = window.data[0] * height * width * window.channels * depth * prod(kernel)
    attrs = {
        RULE: Convolution.name,
        MACS: macs,
        TILE: [rows, columns, tile.vectors, tile.lanes, _chunk(window, rows, tile, weight, machine)],
    }

    def at(data: Any, n: Any, y: Any, x: Any, c: Any) -> Any:
        return data[n, c, y, x] if planar else data[n, y, x, c]

    sizes = (window.data[0], tall, wide, int(blocks) * tile.columns)
    start, marked = halves.starts((*kernel, depth), sizes[-1], machine, dtype)

    def compute(data: Any, weight: Any, *start: Any) -> Any:
        if any((top, left, bottom, right)):
            before, behind = (
                ([0, 0, top, left], [0, 0, bottom, right]) if planar else ([0, top, left, 0], [0, bottom, right, 0])
            )
            data = topi.nn.pad(data, before, behind, name="pad_input")

        def product(n: Any, y: Any, x: Any, c: Any, ry: Any, rx: Any, rc: Any) -> Any:
            pixel = at(data, n, y * strides[0] + ry * dilation[0], x * strides[1] + rx * dilation[1], rc)
            return pixel * weight[c // tile.columns, ry, rx, rc, c % tile.columns]

        full = halves.total(sizes, (*kernel, depth), product, machine, dtype, *start, name="convolution", attrs=attrs)
        shape = (window.data[0], height, width, window.channels)
        return full if tuple(map(int, full.shape)) == shape else te.compute(shape, lambda *i: full(*i), name="crop")  # noqa: PLW0108  # a tensor is no function of its own

    return emit_kernel(builder, compute, data, packed, *start, name="convolution", pattern=OUT_FUSIBLE, **marked)


def pack(weight: np.ndarray[Any, Any], columns: int) -> np.ndarray[Any, Any]:
    """[O, H, W, I] to [blocks, H, W, I, columns], zeros where the last block is not full."""
    channels, *rest = weight.shape
    blocks = -(-channels // columns)
    full = np.zeros((blocks * columns, *rest), weight.dtype)
    full[:channels] = weight
    return np.ascontiguousarray(np.moveaxis(full.reshape(blocks, columns, *rest), 1, -1))


def _tile(window: Window, machine: Machine, dtype: str) -> tuple[int, tiles.Tile]:
    """Rows of the image in a tile (0: pixels are not told apart), and the tile over rows x columns pixels.

    The batch has no say: entries for several batches then read the same packed weights.
    """
    height, width = window.size
    pixels = height * width
    if window.flat and height > 1 and width > 1:
        heights = tiles.divisors(pixels, machine)
        tile = tiles.choose(heights, window.channels, machine, dtype)
        if tile.rows * tile.vectors >= 8 or pixels < 8:
            return 0, tile
    single = tiles.choose(tiles.padded(width, machine), window.channels, machine, dtype)
    if width * 2 > machine.registers:
        return 1, single
    several = [(rows * width, tiles.up(height, rows) / height) for rows in range(1, machine.registers // width + 1)]
    tile = tiles.choose([*several, *tiles.padded(width, machine)], window.channels, machine, dtype)
    return (tile.rows // width, tile) if tile.rows % width == 0 else (1, tile)


def _chunk(window: Window, rows: int, tile: tiles.Tile, weight: np.ndarray[Any, Any], machine: Machine) -> int:
    """How many steps of the outermost loop over pixels are done for one block of channels before the next block.

    What a chunk reads and writes stays in half of the second-level cache while the blocks pass; all weights pass once
    per chunk. 0 (one chunk) where the input fits there anyway, or where the weights do not: each block is read once.
    """
    half = machine.l2 // 2
    size = weight.dtype.itemsize
    pixels = tile.rows if not rows else rows * window.size[1]
    per_pixel = window.data[3] * prod(window.strides) + 2 * window.channels
    steps = max(1, half // (pixels * per_pixel * int(size)))
    usual = 0 if prod(window.data) * size <= half or weight.nbytes > half else steps
    return chosen("chunk", usual, lambda: [0, steps, steps * 2, steps // 2 or 1])
