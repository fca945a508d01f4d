"""Channels last: what convolutions read lies together in memory, pixel by pixel.

Convolutions and pools of two dimensions are written for NHWC, and what lies between them follows: a value that has such
a *twin* (the same data, its axes permuted) passes it on to every operator that can work on it. An operator that cannot
reads the value in the order that the model gave it. Copies that nobody reads fall away afterwards, so a change of order
is paid only where the model's own meaning asks for it.
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
    rewritten,
    shape_of,
    tvm,
)

LAST: Final = (0, 2, 3, 1)
"""``permute_dims`` axes from NCHW to NHWC."""

_ELEMENTWISE: Final = frozenset(
    "relax." + name
    for name in (
        "add subtract multiply divide maximum minimum power floor_divide mod greater greater_equal less less_equal "
        "equal not_equal logical_and logical_or logical_xor logical_not where abs ceil floor round sign exp log sqrt "
        "rsqrt tanh sigmoid sin cos erf negative clip astype isnan isinf nn.relu nn.leakyrelu nn.gelu nn.silu "
        "nn.gelu_tanh quantize dequantize"
    ).split()
)
_REDUCTIONS: Final = frozenset(f"relax.{name}" for name in ("mean", "sum", "max", "min", "prod", "variance", "std"))
_POOLS: Final = frozenset(
    f"relax.nn.{name}" for name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
)


_HANDLERS: Final[dict[str, str]] = {
    "relax.nn.conv2d": "_convolution",
    "relax.nn.conv2d_transpose": "_transposed_convolution",
    "relax.nn.conv1d": "_line_convolution",
    "relax.concat": "_concat",
    "relax.split": "_split",
    "relax.take": "_take",
    "relax.nn.softmax": "_softmax",
    "relax.nn.log_softmax": "_softmax",
    "relax.image.resize2d": "_resize",
    "relax.permute_dims": "_permute",
    "relax.reshape": "_reshape",
    "relax.squeeze": "_reshape",
    **dict.fromkeys(_POOLS, "_pool"),
    **dict.fromkeys(_REDUCTIONS, "_reduction"),
}
"""The method for each operator. By name: the decorator hides the class itself."""


@dataclass(frozen=True)
class Twin:
    """The same values with axes permuted: ``value`` is ``permute_dims(original, axes)``."""

    value: Any
    axes: tuple[int, ...]

    @property
    def inverse(self) -> tuple[int, ...]:
        """Where each axis of the original is now; also the axes that turn the twin back."""
        return tuple(self.axes.index(axis) for axis in range(len(self.axes)))


def channels_last(module: Any) -> Any:
    """Turn convolutions and pools, and what lies between them, to NHWC."""
    module = rewritten(module, ChannelsLast)
    passes = [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination(_names(module))]
    return tvm.transform.Sequential(passes)(module)


def _names(module: Any) -> list[str]:
    return [name.name_hint for name in module.get_global_vars() if isinstance(module[name], relax.Function)]


@mutator
class ChannelsLast(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Emits each operator on twins where it can, and the order of the model beside it."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._twins: dict[Any, Twin] = {}

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        name = op_name(call)
        handler = _HANDLERS.get(name)
        if handler is None and name in _ELEMENTWISE:
            handler = "_elementwise"
        if handler is None or not self._plain_shapes(call):
            return call
        found = getattr(self, handler)(call)
        return call if found is None else found

    def visit_tuple_getitem_(self, item: Any) -> Any:
        item = self.visit_expr_post_order(item)
        source = self._resolve(item.tuple_value)
        twin = self._twins.get(source)
        if twin is None:
            return item
        return self._with_twin(relax.TupleGetItem(twin.value, item.index), twin.axes)

    # ---- twins ----

    def _resolve(self, value: Any) -> Any:
        """Follow names to the variable that the value was first given."""
        return first_name(value, self.lookup_binding)

    def _twin(self, value: Any) -> Twin | None:
        return self._twins.get(self._resolve(value))

    def _with_twin(self, value: Any, axes: tuple[int, ...]) -> Any:
        """Emit a value in the order of ``axes``; return it in the order of the model."""
        emitted = self.builder_.emit(value)
        twin = Twin(emitted, axes)
        plain = self.builder_.emit(relax.op.permute_dims(emitted, list(twin.inverse)))
        self._twins[plain] = twin
        return plain

    def _permuted(self, value: Any, axes: tuple[int, ...]) -> Any:
        """A value in the order of ``axes``: its twin, a constant turned now, or a copy."""
        twin = self._twin(value)
        if twin is not None and twin.axes == axes:
            return twin.value
        constant = self._constant(value)
        if constant is not None:
            return relax.const(np.ascontiguousarray(constant.transpose(axes)))
        shape = shape_of(value)
        moved = [axis for axis in axes if shape is None or shape[axis] != 1]
        if shape is not None and moved == sorted(moved):  # only axes of one element move: no copy
            result = self.builder_.emit(relax.op.reshape(value, tuple(shape[axis] for axis in axes)))
        else:
            result = self.builder_.emit(relax.op.permute_dims(value, list(axes)))
        if isinstance(value, relax.Var) and twin is None:
            self._twins[self._resolve(value)] = Twin(result, axes)
        return result

    def _constant(self, value: Any) -> np.ndarray[Any, Any] | None:
        value = self._resolve(value)
        if isinstance(value, relax.Var):
            value = self.lookup_binding(value)
        return constant_value(value) if value is not None and is_constant(value) else None

    @staticmethod
    def _plain_shapes(call: Any) -> bool:
        return all(
            shape_of(argument) is not None for argument in call.args if isinstance(argument.ty, relax.TensorType)
        )

    # ---- operators ----

    def _convolution(self, call: Any) -> Any | None:
        data, weight = call.args
        attrs = call.attrs
        if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "OIHW"):
            return None
        own = relax.op.nn.conv2d(
            self._permuted(data, LAST),
            self._permuted(weight, LAST),
            strides=numbers(attrs.strides),
            padding=numbers(attrs.padding),
            dilation=numbers(attrs.dilation),
            groups=int(attrs.groups),
            data_layout="NHWC",
            kernel_layout="OHWI",
            out_layout="NHWC",
            out_dtype=attrs.out_dtype,
        )
        return self._with_twin(own, LAST)

    def _line_convolution(self, call: Any) -> Any | None:
        """A convolution along one axis is one over an image of height one."""
        data, weight = call.args
        attrs, kernel = call.attrs, shape_of(weight)
        if (attrs.data_layout, attrs.kernel_layout) != ("NCW", "OIW") or not kernel:
            return None
        batch, channels, width = shape_of(data) or (0, 0, 0)
        line = self.builder_.emit(relax.op.reshape(self._permuted(data, (0, 2, 1)), (batch, 1, width, channels)))
        rows = relax.op.reshape(self._permuted(weight, (0, 2, 1)), (kernel[0], 1, kernel[2], kernel[1]))
        constant = self._constant(weight)
        if constant is not None:
            rows = relax.const(np.ascontiguousarray(constant.transpose(0, 2, 1))[:, None])
        left, right = numbers(attrs.padding)
        own = relax.op.nn.conv2d(
            line,
            rows,
            strides=(1, *numbers(attrs.strides)),
            padding=(0, left, 0, right),
            dilation=(1, *numbers(attrs.dilation)),
            groups=int(attrs.groups),
            data_layout="NHWC",
            kernel_layout="OHWI",
            out_layout="NHWC",
            out_dtype=attrs.out_dtype,
        )
        image = self.builder_.emit(own)
        size = shape_of(image) or ()
        return self._with_twin(relax.op.reshape(image, (batch, *size[2:])), (0, 2, 1))

    def _transposed_convolution(self, call: Any) -> Any | None:
        data, weight = call.args
        attrs = call.attrs
        if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "IOHW"):
            return None
        own = relax.op.nn.conv2d_transpose(
            self._permuted(data, LAST),
            weight,
            strides=numbers(attrs.strides),
            padding=numbers(attrs.padding),
            output_padding=numbers(attrs.output_padding),
            dilation=numbers(attrs.dilation),
            groups=int(attrs.groups),
            data_layout="NHWC",
            kernel_layout="IOHW",
            out_layout="NHWC",
            out_dtype=attrs.out_dtype,
        )
        return self._with_twin(own, LAST)

    def _pool(self, call: Any) -> Any | None:
        if call.attrs.layout != "NCHW":
            return None
        make = getattr(relax.op.nn, op_name(call).rsplit(".", 1)[1])
        attrs = call.attrs
        if "adaptive" in op_name(call):
            sizes = attrs.output_size
            extra: dict[str, Any] = {"output_size": None if sizes is None else numbers(sizes)}
        else:
            extra = {
                "pool_size": numbers(attrs.pool_size),
                "strides": numbers(attrs.strides),
                "padding": numbers(attrs.padding),
                "dilation": numbers(attrs.dilation),
                "ceil_mode": bool(attrs.ceil_mode),
                "count_include_pad": bool(attrs.count_include_pad),
            }
        return self._with_twin(make(self._permuted(call.args[0], LAST), layout="NHWC", **extra), LAST)

    def _elementwise(self, call: Any) -> Any | None:
        axes = self._common(call.args)
        if axes is None:
            return None
        arguments = [self._operand(argument, axes) for argument in call.args]
        if any(argument is None for argument in arguments):
            return None
        return self._with_twin(relax.Call(call.op, arguments, call.attrs, call.ty_args), axes)

    def _common(self, arguments: Any) -> tuple[int, ...] | None:
        """The order in which a call can have its operands: that of the largest twin of full rank."""
        tensors = [argument for argument in arguments if isinstance(argument.ty, relax.TensorType)]
        rank = max((len(shape_of(argument) or ()) for argument in tensors), default=0)
        found = [
            (int(np.prod(shape_of(argument) or (1,))), twin.axes)
            for argument in tensors
            if (twin := self._twin(argument)) is not None and len(twin.axes) == rank
        ]
        return max(found)[1] if found else None

    def _operand(self, argument: Any, axes: tuple[int, ...]) -> Any | None:
        if not isinstance(argument.ty, relax.TensorType):
            return argument
        shape = shape_of(argument) or ()
        if int(np.prod(shape)) == 1 and self._twin(argument) is None:
            return argument if len(shape) <= 1 else self.builder_.emit(relax.op.reshape(argument, (1,)))
        if len(shape) == len(axes):
            return self._permuted(argument, axes)
        full = (1,) * (len(axes) - len(shape)) + tuple(shape)
        constant = self._constant(argument)
        if constant is not None:
            return relax.const(np.ascontiguousarray(constant.reshape(full).transpose(axes)))
        return self._permuted(self.builder_.emit(relax.op.reshape(argument, full)), axes)

    def _concat(self, call: Any) -> Any | None:
        fields = self._fields(call.args[0])
        axes = self._common(fields) if fields else None
        if axes is None:
            return None
        axis = int(call.attrs.axis) % len(axes)
        own = relax.op.concat([self._permuted(field, axes) for field in fields], axes.index(axis))
        return self._with_twin(own, axes)

    def _fields(self, value: Any) -> list[Any]:
        bound = self.lookup_binding(value) if isinstance(value, relax.Var) else value
        return list(bound.fields) if isinstance(bound, relax.Tuple) else []

    def _split(self, call: Any) -> Any | None:
        twin = self._twin(call.args[0])
        if twin is None:
            return None
        axis = int(call.attrs.axis) % len(twin.axes)
        sections = call.attrs.indices_or_sections
        sections = list(numbers(sections)) if hasattr(sections, "__len__") else int(sections)
        own = self.builder_.emit(relax.op.split(twin.value, sections, twin.axes.index(axis)))
        plain = self.builder_.emit(call)
        self._twins[plain] = Twin(own, twin.axes)
        return plain

    def _take(self, call: Any) -> Any | None:
        twin, indices = self._twin(call.args[0]), self._constant(call.args[1])
        if twin is None or indices is None or indices.ndim != 1 or call.attrs.axis is None:
            return None
        axis = twin.axes.index(int(call.attrs.axis) % len(twin.axes))
        own = relax.op.take(twin.value, relax.const(indices), axis=axis, mode=str(call.attrs.mode))
        return self._with_twin(own, twin.axes)

    def _reduction(self, call: Any) -> Any | None:
        twin = self._twin(call.args[0])
        if twin is None or call.attrs.axis is None:
            return None
        rank = len(twin.axes)
        reduced = {axis % rank for axis in numbers(call.attrs.axis)}
        make = getattr(relax.op, op_name(call).rsplit(".", 1)[1])
        keep = bool(call.attrs.keepdims)
        own = make(twin.value, sorted(twin.axes.index(axis) for axis in reduced), keepdims=keep)
        if keep:
            return self._with_twin(own, twin.axes)
        left = [axis for axis in twin.axes if axis not in reduced]
        if left == sorted(left):
            return own
        ranks = sorted(left)
        return self._with_twin(own, tuple(ranks.index(axis) for axis in left))

    def _softmax(self, call: Any) -> Any | None:
        twin = self._twin(call.args[0])
        if twin is None:
            return None
        make = getattr(relax.op.nn, op_name(call).rsplit(".", 1)[1])
        axis = int(call.attrs.axis) % len(twin.axes)
        return self._with_twin(make(twin.value, axis=twin.axes.index(axis)), twin.axes)

    def _resize(self, call: Any) -> Any | None:
        twin = self._twin(call.args[0])
        attrs = call.attrs
        if twin is None or twin.axes != LAST or attrs.layout != "NCHW":
            return None
        own = relax.op.image.resize2d(
            twin.value,
            call.args[1],
            roi=tuple(float(value) for value in attrs.roi),
            layout="NHWC",
            method=attrs.method,
            coordinate_transformation_mode=attrs.coordinate_transformation_mode,
            rounding_method=attrs.rounding_method,
            cubic_alpha=float(attrs.cubic_alpha),
            cubic_exclude=int(attrs.cubic_exclude),
            extrapolation_value=float(attrs.extrapolation_value),
        )
        return self._with_twin(own, LAST)

    def _permute(self, call: Any) -> Any | None:
        twin = self._twin(call.args[0])
        if twin is None:
            return self._from_last(call)
        rank = len(twin.axes)
        wanted = numbers(call.attrs.axes) if call.attrs.axes is not None else tuple(reversed(range(rank)))
        moves = tuple(twin.axes.index(axis % rank) for axis in wanted)
        return twin.value if moves == tuple(range(rank)) else relax.op.permute_dims(twin.value, list(moves))

    def _from_last(self, call: Any) -> Any | None:
        """A permutation to the model's order of what lies channels last."""
        if call.attrs.axes is None or numbers(call.attrs.axes) != (0, 3, 1, 2):
            return None
        plain = self.builder_.emit(call)
        self._twins[plain] = Twin(call.args[0], LAST)
        return plain

    def _reshape(self, call: Any) -> Any | None:
        """A reshape that only joins neighbours, or drops axes of one element, of a value in another order."""
        twin, shape = self._twin(call.args[0]), shape_of(call.args[0])
        target = shape_of(self.builder_.normalize(call))
        if twin is None or shape is None or target is None:
            return None
        moved = [axis for axis in twin.axes if shape[axis] != 1]
        if moved == sorted(moved):
            return relax.op.reshape(twin.value, target)
        if twin.axes == LAST and target == (shape[0], shape[1], shape[2] * shape[3]):
            return self._with_twin(relax.op.reshape(twin.value, (shape[0], target[2], shape[1])), (0, 2, 1))
        if twin.axes == (0, 2, 1) and len(target) == 4 and target[:2] == shape[:2]:
            return self._with_twin(relax.op.reshape(twin.value, (shape[0], *target[2:], shape[1])), LAST)
        return None
