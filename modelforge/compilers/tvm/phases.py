"""Quantized transposed convolutions as ordinary ones, whose output channels are the phases of the output's pixels.

Idea (Shi et al. 2016, arXiv:1609.05158): with stride s, outputs s * m + p of every phase p read the same inputs, m and
the last before it: one convolution of stride 1 makes all phases as channels side by side, and pixels take their places
afterwards. What works on each value by itself goes in front of that, so that bytes are moved. Runs before
:mod:`.earlier`, which moves Q so, on the model's order of axes; :mod:`.integer` makes the products integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    Mutator,
    bindings,
    constant_value,
    dtype_of,
    first_name,
    graphs,
    is_constant,
    mutator,
    numbers,
    op_name,
    relax,
    rewritten,
    shape_of,
    tvm,
)

Array = np.ndarray[Any, Any]

_UNARY: Final = frozenset(f"relax.{name}" for name in ("nn.relu", "nn.leakyrelu", "nn.silu", "sigmoid", "tanh"))
_BINARY: Final = frozenset(f"relax.{name}" for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum"))


def to_phases(module: Any) -> Any:
    """Rewrite a module's transposed convolutions over quantized values."""
    if not any(op_name(value) == "relax.nn.conv2d_transpose" for _, value, _ in bindings(module)):
        return module
    module = rewritten(module, Phases)
    entries = [name.name_hint for name, _ in graphs(module)]
    passes = [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination(entries)]
    return tvm.transform.Sequential(passes)(module)


@dataclass(frozen=True)
class Image:
    """``strides``: phases down and to the right. ``begin``: the first row and column that are wanted, of ``size``."""

    strides: tuple[int, int]
    begin: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Phased:
    """The value is ``source`` [N, phases * O, H, W] with the pixels of all phases in place, as ``image`` says."""

    source: Any
    image: Image


@mutator
class Phases(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Emits what can work on phases so, and the value with its pixels in place beside it for all that cannot."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._known: dict[Any, Phased] = {}

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        name = op_name(call)
        found = None
        if name == "relax.nn.conv2d_transpose":
            found = self._convolution(call)
        elif call.args and (phased := self._known.get(self._resolve(call.args[0]))) is not None:
            if name in _UNARY:
                found = self._emit(relax.Call(call.op, [phased.source], call.attrs, call.ty_args), phased.image)
            elif name in _BINARY and (other := self._constant_for(call.args[1], phased)) is not None:
                found = self._emit(relax.Call(call.op, [phased.source, other], call.attrs, call.ty_args), phased.image)
        return call if found is None else found

    def _convolution(self, call: Any) -> Any | None:
        data, attrs = call.args[0], call.attrs
        shape, result = shape_of(data), shape_of(self.builder_.normalize(call))
        if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "IOHW") or int(attrs.groups) != 1:
            return None
        if shape is None or result is None or op_name(self._bound(data)) != "relax.dequantize":
            return None
        strides, dilation = numbers(attrs.strides), numbers(attrs.dilation)
        weight = self._weight(call.args[1], strides, dilation)
        if weight is None:
            return None
        taps = (shape_of(weight) or ())[2:]
        begin = numbers(attrs.padding)[:2]
        before, after = [count - 1 for count in taps], []
        for axis, count in enumerate(taps):
            # All phases make (size + taps - 1) * stride rows; ONNX's output_padding may ask for more, of bias alone.
            missing = begin[axis] + result[2 + axis] - (shape[2 + axis] + count - 1) * strides[axis]
            after.append(count - 1 + max(0, -(-missing // strides[axis])))
        own = relax.op.nn.conv2d(data, weight, padding=(*before, *after))
        return self._emit(own, Image((strides[0], strides[1]), (begin[0], begin[1]), (result[2], result[3])))

    def _weight(self, value: Any, strides: tuple[int, ...], dilation: tuple[int, ...]) -> Any | None:
        """The DQ of an int8 weight [I, O, H, W] as one of [phases * O, I, taps down, taps to the right]."""
        bound = self._bound(value)
        if op_name(bound) != "relax.dequantize":
            return None
        arrays = [array for argument in bound.args if (array := self._constant(argument)) is not None]
        if len(arrays) < 3 or arrays[0].dtype != np.int8 or arrays[2].any():
            return None
        weight, scale, zeros = arrays
        along = int(bound.attrs.axis) % 4
        if scale.size > 1 and along != 1:
            return None
        moved = as_phases(weight, strides, dilation)
        phases = strides[0] * strides[1]
        parameters = [np.tile(each, phases) if scale.size > 1 else each for each in (scale, zeros)]
        constants = [relax.const(np.ascontiguousarray(each), str(each.dtype)) for each in (moved, *parameters)]
        own = relax.op.dequantize(*constants, axis=0 if scale.size > 1 else -1, out_dtype=dtype_of(value))
        return self.builder_.emit(own)

    def _emit(self, source: Any, image: Image) -> Any:
        """Emit a value of phases, and the same with its pixels in place; remember what that is made of."""
        emitted = self.builder_.emit(source)
        batch, channels, height, width = shape_of(emitted) or ()
        down, right = image.strides
        outputs = channels // (down * right)
        last = self.builder_.emit(relax.op.permute_dims(emitted, [0, 2, 3, 1]))
        apart = self.builder_.emit(relax.op.reshape(last, (batch, height, width, down, right, outputs)))
        placed = self.builder_.emit(relax.op.permute_dims(apart, [0, 1, 3, 2, 4, 5]))
        value = self.builder_.emit(relax.op.reshape(placed, (batch, height * down, width * right, outputs)))
        if image.begin != (0, 0) or image.size != (height * down, width * right):
            ends = [begin + size for begin, size in zip(image.begin, image.size, strict=True)]
            value = self.builder_.emit(relax.op.strided_slice(value, [1, 2], list(image.begin), ends))
        value = self.builder_.emit(relax.op.permute_dims(value, [0, 3, 1, 2]))
        self._known[value] = Phased(emitted, image)
        return value

    def _constant_for(self, value: Any, phased: Phased) -> Any | None:
        """A constant for each output channel, or one for all, as one for each phase of each channel."""
        constant = self._constant(value)
        if constant is None or constant.ndim > 4:
            return None
        if constant.size == 1:
            return relax.const(constant.reshape(()))
        phases = phased.image.strides[0] * phased.image.strides[1]
        channels = (shape_of(phased.source) or (0, 0))[1] // phases
        full = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
        return relax.const(np.tile(full, (1, phases, 1, 1))) if full.shape == (1, channels, 1, 1) else None

    def _constant(self, value: Any) -> Array | None:
        bound = self._bound(value)
        return constant_value(bound) if is_constant(bound) else None

    def _bound(self, value: Any) -> Any:
        value = self._resolve(value)
        bound = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        return value if bound is None else bound

    def _resolve(self, value: Any) -> Any:
        return first_name(value, self.lookup_binding)


def as_phases(weight: Array, strides: tuple[int, ...], dilation: tuple[int, ...]) -> Array:
    """[I, O, H, W] of a transposed convolution as [phases * O, I, taps down, taps to the right] of an ordinary one.

    Tap t of phase p is the window's element s * t + p, read at input m - t: taps lie in reverse. Zero beyond it.
    """
    inputs, outputs, *window = weight.shape
    spans = [step * (size - 1) + 1 for step, size in zip(dilation, window, strict=True)]
    taps = [-(-span // stride) for span, stride in zip(spans, strides, strict=True)]
    whole = np.zeros((inputs, outputs, taps[0] * strides[0], taps[1] * strides[1]), weight.dtype)
    whole[:, :, : spans[0] : dilation[0], : spans[1] : dilation[1]] = weight
    split = whole.reshape(inputs, outputs, taps[0], strides[0], taps[1], strides[1])[:, :, ::-1, :, ::-1]
    return split.transpose(3, 5, 1, 0, 2, 4).reshape(-1, inputs, *taps)
