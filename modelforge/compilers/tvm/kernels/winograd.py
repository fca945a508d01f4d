"""3x3 convolutions of stride 1 by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications.

Idea (Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, CVPR 2016): 4x4 outputs of one channel pair take 36
multiplications instead of 144, once patches of 6x6 inputs and the weights have been transformed. Patches are transformed
a group at a time, then per block of output channels: the weights are transformed, 36 matrix products are made with sums
in registers, and their results are transformed back, where the epilogue is applied. Weights are transformed inside the
kernel, not at compile time: transformed ones are four times as large, and reading them from memory takes longer than
making them from what the artifact holds.

Bound: :func:`cost` counts vector operations of every step; where the direct kernel has fewer, it has the convolution.
Error: with the points below 2.2 times (root mean square) that of the direct sum in single precision; 1, -1, 2, -2, the
usual ones, have 4.7 times. Half precision is never computed so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Final

from modelforge.compilers.tvm.api import (
    OUT_FUSIBLE,
    annotations,
    block_name,
    blocks,
    constant_value,
    dtype_of,
    emit_kernel,
    is_reduction,
    relax,
    te,
    tirx,
)
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.convolution import Window, pack, window_of
from modelforge.compilers.tvm.kernels.loops import PARALLEL_WORK, neighbours
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.machine import Machine

_OUT: Final = 4
"""Outputs of a tile along an axis."""
_IN: Final = _OUT + 2
"""Inputs that they are made from, and points that polynomials are evaluated at."""
_NEAR, _FAR = 5 / 8, 3 / 2
"""The points are 0, +-_NEAR, +-_FAR and infinity: among pairs whose constants are exact in binary the best by measurement
(root mean square error against float64, 64 and 256 channels: 5/8, 3/2: 2.2; 3/4, 3/2: 2.3; 1/2, 3/2: 2.7; 1, 2: 4.7)."""


@dataclass(frozen=True)
class Plan:
    """The numbers of one kernel.

    Attributes:
        tall, wide: tiles of the output in a column and in a row of one image.
        group: tiles of all images that are transformed and multiplied together; a multiple of the register tile's rows.
        depth: input channels whose weights are transformed together; divides their number.
        deep: lanes of a vector of input channels.
        tile: tiles by output channels whose sums are in registers at a time.
        by_group: whether threads share groups, not blocks of output channels.
    """

    tall: int
    wide: int
    group: int
    depth: int
    deep: int
    tile: tiles.Tile
    by_group: bool


@dataclass(frozen=True)
class Winograd:
    """Convolutions of 3x3 in single precision that have fewer operations so."""

    name: str = "winograd"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window = window_of(call)
        if window is None or int(call.attrs.groups) != 1 or dtype_of(call.args[0]) != "float32":
            return None
        if (window.kernel, window.strides, window.dilation) != ((3, 3), (1, 1), (1, 1)):
            return None
        plan = plan_for(window, machine)
        if plan is None:
            return None
        weight = constant_value(call.args[1]).transpose(0, 3, 1, 2)  # a stream: all that one channel's transform reads
        packed = relax.const(pack(weight, plan.tile.columns))
        describe = _describe(window, plan)
        return emit_kernel(builder, describe, call.args[0], packed, name="winograd", pattern=OUT_FUSIBLE)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        group, depth, deep, rows, vectors, lanes, by_group = (int(value) for value in annotations(sch, anchor)[TILE])
        out = _last(sch)
        share, block, inner = _outer(sch, out, group, vectors, lanes)
        _inverse(sch, out, inner, len(sch.get_loops(out)) - 4, lanes)
        steps = _products(sch, anchor, block, rows, vectors, lanes, deep)
        _weights(sch, steps, lanes)
        _patches(sch, share, deep, threads=not by_group)
        sch.parallel(share if by_group else block)
        _split_sums(sch, anchor)
        return f"{rows}x{vectors * lanes}, {group} tiles, {depth} deep"


def _describe(window: Window, plan: Plan) -> Callable[..., Any]:
    """The kernel as tensor expressions of ``data`` (NHWC) and ``weight`` [blocks, input channels, 3, 3, columns]."""
    batch, height, width, channels = window.data
    tall, wide, deep, rows = plan.tall, plan.wide, plan.deep, plan.tile.rows
    high, broad = window.size
    top, left = window.padding[:2]
    count = batch * tall * wide
    full = -(-count // plan.group) * plan.group
    steps = channels // plan.depth
    columns = plan.tile.columns
    outputs = -(-window.channels // columns) * columns
    macs = batch * high * broad * window.channels * channels * 9
    numbers = [plan.group, plan.depth, deep, rows, plan.tile.vectors, plan.tile.lanes, int(plan.by_group)]
    attrs = {RULE: Winograd.name, MACS: macs, TILE: numbers}

    def compute(data: Any, weight: Any) -> Any:
        def pixel(i: Any, j: Any, tile: Any, c: Any) -> Any:
            y = tile // wide % tall * _OUT + i - top
            x = tile % wide * _OUT + j - left
            inside = [y >= 0, y < height, x >= 0, x < width, *([tile < count] if full > count else [])]
            return tirx.if_then_else(tirx.all(*inside), data[tile // (tall * wide), y, x, c], 0.0)

        pixels = te.compute((_IN, _IN, full, channels), pixel, name="pixels")
        patch_rows = te.compute(
            (_IN, _IN, full, channels),
            lambda i, j, t, c: _inputs(i, lambda k: pixels[k, j, t, c]),
            name="patch_rows",
        )
        patches = te.compute(
            (full // rows, _IN, _IN, channels // deep, rows, deep),
            lambda b, i, j, d, r, l: _inputs(j, lambda k: patch_rows[i, k, b * rows + r, d * deep + l]),
            name="patches",
        )
        weight_rows = te.compute(
            (outputs // columns, _IN, 3, channels, columns),
            lambda b, i, j, c, o: _weight(i, lambda k: weight[b, c, k, j, o]),
            name="weight_rows",
        )
        weights = te.compute(
            (outputs // columns, _IN, _IN, channels, columns),
            lambda b, i, j, c, o: _weight(j, lambda k: weight_rows[b, i, k, c, o]),
            name="weights",
        )
        step, inner = te.reduce_axis((0, steps), "step"), te.reduce_axis((0, plan.depth), "inner")

        def product(t: Any, i: Any, j: Any, o: Any, c: Any) -> Any:
            return patches[t // rows, i, j, c // deep, t % rows, c % deep] * weights[o // columns, i, j, c, o % columns]

        products = te.compute(
            (steps, full, _IN, _IN, outputs),
            lambda s, t, i, j, o: te.sum(product(t, i, j, o, s * plan.depth + inner), axis=inner),
            name="products",
            attrs=attrs,
        )
        sums = te.compute(
            (full, _IN, _IN, outputs),
            lambda *at: te.sum(products[(step, *at)], axis=step) if steps > 1 else products[(0, *at)],
            name="sums",
        )
        result_rows = te.compute(
            (_OUT, _IN, full, outputs),
            lambda i, j, t, o: _outputs(i, lambda k: sums[t, k, j, o]),
            name="result_rows",
        )
        result = te.compute(
            (full, _OUT, _OUT, outputs),
            lambda t, i, j, o: _outputs(j, lambda k: result_rows[i, k, t, o]),
            name="result",
        )
        return te.compute(
            (batch, high, broad, window.channels),
            lambda n, y, x, o: result[(n * tall + y // _OUT) * wide + x // _OUT, y % _OUT, x % _OUT, o],
            name="crop",
        )

    return compute


def _pick(index: Any, *values: Any) -> Any:
    """The value at an index that is known once its loop has been unrolled."""
    chosen = values[-1]
    for at in reversed(range(len(values) - 1)):
        chosen = tirx.Select(index == at, values[at], chosen)
    return chosen


def _inputs(at: Any, d: Callable[[Any], Any]) -> Any:
    """Row ``at`` of B^T d: six inputs to one of six values.

    It holds the coefficients of the product of (x - other points). The points of a pair share their even and odd parts.
    """
    near, far = _NEAR**2, _FAR**2
    other = tirx.Select(at < 3, far, near)
    even, odd = d(4) - other * d(2), d(3) - other * d(1)
    first = tirx.Select(at == 0, 0, 1)
    outer = d(first + 4) - (near + far) * d(first + 2) + near * far * d(first)
    return tirx.Select(_is_outer(at), outer, even + _pick(at, 0.0, _NEAR, -_NEAR, _FAR, -_FAR) * odd)


def _weight(at: Any, g: Callable[[Any], Any]) -> Any:
    """Row ``at`` of G g: the polynomial of three weights at one of six points; :func:`_outputs` has the denominators."""
    even = g(0) + tirx.Select(at < 3, _NEAR**2, _FAR**2) * g(2)
    outer = g(tirx.Select(at == 0, 0, 2))
    return tirx.Select(_is_outer(at), outer, even + _pick(at, 0.0, _NEAR, -_NEAR, _FAR, -_FAR) * g(1))


def _is_outer(at: Any) -> Any:
    """Whether a point is 0 or infinity."""
    return tirx.any(at == 0, at == _IN - 1)


def _outputs(at: Any, m: Callable[[Any], Any]) -> Any:
    """Row ``at`` of A^T m: products at six points to one of four outputs, divided by prod(point - other points)."""
    near, far = _NEAR**2, _FAR**2
    at_near = [_NEAR**power / (2 * near * (near - far)) for power in range(_OUT)]
    at_far = [_FAR**power / (2 * far * (far - near)) for power in range(_OUT)]
    plus = _pick(at, *at_near) * (m(1) + m(2)) + _pick(at, *at_far) * (m(3) + m(4))
    minus = _pick(at, *at_near) * (m(1) - m(2)) + _pick(at, *at_far) * (m(3) - m(4))
    return _pick(at, plus + m(0) / (near * far), minus, plus, minus + m(5))


def _last(sch: Any) -> Any:
    """The block that stores the results, after what follows the convolution has been merged into it."""
    names = [block_name(sch, block) for block in blocks(sch)]
    after = names[names.index("result") + 1 :]
    for name in names[: names.index("result")]:
        if name not in _STAGES:
            sch.compute_inline(sch.get_sblock(name))
    for name in after[:-1]:
        sch.compute_inline(sch.get_sblock(name))
    return sch.get_sblock(after[-1])


_STAGES: Final = ("pixels", "patch_rows", "patches", "weight_rows", "weights", "products", "sums", "result_rows", "result")


def _outer(sch: Any, out: Any, group: int, vectors: int, lanes: int) -> tuple[Any, Any, Any]:
    """Loops over groups, blocks of channels, tiles and vectors; inside, one tile's results in vectors."""
    batch, y, x, channel = sch.get_loops(out)
    y, y_tile = sch.split(y, factors=[None, _OUT])
    x, x_tile = sch.split(x, factors=[None, _OUT])
    vector, lane = sch.split(channel, factors=[None, lanes])
    block, vector = sch.split(vector, factors=[None, vectors])
    sch.reorder(batch, y, x, block, vector, y_tile, x_tile, lane)
    share, tile = sch.split(sch.fuse(batch, y, x), factors=[None, group])
    sch.reorder(share, block, tile, vector)
    for loop in (y_tile, x_tile):
        sch.unroll(loop)
    sch.vectorize(lane)
    return share, block, vector


def _inverse(sch: Any, out: Any, at: Any, outer: int, lanes: int) -> None:
    """The output transform of one tile and one vector of channels, in registers."""
    for name in ("result", "result_rows"):
        block = sch.get_sblock(name)
        sch.set_scope(block, 0, "local")
        sch.compute_at(block, at)
        _straight(sch, sch.get_loops(block)[-3:])


def _straight(sch: Any, loops: list[Any]) -> None:
    """Vectors along the last loop, the others unrolled."""
    *outer, lane = loops
    for loop in outer:
        sch.unroll(loop)
    sch.vectorize(lane)


def _products(sch: Any, anchor: Any, at: Any, rows: int, vectors: int, lanes: int, deep: int) -> Any:
    """Matrix products of one block of channels; the sums of a register tile are added to what is in memory once a step."""
    sums = sch.get_sblock("sums")
    sch.compute_at(sums, at, preserve_unit_loops=True)
    tile, i, j, channel, *steps = sch.get_loops(sums)[2:]
    tile, row = sch.split(tile, factors=[None, rows])
    vector, lane = sch.split(channel, factors=[vectors, lanes])
    sch.reorder(*steps, i, j, tile, row, vector, lane)
    _straight(sch, [row, vector, lane])
    sch.set_scope(anchor, 0, "local")
    sch.compute_at(anchor, tile, preserve_unit_loops=True)
    *_, row, i, j, channel, inner = sch.get_loops(anchor)
    vector, lane = sch.split(channel, factors=[vectors, lanes])
    far, near = sch.split(inner, factors=[None, deep])
    sch.reorder(i, j, far, near, row, vector, lane)
    _straight(sch, [row, vector, lane])
    return steps[0] if steps else at


def _split_sums(sch: Any, anchor: Any) -> None:
    """Zero before the sums, not in them; last, for blocks that only update cannot be made parallel."""
    sch.decompose_reduction(anchor, sch.get_loops(anchor)[-5])
    sums = sch.get_sblock("sums")
    if is_reduction(sch, sums):
        sch.decompose_reduction(sums, sch.get_loops(sums)[2])


def _weights(sch: Any, at: Any, lanes: int) -> None:
    """Weights of one block of output channels and one step of input channels."""
    weights, rows = sch.get_sblock("weights"), sch.get_sblock("weight_rows")
    sch.compute_at(weights, at, preserve_unit_loops=True)
    sch.storage_align(weights, 0, 2, 32, 16)
    i, j, channel, column = sch.get_loops(weights)[-4:]
    vector, lane = sch.split(column, factors=[None, lanes])
    sch.reorder(channel, vector, i, j, lane)
    _straight(sch, [i, j, lane])
    sch.set_scope(rows, 0, "local")
    sch.compute_at(rows, i)
    _straight(sch, sch.get_loops(rows)[-2:])


def _patches(sch: Any, at: Any, deep: int, *, threads: bool) -> None:
    """Patches of one group of tiles."""
    patches = sch.get_sblock("patches")
    sch.compute_at(patches, at, preserve_unit_loops=True)
    sch.storage_align(patches, 0, 2, 32, 16)
    tile, i, j, vector, row, lane = sch.get_loops(patches)[-6:]
    sch.reorder(tile, row, vector, i, j, lane)
    _straight(sch, [i, j, lane])
    for name in ("patch_rows", "pixels"):
        block = sch.get_sblock(name)
        sch.set_scope(block, 0, "local")
        sch.compute_at(block, vector)
        _straight(sch, sch.get_loops(block)[-3:])
    if threads:
        sch.parallel(sch.fuse(tile, row))


def plan_for(window: Window, machine: Machine) -> Plan | None:
    """The plan with the least cost, or None where the direct kernel has less."""
    batch, _, _, channels = window.data
    lanes = machine.lanes()
    deep = gcd(channels, lanes)
    high, broad = window.size
    tall, wide = -(-high // _OUT), -(-broad // _OUT)
    count = batch * tall * wide
    if deep < 4:
        return None
    tile = tiles.choose(tiles.padded(count, machine), window.channels, machine)
    tile = tiles.Tile(tile.rows, tile.vectors, gcd(window.channels, tile.lanes))
    if tile.lanes < 4:
        return None
    group = min(-(-count // tile.rows), max(1, 32 // tile.rows)) * tile.rows
    depth = max(d for d in range(deep, min(channels, 64) + 1, deep) if channels % d == 0)
    groups = -(-count // group)
    return Plan(tall, wide, group, depth, deep, tile, groups >= machine.cores)
