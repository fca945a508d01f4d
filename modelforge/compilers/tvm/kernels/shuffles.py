"""Channel shuffles, channels last: the channels of several parts taken in turn.

Idea: one channel of each part after the other is an interleave of as many streams, each read in order. The loop over
the streams is written out and the one along them is left to LLVM, which makes vectors of it with the machine's own
interleaving (Arm: ST2, ST3, ST4; x86: unpacks and permutations). Bound: the bytes read and written.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    OPAQUE,
    block_annotations,
    computed_by,
    constant_value,
    emit_kernel,
    extent,
    is_constant,
    numbers,
    op_name,
    shape_of,
    te,
    written_dtype,
)
from modelforge.compilers.tvm.kernels.loops import spread, vector_width
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.machine import Machine

_SHORT: Final = 8
"""Elements of a run that fill no vector worth its loads and stores."""


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


@dataclass(frozen=True)
class Phases:
    """Pixels of all phases put in place: [N, H, W, down * right * C] as [N, H * down, W * right, C]."""

    name: str = "phases"
    operators: tuple[str, ...] = ("relax.reshape",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        turned = computed_by(call.args[0], builder)
        if op_name(turned) != "relax.permute_dims" or turned.attrs.axes is None:
            return None
        apart = computed_by(turned.args[0], builder)
        if numbers(turned.attrs.axes) != (0, 1, 3, 2, 4, 5) or op_name(apart) != "relax.reshape":
            return None
        batch, height, width, down, right, channels = shape_of(apart) or ()
        result = (batch, height * down, width * right, channels)
        if shape_of(apart.args[0]) != (*result[:1], height, width, down * right * channels):
            return None
        if shape_of(builder.normalize(call)) != result:
            return None
        attrs = {RULE: self.name, MACS: 0, TILE: [down, right]}

        def compute(data: Any) -> Any:
            def element(n: Any, y: Any, x: Any, c: Any) -> Any:
                return data[n, y // down, x // right, (y % down * right + x % right) * channels + c]

            return te.compute(result, element, name="phases", attrs=attrs)

        return emit_kernel(builder, compute, apart.args[0], name="phases", pattern=OPAQUE)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        down, right = (int(value) for value in block_annotations(sch, anchor)[TILE])
        batch, y, x, channel = sch.get_loops(anchor)
        work = prod(extent(sch, loop) for loop in (batch, y, x, channel))
        y, down = sch.split(y, factors=[None, down])
        x, right = sch.split(x, factors=[None, right])
        run = sch.fuse(right, channel)
        count, lanes = extent(sch, run), machine.lanes(written_dtype(sch, anchor))
        if count < _SHORT:  # left to LLVM, as a shuffle's streams are
            sch.reorder(x, down, run)
            sch.unroll(down)
            sch.unroll(run)
            spread(sch, [batch, y], work, machine)
            return f"pixels of {count}"
        width = vector_width(count, lanes)
        rest, vector = sch.split(run, factors=[None, width])
        sch.vectorize(vector)
        sch.unroll(rest)
        spread(sch, [batch, y, down, x], work, machine)
        return f"rows of {count // width}x{width}"


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
