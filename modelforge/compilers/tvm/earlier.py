"""Q before what only moves values, where the model has it behind: bytes are moved then, and not floats.

Exact: each of these operators gives values that it was given, and rounding keeps their order, so that the greatest of
quantized values is the greatest, quantized. Runs on the model's order of axes, before :mod:`.shuffle`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    Mutator,
    bindings,
    constant_value,
    is_constant,
    mutator,
    op_name,
    relax,
)

MOVES: Final = frozenset(
    "relax." + name
    for name in (
        "reshape permute_dims flatten squeeze expand_dims strided_slice broadcast_to tile repeat take "
        "nn.max_pool2d nn.adaptive_max_pool2d concat"
    ).split()
)
"""Operators that give values that they were given."""


def only_moves(call: Any) -> bool:
    """Whether each value of a call's result is one of its operands': Resize too, where it takes the nearest."""
    name = op_name(call)
    return name in MOVES or (name == "relax.image.resize2d" and call.attrs.method == "nearest_neighbor")


@mutator
class EarlierQuantize(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Repeats a chain of such operators on quantized values, where nothing reads its floats."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._given: dict[Any, Any] = {}
        self._readers: defaultdict[Any, list[Any]] = defaultdict(list)
        self._quantized: dict[tuple[Any, ...], Any] = {}
        for variable, value, reads in bindings(module):
            self._given[variable] = value
            for read in reads:
                self._readers[read].append(variable)

    def visit_call_(self, call: Any) -> Any:
        if op_name(call) == "relax.quantize" and (parameters := self._parameters(call)) is not None:
            moved = self._moved(call.args[0], call, parameters)
            if moved is not None:
                return moved
        return self.visit_expr_post_order(call)

    def _moved(self, value: Any, call: Any, parameters: tuple[Any, ...]) -> Any | None:
        """``value`` quantized as ``call`` does it, by quantizing what it is made of; None where that gains nothing."""
        given = self._given.get(value)
        if given is None or not only_moves(given) or not self._read_quantized(value):
            return None
        source = given.args[0]
        fields = self._fields(source)
        if fields is None:
            operand = self._early(source, call, parameters)
        else:
            operand = relax.Tuple([self._early(field, call, parameters) for field in fields])
        others = [self.visit_expr(argument) for argument in given.args[1:]]
        return relax.Call(given.op, [operand, *others], given.attrs, given.ty_args)

    def _early(self, value: Any, call: Any, parameters: tuple[Any, ...]) -> Any:
        """Emit ``value`` quantized, moved again or not."""
        key = (value, *parameters)
        if key not in self._quantized:
            found = self._moved(value, call, parameters)
            if found is None:
                found = relax.Call(call.op, [self.visit_expr(value), *call.args[1:]], call.attrs, call.ty_args)
            self._quantized[key] = self.builder_.emit(found)
        return self._quantized[key]

    def _read_quantized(self, value: Any) -> bool:
        """Whether all that reads a value quantizes it, directly or behind further moves."""
        readers = self._readers[value]
        return bool(readers) and all(self._quantizes(reader) for reader in readers)

    def _quantizes(self, variable: Any) -> bool:
        given = self._given[variable]
        if op_name(given) == "relax.quantize":
            return self._parameters(given) is not None
        return (isinstance(given, relax.Tuple) or only_moves(given)) and self._read_quantized(variable)

    def _fields(self, value: Any) -> list[Any] | None:
        """The tensors of what a concatenation joins."""
        given = self._given.get(value, value) if isinstance(value, relax.Var) else value
        return list(given.fields) if isinstance(given, relax.Tuple) else None

    def _parameters(self, call: Any) -> tuple[Any, ...] | None:
        """Scale, zero point and type of a Q of a whole tensor."""
        found: list[float] = []
        for argument in call.args[1:]:
            bound = self._given.get(argument, argument) if isinstance(argument, relax.Var) else argument
            if not is_constant(bound) or (value := np.asarray(constant_value(bound))).size != 1:
                return None
            found.append(float(value.reshape(-1)[0]))
        return (*found, str(call.attrs.out_dtype))
