"""Channel shuffles (reshape, transpose, reshape) moved forward into the weights of the next convolution.

Idea: a shuffle only renames channels. What works on each channel by itself (bias, activation, depthwise convolution)
does so under the old names as well, with its own constants renamed; a convolution over all channels takes the new
names into its weights. What else reads a shuffled value gets it through an index (``relax.take``), one pass over the
data (:mod:`.kernels.shuffles`). Runs on NCHW, before :mod:`.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    Mutator,
    constant_value,
    first_name,
    is_constant,
    mutator,
    numbers,
    op_name,
    relax,
    shape_of,
)

_UNARY: Final = frozenset(
    f"relax.{name}"
    for name in ("nn.relu", "nn.leakyrelu", "nn.silu", "nn.gelu", "sigmoid", "tanh", "exp", "negative", "abs")
)
_BINARY: Final = frozenset(f"relax.{name}" for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum"))
_POOLS: Final = frozenset(("relax.nn.max_pool2d", "relax.nn.avg_pool2d"))
_WHOLE: Final = frozenset(("relax.quantize", "relax.dequantize"))
"""Work on each channel by itself where they have one scale for all."""


@dataclass(frozen=True)
class Shuffled:
    """Channel ``j`` of the value is channel ``order[j]`` of ``source``."""

    source: Any
    order: np.ndarray[Any, Any]


@mutator
class ForwardShuffles(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Emits what can work on unshuffled channels so, and the shuffled value beside it for the others."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._known: dict[Any, Shuffled] = {}

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        found = self._moved(call, op_name(call))
        return call if found is None else found

    def _moved(self, call: Any, name: str) -> Any | None:
        """The value of a call with the shuffle behind it, or gone; None where it stays in front."""
        if name == "relax.reshape":
            return self._shuffle(call)
        if not call.args or (shuffled := self._known.get(self._resolve(call.args[0]))) is None:
            return None
        if name in _UNARY or name in _POOLS:
            return self._emit(relax.Call(call.op, [shuffled.source], call.attrs, call.ty_args), shuffled.order)
        if name in _WHOLE and all(self._is_one(argument) for argument in call.args[1:]):
            return self._emit(relax.Call(call.op, [shuffled.source, *call.args[1:]], call.attrs), shuffled.order)
        if name in _BINARY:
            return self._binary(call, shuffled)
        return self._convolution(call, shuffled) if name == "relax.nn.conv2d" else None

    def _shuffle(self, call: Any) -> Any | None:
        """The value of a reshape that ends a shuffle."""
        turn = self._bound(call.args[0])
        if (
            op_name(turn) != "relax.permute_dims"
            or turn.attrs.axes is None
            or numbers(turn.attrs.axes)[:3] != (0, 2, 1)
        ):
            return None
        first = self._bound(turn.args[0])
        if op_name(first) != "relax.reshape":
            return None
        source, parts, result = shape_of(first.args[0]), shape_of(first), shape_of(self.builder_.normalize(call))
        if source is None or parts is None or result != source or len(source) != 4 or len(parts) < 3:
            return None
        if numbers(turn.attrs.axes)[3:] != tuple(range(3, len(parts))) or parts[0] != source[0]:
            return None
        if parts[1] * parts[2] != source[1]:
            return None
        order = np.arange(source[1]).reshape(parts[1], parts[2]).T.ravel()
        return self._emit(first.args[0], order)

    def _emit(self, source: Any, order: np.ndarray[Any, Any]) -> Any:
        """Emit a value with its channels in ``order``, and remember what it is made of."""
        before = self._known.get(self._resolve(source))
        if before is not None:
            source, order = before.source, before.order[order]
        emitted = self.builder_.emit(source)
        value = self.builder_.emit(relax.op.take(emitted, relax.const(order.astype("int64")), axis=1, mode="clip"))
        self._known[value] = Shuffled(emitted, order)
        return value

    def _binary(self, call: Any, shuffled: Shuffled) -> Any | None:
        other = self._known.get(self._resolve(call.args[1]))
        if other is not None:
            if not np.array_equal(other.order, shuffled.order):
                return None
            return self._emit(relax.Call(call.op, [shuffled.source, other.source], call.attrs), shuffled.order)
        constant = self._constant(call.args[1])
        if constant is None or constant.ndim > 4:
            return None
        channels = len(shuffled.order)
        full = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
        if full.shape[1] == channels:
            full = full[:, np.argsort(shuffled.order)]
        elif full.shape[1] != 1:
            return None
        own = relax.Call(call.op, [shuffled.source, relax.const(np.ascontiguousarray(full))], call.attrs)
        return self._emit(own, shuffled.order)

    def _convolution(self, call: Any, shuffled: Shuffled) -> Any | None:
        groups, kernel = int(call.attrs.groups), shape_of(call.args[1])
        if kernel is None or (call.attrs.data_layout, call.attrs.kernel_layout) != ("NCHW", "OIHW"):
            return None
        back = np.argsort(shuffled.order)
        if groups > 1 and not groups == len(back) == kernel[0]:
            return None
        weight = self._weight(call.args[1], 0 if groups > 1 else 1, back)
        if weight is None:
            return None
        own = relax.Call(call.op, [shuffled.source, weight], call.attrs, call.ty_args)
        return own if groups == 1 else self._emit(own, shuffled.order)

    def _weight(self, value: Any, axis: int, order: np.ndarray[Any, Any]) -> Any | None:
        """A constant, behind a DQ or not, with its channels along ``axis`` in another order; None for what is not."""
        bound = self._bound(value)
        if is_constant(bound):
            return relax.const(np.ascontiguousarray(constant_value(bound).take(order, axis)))
        if op_name(bound) != "relax.dequantize":
            return None
        arrays = [array for argument in bound.args if (array := self._constant(argument)) is not None]
        if len(arrays) < len(bound.args):
            return None
        values, *parameters = arrays
        along = int(bound.attrs.axis) % (values.ndim or 1) == axis
        moved = [values.take(order, axis)]
        moved += [each.take(order) if along and each.size > 1 else each for each in parameters]
        constants = [relax.const(np.ascontiguousarray(array), str(array.dtype)) for array in moved]
        return self.builder_.emit(relax.Call(bound.op, constants, bound.attrs, bound.ty_args))

    def _is_one(self, value: Any) -> bool:
        constant = self._constant(value)
        return constant is not None and constant.size == 1

    def _constant(self, value: Any) -> np.ndarray[Any, Any] | None:
        bound = self._bound(value)
        return constant_value(bound) if is_constant(bound) else None

    def _bound(self, value: Any) -> Any:
        value = self._resolve(value)
        bound = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        return value if bound is None else bound

    def _resolve(self, value: Any) -> Any:
        """Follow names to the variable that the value was first given."""
        return first_name(value, self.lookup_binding)
