"""What LLVM does not find by itself on aarch64: one instruction where it writes two.

TVM's Max and Min are a comparison and a selection, which LLVM cannot join as NaN might be there: FMAX and FMIN do pass
it on. Rounding and conversion are two calls, of which LLVM makes FCVTNS for single numbers, but not for vectors.
"""

from __future__ import annotations

from typing import Any, Final

from modelforge.compilers.tvm.api import lanes_of, op_name, structural_map, tirx

_EXTREMES: Final = {"Max": "llvm.maximum", "Min": "llvm.minimum"}
_CONVERT: Final = "llvm.aarch64.neon.fcvtns"
_LANES: Final = 4
"""Floats in a vector register."""


def with_own_instructions(body: Any) -> Any:
    """The body of a vectorised kernel with Arm's own instructions in it."""
    for kind in (tirx.Max, tirx.Min):
        body = structural_map(body, (kind, _extreme), order="post")
    return structural_map(body, (tirx.Cast, _converted), order="post")


def _extreme(call: Any) -> Any:
    """FMAX, FMIN: NaN if either is NaN. Integers have theirs already."""
    dtype = str(call.ty.dtype)
    if not dtype.startswith("float32"):
        return call
    return tirx.call_llvm_pure_intrin(dtype, _EXTREMES[type(call).__name__], call.a, call.b)


def _converted(cast: Any) -> Any:
    """FCVTNS: to nearest, ties to even, with saturation; in parts as wide as a register, as the others are illegal."""
    value = cast.value
    dtype, lanes = str(cast.ty.dtype), lanes_of(cast)
    if not dtype.startswith("int32") or lanes % _LANES or op_name(value) != "tirx.round":
        return cast
    if not str(value.ty.dtype).startswith("float32"):
        return cast
    source = value.args[0]
    if lanes == _LANES:
        return _convert(source)
    name = tirx.Var("rounded", source.ty.dtype)
    parts = [
        _convert(tirx.Shuffle([name], [tirx.IntImm("int32", first + lane) for lane in range(_LANES)]))
        for first in range(0, lanes, _LANES)
    ]
    joined = tirx.Shuffle(parts, [tirx.IntImm("int32", lane) for lane in range(lanes)])
    return tirx.Let(name, source, joined)


def _convert(value: Any) -> Any:
    return tirx.call_llvm_pure_intrin(f"int32x{_LANES}", _CONVERT, value)
