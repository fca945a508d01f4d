"""Operators that exporters wrote in pieces, put together again, so that the rule for the whole can have them."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelforge.compilers.tvm.api import (
    Mutator,
    computed_by,
    constant_value,
    dtype_of,
    is_constant,
    mutator,
    numbers,
    op_name,
    relax,
    shape_of,
)


@mutator
class LayerNorms(Mutator):  # type: ignore[misc]  # TVM ships no types
    """(x - mean(x)) / sqrt(mean((x - mean(x)) squared) + epsilon) over the last axes is a layer norm.

    The scale and shift that follow stay operators of their own: they fuse with it.
    """

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if op_name(call) != "relax.divide":
            return call
        data, epsilon = self._rest(call.args[0]), self._deviation(call.args[1])
        if data is None or epsilon is None:
            return call
        source, axes = data
        squared, amount, spread_axes = epsilon
        again = self._rest(squared)
        if again is None or not again[0].same_as(source) or not axes == again[1] == spread_axes:
            return call
        sizes = [(shape_of(source) or ())[axis] for axis in axes]
        dtype = dtype_of(source)
        scale, shift = (relax.const(np.full(sizes, value, dtype), dtype) for value in (1.0, 0.0))
        return relax.op.nn.layer_norm(source, scale, shift, axes=list(axes), epsilon=amount)

    def _call(self, expression: Any, name: str) -> Any:
        call = computed_by(expression, self.builder_)
        return call if op_name(call) == f"relax.{name}" else None

    def _rest(self, expression: Any) -> tuple[Any, tuple[int, ...]] | None:
        """``x`` and the axes of x - mean(x)."""
        rest = self._call(expression, "subtract")
        if rest is None:
            return None
        mean = self._mean(rest.args[1])
        return mean if mean is not None and mean[0].same_as(rest.args[0]) else None

    def _mean(self, expression: Any) -> tuple[Any, tuple[int, ...]] | None:
        """What a mean over the last axes, kept as ones, is taken of, and those axes."""
        mean = self._call(expression, "mean")
        shape = shape_of(mean.args[0]) if mean is not None else None
        if shape is None or not bool(mean.attrs.keepdims) or mean.attrs.axis is None:
            return None
        axes = tuple(sorted(axis % len(shape) for axis in numbers(mean.attrs.axis)))
        return (mean.args[0], axes) if axes == tuple(range(len(shape) - len(axes), len(shape))) else None

    def _deviation(self, expression: Any) -> tuple[Any, float, tuple[int, ...]] | None:
        """``d``, epsilon and the axes of sqrt(mean(d squared) + epsilon)."""
        root = self._call(expression, "sqrt")
        total = self._call(root.args[0], "add") if root is not None else None
        if total is None:
            return None
        epsilon, mean = self._number(total.args[1]), self._mean(total.args[0])
        squared = self._squared(mean[0]) if mean is not None else None
        return None if epsilon is None or mean is None or squared is None else (squared, epsilon, mean[1])

    def _squared(self, expression: Any) -> Any:
        power = self._call(expression, "power")
        if power is not None:
            return power.args[0] if self._number(power.args[1]) == 2.0 else None
        product = self._call(expression, "multiply")
        return product.args[0] if product is not None and product.args[0].same_as(product.args[1]) else None

    def _number(self, expression: Any) -> float | None:
        value = computed_by(expression, self.builder_)
        if not is_constant(value) or constant_value(value).size != 1:
            return None
        return float(constant_value(value).reshape(()))
