"""Chains of sums and products with constants per channel (a batch normalisation) as one product and one sum.

Kept in the model's order of axes (NCHW): runs before :mod:`.layout`. Constants are combined in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from modelforge.compilers.tvm.api import (
    Mutator,
    constant_value,
    dtype_of,
    first_name,
    is_constant,
    mutator,
    op_name,
    relax,
    shape_of,
)


@dataclass(frozen=True)
class Affine:
    """``base * scale + shift``, reached in ``steps`` operators; both constants have one element per channel or one."""

    base: Any
    scale: np.ndarray[Any, Any]
    shift: np.ndarray[Any, Any]
    steps: int


@mutator
class FoldAffine(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Restarts each chain from its base; what became of the steps between falls away if nobody else reads it."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._known: dict[Any, Affine] = {}

    def visit_tuple_getitem_(self, item: Any) -> Any:
        """A field of a tuple that is written here is that field: decomposed normalisations return tuples."""
        item = self.visit_expr_post_order(item)
        source = self._bound(item.tuple_value)
        return source.fields[item.index] if isinstance(source, relax.Tuple) else item

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        found = self._step(call)
        if found is None:
            return call
        scaled, shifted = bool(np.any(found.scale != 1)), bool(np.any(found.shift != 0))
        value = call
        if found.steps > scaled + shifted:
            value = found.base
            dtype = dtype_of(found.base)
            if scaled:
                value = self.builder_.emit(relax.op.multiply(value, relax.const(found.scale.astype(dtype))))
            if shifted:
                value = relax.op.add(value, relax.const(found.shift.astype(dtype)))
        emitted = self.builder_.emit(value)
        self._known[emitted] = found
        return emitted

    def _step(self, call: Any) -> Affine | None:
        name = op_name(call).removeprefix("relax.")
        if name not in ("add", "subtract", "multiply", "divide"):
            return None
        left, right = call.args
        constant = self._per_channel(right, left)
        if constant is None and name in ("add", "multiply"):
            left, right = right, left
            constant = self._per_channel(right, left)
        if constant is None or (name == "divide" and not np.all(constant)):
            return None
        one, none = np.ones((1, 1, 1, 1)), np.zeros((1, 1, 1, 1))
        before = self._known.get(self._resolve(left), Affine(left, one, none, 0))
        scale, shift = before.scale, before.shift
        if name in ("add", "subtract"):
            shift = shift + (constant if name == "add" else -constant)
        else:
            factor = constant if name == "multiply" else 1 / constant
            scale, shift = scale * factor, shift * factor
        return Affine(before.base, scale, shift, before.steps + 1)

    def _per_channel(self, value: Any, data: Any) -> np.ndarray[Any, Any] | None:
        """A constant with one element, or one per channel of ``data`` (NCHW)."""
        bound, shape = self._bound(value), shape_of(data)
        if not is_constant(bound) or shape is None or len(shape) != 4 or dtype_of(data) != "float32":
            return None
        array = constant_value(bound).astype("float64")
        full = array.reshape((1,) * (4 - array.ndim) + array.shape) if array.ndim <= 4 else array
        return full if full.shape in ((1, 1, 1, 1), (1, shape[1], 1, 1)) else None

    def _bound(self, value: Any) -> Any:
        value = self._resolve(value)
        bound = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        return value if bound is None else bound

    def _resolve(self, value: Any) -> Any:
        """Follow names to the variable that the value was first given."""
        return first_name(value, self.lookup_binding)
