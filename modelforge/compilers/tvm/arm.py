"""What LLVM does not find by itself on aarch64: one instruction where it writes two.

TVM's Max and Min are a comparison and a selection, which LLVM cannot join as NaN might be there: FMAX and FMIN do pass
it on. Rounding and conversion are two calls, of which LLVM makes FCVTNS for single numbers, but not for vectors.
"""

from __future__ import annotations

from typing import Any, Final

from modelforge.compilers.tvm.api import element_of, intrinsic, lanes_of, op_name, relax, structural_map, tirx

_EXTREMES: Final = {"Max": "llvm.maximum", "Min": "llvm.minimum"}
_CONVERT: Final = "llvm.aarch64.neon.fcvtns"
USQADD: Final = "llvm.aarch64.neon.usqadd"
"""An unsigned number and a signed one: their sum, or zero where it is less (Arm ARM)."""
SQRDMULH: Final = "llvm.aarch64.neon.sqrdmulh"
"""Twice the product of two numbers of 16 or 32 bits, the high half of it, rounded (Arm ARM)."""
SQSHL: Final = "llvm.aarch64.neon.sqshl"
"""A number shifted to the left, or where it ends (Arm ARM)."""
_SHIFTED: Final = "llvm.sshl.sat"
_LANES: Final = 4
"""Floats in a vector register."""


def with_own_instructions(body: Any) -> Any:
    """The body of a vectorised kernel with Arm's own instructions in it."""
    for kind in (tirx.Max, tirx.Min):
        body = structural_map(body, (kind, _extreme), order="post")
    body = structural_map(body, (relax.Call, _parted), order="post")
    return structural_map(body, (tirx.Cast, _converted), order="post")


def _extreme(call: Any) -> Any:
    """FMAX, FMIN: NaN if either is NaN. Integers have theirs already."""
    dtype = str(call.ty.dtype)
    if not dtype.startswith("float32"):
        return call
    return tirx.call_llvm_pure_intrin(dtype, _EXTREMES[type(call).__name__], call.a, call.b)


def _converted(cast: Any) -> Any:
    """FCVTNS: to nearest, ties to even, with saturation."""
    value = cast.value
    dtype, lanes = str(cast.ty.dtype), lanes_of(cast)
    if not dtype.startswith("int32") or lanes % _LANES or op_name(value) != "tirx.round":
        return cast
    if not str(value.ty.dtype).startswith("float32"):
        return cast
    return _in_parts(_CONVERT, [value.args[0]], lanes)


def _parted(call: Any) -> Any:
    """Arm's instructions that a rule asked for, over more lanes than a register has, or fewer than an instruction."""
    if op_name(call) != "tirx.call_llvm_pure_intrin":
        return call
    name = next((name for name in (USQADD, SQRDMULH, SQSHL) if intrinsic(name) == int(call.args[0])), None)
    lanes, operands = lanes_of(call), list(call.args[1:])
    if name is None or (lanes < _LANES and name == USQADD):  # which there is of one number and of two
        return call
    if lanes >= _LANES:
        return _in_parts(name, operands, lanes, element_of(call))
    return _doubled(*operands) if name == SQRDMULH else tirx.call_llvm_pure_intrin(call.ty.dtype, _SHIFTED, *operands)


def _doubled(one: Any, other: Any) -> Any:
    """What SQRDMULH is, for lanes that it does not have; not for two numbers that are both the least one."""
    wide = {"int16": "int32", "int32": "int64"}[element_of(one)]
    bits, lanes = int(wide[3:]) // 2 - 1, lanes_of(one)
    whole = wide if lanes == 1 else f"{wide}x{lanes}"

    def everywhere(number: int) -> Any:
        constant = tirx.const(number, wide)
        return constant if lanes == 1 else tirx.Broadcast(constant, lanes)

    product = tirx.Cast(whole, one) * tirx.Cast(whole, other) + everywhere(1 << (bits - 1))
    return tirx.Cast(one.ty.dtype, product >> everywhere(bits))


def _in_parts(name: str, operands: list[Any], lanes: int, element: str = "int32") -> Any:
    """An instruction with integer results, in parts as wide as a register: LLVM takes its own at no other width."""
    width = min(lanes, _LANES if element == "int32" else 2 * _LANES)
    dtype = f"{element}x{width}"
    if lanes == width:
        return tirx.call_llvm_pure_intrin(dtype, name, *operands)
    values = [tirx.Var("value", operand.ty.dtype) for operand in operands]
    parts = [
        tirx.call_llvm_pure_intrin(dtype, name, *(_part(value, first, width) for value in values))
        for first in range(0, lanes, width)
    ]
    joined = tirx.Shuffle(parts, [tirx.IntImm("int32", lane) for lane in range(lanes)])
    for value, operand in zip(values, operands, strict=True):
        joined = tirx.Let(value, operand, joined)
    return joined


def _part(value: Any, first: int, width: int) -> Any:
    return tirx.Shuffle([value], [tirx.IntImm("int32", first + lane) for lane in range(width)])
