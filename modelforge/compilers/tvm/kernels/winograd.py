"""3x3 convolutions of stride 1 by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications.

Idea (Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, CVPR 2016): 4x4 outputs of one pair of channels
take 36 multiplications, not 144, once patches of 6x6 inputs and the weights have been transformed. Patches are
transformed a group at a time; then, per block of output channels, the weights are transformed, 36 matrix products are
made with sums in registers, and their results are transformed back, where the epilogue is applied. Weights are
transformed in the kernel, not at compile time: transformed ones are four times as large in the artifact and in memory,
and making them costs what the products of a few tiles do.

Bound: :mod:`.winograd_plan` counts vector operations of every step; where the direct kernel has fewer, it stays.
Error: with the points below 2.2 times (root mean square) that of the direct sum in single precision; with 1, -1, 2, -2,
the usual ones, 4.7 times. Half precision is never computed so. An infinity spreads over its tile as not-a-number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    OUT_FUSIBLE,
    block_annotations,
    block_name,
    blocks,
    constant_value,
    dtype_of,
    emit_kernel,
    extent,
    is_reduction,
    relax,
    te,
    tirx,
)
from modelforge.compilers.tvm.choices import chosen
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.convolution import Window, pack, window_of
from modelforge.compilers.tvm.kernels.loops import spread
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.kernels.winograd_plan import IN, OUT, Plan, ranked
from modelforge.compilers.tvm.machine import Machine

_NEAR, _FAR = 5 / 8, 3 / 2
"""The points are 0, +-_NEAR, +-_FAR and infinity: of pairs with constants exact in binary the best by measurement (root
mean square error against float64 over that of the direct sum, 64 channels: 5/8, 3/2: 2.2; 3/4, 3/2: 2.3; 1, 2: 4.7)."""


@dataclass(frozen=True)
class Winograd:
    """Convolutions of 3x3 in single precision that have fewer operations so."""

    name: str = "winograd"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)
    batches: tuple[int, ...] = ()

    def among(self, batches: tuple[int, ...]) -> Winograd:
        return replace(self, batches=batches)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window = window_of(call)
        if window is None or int(call.attrs.groups) != 1 or dtype_of(call.args[0]) != "float32":
            return None
        if (window.kernel, window.strides, window.dilation) != ((3, 3), (1, 1), (1, 1)):
            return None
        plans = ranked(window, machine, self.batches)
        plan = chosen("plan", plans[0], lambda: plans[1:])
        if plan is None:
            return None
        packed = relax.const(_pack(constant_value(call.args[1]), plan.tile))
        describe = _describe(window, plan)
        return emit_kernel(builder, describe, call.args[0], packed, name="winograd", pattern=OUT_FUSIBLE)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        group, depth, deep, rows, vectors, lanes, by_group = (
            int(value) for value in block_annotations(sch, anchor)[TILE]
        )
        out = _last(sch)
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        share, block, vector = _outer(sch, out, group, vectors, lanes)
        _transform_results(sch, vector)
        step = _multiply(sch, anchor, block, rows, vectors, lanes, deep, gcd(deep, tiles.depth(machine, "float32")))
        _transform_weights(sch, step, lanes)
        tile = _transform_patches(sch, share)
        for loop in [share] if by_group else [block, tile]:
            spread(sch, [loop], work, machine)
        _split_sums(sch, anchor)
        return f"{rows}x{vectors * lanes}, {group} tiles, {depth} deep"


def _pack(weight: np.ndarray[Any, Any], tile: tiles.Tile) -> np.ndarray[Any, Any]:
    """[O, 3, 3, I] to [blocks, I, vectors, 3, 3, lanes]: one stream, in the order in which weights are transformed."""
    blocks = pack(weight.transpose(0, 3, 1, 2), tile.columns)
    return np.ascontiguousarray(np.moveaxis(blocks.reshape(*blocks.shape[:-1], tile.vectors, tile.lanes), -2, 2))


def _describe(window: Window, plan: Plan) -> Callable[..., Any]:
    """The kernel as tensor expressions of ``data`` (NHWC) and ``weight`` as of :func:`_pack`."""

    def compute(data: Any, weight: Any) -> Any:
        return _results(_products(_patches(data, window, plan), _weights(weight), window, plan), window, plan)

    return compute


def _patches(data: Any, window: Window, plan: Plan) -> Any:
    """B^T d B of every tile: [tiles / rows, 6, 6, input channels / lanes, rows, lanes]."""
    batch, height, width, channels = window.data
    top, left = window.padding[:2]
    count, rows, deep = plan.tiles(batch), plan.tile.rows, plan.deep

    def pixel(i: Any, j: Any, tile: Any, c: Any) -> Any:
        image = tile // (plan.tall * plan.wide)
        y = tile // plan.wide % plan.tall * OUT + i - top
        x = tile % plan.wide * OUT + j - left
        # Read at the border's place and dropped: a masked load, where a branch would split the transform in 36. Written
        # as an equation, as TVM would take a bound of the condition for one of the load, and drop the clamps.
        near = [tirx.min(image, batch - 1), _clamp(y, height), _clamp(x, width)]
        inside = [clamped == wanted for clamped, wanted in zip(near, (image, y, x), strict=True)]
        return tirx.Select(tirx.all(*inside), data[(*near, c)], 0.0)

    pixels = te.compute((IN, IN, count, channels), pixel, name="pixels")
    patch_rows = te.compute(
        (IN, IN, count, channels), lambda i, j, t, c: _inputs(i, lambda k: pixels[k, j, t, c]), name="patch_rows"
    )
    return te.compute(
        (count // rows, IN, IN, channels // deep, rows, deep),
        lambda b, i, j, d, r, lane: _inputs(j, lambda k: patch_rows[i, k, b * rows + r, d * deep + lane]),
        name="patches",
    )


def _weights(weight: Any) -> Any:
    """G g G^T of every pair of channels: [blocks, 6, 6, input channels, columns]."""
    blocks, channels, vectors, _, _, lanes = map(int, weight.shape)
    columns = vectors * lanes
    weight_rows = te.compute(
        (blocks, IN, 3, channels, columns),
        lambda b, i, j, c, o: _weight(i, lambda k: weight[b, c, o // lanes, k, j, o % lanes]),
        name="weight_rows",
    )
    return te.compute(
        (blocks, IN, IN, channels, columns),
        lambda b, i, j, c, o: _weight(j, lambda k: weight_rows[b, i, k, c, o]),
        name="weights",
    )


def _products(patches: Any, weights: Any, window: Window, plan: Plan) -> Any:
    """36 matrix products, in steps of input channels: [tiles, 6, 6, output channels]."""
    channels, tile, deep = window.data[3], plan.tile, plan.deep
    steps, rows, columns = channels // plan.depth, tile.rows, tile.columns
    shape = (plan.tiles(window.data[0]), IN, IN, int(weights.shape[0]) * columns)
    step, inner = te.reduce_axis((0, steps), "step"), te.reduce_axis((0, plan.depth), "inner")
    high, broad = window.size
    attrs = {
        RULE: Winograd.name,
        MACS: window.data[0] * high * broad * window.channels * channels * 9,
        TILE: [plan.group, plan.depth, deep, rows, tile.vectors, tile.lanes, int(plan.by_group)],
    }

    def product(t: Any, i: Any, j: Any, o: Any, c: Any) -> Any:
        return patches[t // rows, i, j, c // deep, t % rows, c % deep] * weights[o // columns, i, j, c, o % columns]

    products = te.compute(
        (steps, *shape),
        lambda s, t, i, j, o: te.sum(product(t, i, j, o, s * plan.depth + inner), axis=inner),
        name="products",
        attrs=attrs,
    )
    return te.compute(
        shape,
        lambda *at: te.sum(products[(step, *at)], axis=step) if steps > 1 else products[(0, *at)],
        name="sums",
    )


def _results(sums: Any, window: Window, plan: Plan) -> Any:
    """A^T m A of every tile, as an image."""
    count, _, _, outputs = sums.shape
    result_rows = te.compute(
        (OUT, IN, count, outputs), lambda i, j, t, o: _outputs(i, lambda k: sums[t, k, j, o]), name="result_rows"
    )
    result = te.compute(
        (count, OUT, OUT, outputs), lambda t, i, j, o: _outputs(j, lambda k: result_rows[i, k, t, o]), name="result"
    )
    return te.compute(
        (window.data[0], *window.size, window.channels),
        lambda n, y, x, o: result[(n * plan.tall + y // OUT) * plan.wide + x // OUT, y % OUT, x % OUT, o],
        name="crop",
    )


def _clamp(index: Any, size: int) -> Any:
    return tirx.max(tirx.min(index, size - 1), 0)


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
    """Row ``at`` of G g: the polynomial of three weights at one of six points; :func:`_outputs` divides."""
    even = g(0) + tirx.Select(at < 3, _NEAR**2, _FAR**2) * g(2)
    outer = g(tirx.Select(at == 0, 0, 2))
    return tirx.Select(_is_outer(at), outer, even + _pick(at, 0.0, _NEAR, -_NEAR, _FAR, -_FAR) * g(1))


def _is_outer(at: Any) -> Any:
    """Whether a point is 0 or infinity."""
    return tirx.any(at == 0, at == IN - 1)


def _outputs(at: Any, m: Callable[[Any], Any]) -> Any:
    """Row ``at`` of A^T m: products at six points to one of four outputs, divided by prod(point - other points)."""
    near, far = _NEAR**2, _FAR**2
    at_near = [_NEAR**power / (2 * near * (near - far)) for power in range(OUT)]
    at_far = [_FAR**power / (2 * far * (far - near)) for power in range(OUT)]
    plus = _pick(at, *at_near) * (m(1) + m(2)) + _pick(at, *at_far) * (m(3) + m(4))
    minus = _pick(at, *at_near) * (m(1) - m(2)) + _pick(at, *at_far) * (m(3) - m(4))
    return _pick(at, plus + 1 / (near * far) * m(0), minus, plus, minus + m(5))


_STAGES: Final = frozenset(
    ["pixels", "patch_rows", "patches", "weight_rows", "weights", "products", "sums", "result_rows", "result"]
)


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


def _outer(sch: Any, out: Any, group: int, vectors: int, lanes: int) -> tuple[Any, Any, Any]:
    """Loops over groups, blocks of channels, tiles and vectors; inside, one tile's results in vectors."""
    batch, y, x, channel = sch.get_loops(out)
    y, y_tile = sch.split(y, factors=[None, OUT])
    x, x_tile = sch.split(x, factors=[None, OUT])
    vector, lane = sch.split(channel, factors=[None, lanes])
    block, vector = sch.split(vector, factors=[None, vectors])
    sch.reorder(batch, y, x, block, vector, y_tile, x_tile, lane)
    share, tile = sch.split(sch.fuse(batch, y, x), factors=[None, group])
    sch.reorder(share, block, tile, vector)
    for loop in (y_tile, x_tile):
        sch.unroll(loop)
    sch.vectorize(lane)
    return share, block, vector


def _transform_results(sch: Any, at: Any) -> None:
    """The output transform of one tile and one vector of channels, in registers."""
    result = sch.get_sblock("result")
    sch.set_scope(result, 0, "local")
    sch.compute_at(result, at)
    _straight(sch, sch.get_loops(result)[-3:])
    _by_column(sch, sch.get_sblock("result_rows"), at)


def _by_column(sch: Any, block: Any, at: Any) -> Any:
    """The first of two transforms, by columns: few values wait in registers."""
    sch.set_scope(block, 0, "local")
    sch.compute_at(block, at)
    row, column, lane = sch.get_loops(block)[-3:]
    sch.reorder(column, row)
    _straight(sch, [column, row, lane])
    return column


def _straight(sch: Any, loops: list[Any]) -> None:
    """Vectors along the last loop, the others unrolled."""
    *outer, lane = loops
    for loop in outer:
        sch.unroll(loop)
    sch.vectorize(lane)


def _multiply(sch: Any, anchor: Any, at: Any, rows: int, vectors: int, lanes: int, deep: int, elements: int) -> Any:
    """Matrix products of one block of channels; a register tile's sums go to memory once a step."""
    sums = sch.get_sblock("sums")
    sch.compute_at(sums, at, preserve_unit_loops=True)
    tile, point, other, channel, *steps = sch.get_loops(sums)[2:]
    tile, row = sch.split(tile, factors=[None, rows])
    vector, lane = sch.split(channel, factors=[vectors, lanes])
    sch.reorder(*steps, point, other, tile, row, vector, lane)
    _straight(sch, [row, vector, lane])
    sch.set_scope(anchor, 0, "local")
    sch.compute_at(anchor, tile, preserve_unit_loops=True)
    *_, row, i, j, channel, inner = sch.get_loops(anchor)
    vector, lane = sch.split(channel, factors=[vectors, lanes])
    far, near, element = sch.split(inner, factors=[None, deep // elements, elements])
    sch.reorder(i, j, far, near, element, row, vector, lane)
    _straight(sch, [element, row, vector, lane])
    if elements > 1:
        loaded = sch.cache_read(anchor, 0, "local")
        sch.compute_at(loaded, near, preserve_unit_loops=True)
        _straight(sch, sch.get_loops(loaded)[-2:])
    return steps[0] if steps else at


def _split_sums(sch: Any, anchor: Any) -> None:
    """Zero before the sums, not in them; last, for blocks that only update cannot be made parallel."""
    sch.decompose_reduction(anchor, sch.get_loops(anchor)[-6])
    sums = sch.get_sblock("sums")
    if is_reduction(sch, sums):
        sch.decompose_reduction(sums, sch.get_loops(sums)[2])


def _apart(sch: Any, block: Any) -> None:
    """Begin each of 36 matrices an odd number of cache lines (64 bytes) after the last: else all lie in one set."""
    sch.storage_align(block, 0, 2, 32, 16)


def _transform_weights(sch: Any, at: Any, lanes: int) -> None:
    """Weights of one block of output channels and one step of input channels."""
    weights, rows = sch.get_sblock("weights"), sch.get_sblock("weight_rows")
    sch.compute_at(weights, at, preserve_unit_loops=True)
    _apart(sch, weights)
    i, j, channel, column = sch.get_loops(weights)[-4:]
    vector, lane = sch.split(column, factors=[None, lanes])
    sch.reorder(channel, vector, i, j, lane)
    _straight(sch, [i, j, lane])
    sch.set_scope(rows, 0, "local")
    sch.compute_at(rows, i)
    _straight(sch, sch.get_loops(rows)[-2:])


def _transform_patches(sch: Any, at: Any) -> Any:
    """Patches of one group of tiles; returns the loop over them."""
    patches = sch.get_sblock("patches")
    sch.compute_at(patches, at, preserve_unit_loops=True)
    _apart(sch, patches)
    tile, i, j, vector, row, lane = sch.get_loops(patches)[-6:]
    sch.reorder(tile, row, vector, i, j, lane)
    _straight(sch, [i, j, lane])
    rows = sch.get_sblock("patch_rows")
    column = _by_column(sch, rows, vector)
    pixels = sch.get_sblock("pixels")
    sch.set_scope(pixels, 0, "local")
    sch.compute_at(pixels, column)
    _straight(sch, sch.get_loops(pixels)[-2:])
    return sch.fuse(tile, row)
