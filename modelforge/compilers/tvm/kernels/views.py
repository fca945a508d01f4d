"""Operands read where they lie: a permutation, reshape or slice before a product is an index, not a copy.

Exporters cut queries, keys and values out of one matrix and turn their axes; a kernel that reads the matrix itself
saves a pass over memory for each such step. A factor that is one number for all elements is taken out, for the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import computed_by, constant_value, is_constant, numbers, op_name, relax, shape_of

Index = tuple[Any, ...]
"""A position: integers, arrays of them, or TVM's expressions."""


@dataclass(frozen=True)
class View:
    """``data`` [...] read as a tensor of ``shape``: element ``index`` of it is ``factor * data[at(index)]``."""

    data: Any
    shape: tuple[int, ...]
    at: Callable[[Index], Index]
    factor: float = 1.0

    @property
    def contiguous(self) -> bool:
        """Whether neighbours along the last axis are neighbours in memory; tried at the ends of the other axes."""
        probes = [sorted({0, min(1, size - 1), size // 2, size - 1}) for size in self.shape[:-1]]
        index = np.ix_(*probes, range(self.shape[-1]))
        offsets = flat_index(self.at(tuple(index)), shape_of(self.data) or ())
        return bool(np.all(np.diff(offsets, axis=-1) == 1))


def view_of(expression: Any, builder: Any) -> View:
    """Follow what computed a tensor as far up as it only moved elements, or scaled them all alike."""
    view = View(expression, shape_of(expression) or (), lambda index: index)
    while (step := _step(view.data, builder)) is not None:
        data, at, factor = step
        view = View(data, view.shape, _after(at, view.at), view.factor * factor)
    return view


def flat_index(index: Index, sizes: tuple[int, ...]) -> Any:
    """The position of an index in memory order."""
    flat: Any = 0
    for position, size in zip(index, sizes, strict=True):
        flat = flat * size + position
    return flat


def split_index(flat: Any, sizes: tuple[int, ...]) -> Index:
    """The index of a position in memory order."""
    index: list[Any] = []
    for axis in reversed(range(len(sizes))):
        outermost = prod(sizes[:axis]) == 1
        index.insert(0, flat if outermost else flat % sizes[axis])
        flat = 0 if outermost else flat // sizes[axis]
    return tuple(index)


_Step = tuple[Any, Callable[[Index], Index], float]


def _after(outer: Callable[[Index], Index], inner: Callable[[Index], Index]) -> Callable[[Index], Index]:
    return lambda index: outer(inner(index))


def _step(expression: Any, builder: Any) -> _Step | None:
    """What an expression was computed from, where its index goes there, and by which factor."""
    call = computed_by(expression, builder) if isinstance(expression, relax.Var) else None
    if call is None:
        return None
    if isinstance(call, relax.TupleGetItem):
        return _split(call, builder)
    shape, source = shape_of(expression), shape_of(call.args[0]) if getattr(call, "args", None) else None
    handler = _STEPS.get(op_name(call))
    return handler(call, source, shape, builder) if handler and shape is not None and source is not None else None


def _reshaped(call: Any, source: Any, shape: Any, _: Any) -> _Step:
    return call.args[0], lambda index: split_index(flat_index(index, shape), source), 1.0


def _permuted(call: Any, source: Any, _: Any, __: Any) -> _Step:
    axes = numbers(call.attrs.axes) if call.attrs.axes is not None else tuple(reversed(range(len(source))))
    places = [axes.index(axis) for axis in range(len(source))]
    return call.args[0], lambda index: tuple(index[place] for place in places), 1.0


def _taken(call: Any, source: Any, _: Any, builder: Any) -> _Step | None:
    """One constant position along an axis."""
    chosen = _constant(call.args[1], builder)
    if chosen is None or chosen.ndim != 0 or call.attrs.axis is None:
        return None
    axis = int(call.attrs.axis) % len(source)
    place = int(chosen)
    if not -source[axis] <= place < source[axis]:
        return None
    place %= source[axis]
    return call.args[0], lambda index: (*index[:axis], place, *index[axis:]), 1.0


def _sliced(call: Any, source: Any, _: Any, __: Any) -> _Step | None:
    """A range with positive steps along some axes."""
    try:
        axes, begins, _, *steps = [[int(value.value) for value in argument] for argument in call.args[1:]]
    except (AttributeError, TypeError, ValueError):  # a bound that is not a number
        return None
    strides = steps[0] if steps else [1] * len(axes)
    if any(stride < 1 for stride in strides):
        return None
    start, step = [0] * len(source), [1] * len(source)
    for axis, begin, stride in zip(axes, begins, strides, strict=True):
        size = source[axis]
        start[axis], step[axis] = min(max(begin + size if begin < 0 else begin, 0), size), stride
    return call.args[0], lambda index: tuple(b + i * s for b, i, s in zip(start, index, step, strict=True)), 1.0


def _split(item: Any, builder: Any) -> _Step | None:
    """One of the equal or listed parts that a tensor is cut into."""
    call = computed_by(item.tuple_value, builder)
    if op_name(call) != "relax.split" or (source := shape_of(call.args[0])) is None:
        return None
    cuts, axis, part = call.attrs.indices_or_sections, int(call.attrs.axis) % len(source), int(item.index)
    listed = hasattr(cuts, "__len__")
    begin = (0, *numbers(cuts))[part] if listed else part * -(-source[axis] // int(cuts))
    return call.args[0], lambda index: (*index[:axis], index[axis] + begin, *index[axis + 1 :]), 1.0


def _scaled(call: Any, source: Any, shape: Any, builder: Any) -> _Step | None:
    """A product with one number."""
    for data, other in (call.args, reversed(call.args)):
        number = _constant(other, builder)
        if number is not None and number.size == 1 and shape_of(data) == shape:
            return data, lambda index: index, float(number.reshape(()))
    return None


def _constant(expression: Any, builder: Any) -> Any:
    value = computed_by(expression, builder)
    return constant_value(value) if value is not None and is_constant(value) else None


_STEPS: Final[dict[str, Callable[[Any, Any, Any, Any], _Step | None]]] = {
    "relax.reshape": _reshaped,
    "relax.squeeze": _reshaped,
    "relax.expand_dims": _reshaped,
    "relax.flatten": _reshaped,
    "relax.permute_dims": _permuted,
    "relax.take": _taken,
    "relax.strided_slice": _sliced,
    "relax.multiply": _scaled,
}
