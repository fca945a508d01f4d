"""Channel shuffles, channels last: the channels of several parts taken in turn.

Idea: one channel of each part after the other is an interleave of as many streams, each read in order. The loop over
the streams is written out and the one along them is left to LLVM, which makes vectors of it with the machine's own
interleaving (Arm: ST2, ST3, ST4; x86: unpacks and permutations). Bound: the bytes read and written.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from modelforge.compilers.tvm.api import (
    OPAQUE,
    block_annotations,
    constant_value,
    emit_kernel,
    extent,
    is_constant,
    shape_of,
    te,
)
from modelforge.compilers.tvm.kernels.loops import spread
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class Shuffles:
    """Indices along the last axis that go through parts of it in turn."""

    name: str = "shuffle"
    operators: tuple[str, ...] = ("relax.take",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data, indices = call.args
        shape = shape_of(data)
        if shape is None or call.attrs.axis is None or int(call.attrs.axis) % len(shape) != len(shape) - 1:
            return None
        order = constant_value(indices) if is_constant(indices) else np.zeros(0)
        found = interleaved(order, shape[-1])
        if found is None:
            return None
        parts, step = found
        attrs = {RULE: self.name, MACS: 0, TILE: [parts]}

        def compute(data: Any) -> Any:
            return te.compute(
                (*shape[:-1], len(order)),
                lambda *i: data[(*i[:-1], i[-1] % parts * step + i[-1] // parts)],
                name="shuffle",
                attrs=attrs,
            )

        return emit_kernel(builder, compute, data, name="shuffle", pattern=OPAQUE)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        (parts,) = (int(value) for value in block_annotations(sch, anchor)[TILE])
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        *outer, channel = sch.get_loops(anchor)
        _, part = sch.split(channel, factors=[None, parts])
        sch.unroll(part)
        spread(sch, outer, work, machine)
        return f"{parts} parts"


def interleaved(order: np.ndarray[Any, Any], channels: int) -> tuple[int, int] | None:
    """How many parts of the channels an order goes through in turn, and how far one begins behind the other."""
    if order.ndim != 1 or len(order) < 4 or order[0] != 0:
        return None
    step = int(order[1])
    parts = int(np.argmax(order == 1)) if (order == 1).any() else 0
    if parts < 2 or step < 2 or len(order) % parts or (parts - 1) * step + len(order) // parts > channels:
        return None
    wanted = (np.arange(parts) * step + np.arange(len(order) // parts)[:, None]).ravel()
    return (parts, step) if np.array_equal(order, wanted) else None
