"""Sigmoids whose results become bytes need few digits: a shorter polynomial serves them, and what they gate.

Idea: a byte has 256 steps, so a relative error of 8e-5 in a factor of what is rounded moves it by 0.02 of a step at
most, wherever it lies; the polynomial for that has four terms where FP32's digits take eight. What such a sigmoid
multiplies is divided instead by what the sigmoid divides one by, and factors go into the scales that are there. Runs on
integer graphs.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    Mutator,
    constant_value,
    dtype_of,
    given_and_read,
    is_constant,
    mutator,
    op_name,
    relax,
    shape_of,
    te,
)
from modelforge.compilers.tvm.earlier import only_moves
from modelforge.compilers.tvm.kernels.elementwise import emit_function
from modelforge.compilers.tvm.kernels.mathematics import COARSE_UNIT, LOG2E, coarse_quotient, number
from modelforge.compilers.tvm.machine import Machine

_BYTES: Final = ("int8", "uint8")
_BETWEEN: Final = frozenset(
    f"relax.{name}" for name in ("multiply", "add", "subtract", "maximum", "minimum", "round", "split")
)
"""Operators that do not magnify the relative error of a factor beyond the range that the byte was given."""


@mutator
class CoarseSigmoids(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Replaces sigmoids that nothing reads but what rounds to 8 bits."""

    def __init__(self, module: Any, machine: Machine) -> None:
        super().__init__(module)
        self._machine = machine
        self._given, self._readers = given_and_read(module)
        self._become_bytes: dict[Any, bool] = {}
        self._coarse = [
            call
            for variable, call in self._given.items()
            if op_name(call) == "relax.sigmoid" and dtype_of(call) == "float32" and self._all_bytes(variable)
        ]

    def visit_call_(self, call: Any) -> Any:
        gate = self._gate(call)
        if gate is None and not self._is_coarse(call):
            return self.visit_expr_post_order(call)
        numerator, sigmoid = gate or (None, call)
        operands = [] if numerator is None else [self._times(numerator, COARSE_UNIT)]
        operands.append(self._times(sigmoid.args[0], -LOG2E))
        return emit_function(self._quotient, operands, self.builder_, "coarse_quotient")

    def _quotient(self, *tensors: Any) -> Any:
        exponents = tensors[-1]

        def element(*i: Any) -> Any:
            numerator = number(COARSE_UNIT) if len(tensors) == 1 else tensors[0](*i)
            return coarse_quotient(numerator, exponents(*i), self._machine)

        return te.compute(exponents.shape, element, name="coarse_quotient")

    def _gate(self, call: Any) -> tuple[Any, Any] | None:
        """What a coarse sigmoid of the same shape multiplies, which nothing else reads, and that sigmoid."""
        if op_name(call) != "relax.multiply":
            return None
        for value, other in (call.args, reversed(call.args)):
            sigmoid = self._given.get(other)
            if sigmoid is not None and self._is_coarse(sigmoid) and len(self._readers[other]) == 1:
                return (value, sigmoid) if shape_of(value) == shape_of(sigmoid) else None
        return None

    def _is_coarse(self, call: Any) -> bool:
        return any(call.same_as(found) for found in self._coarse)

    def _times(self, value: Any, factor: float) -> Any:
        """``value * factor``, in the constant that it is multiplied by already where there is one."""
        factors = np.array(factor)
        given: Any = self._given.get(value)
        if op_name(given) == "relax.multiply":
            constant = self._given.get(given.args[1], given.args[1])
            if is_constant(constant):
                value, factors = given.args[0], constant_value(constant).astype(np.float64) * factor
        scale = relax.const(factors.astype(np.float32))
        return self.builder_.emit(relax.op.multiply(self.visit_expr(value), scale))

    def _all_bytes(self, variable: Any) -> bool:
        if variable not in self._become_bytes:
            readers = self._readers[variable]
            self._become_bytes[variable] = bool(readers) and all(self._ends(reader) for reader in readers)
        return self._become_bytes[variable]

    def _ends(self, reader: Any) -> bool:
        given: Any = self._given.get(reader)
        if op_name(given) == "relax.astype":
            rounded = self._given.get(given.args[0], given.args[0])
            return dtype_of(given) in _BYTES and op_name(rounded) != ""
        passes_on = op_name(given) in _BETWEEN or isinstance(given, (relax.Tuple, relax.TupleGetItem))
        return (passes_on or (op_name(given) != "" and only_moves(given))) and self._all_bytes(reader)
