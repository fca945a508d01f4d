"""Depthwise convolutions of int8 by dot products: four neighbouring pixels of a channel lie side by side.

Idea: what brings a block of rows into the first-level cache also turns it: at each second pixel stands the group of
that pixel and the next three, channel by channel. One dot product then adds up to four taps of a row of the window to
the sums of a vector of channels. A window of stride one reads a group twice: with its weights for an even pixel, and
with them one place later for the odd one beside it; taps outside the window have weights of zero. Where a fifth tap
needs a second group, that one starts as far left as it may, as its neighbours read it too.
Bound: a dot product for four taps of ``lanes`` channels, and five instructions (ST4 the last) to turn 32 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    OUT_FUSIBLE,
    block_annotations,
    constant_value,
    dtype_of,
    extent,
    register_intrinsic,
    relax,
    te,
    tirx,
)
from modelforge.compilers.tvm.choices import chosen
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.convolution import Window, window_of
from modelforge.compilers.tvm.kernels.depthwise import met
from modelforge.compilers.tvm.kernels.dot import Dot, dot_of, finished
from modelforge.compilers.tvm.kernels.loops import neighbours, partition, spread, unroll_tail
from modelforge.compilers.tvm.kernels.quantized import Activations, activations_of
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.kernels.starts import emit_from
from modelforge.compilers.tvm.machine import Machine

_UNROLLED: Final = 64
"""Dot products of a tile that are written out: the weights of more do not stay in registers anyway."""
_ENDED: Final = 8
"""Instructions that set a vector of sums, and make and store the result of them: a usual number."""
_KEPT: Final = 12
"""Registers that sums cannot have: of weights, groups, and the constants of what follows."""
_SPILLED: Final = 1.5
"""Instructions that each sum beyond those costs for each dot product, as compiled by LLVM for cls and ShuffleNet."""
_TRIED: Final = 16
"""Tiles that a search measures at most."""


@dataclass(frozen=True)
class DepthwiseDot:
    """Convolutions over quantized activations with one filter for each of 8 n channels, on machines with dot products
    over four bytes."""

    name: str = "depthwise-dot"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window, dot = window_of(call), dot_of(machine, 4)
        if window is None or dtype_of(call.args[1]) != "int8" or dot.group != 4:
            return None
        if not int(call.attrs.groups) == window.data[3] == window.channels or window.channels % _block(window):
            return None
        if _block(window) % dot.lanes:
            return None
        if window.kernel[1] == 1 or window.dilation[1] != 1 or window.strides[1] > 2:
            return None
        data = activations_of(call.args[0], builder)
        return None if data is None else _convolve(*met(window, constant_value(call.args[1])), data, builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        rows, columns, vectors, lanes, width = (int(value) for value in block_annotations(sch, anchor)[TILE])
        (*pads, groups), after = neighbours(sch, anchor, machine)
        out = after[-1]
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor)) // 4
        groups = _turn(sch, groups, width)
        batch, y, x, channel = sch.get_loops(out)
        y, y_row = sch.split(y, factors=[None, rows])
        x, x_tile = sch.split(x, factors=[None, columns])
        block, part, channel = sch.split(channel, factors=[None, width // (vectors * lanes), vectors * lanes])
        sch.reorder(batch, y, block, y_row, part, x, x_tile, channel)
        sch.compute_at(anchor, x, preserve_unit_loops=True)
        sch.compute_at(groups, block, preserve_unit_loops=True)
        sch.unroll(sch.split(sch.get_loops(groups)[-1], factors=[None, 2])[1])
        for pad in pads:
            _load(sch, pad, groups)
        unroll_tail(sch, [x_tile, channel], max(8, lanes))
        spread(sch, [batch, y, block], work, machine)
        _fill(sch, anchor, vectors, dot_of(machine, 4))
        return f"{lanes}x4 {columns}x{vectors * lanes} in {rows} rows"


@dataclass(frozen=True)
class _Groups:
    """Which groups of four pixels a row of a window needs: ``count``, each so many ``step`` pixels after the other;
    ``turns``: how many pixels of the result start at the same group."""

    count: int
    step: int
    turns: int

    @staticmethod
    def of(window: Window) -> _Groups:
        turns = 2 // window.strides[1]
        span = window.kernel[1] + turns - 1
        count = -(-span // 4)
        return _Groups(count, 4 if count != 2 else (span - 3) // 2 * 2, turns)

    def pixels(self, width: int) -> int:
        """How many groups so many pixels of the result read."""
        return width // self.turns + (self.count - 1) * self.step // 2

    def pack(self, weight: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
        """[channels, height, width of the window] as [blocks, height, count, turns, channels of a block, 4]."""
        channels, height, wide = weight.shape
        found = np.zeros((channels, height, self.count, self.turns, 4), np.int8)
        for turn in range(self.turns):
            for tap in range(wide):
                group = (tap + turn) // 4
                found[:, :, group, turn, tap + turn - group * self.step] = weight[:, :, tap]
        split = found.reshape(channels // width, width, height, self.count, self.turns, 4)
        return np.ascontiguousarray(split.transpose(0, 2, 3, 4, 1, 5))


def _convolve(window: Window, weight: np.ndarray[Any, Any], data: Activations, builder: Any, machine: Machine) -> Any:
    """Emit the int32 sums of ``data`` (NHWC) times ``weight`` (OHW1)."""
    batch, _, wide_in, channels = window.data
    dot, groups, tile = dot_of(machine, 4), _Groups.of(window), _tile(window, machine)
    columns, width = tile.vectors * dot.lanes, _block(window)
    height, wide = window.size[0], tiles.up(window.size[1], tile.columns)
    tall = tiles.up(height, tile.rows)
    top, left = window.padding[:2]
    count = tiles.up(groups.pixels(wide), 2)
    bottom, right = window.padded_for(tall, wide)[0], max(0, 2 * count + 2 - left - wide_in)
    strides, dilation = window.strides, window.dilation
    packed = relax.const(groups.pack(weight[..., 0], columns))
    attrs = {
        RULE: DepthwiseDot.name,
        MACS: batch * prod(window.size) * channels * prod(window.kernel),
        TILE: [tile.rows, tile.columns, tile.vectors, dot.lanes, width],
    }

    def compute(stored: Any, weight: Any, blank: Any) -> Any:
        operand = _padded(stored, dot, data, (top, left, bottom, right), blank)
        turned = te.compute(
            (batch, int(operand.shape[1]), channels // width, count * width * 4),
            lambda n, y, b, i: operand[n, y, i // (width * 4) * 2 + i % 4, b * width + i // 4 % width],
            name="load_groups",
        )
        ry, rg, rk = (
            te.reduce_axis((0, size), name)
            for name, size in (("ry", window.kernel[0]), ("rg", groups.count), ("rk", 4))
        )
        sums = te.compute(
            (batch, tall, wide, channels),
            lambda n, y, x, c: te.sum(
                turned[
                    n,
                    y * strides[0] + ry * dilation[0],
                    c // width,
                    (x // groups.turns + rg * (groups.step // 2)) * (width * 4) + c % width * 4 + rk,
                ].astype("int32")
                * weight[c // columns, ry, rg, x % groups.turns, c % columns, rk].astype("int32"),
                axis=[ry, rg, rk],
            ),
            name="sums",
            attrs=attrs,
        )
        return finished((batch, *window.size, channels), sums)

    blank = relax.const(np.full(width, data.zero_for(dot), dot.operand))
    start = data.start(weight, dot, channels)
    return emit_from(
        builder, compute, data.stored, packed, blank, start=start, name="depthwise_dot", pattern=OUT_FUSIBLE
    )


def _padded(stored: Any, dot: Dot, data: Activations, padding: tuple[int, int, int, int], blank: Any) -> Any:
    """The activations as the instruction reads them, with pixels of the zero point around them; or as they are.

    Beside the image those are read from memory (``blank``): LLVM would make other instructions of constants there.
    """
    if stored.dtype == dot.operand and not any(padding):
        return stored
    batch, height, width, channels = (int(size) for size in stored.shape)
    top, left, bottom, right = padding
    zero = data.zero_for(dot)

    def element(n: Any, y: Any, x: Any, c: Any) -> Any:
        found = stored[n, y - top, x - left, c]
        if stored.dtype != dot.operand:
            found = (found.astype("int16") + tirx.const(zero - data.zero, "int16")).astype(dot.operand)
        across = [*([x >= left] if left else []), *([x < left + width] if right else [])]
        down = [*([y >= top] if top else []), *([y < top + height] if bottom else [])]
        if across:
            found = tirx.if_then_else(tirx.all(*across), found, blank[c % blank.shape[0]])
        return tirx.if_then_else(tirx.all(*down), found, tirx.const(zero, dot.operand)) if down else found

    return te.compute((batch, top + height + bottom, left + width + right, channels), element, name="pad_operand")


def _fill(sch: Any, anchor: Any, vectors: int, dot: Dot) -> None:
    """The sums of one tile: the window outside, pixels and vectors inside, then the dot product."""
    *_, tile, channel, row, group, tap = sch.get_loops(anchor)
    vector, lane = sch.split(channel, factors=[vectors, dot.lanes])
    sch.reorder(row, group, tile, vector, lane, tap)
    steps = extent(sch, tile) * vectors * extent(sch, group)
    for loop in (vector, tile, group):
        sch.unroll(loop)
    if steps * extent(sch, row) <= _UNROLLED:
        sch.unroll(row)
    init = sch.decompose_reduction(anchor, row)
    sch.vectorize(sch.get_loops(init)[-1])
    sch.tensorize(sch.blockize(lane), _product(dot))
    sch.set_scope(init, 0, "local")


def _turn(sch: Any, groups: Any, width: int) -> Any:
    """The block that makes the groups of one pixel, by their instruction.

    Before anything moves: TVM would take blocks of rows that overlap for some that do not, and lose track of tiles that
    do not divide the image.
    """
    _, lane = sch.split(sch.get_loops(groups)[-1], factors=[None, width * 4])
    made = sch.blockize(lane)
    sch.tensorize(made, _turned(str(sch.get(groups).writes[0].source.dtype), width))
    return made


def _load(sch: Any, pad: Any, groups: Any) -> None:
    """Bring the pixels of a group, or what pads the image, into registers."""
    row, _, x, step = sch.get_loops(groups)[-4:]
    sch.compute_at(pad, step, preserve_unit_loops=True)
    *_, pixel, lanes = sch.get_loops(pad)
    sch.unroll(pixel)
    sch.vectorize(lanes)
    sch.set_scope(pad, 0, "local")
    partition(sch, row)
    partition(sch, x)


@dataclass(frozen=True)
class _Tile:
    """``columns`` pixels by ``vectors`` of sums in registers; groups are made for ``rows`` of the result at once."""

    rows: int
    columns: int
    vectors: int


def _tile(window: Window, machine: Machine) -> _Tile:
    """The measured tile, or that with the fewest instructions for each sum, counted from what a tile has to do.

    For each row of the window: a load for each vector of groups, by pairs where two lie side by side; the same for
    weights, unless all of them stay in registers; the dot products; sums that do not stay in registers. Then what is
    done once with each sum. Fewer than eight sums wait for each other.
    """
    dot, groups = dot_of(machine, 4), _Groups.of(window)
    width, tall = window.size[1], window.kernel[0]
    found: list[tuple[float, int, int]] = []
    for vectors in (1, 2, 4):
        if _block(window) % (vectors * dot.lanes):
            continue
        pair = 1 if vectors == 1 else 2
        for columns in range(groups.turns, 17, groups.turns):
            sums, weights = vectors * columns, groups.count * groups.turns * vectors
            if sums + 4 > machine.registers:
                continue
            loads = groups.pixels(columns) * vectors / pair
            if weights * tall + sums + 2 > machine.registers:
                loads += weights / pair
            loads += _SPILLED * groups.count * max(0, sums + _KEPT - machine.registers)
            steps = tall * (loads + sums * groups.count) + sums * (_ENDED if pair == 2 else _ENDED + 1)
            waste = max(1.0, 8 / sums) * tiles.up(width, columns) / width
            found.append((round(waste * steps / sums, 9), columns, vectors))
    found.sort()
    ranked = [_Tile(_rows(window, columns, machine), columns, vectors) for _, columns, vectors in found[:_TRIED]]
    return chosen("tile", ranked[0], lambda: ranked[1:])


def _rows(window: Window, columns: int, machine: Machine) -> int:
    """Rows of the result whose groups take half of the first-level cache, with little waste in the last block."""
    height, width = window.size
    row = _Groups.of(window).pixels(tiles.up(width, columns)) * _block(window) * 4
    span = window.dilation[0] * (window.kernel[0] - 1) + 1
    most = max(4, (machine.l1d // 2 // row - span) // window.strides[0] + 1)
    blocks = -(-height // min(most, height))
    return -(-height // blocks)


def _block(window: Window) -> int:
    """Channels whose groups are made together."""
    return 16 if window.channels % 16 == 0 else 8


@cache
def _product(dot: Dot) -> str:
    """The dot products of as many groups as a vector holds, made known to TVM."""
    name = f"modelforge.groups.{dot.name}.{dot.lanes}"
    instruction = _INSTRUCTIONS[dot.name, dot.lanes]
    sizes = {"lanes": dot.lanes, "bytes": dot.lanes * 4, "operand": dot.operand, "instruction": instruction}
    a, b = ('A.vload([0], dtype="{operand}x{bytes}")', 'B.vload([0, 0], dtype="int8x{bytes}")')
    if dot.operand == "uint8":
        a = f'T.reinterpret({a}, dtype="int8x{{bytes}}")'
    body = _PRODUCT_HEAD + _PRODUCT_BODY.replace("FIRST", a).replace("SECOND", b)
    register_intrinsic(name, (_PRODUCT_HEAD + _PRODUCT_MEANING).format(**sizes), body.format(**sizes))
    return name


@cache
def _turned(dtype: str, width: int) -> str:
    """Four pixels of ``width`` channels as groups, made known to TVM: Arm has an instruction that stores so (ST4)."""
    name = f"modelforge.groups.{dtype}.{width}"
    lines = [f'p{k} = A.vload([{k}, 0], dtype="{dtype}x{width}")' for k in range(4)]
    order = [k * width + channel for channel in range(width) for k in range(4)]
    lines.append(f"B[T.ramp(T.int32(0), 1, {width * 4})] = T.Shuffle([p0, p1, p2, p3], {order})")
    head = _TURN_HEAD.format(dtype=dtype, width=width, bytes=width * 4)
    body = "\n".join(" " * 8 + line for line in lines) + "\n"
    register_intrinsic(name, head + _TURN_MEANING.format(bytes=width * 4), head + body)
    return name


_INSTRUCTIONS: Final[dict[tuple[str, int], str]] = {
    ("sdot", 4): "llvm.aarch64.neon.sdot.v4i32.v16i8",
    ("vnni", 16): "llvm.x86.avx512.vpdpbusd.512",
    ("vnni", 8): "llvm.x86.avx512.vpdpbusd.256",
}
_PRODUCT_HEAD: Final = """
@T.prim_func(s_tir=True)
def step(
    A: T.Buffer(({bytes},), "{operand}", offset_factor=1),
    B: T.Buffer(({lanes}, 4), "int8", offset_factor=1),
    C: T.Buffer(({lanes},), "int32", offset_factor=1),
) -> None:
    with T.sblock("root"):
        T.reads(C[0:{lanes}], A[0:{bytes}], B[0:{lanes}, 0:4])
        T.writes(C[0:{lanes}])
"""
_PRODUCT_MEANING: Final = """
        for i, j in T.grid({lanes}, 4):
            with T.sblock("update"):
                vi, vj = T.axis.remap("SR", [i, j])
                C[vi] = C[vi] + T.cast(A[vi * 4 + vj], "int32") * T.cast(B[vi, vj], "int32")
"""
_PRODUCT_BODY: Final = """
        C[T.ramp(T.int32(0), 1, {lanes})] = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("{instruction}"),
            C.vload([0], dtype="int32x{lanes}"),
            FIRST,
            SECOND,
            dtype="int32x{lanes}")
"""
_TURN_HEAD: Final = """
@T.prim_func(s_tir=True)
def turn(
    A: T.Buffer((4, {width}), "{dtype}", strides=("s", 1), offset_factor=1),
    B: T.Buffer(({bytes},), "{dtype}", offset_factor=1),
) -> None:
    with T.sblock("root"):
        T.reads(A[0:4, 0:{width}])
        T.writes(B[0:{bytes}])
"""
_TURN_MEANING: Final = """
        for i in range({bytes}):
            with T.sblock("turn"):
                vi = T.axis.spatial({bytes}, i)
                B[vi] = A[vi % 4, vi // 4]
"""
