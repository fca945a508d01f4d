"""Sigmoids whose results become bytes need few digits: a shorter polynomial serves them.

Idea: a byte has 256 steps, so a relative error of 8e-5 in a factor of what is rounded moves it by 0.02 of a step at
most, wherever it lies; the polynomial for that has four terms where FP32's digits take eight. Runs on integer graphs.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

from modelforge.compilers.tvm.api import Mutator, bindings, dtype_of, mutator, op_name, relax
from modelforge.compilers.tvm.earlier import only_moves
from modelforge.compilers.tvm.kernels.elementwise import apply
from modelforge.compilers.tvm.kernels.mathematics import coarse_sigmoid

_BYTES: Final = ("int8", "uint8")
_BETWEEN: Final = frozenset(
    f"relax.{name}" for name in ("multiply", "add", "subtract", "maximum", "minimum", "round", "split")
)
"""Operators that do not magnify the relative error of a factor beyond the range that the byte was given."""


@mutator
class CoarseSigmoids(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Replaces sigmoids that nothing reads but what rounds to 8 bits."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._given: dict[Any, Any] = {}
        self._readers: defaultdict[Any, list[Any]] = defaultdict(list)
        self._become_bytes: dict[Any, bool] = {}
        for variable, value, reads in bindings(module):
            if variable is not None:
                self._given[variable] = value
            for read in reads:
                self._readers[read].append(variable)
        self._coarse = [
            call
            for variable, call in self._given.items()
            if op_name(call) == "relax.sigmoid" and dtype_of(call) == "float32" and self._all_bytes(variable)
        ]

    def visit_call_(self, call: Any) -> Any:
        coarse = any(call.same_as(found) for found in self._coarse)
        call = self.visit_expr_post_order(call)
        return apply(coarse_sigmoid, call.args[0], self.builder_, "coarse_sigmoid") if coarse else call

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
