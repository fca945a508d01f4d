"""Graph rewrites that make later passes cheap or exact: constants folded by NumPy, long FP16 sums widened."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import Mutator, constant_value, dtype_of, is_constant, mutator, op_name, relax


@mutator
class FoldPlain(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Folds what NumPy gives exactly, bias reshapes and the bounds of Clip above all: FoldConstant compiles a kernel
    for each of them (60 ms), and there are hundreds."""

    _VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")
    _NUMPY: Final[dict[str, Callable[..., Any]]] = {
        "relax.add": np.add,
        "relax.subtract": np.subtract,
        "relax.multiply": np.multiply,
        "relax.divide": np.divide,
        "relax.sqrt": np.sqrt,
        "relax.less": np.less,
        "relax.greater": np.greater,
        "relax.equal": np.equal,
    }
    """What exporters compute shapes and positions with, and batch normalisations their factors."""

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        name = getattr(call.op, "name", "")
        if name == "relax.shape_to_tensor" and (sizes := self._sizes(call.args[0])) is not None:
            return _folded(np.array(sizes, np.int64))
        values = [self._constant(argument) for argument in call.args]
        if not values or values[0] is None:
            return call
        if name in self._VIEWS:
            shape = self.builder_.normalize(call).ty.shape
            return _folded(values[0].reshape([int(size) for size in shape]))
        if name == "relax.permute_dims":
            axes = call.attrs.axes and [int(axis) for axis in call.attrs.axes]
            return _folded(np.ascontiguousarray(values[0].transpose(axes)))
        if name == "relax.isnan":
            return _folded(np.isnan(values[0]))
        if name == "relax.where" and all(value is not None for value in values):
            return _folded(np.where(*values))
        if name == "relax.take" and values[1] is not None and call.attrs.axis is not None:
            return _folded(np.asarray(np.take(values[0], values[1], int(call.attrs.axis), mode="wrap")))
        if name in self._NUMPY and all(value is not None and value.size <= 1 << 16 for value in values):
            return _folded(np.asarray(self._NUMPY[name](*values), dtype_of(self.builder_.normalize(call))))
        return call

    @staticmethod
    def _sizes(shape: Any) -> list[int] | None:
        values = getattr(shape.ty, "values", None)
        if values is None or any(not hasattr(size, "value") for size in values):
            return None
        return [int(size) for size in values]

    def _constant(self, expression: Any) -> Any:
        if isinstance(expression, relax.Var):
            expression = self.lookup_binding(expression)
        return constant_value(expression) if is_constant(expression) else None


@mutator
class LongSums(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Means, sums and softmax of FP16 go through FP32: a mean over 2304 pixels in FP16 was off by 0.04 of 1. So do
    maxima and minima: TVM's own start at the largest finite number, and none would be infinite.

    Convolutions and matrix products sum by blocks (:mod:`.kernels.halves`): that is what makes them faster than FP32.
    """

    _OPS = (
        "relax.mean",
        "relax.sum",
        "relax.prod",
        "relax.max",
        "relax.min",
        "relax.variance",
        "relax.std",
        "relax.cumsum",
        "relax.nn.softmax",
        "relax.nn.log_softmax",
        "relax.nn.avg_pool1d",
        "relax.nn.avg_pool2d",
        "relax.nn.avg_pool3d",
        "relax.nn.adaptive_avg_pool2d",
    )

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") not in self._OPS:
            return call
        if getattr(call.args[0].ty, "dtype", None) != "float16":
            return call
        wide = self.builder_.emit(relax.op.astype(call.args[0], "float32"))
        result = self.builder_.emit(relax.Call(call.op, [wide, *call.args[1:]], call.attrs, call.ty_args))
        return relax.op.astype(result, "float16")


@mutator
class PlainClip(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Clip as maximum and minimum, which the layout pass goes through."""

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if op_name(call) != "relax.clip":
            return call
        data, low, high = call.args
        dtype = dtype_of(data)
        floor = self.builder_.emit(relax.op.maximum(data, relax.const(_bound(low), dtype)))
        return relax.op.minimum(floor, relax.const(_bound(high), dtype))


@mutator
class Reciprocal(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Division by a constant as a product: a division takes a core five to ten times as long. Within one ulp."""

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if op_name(call) != "relax.divide" or dtype_of(call.args[0]) != "float32":
            return call
        bound = self.lookup_binding(call.args[1]) if isinstance(call.args[1], relax.Var) else call.args[1]
        if not is_constant(bound) or is_constant(call.args[0]):
            return call
        value = constant_value(bound)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = 1 / value
        usual = np.isfinite(inverse) & (np.abs(inverse) >= np.finfo(np.float32).tiny)
        return relax.op.multiply(call.args[0], relax.const(inverse)) if usual.all() else call


@mutator
class Pairwise(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Max, Min, Sum and Mean of several tensors as operators on two: the importer broadcasts them, stacks them in
    memory and reduces the stack, a copy of every operand (Clip with bounds as inputs comes this way too)."""

    _PAIRS = MappingProxyType({"max": "maximum", "min": "minimum", "sum": "add", "mean": "add"})

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        kind = op_name(call).removeprefix("relax.")
        if kind not in self._PAIRS or call.attrs.keepdims or call.attrs.axis is None:
            return call
        stacked = self._bound(call.args[0])
        if (
            op_name(stacked) != "relax.stack"
            or int(stacked.attrs.axis or 0) != 0
            or [int(a) for a in call.attrs.axis] != [0]
        ):
            return call
        fields = self._bound(stacked.args[0])
        if not isinstance(fields, relax.Tuple):
            return call
        shape = self.builder_.normalize(call).ty.shape
        pair = getattr(relax.op, self._PAIRS[kind])
        result = self._plain(fields[0])
        for field in list(fields)[1:]:
            result = self.builder_.emit(pair(result, self._plain(field)))
        if kind == "mean":
            result = self.builder_.emit(relax.op.divide(result, relax.const(len(fields), dtype_of(call.args[0]))))
        same = [int(size) for size in result.ty.shape] == [int(size) for size in shape]
        return result if same else relax.op.broadcast_to(result, shape)

    def _bound(self, expression: Any) -> Any:
        while isinstance(expression, relax.Var) and self.lookup_binding(expression) is not None:
            expression = self.lookup_binding(expression)
        return expression

    def _plain(self, expression: Any) -> Any:
        """An operand before it was broadcast."""
        bound = self._bound(expression)
        return bound.args[0] if op_name(bound) == "relax.broadcast_to" else expression


def _bound(value: Any) -> float:
    """The number in a bound of Clip, which the importer wraps once or twice."""
    while hasattr(value, "value"):
        value = value.value
    return float(value)


def _folded(array: np.ndarray[Any, Any]) -> Any:
    """A constant of the array's own type: left to itself, TVM makes 32-bit integers of 64-bit ones."""
    return relax.const(array, str(array.dtype))
