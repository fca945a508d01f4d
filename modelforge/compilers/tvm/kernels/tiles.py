"""Register tiles for sums of products: how many pixels (or rows) by how many vectors of channels (or columns)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from modelforge.compilers.tvm.choices import chosen
from modelforge.compilers.tvm.machine import Machine

_LATENCY: Final = 8
"""Sums in flight that keep two multiply-add pipes busy at a latency of four cycles (Zen 4, Cortex-A76)."""
_WIDEST: Final = 4
_NEAR: Final = 1.02
_BY_ELEMENT: Final = {"float16": 9}
"""Rows whose elements sums can be multiplied by: FMLA by element of FP16 knows registers 0 to 15 only (Arm ARM, C7.2:
four bits of Rm), and LLVM keeps sums in some of them: from ten rows on it spills."""
_TRIED: Final = 16
"""Tiles that a search measures at most: those after them cost half as much again by the model."""


@dataclass(frozen=True)
class Tile:
    """``rows`` by ``vectors`` of ``lanes`` sums in registers."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        """Channels or columns that one tile makes."""
        return self.vectors * self.lanes

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


def choose(
    rows: Iterable[tuple[int, float]],
    columns: int,
    machine: Machine,
    dtype: str = "float32",
    widest: int = _WIDEST,
    unit: int = 1,
) -> Tile:
    """The tile with the least cost per useful multiply-add, or the measured one. Arguments as of :func:`ranked`."""
    found = ranked(rows, columns, machine, dtype, widest, unit)
    return chosen("tile", found[0], lambda: found[1:_TRIED])


def ranked(
    rows: Iterable[tuple[int, float]],
    columns: int,
    machine: Machine,
    dtype: str = "float32",
    widest: int = _WIDEST,
    unit: int = 1,
) -> list[Tile]:
    """All tiles that fit the registers, the least cost per useful multiply-add first.

    Args:
        rows: heights that the caller can have, each with the work that it does per useful row (1.0: no waste).
        columns: channels or columns wanted.
        widest: vectors that a tile may have.
        unit: vectors of columns that lie side by side in packed weights; a tile has a part of them, or some such.

    The cost of a tile is the longest of what the pipes for sums take, what the loads take (one per row, one per
    vector; two a cycle, like sums), and the latency, times the waste. A tile that does not fit costs a little more
    still: its results are tested as they are stored.
    """
    found = _costs(rows, columns, machine, dtype, widest)
    fitting = [tile for _, tile in found if tile.vectors % unit == 0 or unit % tile.vectors == 0]
    return fitting or [Tile(1, 1, _lanes(columns, machine.lanes(dtype)))]


def unit(columns: int, machine: Machine, dtype: str = "float32", widest: int = _WIDEST) -> int:
    """Vectors of columns to pack side by side: what suits many rows, and as many as cost hardly more, so that few rows
    read few streams. The rows have no say: whatever reads the weights, they are packed alike."""
    heights = [(size, 1.0) for size in range(1, machine.registers + 1)]
    found = _costs(heights, columns, machine, dtype, widest)
    return max((tile.vectors for cost, tile in found if cost <= _NEAR * found[0][0]), default=1)


def _costs(
    rows: Iterable[tuple[int, float]], columns: int, machine: Machine, dtype: str, widest: int
) -> list[tuple[float, Tile]]:
    """Cost per useful multiply-add of all tiles that fit the registers, the least first."""
    lanes = _lanes(columns, machine.lanes(dtype))
    found: list[tuple[float, Tile]] = []
    deep = depth(machine, dtype)
    lanewise = deep > 1
    for height, waste in rows:
        if lanewise and height > _BY_ELEMENT.get(dtype, height):
            continue
        for vectors in range(1, widest + 1):
            sums = height * vectors
            if sums + vectors + (height if lanewise else 1) > machine.registers:
                continue
            width = vectors * lanes
            wide = -(-columns // width) * width / columns
            loads = height / deep + vectors
            steps = max(sums, loads, _LATENCY) + 0.02 * (height / deep + 4 * vectors)
            if lanewise:  # every instruction takes its turn in a narrow front end
                steps = max(steps, sums + height / deep + vectors / 2)
            cost = waste * wide * steps / sums * (1.05 if waste > 1 else 1.0)
            found.append((round(cost, 9), Tile(height, vectors, lanes)))
    return sorted(found, key=lambda pair: pair[0])


def depth(machine: Machine, dtype: str) -> int:
    """How many elements of a row one load brings, where instructions multiply by one element of a register (Arm: FMLA
    by element); 1 where each is broadcast from memory for nothing (x86)."""
    return machine.lanes(dtype) if machine.isa == "aarch64" else 1


def steps(count: int, machine: Machine, dtype: str) -> int:
    """How many of ``count`` elements of a row to go through in one turn of a loop: whole loads, two where they come out
    even, for half as many instructions of the loop itself; 1 where that is not possible or gives nothing."""
    deep = depth(machine, dtype)
    return next((size for size in (8, deep) if size in (deep, 2 * deep) and deep > 1 and count % size == 0), 1)


def divisors(count: int, machine: Machine) -> list[tuple[int, float]]:
    """Heights that divide ``count``: no waste."""
    return [(size, 1.0) for size in range(1, min(count, machine.registers) + 1) if count % size == 0]


def padded(count: int, machine: Machine) -> list[tuple[int, float]]:
    """Every height, with the waste of rounding ``count`` up to it."""
    return [(size, -(-count // size) * size / count) for size in range(1, min(count, machine.registers) + 1)]


def up(size: int, step: int) -> int:
    """The next multiple."""
    return -(-size // step) * step


def _lanes(columns: int, lanes: int) -> int:
    """Narrower vectors where there are fewer columns than lanes."""
    while lanes > 4 and columns <= lanes // 2:
        lanes //= 2
    return lanes
