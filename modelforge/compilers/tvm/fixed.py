"""HardSwish of int32 sums that becomes bytes, in 16 bits on Arm: eight lanes an instruction where floats have four.

Idea: ``x * clip(x + 3, 0, 6)`` ends where a byte does, so ``x`` fits 16 bits with room to spare. Its unit is chosen so
that the rounded high half of the product (SQRDMULH) counts 2**-k of a step of the byte: an offset, a shift and
narrowing are left. Bound: eleven instructions for eight lanes, where floats take twenty-two. Runs on integer graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    ELEMENTWISE,
    Mutator,
    constant_value,
    dtype_of,
    emit_kernel,
    given_and_read,
    is_constant,
    mutator,
    op_name,
    relax,
    shape_of,
    te,
    tirx,
)
from modelforge.compilers.tvm.arm import SQRDMULH, SQSHL
from modelforge.compilers.tvm.kernels.mathematics import let
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.scales import BOUNDS

Array = np.ndarray[Any, Any]

_LARGEST: Final = 32767
_FINEST: Final = 7
_COARSEST: Final = 3
"""Bits k below a step of the byte: beyond seven, 16 bits end before an unsigned byte does. Errors are below 2**(1 - k)
of a step, from four roundings: of x, of its bounds, of the product and of the offset."""
_UNIFORM: Final = 1e-5
"""How far, relatively, numbers of channels may stand apart that are one but for being rounded to FP32."""


@dataclass(frozen=True)
class Chain:
    """``x * clip(x + c, 0, top) * ratio + offset`` as a byte from ``low`` to ``high``; ``x`` is ``sums * scale``."""

    sums: Any
    scale: Array
    c: float
    top: float
    ratio: float
    offset: float
    low: float
    high: float
    dtype: str


@dataclass(frozen=True)
class Fixed:
    """A chain in integers: sums go ``up`` so many bits, and are multiplied in units of 2**-31; all else has 16 bits.

    ``bits`` of the result are below a step of the byte.
    """

    up: int
    multipliers: Array
    c: int
    top: int
    offset: int
    bits: int


def fixed(chain: Chain) -> Fixed | None:
    """The finest integers that hold a chain to where its bytes end; None where none do."""
    for bits in range(_FINEST, _COARSEST - 1, -1):
        unit = float(np.sqrt(2.0 ** -(bits + 15) / chain.ratio))
        farthest = _LARGEST * unit
        ends = chain.ratio * chain.top * farthest + chain.offset >= chain.high
        offset = int(np.rint(chain.offset * 2**bits)) + (1 << (bits - 1))  # half a step: the shift rounds down
        if ends and farthest >= max(chain.top, chain.c) and abs(offset) <= _LARGEST:
            up = max(0, int(np.floor(np.log2(chain.scale.max() / unit))) + 1)
            multipliers = np.minimum(np.rint(chain.scale / unit * 2.0 ** (31 - up)), 2.0**31 - 1).astype(np.int32)
            return Fixed(up, multipliers, round(chain.c / unit), round(chain.top / unit), offset, bits)
    return None


@mutator
class FixedHardSwish(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Replaces chains from int32 sums to bytes, on Arm; elsewhere vectors of 32 bits narrow to bytes at once."""

    def __init__(self, module: Any, machine: Machine) -> None:
        super().__init__(module)
        self._machine = machine
        self._given, self._readers = given_and_read(module)

    def visit_call_(self, call: Any) -> Any:
        chain = self._chain(call) if self._machine.isa == "aarch64" else None
        found = None if chain is None else fixed(chain)
        if chain is None or found is None:
            return self.visit_expr_post_order(call)
        sums, constant = self.visit_expr(chain.sums), found.multipliers
        given = relax.const(constant)

        def compute(sums: Any, multipliers: Any) -> Any:
            def element(*i: Any) -> Any:
                own = i[len(i) - constant.ndim :]
                place = [at if size > 1 else 0 for at, size in zip(own, constant.shape, strict=True)]
                return _byte(sums(*i), multipliers(*place), found, chain)

            return te.compute(sums.shape, element, name="hard_swish")

        return emit_kernel(self.builder_, compute, sums, given, name="hard_swish", pattern=ELEMENTWISE)

    def _chain(self, call: Any) -> Chain | None:
        """The whole of what a byte is made by, read from its end."""
        dtype = dtype_of(call)
        if op_name(call) != "relax.astype" or dtype not in BOUNDS:
            return None
        rounded: Any = self._given.get(call.args[0])
        if op_name(rounded) != "relax.round" or len(self._readers[call.args[0]]) != 1:
            return None
        clipped = self._clipped(rounded.args[0])
        if clipped is None:
            return None
        value, low, high = clipped
        added = self._with_number(value, "add")
        value, offset = (value, 0.0) if added is None else added
        product: Any = self._given.get(value)
        if op_name(product) != "relax.multiply" or len(self._readers[value]) != 1:
            return None
        for one, other in (product.args, reversed(product.args)):
            inner, share = self._with_number(one, "multiply") or (
                one,
                1.0,
            )  # a sixth of it, where the operator is one
            gate, factor = self._gate(inner), self._factor(other)
            if gate is None or factor is None or not factor[0].same_as(gate[0]):
                continue
            sums, scale, c, top = gate
            ratios = factor[1] * share / scale
            ratio = float(np.mean(ratios))
            if ratio <= 0 or np.ptp(ratios) > _UNIFORM * ratio:
                return None
            return Chain(sums, scale, c, top, ratio, offset, low, high, dtype)
        return None

    def _gate(self, value: Any) -> tuple[Any, Array, float, float] | None:
        """Sums, their scale, c and top of ``clip(sums * scale + c, 0, top)``."""
        clipped = self._clipped(value)
        moved = None if clipped is None else self._with_number(clipped[0], "add")
        factor = None if moved is None else self._factor(moved[0])
        if clipped is None or moved is None or factor is None:
            return None
        (_, low, top), c = clipped, moved[1]
        return (*factor, c, top) if low == 0 and min(c, top) > 0 and factor[1].min() > 0 else None

    def _factor(self, value: Any) -> tuple[Any, Array] | None:
        """Int32 sums and the constant, float64, that they are multiplied by; its shape adds no axis to theirs."""
        given: Any = self._given.get(value)
        if op_name(given) != "relax.multiply" or len(self._readers[value]) != 1 or not is_constant(given.args[1]):
            return None
        wide: Any = self._given.get(given.args[0])
        scale = constant_value(given.args[1])
        if op_name(wide) != "relax.astype" or dtype_of(wide.args[0]) != "int32":
            return None
        return None if scale.ndim > len(shape_of(value) or ()) else (wide.args[0], scale.astype(np.float64))

    def _clipped(self, value: Any) -> tuple[Any, float, float] | None:
        """A value and its bounds, of one that is clipped."""
        above = self._with_number(value, "minimum")
        below = None if above is None else self._with_number(above[0], "maximum")
        return None if above is None or below is None else (below[0], below[1], above[1])

    def _with_number(self, value: Any, name: str) -> tuple[Any, float] | None:
        """The operand beside one number, of what nothing else reads."""
        given: Any = self._given.get(value)
        if op_name(given) != f"relax.{name}" or len(self._readers[value]) != 1 or not is_constant(given.args[1]):
            return None
        constant = constant_value(given.args[1])
        number = float(np.mean(constant)) if constant.size else 0.0
        return (given.args[0], number) if np.ptp(constant) <= _UNIFORM * abs(number) else None


def _byte(sums: Any, multiplier: Any, found: Fixed, chain: Chain) -> Any:
    """One sum as its byte."""
    if found.up:  # with saturation, which is farther than any byte
        sums = tirx.call_llvm_pure_intrin("int32", SQSHL, sums, tirx.const(found.up, "int32"))
    scaled = tirx.call_llvm_pure_intrin("int32", SQRDMULH, sums, multiplier)
    product = let(_narrowed(scaled, "int16"), lambda x: _product(x, found))
    steps = _plus(product, found.offset) >> tirx.const(found.bits, "int16")
    least, greatest = BOUNDS[chain.dtype]
    low, high = max(least, int(np.rint(chain.low))), min(greatest, int(np.rint(chain.high)))
    byte = _narrowed(steps, chain.dtype)
    if low > least:
        byte = tirx.max(byte, tirx.const(low, chain.dtype))
    return tirx.min(byte, tirx.const(max(low, high), chain.dtype)) if high < greatest else byte


def _product(x: Any, found: Fixed) -> Any:
    gate = tirx.min(tirx.max(_plus(x, found.c), tirx.const(0, "int16")), tirx.const(found.top, "int16"))
    return tirx.call_llvm_pure_intrin("int16", SQRDMULH, x, gate)


def _plus(x: Any, number: int) -> Any:
    return tirx.call_llvm_pure_intrin("int16", "llvm.sadd.sat", x, tirx.const(number, "int16"))


def _narrowed(x: Any, dtype: str) -> Any:
    """A narrower integer, with saturation."""
    low, high = (-(1 << 15), (1 << 15) - 1) if dtype == "int16" else BOUNDS[dtype]
    wide = str(x.ty.dtype)
    return tirx.Cast(dtype, tirx.max(tirx.min(x, tirx.const(high, wide)), tirx.const(low, wide)))
