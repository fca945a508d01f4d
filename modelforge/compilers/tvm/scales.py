"""Q and DQ as arithmetic: scales and zero points go into the constants that are there.

So a layer is one kernel from int8 to int8: sums that start at bias and zero point, one product, round, narrow.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    Mutator,
    computed_by,
    constant_value,
    dtype_of,
    given_and_read,
    is_constant,
    mutator,
    op_name,
    relax,
    shape_of,
)
from modelforge.compilers.tvm.machine import Machine

Array = np.ndarray[Any, Any]

BOUNDS: Final = {"int8": (-128, 127), "uint8": (0, 255)}
_FARTHEST: Final = 1 << 29
_COARSEST: Final = 1 / 64
"""The largest start of a sum, and the largest step of one beside the step of what is made of it."""


@mutator
class FoldScales(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Q and DQ as arithmetic.

    Walks the graph as it was given (``_given``): its values are emitted scaled where only one operator reads them; a DQ
    is repeated for each operator that reads it, so that no float tensor is kept for it.
    """

    def __init__(self, module: Any, machine: Machine) -> None:
        super().__init__(module)
        self._machine = machine
        self._given, self._readers = given_and_read(module)
        self._first: dict[Any, tuple[Any, Array]] = {}

    def visit_call_(self, call: Any) -> Any:
        name = op_name(call)
        if name == "relax.quantize" and self._is_whole(call) and str(call.attrs.out_dtype) in BOUNDS:
            return self._quantized(call)
        if name == "relax.dequantize" and self._is_whole(call):
            return self._affine(call, 1.0, 0.0)
        if name == "relax.add" and (started := self._added(call)) is not None:
            return started
        arguments = [self._read(argument) for argument in call.args]
        return relax.Call(call.op, arguments, call.attrs, call.ty_args)

    def _read(self, argument: Any) -> Any:
        """An operand; with a DQ of its own where it is one."""
        if isinstance(argument, relax.Tuple):
            return relax.Tuple([self._read(field) for field in argument.fields])
        given = self._given.get(argument) if isinstance(argument, relax.Var) else None
        if isinstance(given, relax.Tuple):
            return relax.Tuple([self._read(field) for field in given.fields])
        if op_name(given) == "relax.dequantize" and self._is_whole(given):
            return self.builder_.emit(self._affine(given, 1.0, 0.0))
        return self.visit_expr(argument)

    def _is_whole(self, call: Any) -> bool:
        return all(self._is_number(value) for value in call.args[1:3])

    def _constant(self, value: Any) -> Array | None:
        while isinstance(value, relax.Var) and value in self._given:
            value = self._given[value]
        return constant_value(value) if is_constant(value) else None

    def _is_number(self, value: Any) -> bool:
        found = self._constant(value)
        return found is not None and found.size == 1

    def _number(self, value: Any) -> float:
        found = self._constant(value)
        assert found is not None
        return float(found.reshape(-1)[0])

    def _quantized(self, call: Any) -> Any:
        """clip and round of ``x / scale + zero``; what clips ``x`` already becomes the bounds."""
        dtype = str(call.attrs.out_dtype)
        scale, zero = self._number(call.args[1]), self._number(call.args[2])
        low, high = (float(bound) for bound in BOUNDS[dtype])
        value = call.args[0]
        while (given := self._only(value)) is not None:
            name = op_name(given)
            if name == "relax.nn.relu":
                low = max(low, zero)
            elif name == "relax.maximum" and self._is_number(given.args[1]):
                low = max(low, self._number(given.args[1]) / scale + zero)
            elif name == "relax.minimum" and self._is_number(given.args[1]):
                high = min(high, self._number(given.args[1]) / scale + zero)
            else:
                break
            value = given.args[0]
        found = self._emit(self._scaled(value, 1.0 / scale, zero))
        found = self._emit(relax.op.maximum(found, relax.const(low, "float32")))
        found = self._emit(relax.op.minimum(found, relax.const(max(low, high), "float32")))
        return relax.op.astype(self._emit(relax.op.round(found)), dtype)

    def _only(self, value: Any) -> Any | None:
        """What a value stands for, where nothing else reads it."""
        return self._given.get(value) if isinstance(value, relax.Var) and len(self._readers[value]) == 1 else None

    def _scaled(self, value: Any, factor: float, offset: float) -> Any:
        """``value * factor + offset``, with both in the constants that are there. ``factor`` is positive."""
        given = self._only(value)
        name = op_name(given)
        if given is not None and name in ("relax.add", "relax.multiply"):
            first, second = given.args
            if self._constant(first) is not None:
                first, second = second, first
            constant = self._constant(second)
            if name == "relax.add" and constant is not None:
                shift = constant.astype(np.float64) * factor + offset
                started = self._started(first, factor, shift)
                if started is not None:
                    return started
                moved = shift.astype(np.float32)
                return relax.op.add(self._emit(self._scaled(first, factor, 0.0)), relax.const(moved))
            if name == "relax.add":
                one, other = self._scaled(first, factor, offset), self._scaled(second, factor, 0.0)
                return relax.op.add(self._emit(one), self._emit(other))
            if constant is not None:
                started = self._started(value, factor, np.array(offset)) if offset else None
                if started is not None:
                    return started
                wanted = constant.astype(np.float64) * factor
                product = self._in_product(first, wanted)
                if product is None:
                    product = relax.op.multiply(self._read(first), relax.const(wanted.astype(np.float32)))
                return self._plus(product, offset)
            product = self._in_product(value, np.array(factor))
            if product is not None:
                return self._plus(product, offset)
        if given is not None and name == "relax.nn.relu":
            inner = self._emit(self._scaled(given.args[0], factor, 0.0))
            return self._plus(relax.op.maximum(inner, relax.const(0.0, "float32")), offset)
        bound = self._given.get(value) if isinstance(value, relax.Var) else None
        if bound is not None and op_name(bound) == "relax.dequantize" and self._is_whole(bound):
            return self._affine(bound, factor, offset)
        return self._plus(relax.op.multiply(self._read(value), relax.const(factor, "float32")), offset)

    def _in_product(self, value: Any, factor: Array) -> Any | None:
        """``value * factor`` of a product with scaled int32 sums, which have a factor; None for others."""
        given = self._only(value)
        if given is None or op_name(given) != "relax.multiply" or factor.size != 1:
            return None
        operands = [self._read(argument) for argument in given.args]
        for at, operand in enumerate(operands):
            scaled = computed_by(operand, self.builder_)
            if op_name(scaled) != "relax.multiply":
                continue
            wide, constant = (computed_by(argument, self.builder_) for argument in scaled.args)
            if op_name(wide) == "relax.astype" and dtype_of(wide.args[0]) == "int32" and is_constant(constant):
                moved = constant_value(constant).astype(np.float64) * factor.reshape(())
                own = self._emit(relax.op.multiply(scaled.args[0], relax.const(moved.astype(np.float32))))
                return relax.op.multiply(own, operands[1 - at])
        return None

    def _added(self, call: Any) -> Any | None:
        """``sums * scale + constant``; several such of the same sums differ by what is added to the first."""
        product, constant = call.args[0], self._constant(call.args[1])
        if constant is None or not isinstance(product, relax.Var):
            return None
        shift = constant.astype(np.float64)
        if product in self._first:
            value, before = self._first[product]
            return self._plus(value, (shift - before).astype(np.float32))
        readers = [self._given[reader] for reader in self._readers[product]]
        if any(op_name(reader) != "relax.add" or self._constant(reader.args[1]) is None for reader in readers):
            return None
        found = self._started(self._given.get(product), 1.0, shift)
        if found is not None:
            self._first[product] = (self._emit(found), shift)
        return found if found is None else self._first[product][0]

    def _started(self, value: Any, factor: float, shift: Array) -> Any | None:
        """``value * factor + shift`` of scaled int32 sums, with the shift in the sums: they can start there.

        It is rounded to steps of the sums, half a product of the smallest activation and weight at most. None for
        other values, and where that would be more than a few hundredths of an output's step, or beyond int32.
        """
        product = self._only(value) if isinstance(value, relax.Var) else value
        if product is None or op_name(product) != "relax.multiply":
            return None
        constant, wide = self._constant(product.args[1]), self._only(product.args[0])
        if constant is None or wide is None or op_name(wide) != "relax.astype":
            return None
        if dtype_of(wide.args[0]) != "int32" or self._in_floats(wide.args[0]):
            return None
        scale = constant.astype(np.float64) * factor
        if not (np.abs(scale) > 0).all():
            return None
        start = np.rint(shift / scale)
        if np.abs(start).max() > _FARTHEST or (factor != 1 and np.abs(scale).max() > _COARSEST):
            return None
        sums = self._emit(relax.op.add(self._read(wide.args[0]), relax.const(start.astype(np.int32))))
        floats = self._emit(relax.op.astype(sums, "float32"))
        return relax.op.multiply(floats, relax.const(scale.astype(np.float32)))

    def _in_floats(self, sums: Any) -> bool:
        """Whether the rule for a convolution sums in float32: one channel at a time on x86."""
        convolution = self._only(sums)
        if self._machine.isa != "x86_64" or convolution is None or op_name(convolution) != "relax.nn.conv2d":
            return False
        return 1 < int(convolution.attrs.groups) == (shape_of(convolution.args[0]) or (0, 0))[1]

    def _affine(self, call: Any, factor: float, offset: float) -> Any:
        """``DQ * factor + offset`` as one multiply-add."""
        scale, zero = self._number(call.args[1]) * factor, self._number(call.args[2])
        wide = self._emit(relax.op.astype(self.visit_expr(call.args[0]), "float32"))
        return self._plus(relax.op.multiply(wide, relax.const(scale, "float32")), offset - zero * scale)

    def _plus(self, value: Any, offset: Any) -> Any:
        if not np.any(offset):
            return value
        one = np.reshape(offset, -1)[0] if np.ptp(offset) == 0 else offset
        return relax.op.add(self._emit(value), relax.const(one, "float32"))

    def _emit(self, value: Any) -> Any:
        return self.builder_.emit(value)
