"""Convolutions in groups as products of one group: a block of output channels reads a band of input channels.

Idea: a block as wide as the vectors that make it may have channels of several groups in it; the band is what all of
them read, from the first group's inputs to the last one's, with zeros among the weights of each channel where it is
another group's turn. Or the groups stand apart: each has whole blocks of its own, the last of them in part for nothing.
All bands are as long, so that one loop serves all blocks. A convolution of one group has a band of everything. Bound:
(1 + groups in a block's way) times the groups' own products, where a dense weight has all groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import extent, te, tirx
from modelforge.compilers.tvm.kernels import tiles
from modelforge.compilers.tvm.kernels.dot import dot_of
from modelforge.compilers.tvm.kernels.loops import neighbours
from modelforge.compilers.tvm.kernels.views import flat_index
from modelforge.compilers.tvm.machine import Machine

Array = np.ndarray[Any, Any]

_BROADCAST: Final = 0.3
"""What one load of activations costs beside one product step on x86, where both read memory. On Arm it is an
instruction as another."""


@dataclass(frozen=True)
class Band:
    """``outputs`` and ``inputs``: channels of a group, of which ``share`` are wanted of the outputs. ``length`` input
    channels, of ``channels``, serve ``width`` output channels."""

    width: int
    length: int
    outputs: int
    inputs: int
    channels: int
    share: int

    @property
    def apart(self) -> bool:
        """Whether each group has blocks of its own, with outputs that nobody wants."""
        return self.outputs > self.share

    @property
    def groups(self) -> int:
        return self.channels // self.inputs

    @property
    def products(self) -> int:
        """Of one pixel and one tap of the window."""
        return tiles.up(self.groups * self.outputs, self.width) * self.length

    def start(self, block: Any) -> Any:
        """The first input channel of a block's band, of a number or in TIR."""
        if self.length >= self.channels:
            return 0
        first = block * self.width // self.outputs * self.inputs
        least = min if isinstance(block, int) else tirx.min
        return least(first, self.channels - self.length)

    def weights(self, weight: Array) -> Array:
        """[O, H, W, I of a group] as [groups * outputs, H, W, length], zeros where a channel reads nothing of its
        block's band."""
        if weight.shape[3] == self.length and not self.apart:
            return weight
        found = np.zeros((self.groups * self.outputs, *weight.shape[1:3], self.length), weight.dtype)
        for channel, values in enumerate(weight):
            group, own = divmod(channel, self.share)
            place = group * self.outputs + own
            begin = group * self.inputs - int(self.start(place // self.width))
            found[place, :, :, begin : begin + self.inputs] = values
        return found


def band_of(weight: Array, groups: int, machine: Machine) -> Band:
    """The band that makes the least work of a weight [O, H, W, I of a group]."""
    share, inputs = weight.shape[0] // groups, weight.shape[3]
    lanes = dot_of(machine, inputs).lanes
    found = []
    for depth in sorted({dot_of(machine, size).depth for size in (16, 8, 4)}):
        for vectors in range(1, dot_of(machine, depth).widest + 1):
            width = vectors * lanes
            for outputs in sorted({share, tiles.up(share, width)}):
                length = tiles.up(_spans(groups, outputs, width) * inputs, depth)
                dot = dot_of(machine, length)
                if vectors <= dot.widest:
                    loads = 1.0 if machine.isa == "aarch64" else _BROADCAST
                    work = length * tiles.up(groups * outputs, width) * (1 + loads / (vectors * dot.steps))
                    found.append((work, outputs, -vectors, length))
    _, outputs, vectors, length = min(found)
    return Band(-vectors * lanes, length, outputs, inputs, groups * inputs, share)


def _spans(groups: int, outputs: int, width: int) -> int:
    """How many groups a block has channels of, at most."""
    columns = groups * outputs
    firsts = range(0, columns, width)
    return max((min(first + width, columns) - 1) // outputs - first // outputs + 1 for first in firsts)


def joined(shape: tuple[int, ...], sums: Callable[..., Any], band: Band, flat: bool = False) -> Any:
    """The sums that are wanted, [..., channels], of groups that stand apart: first with an axis for the groups.

    ``flat``: the sums have one axis, of rows, for all that lead.
    """
    *leading, _ = shape
    parts = te.compute(
        (*([prod(leading)] if flat else leading), band.groups, band.share),
        lambda *i: sums(*i[:-2], i[-2] * band.outputs + i[-1]),
        name="groups",
    )

    def element(*i: Any) -> Any:
        rows = [flat_index(i[:-1], tuple(leading))] if flat else i[:-1]
        return parts(*rows, i[-1] // band.share, i[-1] % band.share)

    return te.compute(shape, element, name="joined")


def before_joining(sch: Any, anchor: Any, machine: Machine) -> tuple[list[Any], Any]:
    """The pads before the sums, and the block behind them that knows the groups, with all that follows drawn into it:
    over joined channels tiles would overlap."""
    (out,) = sch.get_consumers(anchor)
    before, after = neighbours(sch, out, machine)
    for block in after:
        sch.reverse_compute_inline(block)
    return before[:-1], out


def in_turn(sch: Any, rows: list[Any], group: Any, block: Any, machine: Machine) -> list[Any]:
    """The loops around a tile, in order: rows inside, as LLVM would keep what it broadcasts of them for all blocks of
    a group on the stack; a share of them outside for each thread, where they divide."""
    first, *others = rows
    count = extent(sch, first)
    shares = max(size for size in range(1, machine.cores + 1) if count % size == 0)
    share, first = sch.split(first, factors=[shares, None])
    return [share, group, block, first, *others]
