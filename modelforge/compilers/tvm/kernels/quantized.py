"""Quantized activations as rules see them: what lies in memory, its zero point, and what a product instruction reads.

The graph says ``astype(q, int16) - zero_point`` where a sum over int8 stands: true arithmetic, which rules read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import constant_value, dtype_of, is_constant, op_name, relax, te, tirx
from modelforge.compilers.tvm.kernels.dot import Dot

_LOWEST: Final = {"int8": -128, "uint8": 0, "int16": 0}
"""What int8's -128 is in each type; ``int16`` operands are differences from the zero point, so nothing is moved."""


@dataclass(frozen=True)
class Activations:
    """``stored - zero`` are the integers that are multiplied."""

    stored: Any
    zero: int

    def zero_for(self, dot: Dot) -> int:
        """The zero point in what the instruction reads."""
        if dot.operand == "int16":
            return 0
        return self.zero + _LOWEST[dot.operand] - _LOWEST[dtype_of(self.stored)]

    def start(self, weight: np.ndarray[Any, Any], dot: Dot, columns: int) -> np.ndarray[Any, Any]:
        """What sums over stored values start at, so that the zero point adds nothing: int32 [columns]."""
        found = np.zeros(columns, np.int32)
        found[: len(weight)] = -self.zero_for(dot) * weight.astype(np.int32).sum(axis=tuple(range(1, weight.ndim)))
        return found


def activations_of(value: Any, builder: Any) -> Activations | None:
    """What stands behind ``astype(q, int16) - zero_point``, its order of axes changed or not; or None."""
    difference = _bound(value, builder)
    if op_name(difference) in ("relax.permute_dims", "relax.reshape"):
        before = activations_of(difference.args[0], builder)
        if before is None:
            return None
        moved = relax.Call(difference.op, [before.stored, *difference.args[1:]], difference.attrs)
        return Activations(builder.emit(moved), before.zero)
    if op_name(difference) != "relax.subtract":
        return None
    wide, zero = _bound(difference.args[0], builder), _bound(difference.args[1], builder)
    if op_name(wide) != "relax.astype" or not is_constant(zero) or dtype_of(wide) != "int16":
        return None
    stored = wide.args[0]
    if dtype_of(stored) not in ("int8", "uint8"):
        return None
    return Activations(stored, int(constant_value(zero).reshape(-1)[0]))


def as_operand(
    stored: Any,
    dot: Dot,
    zero: int,
    operand_zero: int,
    before: Sequence[int],
    after: Sequence[int],
    *,
    runs: bool = False,
) -> Any:
    """The activations as the instruction reads them, padded along each axis; with ``runs`` the last two axes are one.

    The same tensor where it can be read as it is.
    """
    if stored.dtype == dot.operand and not runs and not any((*before, *after)):
        return stored
    sizes = [int(size) for size in stored.shape]
    channels = sizes[-1]
    if runs:
        sizes = [*sizes[:-2], sizes[-2] * channels]
    offset = operand_zero - zero

    def element(*at: Any) -> Any:
        own = [position - low for position, low in zip(at, before, strict=True)]
        found = stored[(*own[:-1], own[-1] // channels, own[-1] % channels) if runs else tuple(own)]
        if stored.dtype != dot.operand:
            found = (found.astype("int16") + tirx.const(offset, "int16")).astype(dot.operand)
        inside: list[Any] = []
        for position, low, size, high in zip(at, before, sizes, after, strict=True):
            inside += [position >= low] if low else []
            inside += [position < low + size] if high else []
        return tirx.if_then_else(tirx.all(*inside), found, tirx.const(operand_zero, dot.operand)) if inside else found

    shape = tuple(low + size + high for low, size, high in zip(before, sizes, after, strict=True))
    return te.compute(shape, element, name="pad_operand")


def _bound(value: Any, builder: Any) -> Any:
    """What a variable stands for, through names."""
    while isinstance(value, relax.Var):
        found = builder.lookup_binding(value)
        if found is None:
            return value
        value = found
    return value
