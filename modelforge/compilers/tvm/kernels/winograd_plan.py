"""How a convolution by minimal filtering is cut up, and whether it costs less than the direct one: numbers alone.

Costs are vector operations of one thread; a multiply-add of one vector is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Final

from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.convolution import Window
from modelforge.compilers.tvm.machine import Machine

OUT: Final = 4
"""Outputs of a tile along an axis."""
IN: Final = OUT + 2
"""Inputs that they are made from, and points that polynomials are evaluated at."""

_PATCH, _WEIGHT, _RESULT, _STORE = 300, 225, 250, 2
"""Cost of one vector's 36 inputs, 36 weights, 16 results; of one sum stored or added to.

Measured with AVX-512 on layers of ResNet-50 and YOLOv8n (samples of perf in each step over those in the multiply-adds);
near the number of instructions that LLVM makes of a step, so taken for the other instruction sets too.
"""
_FETCH, _DIRECT_FETCH = 350, 200
"""Cost of nine vectors of weights that come from memory, once a run: the direct kernel reads them while it multiplies.

Measured likewise, caches emptied before each run. With weights in the cache even 7x7 images of 512 channels would win.
"""
_BEYOND: Final = {"x86_64": 16, "aarch64": 4}
"""Bytes that come from beyond the second-level cache per operation: x86-64 measured (a third level), Arm estimated."""
_GAIN: Final = 0.85
"""The model is not exact and the direct kernel is simpler: it stays where less than this would be won."""
_TRIED: Final = 6
"""Plans that a search measures at most."""
_MEMORY: Final = 4
"""Second-level caches that the transformed data of a group may fill."""


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

    def tiles(self, batch: int) -> int:
        """Tiles of all images, rounded up to whole groups."""
        return -(-batch * self.tall * self.wide // self.group) * self.group

    def held(self, channels: int) -> int:
        """Bytes of transformed patches, weights and products that a group of tiles needs at a time."""
        columns = self.tile.columns
        return 4 * IN**2 * (self.group * (channels + columns) + self.depth * columns)


def ranked(window: Window, machine: Machine, batches: Sequence[int] = ()) -> list[Plan | None]:
    """Plans, the least cost first; None stands for the direct kernel, where it costs hardly more than the next or less.

    Channels of both sides must fill vectors of at least four lanes; ``window`` is 3x3, stride 1, dilation 1. Where a
    module has entries for several ``batches``, one of them the window's, what suits them together is first for each:
    kernels of both kinds would hold the weights twice.
    """
    deep, lanes = gcd(window.data[3], machine.lanes()), gcd(window.channels, machine.lanes())
    if min(deep, lanes) < 4 or 0 in (*window.data, *window.size):
        return [None]
    # Of one image: entries for several batches then read the same packed weights.
    tall, wide = _tiles(window)
    heights = tiles.padded(tall * wide, machine)
    narrow = replace(machine, vector_bits=32 * lanes)
    tile = tiles.choose(heights, window.channels, narrow)
    alike = [other for other in tiles.ranked(heights, window.channels, narrow) if other.columns == tile.columns]

    def fitting(of: Window) -> list[Plan]:
        # Groups of the best height may all be too large, or none traceable: then the next that reads the same weights.
        return next(filter(None, (_plans(of, each, deep, machine) for each in (tile, *alike))), [])

    plans = fitting(window)
    others = [replace(window, data=(batch, *window.data[1:])) for batch in batches if window.data[0] in batches]
    found = [(other, fitting(other)) for other in others]
    if len(found) > 1 and all(mine for _, mine in found):
        shares = [cost(mine[0], other, machine) / direct_cost(other, machine) for other, mine in found]
        together = sum(shares) < _GAIN * len(shares)
        return [*plans[:_TRIED], None] if together else [None, *plans[:_TRIED]]
    limit = _GAIN * direct_cost(window, machine)
    better = [plan for plan in plans if cost(plan, window, machine) < limit]
    return [*better[:_TRIED], None, *plans[len(better) : _TRIED]]


def _tiles(window: Window) -> tuple[int, int]:
    """In a column and in a row of one image."""
    high, broad = window.size
    return -(-high // OUT), -(-broad // OUT)


def _plans(window: Window, tile: tiles.Tile, deep: int, machine: Machine) -> list[Plan]:
    """Those that fit the caches, the least cost first."""
    batch, _, _, channels = window.data
    tall, wide = _tiles(window)
    count = batch * tall * wide
    room = machine.l2 // 3 // (4 * IN**2 * tile.columns)
    depth = max(size for size in range(deep, channels + 1, deep) if channels % size == 0 and size <= max(deep, room))
    blocks = -(-count // tile.rows)
    even = {-(-blocks // groups) * tile.rows for groups in range(1, blocks + 1)}
    sizes = sorted(size for size in even if size >= count or _traceable(size, tall, wide, batch))
    plans = [Plan(tall, wide, size, depth, deep, tile, by_group) for size in sizes for by_group in (True, False)]
    small = [plan for plan in plans if plan.held(channels) <= _MEMORY * machine.l2]
    return sorted(small, key=lambda plan: cost(plan, window, machine))


def _traceable(group: int, tall: int, wide: int, batch: int) -> bool:
    """Whether TVM finds which tiles a group has.

    It turns a tile's number into image, row and column and back. Where whole rows of tiles, but not whole images, make
    a group, its simplifier divides the group's number by the row's length first and cannot put the three together.
    """
    return batch == 1 or group % wide != 0 or group % (tall * wide) == 0


def direct_cost(window: Window, machine: Machine) -> float:
    """Multiply-adds of the direct kernel, per thread."""
    high, broad = window.size
    vectors = -(-window.channels // machine.lanes())
    pixels = window.data[0] * high * broad
    return (9 * pixels + _DIRECT_FETCH) * window.data[3] * vectors / machine.cores


def cost(plan: Plan, window: Window, machine: Machine) -> float:
    """Operations of the thread that has the most to do."""
    batch, _, _, channels = window.data
    count = batch * plan.tall * plan.wide
    groups = -(-count // plan.group)
    full, steps = groups * plan.group, channels // plan.depth
    blocks = -(-window.channels // plan.tile.columns)
    vectors = blocks * plan.tile.vectors
    products = IN**2 * full * vectors * (channels + _STORE * (2 * steps - 1))
    weights = (_WEIGHT * groups + _FETCH) * channels * vectors
    patches = _PATCH * full * channels // plan.deep
    results = _RESULT * count * vectors
    spilt = plan.held(channels) > machine.l2
    moved = 4 * IN**2 * full * channels * blocks / _BEYOND.get(machine.isa, 4) if spilt else 0
    shares = groups if plan.by_group else blocks
    busy = -(-shares // machine.cores) / shares
    return busy * (products + weights + results + moved) + patches * (busy if plan.by_group else 1 / machine.cores)
