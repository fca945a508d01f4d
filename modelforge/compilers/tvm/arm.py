"""What LLVM does not find by itself on aarch64: one instruction where it writes two.

TVM's Max and Min are a comparison and a selection, which LLVM cannot join as NaN might be there: FMAX and FMIN do pass
it on. Rounding and conversion are two calls, of which LLVM makes FCVTNS for single numbers, but not for vectors.
"""

from __future__ import annotations

from typing import Any, Final

from modelforge.compilers.tvm.api import intrinsic, lanes_of, op_name, relax, structural_map, tirx
from modelforge.compilers.tvm.kernels.mathematics import USQADD

_EXTREMES: Final = {"Max": "llvm.maximum", "Min": "llvm.minimum"}
_CONVERT: Final = "llvm.aarch64.neon.fcvtns"
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
    """Arm's instructions that a rule asked for, over more lanes than a register has."""
    if op_name(call) != "tirx.call_llvm_pure_intrin" or int(call.args[0]) != intrinsic(USQADD):
        return call
    lanes = lanes_of(call)
    return call if lanes < _LANES else _in_parts(USQADD, list(call.args[1:]), lanes)


def _in_parts(name: str, operands: list[Any], lanes: int) -> Any:
    """An instruction with int32 results, in parts as wide as a register: LLVM takes its own at no other width."""
    if lanes == _LANES:
        return _call(name, operands)
    values = [tirx.Var("value", operand.ty.dtype) for operand in operands]
    parts = [_call(name, [_part(value, first) for value in values]) for first in range(0, lanes, _LANES)]
    joined = tirx.Shuffle(parts, [tirx.IntImm("int32", lane) for lane in range(lanes)])
    for value, operand in zip(values, operands, strict=True):
        joined = tirx.Let(value, operand, joined)
    return joined


def _part(value: Any, first: int) -> Any:
    return tirx.Shuffle([value], [tirx.IntImm("int32", first + lane) for lane in range(_LANES)])


def _call(name: str, operands: list[Any]) -> Any:
    return tirx.call_llvm_pure_intrin(f"int32x{_LANES}", name, *operands)
