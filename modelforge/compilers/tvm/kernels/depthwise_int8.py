"""Depthwise convolutions of int8 that :mod:`.depthwise_dot` leaves: the window is summed in a wider type.

Idea: the kernel of :mod:`.depthwise`. What pads the image for a block of rows also widens it, once for each value and
not once for each tap: to float32 on x86, whose multiply-adds take an operand from memory (exact: sums stay below
2 ** 24); to int16 on Arm, where SMLAL adds products of int16 to int32 sums. Bound: as in float, with a quarter of its
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

from modelforge.compilers.tvm.api import constant_value, dtype_of
from modelforge.compilers.tvm.kernels.convolution import window_of
from modelforge.compilers.tvm.kernels.depthwise import Depthwise, convolve
from modelforge.compilers.tvm.kernels.quantized import activations_of
from modelforge.compilers.tvm.machine import Machine

_EXACT_TAPS: Final = 2**24 // (255 * 128)
"""Products of 8 bits that a float32 sum holds exactly."""


@dataclass(frozen=True)
class DepthwiseInt8:
    """Convolutions over quantized activations with as many groups as input channels, and constant int8 weights."""

    name: str = "depthwise-int8"
    operators: tuple[str, ...] = ("relax.nn.conv2d",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        window = window_of(call)
        if window is None or dtype_of(call.args[1]) != "int8":
            return None
        if int(call.attrs.groups) == 1 or int(call.attrs.groups) != window.data[3]:
            return None
        data = activations_of(call.args[0], builder)
        if data is None:
            return None
        wide = "float32" if machine.isa == "x86_64" and prod(window.kernel) <= _EXACT_TAPS else "int16"
        weight = constant_value(call.args[1]).astype(wide)
        return convolve(window, weight, data.stored, builder, machine, rule=self.name, zero=data.zero)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        return Depthwise().schedule(sch, anchor, machine)
