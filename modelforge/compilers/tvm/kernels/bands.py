"""Convolutions in groups as products of one group: a block of output channels reads a band of input channels.

Idea: a block as wide as the vectors that make it may have channels of several groups in it; the band is what all of
them read, from the first group's inputs to the last one's, with zeros among the weights of each channel where it is
another group's turn. All bands are as long, so that one loop serves all blocks. A convolution of one group has a band
of everything. Bound: (1 + groups in a block's way) times the groups' own products, where a dense weight has all groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import tirx
from modelforge.compilers.tvm.kernels.dot import Dot
from modelforge.compilers.tvm.machine import Machine

Array = np.ndarray[Any, Any]

_NARROW: Final = 0.3
"""What a block of one vector costs more for each product: it loads as much of the activations as a wider one."""
_ROUNDED: Final = 1.15
"""What a band may grow by to be whole steps of the longest kind."""


@dataclass(frozen=True)
class Band:
    """``outputs`` and ``inputs``: channels of a group. ``length`` input channels, of ``channels``, serve ``width``
    output channels."""

    width: int
    length: int
    outputs: int
    inputs: int
    channels: int

    def start(self, block: Any) -> Any:
        """The first input channel of a block's band, of a number or in TIR."""
        if self.length >= self.channels:
            return 0
        first = block * self.width // self.outputs * self.inputs
        least = min if isinstance(block, int) else tirx.min
        return least(first, self.channels - self.length)

    def weights(self, weight: Array) -> Array:
        """[O, H, W, I of a group] as [O, H, W, length], zeros where a channel reads nothing of its block's band."""
        if weight.shape[3] == self.length:
            return weight
        found = np.zeros((*weight.shape[:3], self.length), weight.dtype)
        for channel, values in enumerate(weight):
            begin = channel // self.outputs * self.inputs - int(self.start(channel // self.width))
            found[channel, :, :, begin : begin + self.inputs] = values
        return found


def band_of(weight: Array, groups: int, dot: Dot, machine: Machine) -> Band:
    """The band that makes the least work of a weight [O, H, W, I of a group]."""
    columns, inputs = weight.shape[0], weight.shape[3]
    outputs = columns // groups
    found = []
    for vectors in range(1, dot.widest + 1):
        width = vectors * dot.lanes
        blocks = -(-columns // width)
        ends = [(block * width // outputs, min((block + 1) * width, columns) - 1) for block in range(blocks)]
        spans = max(last // outputs - first + 1 for first, last in ends)
        length = whole(spans * inputs, dot, machine)
        found.append((length * blocks * width * (1 + _NARROW / vectors), vectors, length))
    _, vectors, length = min(found)
    return Band(vectors * dot.lanes, length, outputs, inputs, groups * inputs)


def whole(length: int, dot: Dot, machine: Machine) -> int:
    """A length of whole steps, of the longest that cost little."""
    longest = max(1, 16 // dot.group) * dot.group if machine.isa == "aarch64" else dot.depth
    for depth in (longest, longest // 2, dot.group):
        rounded = -(-length // depth) * depth
        if rounded <= _ROUNDED * length or depth == dot.group:
            return rounded
    return length
