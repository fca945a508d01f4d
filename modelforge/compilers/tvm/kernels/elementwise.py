"""Exponentials and their kin, element by element, as polynomials of vector instructions that fuse with what they follow.

Idea: TVM lowers these operators to calls of the C library, one element at a time; here each is an expression over vectors
(:mod:`.mathematics`), marked elementwise, so that FuseOps joins it to the convolution, product or sum before it.
Bound: ten to twenty arithmetic instructions a vector, hidden behind loads where the kernel is bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from modelforge.compilers.tvm.api import (
    ELEMENTWISE,
    constant_value,
    dtype_of,
    emit_kernel,
    is_constant,
    op_name,
    te,
    tirx,
)
from modelforge.compilers.tvm.kernels import mathematics
from modelforge.compilers.tvm.machine import Machine

_FUNCTIONS: Final[dict[str, Callable[[Any], Any]]] = {
    "relax.exp": mathematics.exp,
    "relax.log": mathematics.log,
    "relax.tanh": mathematics.tanh,
    "relax.erf": mathematics.erf,
    "relax.sigmoid": mathematics.sigmoid,
    "relax.nn.silu": mathematics.silu,
    "relax.nn.gelu": mathematics.gelu,
    "relax.nn.gelu_tanh": mathematics.gelu_tanh,
}


@dataclass(frozen=True)
class Elementwise:
    """Functions of one FP32 or FP16 tensor, and powers with a constant exponent."""

    name: str = "elementwise"
    operators: tuple[str, ...] = (*_FUNCTIONS, "relax.power")

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data = call.args[0]
        function = _FUNCTIONS.get(op_name(call)) or _power(call)
        if function is None or is_constant(data):
            return None
        return apply(function, data, builder, op_name(call).rsplit(".", 1)[-1])

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        raise NotImplementedError("elementwise kernels carry no anchor: they are scheduled with what they fuse into")


def apply(function: Callable[[Any], Any], data: Any, builder: Any, name: str) -> Any | None:
    """Emit a function of each element of ``data``; FP16 goes through FP32. None for other types."""
    dtype = dtype_of(data)
    if dtype not in ("float32", "float16"):
        return None

    def element(x: Any) -> Any:
        return function(x) if dtype == "float32" else tirx.Cast(dtype, function(tirx.Cast("float32", x)))

    def compute(data: Any) -> Any:
        return te.compute(data.shape, lambda *i: element(data(*i)), name=name)

    return emit_kernel(builder, compute, data, name=name, pattern=ELEMENTWISE)


def _power(call: Any) -> Callable[[Any], Any] | None:
    """A power with one constant exponent for all elements."""
    if op_name(call) != "relax.power" or not is_constant(call.args[1]):
        return None
    exponent = constant_value(call.args[1])
    if exponent.size != 1 or exponent.ndim > len(call.args[0].ty.shape):
        return None
    value = float(exponent.reshape(()))
    return (
        (lambda x: mathematics.power(x, value))
        if mathematics.power(mathematics.number(2.0), value) is not None
        else None
    )
