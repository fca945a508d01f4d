"""Floats to bytes at the end of a layer: round to even, and narrow with saturation.

Idea: the graph says maximum, minimum, round and cast; instruction sets have conversions that round and narrowing that
saturates, which do the clipping for nothing (Arm: FCVTNS, SQXTN; x86: VCVTPS2DQ, VPMOVSDB or VPACKSS). Clipping that is
tighter than the type is done on bytes. Bound: three instructions a vector of floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    ELEMENTWISE,
    computed_by,
    constant_value,
    dtype_of,
    emit_kernel,
    is_constant,
    op_name,
    te,
    tirx,
)
from modelforge.compilers.tvm.machine import Machine

_BOUNDS: Final = {"int8": (-128, 127), "uint8": (0, 255)}
_FARTHEST_ZERO: Final = 255
_LARGEST: Final = float(1 << 30)
"""What a float is kept below on x86 before it becomes an integer: beyond, the conversion gives the least integer."""


@dataclass(frozen=True)
class Requantize:
    """Casts to 8 bits of what was rounded and clipped."""

    name: str = "requantize"
    operators: tuple[str, ...] = ("relax.astype",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        dtype = str(call.attrs.dtype)
        rounded = computed_by(call.args[0], builder)
        if dtype not in _BOUNDS or op_name(rounded) != "relax.round" or dtype_of(rounded) != "float32":
            return None
        bounds: list[tuple[str, float]] = []
        value = rounded.args[0]
        for name in ("relax.minimum", "relax.maximum"):
            clipped = computed_by(value, builder)
            bound = _number(clipped.args[1], builder) if op_name(clipped) == name else None
            if bound is None:
                return None
            bounds.append((name, bound))
            value = clipped.args[0]
        zero = 0
        if machine.isa == "aarch64":
            value, zero = _without_zero(value, builder)
        low, high = _BOUNDS[dtype]
        for name, bound in bounds:
            steps = int(np.rint(bound - zero)) + zero  # rounded as what it clips will be: rounding keeps the order
            low, high = (max(low, steps), high) if name == "relax.maximum" else (low, min(high, steps))
        low = min(low, high)

        def compute(data: Any) -> Any:
            return te.compute(
                data.shape, lambda *i: _byte(data(*i), dtype, low, high, zero, machine), name="requantize"
            )

        return emit_kernel(builder, compute, value, name="requantize", pattern=ELEMENTWISE)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        raise NotImplementedError("these kernels carry no anchor: they are scheduled with what they fuse into")


def _without_zero(value: Any, builder: Any) -> tuple[Any, int]:
    """What a zero point is added to, and that: it costs less on half as many vectors of narrower integers, and ties
    are then rounded before it is added, as ONNX asks. The value itself and zero where none is added."""
    added = computed_by(value, builder)
    if op_name(added) != "relax.add":
        return value, 0
    zero = _number(added.args[1], builder)
    if zero is None or not zero.is_integer() or abs(zero) > _FARTHEST_ZERO:
        return value, 0
    return added.args[0], int(zero)


def _byte(x: Any, dtype: str, low: int, high: int, zero: int, machine: Machine) -> Any:
    """A float as a byte: rounded, ``zero`` added, clipped to the type and to ``low`` and ``high``."""
    if machine.isa == "x86_64":
        x = tirx.min(x, tirx.const(_LARGEST, "float32"))
    found = tirx.Cast("int32", tirx.round(x))
    if (machine.isa, machine.vector_bits) != ("x86_64", 512):  # AVX-512 narrows 32 bits to 8 at once
        found = tirx.Cast("int16", _clip(found, -(1 << 15), (1 << 15) - 1))
    if zero:
        found = tirx.call_llvm_pure_intrin("int16", "llvm.sadd.sat", found, tirx.const(zero, "int16"))
    least, greatest = _BOUNDS[dtype]
    found = tirx.Cast(dtype, _clip(found, least, greatest))
    if low > least:
        found = tirx.max(found, tirx.const(low, dtype))
    return tirx.min(found, tirx.const(high, dtype)) if high < greatest else found


def _clip(x: Any, low: int, high: int) -> Any:
    return tirx.max(tirx.min(x, tirx.const(high, x.ty.dtype)), tirx.const(low, x.ty.dtype))


def _number(value: Any, builder: Any) -> float | None:
    """The number that a constant of one element is."""
    constant = computed_by(value, builder)
    if not is_constant(constant) or constant_value(constant).size != 1:
        return None
    return float(constant_value(constant).reshape(-1)[0])
