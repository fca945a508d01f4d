"""Exponentials and their kin as polynomials of vector instructions that fuse with what they follow.

Idea: TVM lowers these operators to calls of the C library, one element at a time; here each is an expression over
vectors (:mod:`.mathematics`), marked elementwise: FuseOps joins it to the convolution, product or sum before it.
Bound: ten to twenty arithmetic instructions a vector, hidden behind loads where the kernel is bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from modelforge.compilers.tvm.api import (
    ELEMENTWISE,
    OUT_FUSIBLE,
    computed_by,
    constant_value,
    dtype_of,
    emit_kernel,
    is_constant,
    kernel_attribute,
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
    "relax.nn.softplus": mathematics.softplus,
}
DEPTH: Final = "modelforge.depth"
"""An attribute of a kernel: how many of these functions stand one upon the other in it."""
_DEEPEST: Final = 2
"""How many are fused into one expression. TVM's code generator puts into each name what it stands for as it simplifies,
so the time it takes grows about twentyfold with each more: exp of log of exp took a second for one vector."""


_FUSED: Final = frozenset(
    f"relax.{name}"
    for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "negative", "nn.relu", "astype", "sqrt")
)


@dataclass(frozen=True)
class Elementwise:
    """Functions of one FP32 or FP16 tensor, and powers with a constant exponent."""

    name: str = "elementwise"
    operators: tuple[str, ...] = (*_FUNCTIONS, "relax.power")

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data = call.args[0]
        function = _FUNCTIONS.get(op_name(call)) or _power(call)
        if function is None or is_constant(data) or _unusual(call):
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

    return emit_function(compute, [data], builder, name)


def emit_function(compute: Callable[..., Any], operands: Sequence[Any], builder: Any, name: str) -> Any:
    """Emit a function of each element of ``operands``, which fuses with what it follows unless that is deep already."""
    depth = 1 + max(_depth(operand, builder) for operand in operands)
    if depth > _DEEPEST:
        return emit_kernel(builder, compute, *operands, name=name, pattern=OUT_FUSIBLE, **{DEPTH: 1})
    return emit_kernel(builder, compute, *operands, name=name, pattern=ELEMENTWISE, **{DEPTH: depth})


def _depth(expression: Any, builder: Any) -> int:
    """How many functions of this rule a value has gone through, by way of operators that fuse with them."""
    call = computed_by(expression, builder)
    if op_name(call) == "relax.call_tir":
        return int(kernel_attribute(builder, call.args[0], DEPTH))
    if op_name(call) not in _FUSED:
        return 0
    return max((_depth(argument, builder) for argument in call.args), default=0)


def _unusual(call: Any) -> bool:
    """A softplus of another steepness than one."""
    return op_name(call) == "relax.nn.softplus" and float(call.attrs.beta) != 1.0


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
