"""Integer products as the instruction sets have them: int8 weights, 8 or 16 bit activations, exact int32 sums.

One row of a table a machine. TVM's own intrinsics are not imported: that parses those of every target, for 40 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import REDUCTION, extent, register_intrinsic, relax, te
from modelforge.compilers.tvm.kernels.loops import PARALLEL_WORK, partition, spread, vectorize_copy
from modelforge.compilers.tvm.machine import Machine

_REGISTERS: Final = 32
"""Of vectors, on every core that has SDOT (Arm ARM, A1.4)."""
_TWICE: Final = 0.96
"""Instructions for a product where a turn of the loop has two steps, beside those where it has one, of a tile of 7 x 8
or 8 x 8 sums as compiled; smaller tiles gain as much and start from more."""
_LARGE: Final = 12
"""Sums of a tile from which choosing it for that is worth the waste."""


@dataclass(frozen=True)
class Dot:
    """One step: ``depth`` activations of a pixel times the weights of ``lanes`` channels, added to ``lanes`` sums.

    Attributes:
        operand: type of the activations that it reads: 8 bits lie in memory so, ``int16`` is widened for it.
        steps: instructions in one step, each over ``group`` activations; they share a load of activations.
        registers: vector registers that ``lanes`` int32 sums take.
    """

    name: str
    operand: str
    steps: int
    group: int
    lanes: int
    registers: int = 1

    @property
    def depth(self) -> int:
        """Activations of one step."""
        return self.steps * self.group

    @property
    def axes(self) -> tuple[int, ...]:
        """The extents that sums run over within a step; an axis of one is none."""
        return tuple(size for size in (self.steps, self.group) if size > 1)

    def of_weights(self, lane: Any, inner: Sequence[Any]) -> tuple[Any, ...]:
        """Where the weight of a lane lies within a step: [steps, lanes, group], without axes of one."""
        step, group = inner if len(inner) == 2 else (inner[0], None) if self.steps > 1 else (None, inner[0])
        return (*([step] if self.steps > 1 else []), lane, *([group] if self.group > 1 else []))

    def of_activations(self, inner: Sequence[Any]) -> Any:
        """Which activation of a step."""
        return inner[0] * self.group + inner[1] if len(self.axes) == 2 else inner[0]

    @property
    def widest(self) -> int:
        """Vectors of sums in a tile: the weights of a whole step stay in registers beside them while rows pass."""
        return 4 if self.steps == 1 else max(1, 8 // (self.steps * self.registers))

    def goes_twice(self, rows: int, vectors: int, turns: int) -> bool:
        """Whether a tile of so many rows goes through two steps in a turn of its loop over the depth: a load then
        brings a row's activations of both (LDP), and half of the loop's own instructions are left. Sums, the weights of
        a step and the second halves must fit the registers."""
        fits = rows * vectors + self.steps * vectors + rows <= _REGISTERS
        return self.name == "sdot" and fits and turns >= 4 and turns % 2 == 0

    def heights(self, heights: Iterable[tuple[int, float]], channels: int, turns: int) -> list[tuple[int, float]]:
        """Heights of tiles with their waste, less for large ones that go through two steps at once."""
        vectors = min(self.widest, -(-channels // self.lanes))

        def gains(rows: int) -> bool:
            return rows * vectors >= _LARGE and self.goes_twice(rows, vectors, turns)

        return [(rows, waste * (_TWICE if gains(rows) else 1.0)) for rows, waste in heights]

    def seen_by_tiles(self, machine: Machine) -> Machine:
        """The machine with vectors that hold the sums of one step."""
        return machine if self.registers == 1 else replace(machine, vector_bits=machine.vector_bits * self.registers)


def dot_of(machine: Machine, depth: int) -> Dot:
    """The instruction for sums over ``depth`` input channels.

    * ``vnni``: VPDPBUSD, uint8 by int8 (Intel SDM volume 2; exact: VPDPBUSDS is the one that saturates).
    * ``madd``, x86 without VNNI: VPMADDWD, int16 by int16, exact where VPMADDUBSW would saturate.
    * ``sdot``: SDOT by element, int8 by int8 (Arm ARM, FEAT_DotProd); up to four share a load of activations.
    * ``smlal``, Arm without dot products: SMLAL by element, int16 by int16.
    """
    lanes = machine.lanes("int32")
    if has_unsigned_dot(machine):
        return Dot("vnni", "uint8", 1, 4, lanes)
    if machine.isa == "x86_64":
        return Dot("madd", "int16", 1, 2, lanes)
    if machine.dot == "sdot":
        return Dot("sdot", "int8", 4 if depth % 16 == 0 else 2 if depth % 8 == 0 else 1, 4, 4)
    return Dot("smlal", "int16", 8 if depth % 8 == 0 else 4, 1, 8, registers=2)


def has_unsigned_dot(machine: Machine) -> bool:
    """Whether the dot product reads uint8 activations; they then lie in memory as such, 128 above int8."""
    return machine.dot == "vnni" and ("vnni", machine.lanes("int32")) in _INSTRUCTIONS


def pack(weight: np.ndarray[Any, Any], dot: Dot, columns: int) -> Any:
    """[O, H, W, I] as a constant [blocks, H, W, I / depth, columns / lanes, steps, lanes, group]; zeros fill up.

    Axes of one among the last three are left out.
    """
    channels, height, width, inputs = weight.shape
    blocks, parts = -(-channels // columns), -(-inputs // dot.depth)
    full = np.zeros((blocks * columns, height, width, parts * dot.depth), np.int8)
    full[:channels, :, :, :inputs] = weight
    shape = (blocks, columns // dot.lanes, dot.lanes, height, width, parts, dot.steps, dot.group)
    packed = full.reshape(shape).transpose(0, 3, 4, 5, 1, 6, 2, 7)
    ones = tuple(axis for axis in (5, 7) if packed.shape[axis] == 1)
    return relax.const(np.ascontiguousarray(packed.squeeze(ones)))


def finished(shape: tuple[int, ...], sums: Callable[..., Any]) -> Any:
    """The sums that are wanted, of a tile that may be larger."""
    return te.compute(shape, lambda *i: sums(*i), name="finished")  # noqa: PLW0108  # a tensor is no function


def store_products(
    sch: Any,
    anchor: Any,
    out: Any,
    outer: list[Any],
    tile: list[Any],
    block: Any,
    column: Any,
    vectors: int,
    dot: Dot,
    pads: list[Any],
    machine: Machine,
) -> None:
    """Schedule sums from the loops of their result: ``outer`` (``block`` among them) around ``tile`` and ``column``.

    The sums of a tile stay in registers; columns that do not fill a vector are stored in a copy of the loop.
    """
    work = prod(extent(sch, loop) for loop in sch.get_loops(anchor)) // dot.depth
    channels = int(sch.get(out).iter_vars[-1].dom.extent)
    sch.reorder(*outer, *tile, column)
    sch.compute_at(anchor, outer[-1], preserve_unit_loops=True)
    whole, blocks = channels % dot.lanes == 0, extent(sch, block)
    wide = dot.lanes * (2 if dot.lanes == 4 and vectors % 2 == 0 and channels % 8 == 0 else 1)  # SQXTN fills 8 lanes
    vector, lane = sch.split(column, factors=[None, wide])
    sch.vectorize(lane)
    for loop in (*tile, vector):
        sch.unroll(loop)
    if not whole:
        partition(sch, vector)
        if blocks > 1:
            partition(sch, block)
    if work >= PARALLEL_WORK and machine.cores > 1:
        if whole:
            spread(sch, outer, work, machine)
        elif block in outer[2:]:
            spread(sch, outer[: outer.index(block)], work, machine)
        else:
            sch.parallel(max(outer, key=lambda loop: extent(sch, loop)) if outer[0] == block else outer[0])
    _fill(sch, anchor, len(tile), vectors, dot)
    for pad in pads:
        vectorize_copy(sch, pad, machine, dot.operand)


def _fill(sch: Any, anchor: Any, tile_axes: int, vectors: int, dot: Dot) -> None:
    """The sums of one tile: window and input channels outside, pixels and vectors inside, then the step."""
    loops = sch.get_loops(anchor)
    reduced = sum(int(var.iter_type) == REDUCTION for var in sch.get(anchor).iter_vars)
    *tile, column = loops[-reduced - tile_axes - 1 : -reduced]
    reduction, steps = loops[-reduced : -len(dot.axes)], loops[-len(dot.axes) :]
    vector, lane = sch.split(column, factors=[vectors, dot.lanes])
    *before, last = reduction
    if dot.goes_twice(prod(extent(sch, loop) for loop in tile), vectors, extent(sch, last)):
        reduction = [*before, *sch.split(last, factors=[None, 2])]
        sch.unroll(reduction[-1])
    sch.reorder(*reduction, *tile, vector, lane, *steps)
    for loop in (*tile, vector):
        sch.unroll(loop)
    init = sch.decompose_reduction(anchor, reduction[0])
    sch.vectorize(sch.get_loops(init)[-1])
    sch.tensorize(sch.blockize(lane), _registered(dot))
    sch.set_scope(init, 0, "local")


@cache
def _registered(dot: Dot) -> str:
    """The step made known to TVM: what it means, and how it is done."""
    name = f"modelforge.{dot.name}.{dot.lanes}x{dot.steps}x{dot.group}"
    inner = ("vj", "vk")[: len(dot.axes)]
    weights = tuple(str(size) for size in dot.of_weights(dot.lanes, dot.axes))
    sizes: dict[str, Any] = {
        "lanes": dot.lanes,
        "depth": dot.depth,
        "operand": dot.operand,
        "group": dot.group,
        "weights": ", ".join(weights),
        "slices": ", ".join(f"0:{size}" for size in weights),
        "loops": ", ".join(map(str, (dot.lanes, *dot.axes))),
        "loop_names": ", ".join("ijk"[: len(inner) + 1]),
        "names": ", ".join(("vi", *inner)),
        "kinds": "S" + "R" * len(inner),
        "activation": f"vj * {dot.group} + vk" if len(inner) == 2 else "vj",
        "weight": ", ".join(dot.of_weights("vi", inner)),
    }
    head = _HEAD.format(**sizes)
    register_intrinsic(name, head + _MEANING.format(**sizes), head + _body(dot, sizes))
    return name


def _body(dot: Dot, sizes: dict[str, Any]) -> str:
    """The step's instructions, one after the other."""
    before, each = {
        "vnni": (_A_BROADCAST, _VPDPBUSD),
        "madd": (_A_BROADCAST, _VPMADDWD),
        "sdot": (_A_WORDS, _SDOT),
        "smlal": (_A_VECTOR, _SMLAL),
    }[dot.name]
    sizes = {
        **sizes,
        "bytes": dot.lanes * dot.group,
        "instruction": _INSTRUCTIONS.get((dot.name, dot.lanes), ""),
        "words": f"int32x{dot.steps}" if dot.steps > 1 else "int32",
    }
    found = before.format(**sizes)
    for step in range(dot.steps):
        start = ", ".join(map(str, dot.of_weights(0, (step, 0))))
        word = f"T.Shuffle([words], [{step}])" if dot.steps > 1 else "words"
        found += each.format(step=step, word=word, start=start, **sizes)
    return found


_HEAD: Final = """
@T.prim_func(s_tir=True)
def step(
    A: T.Buffer(({depth},), "{operand}", offset_factor=1),
    B: T.Buffer(({weights},), "int8", offset_factor=1),
    C: T.Buffer(({lanes},), "int32", offset_factor=1),
) -> None:
    with T.sblock("root"):
        T.reads(C[0:{lanes}], A[0:{depth}], B[{slices}])
        T.writes(C[0:{lanes}])
"""
_MEANING: Final = """
        for {loop_names} in T.grid({loops}):
            with T.sblock("update"):
                {names} = T.axis.remap("{kinds}", [{loop_names}])
                C[vi] = C[vi] + T.cast(A[{activation}], "int32") * T.cast(B[{weight}], "int32")
"""
_A_BROADCAST: Final = """\
        a = T.broadcast(T.reinterpret(A.vload([0], dtype="{operand}x{group}"), dtype="int32"), {lanes})
"""
_VPDPBUSD: Final = """\
        C[T.ramp(T.int32(0), 1, {lanes})] = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("{instruction}"),
            C.vload([0], dtype="int32x{lanes}"),
            T.reinterpret(a, dtype="int8x{bytes}"),
            B.vload([{start}], dtype="int8x{bytes}"),
            dtype="int32x{lanes}")
"""
_VPMADDWD: Final = """\
        C[T.ramp(T.int32(0), 1, {lanes})] = C.vload([0], dtype="int32x{lanes}") + T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("{instruction}"),
            T.reinterpret(a, dtype="int16x{bytes}"),
            T.cast(B.vload([{start}], dtype="int8x{bytes}"), "int16x{bytes}"),
            dtype="int32x{lanes}")
"""
_A_WORDS: Final = """\
        words = T.reinterpret(A.vload([0], dtype="{operand}x{depth}"), dtype="{words}")
"""
_A_VECTOR: Final = """\
        a = A.vload([0], dtype="{operand}x{depth}")
"""
_SDOT: Final = """\
        C[T.ramp(T.int32(0), 1, 4)] = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sdot.v4i32.v16i8"),
            C.vload([0], dtype="int32x4"),
            B.vload([{start}], dtype="int8x16"),
            T.reinterpret(T.broadcast({word}, 4), dtype="int8x16"),
            dtype="int32x4")
"""
_SMLAL: Final = """\
        C[T.ramp(T.int32(0), 1, 8)] = C.vload([0], dtype="int32x8") + T.cast(
            B.vload([{start}], dtype="int8x8"), "int32x8"
        ) * T.broadcast(T.cast(T.Shuffle([a], [{step}]), "int32"), 8)
"""
_INSTRUCTIONS: Final[dict[tuple[str, int], str]] = {
    ("vnni", 16): "llvm.x86.avx512.vpdpbusd.512",
    ("vnni", 8): "llvm.x86.avx512.vpdpbusd.256",
    ("madd", 16): "llvm.x86.avx512.pmaddw.d.512",
    ("madd", 8): "llvm.x86.avx2.pmadd.wd",
    ("madd", 4): "llvm.x86.sse2.pmadd.wd",
}
