"""Q and DQ become integer arithmetic, in the model's own order of axes: this comes before :mod:`.layout`.

Sums over quantized activations and weights become int32 sums, and what only moves values moves bytes; what Q and DQ
are left become arithmetic (:mod:`.scales`).

Activations are kept in the 8-bit type that the machine's dot product reads: ``uint8``, 128 above ``int8``, with VNNI.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    Mutator,
    bindings,
    constant_value,
    dtype_of,
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
from modelforge.compilers.tvm.earlier import only_moves
from modelforge.compilers.tvm.kernels.bands import band_of
from modelforge.compilers.tvm.kernels.dot import has_unsigned_dot
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.scales import BOUNDS, FoldScales

Array = np.ndarray[Any, Any]


_MOVED: Final = 8
"""Products that take as long as moving a byte to its place in a shuffle: half an instruction of 16 (SDOT)."""


def to_integers(module: Any, machine: Machine) -> Any:
    """Rewrite a module's quantized parts; what is not quantized stays as it is."""
    if not any(op_name(value) in ("relax.quantize", "relax.dequantize") for _, value, _ in bindings(module)):
        return module
    for pass_ in (Integers, FoldScales):
        module = rewritten(module, partial(pass_, machine=machine))
        names = [name.name_hint for name in module.get_global_vars() if isinstance(module[name], relax.Function)]
        passes = [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination(names)]
        module = tvm.transform.Sequential(passes)(module)
    return module


@dataclass(frozen=True)
class Quantized:
    """A float value is ``(stored - zero) * scale``."""

    stored: Any
    scale: float
    zero: int


@dataclass(frozen=True)
class Weight:
    """A float constant is ``values * scale`` along ``axis``; one scale for all without one."""

    values: Array
    scale: Array
    axis: int | None


@mutator
class Integers(Mutator):  # type: ignore[misc]  # TVM ships no types
    """Knows the integers beside each quantized float value; the float ones fall away where nobody reads them."""

    def __init__(self, module: Any, machine: Machine) -> None:
        super().__init__(module)
        self._type = "uint8" if has_unsigned_dot(machine) else "int8"
        self._machine = machine
        self._quantized: dict[Any, Quantized] = {}
        self._tuples: dict[Any, Quantized] = {}
        self._weights: dict[Any, Weight] = {}
        self._stored: dict[Any, Any] = {}

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        name = op_name(call)
        found = None
        if name == "relax.quantize":
            found = self._quantize(call)
        elif name == "relax.dequantize":
            found = self._dequantize(call)
        elif name == "relax.nn.conv2d":
            found = self._convolution(call)
        elif name == "relax.matmul":
            found = self._product(call)
        elif only_moves(call) or name in ("relax.split", "relax.nn.relu"):
            found = self._move(call, name)
        return call if found is None else found

    def visit_tuple_getitem_(self, item: Any) -> Any:
        item = self.visit_expr_post_order(item)
        source = self._tuples.get(self._resolve(item.tuple_value))
        if source is None:
            return item
        stored = self.builder_.emit(relax.TupleGetItem(source.stored, item.index))
        return self._float(Quantized(stored, source.scale, source.zero))

    # ---- what is known of values ----

    def _resolve(self, value: Any) -> Any:
        return first_name(value, self.lookup_binding)

    def _constant(self, value: Any) -> Array | None:
        value = self._resolve(value)
        if isinstance(value, relax.Var):
            value = self.lookup_binding(value)
        return constant_value(value) if value is not None and is_constant(value) else None

    def _known(self, value: Any) -> Quantized | None:
        return self._quantized.get(self._resolve(value))

    def _float(self, found: Quantized) -> Any:
        """The float value of integers, emitted, and known as such."""
        scale, zero = relax.const(found.scale, "float32"), relax.const(found.zero, dtype_of(found.stored))
        value = self.builder_.emit(relax.op.dequantize(found.stored, scale, zero, axis=-1, out_dtype="float32"))
        self._quantized[value] = found
        return value

    def _parameters(self, call: Any) -> tuple[float, int] | None:
        """Scale and zero point of a Q or DQ of a whole tensor."""
        scale, zero = self._constant(call.args[1]), self._constant(call.args[2])
        if scale is None or zero is None or scale.size != 1 or zero.size != 1:
            return None
        return float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])

    # ---- Q and DQ ----

    def _quantize(self, call: Any) -> Any | None:
        parameters, dtype = self._parameters(call), str(call.attrs.out_dtype)
        if parameters is None or dtype not in BOUNDS:
            return None
        scale, zero = parameters
        shift = BOUNDS[self._type][0] - BOUNDS[dtype][0]
        known = self._known(call.args[0])
        if known is not None and known.zero == zero + shift and np.isclose(known.scale, scale, rtol=1e-6, atol=0.0):
            stored = known.stored
        else:
            own = relax.op.quantize(
                call.args[0], call.args[1], relax.const(zero + shift, self._type), axis=-1, out_dtype=self._type
            )
            stored = self.builder_.emit(own)
        plain = self.builder_.emit(call)
        self._stored[plain] = stored
        return plain

    def _dequantize(self, call: Any) -> Any | None:
        data = call.args[0]
        values, scale, zeros = (self._constant(argument) for argument in call.args)
        if values is not None and scale is not None and zeros is not None:
            return self._constant_weight(values, scale, zeros, int(call.attrs.axis))
        parameters, dtype = self._parameters(call), dtype_of(data)
        if parameters is None or dtype not in BOUNDS:
            return None
        shift = BOUNDS[self._type][0] - BOUNDS[dtype][0]
        return self._float(Quantized(self._in_own_type(data, shift), parameters[0], parameters[1] + shift))

    def _in_own_type(self, data: Any, shift: int) -> Any:
        """What an 8-bit value is in the type of this machine."""
        stored = self._stored.get(self._resolve(data))
        if stored is not None or shift == 0:
            return data if stored is None else stored
        wide = self.builder_.emit(relax.op.astype(data, "int16"))
        moved = self.builder_.emit(relax.op.add(wide, relax.const(shift, "int16")))
        return self.builder_.emit(relax.op.astype(moved, self._type))

    def _constant_weight(self, values: Array, scale: Array, zeros: Array, axis: int) -> Any:
        rank = values.ndim
        axis = axis % rank if rank and scale.size > 1 else 0
        along = [-1 if position == axis else 1 for position in range(rank)] if scale.size > 1 else [1] * rank
        exact = values.astype(np.float32) - zeros.astype(np.float32).reshape(along if zeros.size > 1 else [1] * rank)
        result = self.builder_.emit(relax.const((exact * scale.astype(np.float32).reshape(along)).astype(np.float32)))
        if values.dtype == np.int8 and not zeros.any():
            own_axis = axis if scale.size > 1 else None
            self._weights[result] = Weight(values, scale.astype(np.float32).reshape(-1), own_axis)
        return result

    # ---- sums ----

    def _convolution(self, call: Any) -> Any | None:
        data, weight = self._known(call.args[0]), self._weights.get(self._resolve(call.args[1]))
        attrs, groups = call.attrs, int(call.attrs.groups)
        if data is None or weight is None or weight.axis not in (None, 0) or attrs.data_layout != "NCHW":
            return None
        shape, values = shape_of(data.stored), weight.values
        if shape is None:
            return None
        if groups > 1 and not groups == shape[1] == len(values):
            if not self._machine.dot:
                return None
            before, order = self._unshuffled(data)
            result = shape_of(self.builder_.normalize(call)) or ()
            if order is not None and _is_dense_cheaper(
                values, groups, prod(result) // len(values), prod(shape), self._machine
            ):
                values, groups = np.ascontiguousarray(_dense(values, groups)[:, np.argsort(order)]), 1
                data = before
        sums = relax.op.nn.conv2d(
            self._difference(data),
            relax.const(values),
            strides=numbers(attrs.strides),
            padding=numbers(attrs.padding),
            dilation=numbers(attrs.dilation),
            groups=groups,
            out_dtype="int32",
        )
        return self._scaled(sums, data, weight, (1, -1, 1, 1))

    def _unshuffled(self, data: Quantized) -> tuple[Quantized, Array | None]:
        """Activations before their channels were put into another order, and that order, where that is known."""
        taken = self.lookup_binding(self._resolve(data.stored))
        if op_name(taken) != "relax.take" or int(taken.attrs.axis) != 1:
            return data, None
        return Quantized(taken.args[0], data.scale, data.zero), self._constant(taken.args[1])

    def _product(self, call: Any) -> Any | None:
        data, weight = self._known(call.args[0]), self._weights.get(self._resolve(call.args[1]))
        if data is None or weight is None or weight.values.ndim != 2 or weight.axis not in (None, 1):
            return None
        if shape_of(data.stored) is None:
            return None
        sums = relax.op.matmul(self._difference(data), relax.const(weight.values), out_dtype="int32")
        return self._scaled(sums, data, weight, (-1,))

    def _difference(self, data: Quantized) -> Any:
        """``stored - zero``, which :func:`.kernels.quantized.activations_of` reads back."""
        wide = self.builder_.emit(relax.op.astype(data.stored, "int16"))
        return self.builder_.emit(relax.op.subtract(wide, relax.const(data.zero, "int16")))

    def _scaled(self, sums: Any, data: Quantized, weight: Weight, along: tuple[int, ...]) -> Any:
        """The float value of int32 sums."""
        scale = (np.float64(data.scale) * weight.scale.astype(np.float64)).astype(np.float32)
        wide = self.builder_.emit(relax.op.astype(self.builder_.emit(sums), "float32"))
        constant = relax.const(scale.reshape(along) if scale.size > 1 else scale.reshape(()))
        return relax.op.multiply(wide, constant)

    # ---- what moves values ----

    def _move(self, call: Any, name: str) -> Any | None:
        if name == "relax.permute_dims" and (weight := self._weights.get(self._resolve(call.args[0]))) is not None:
            return self._turned(call, weight)
        if dtype_of(call.args[0]) in BOUNDS or name == "relax.concat":
            moved = self._move_stored(call)
            return moved if moved is not None or name != "relax.concat" else self._concat(call)
        known = self._known(call.args[0])
        if known is None:
            return None
        if name == "relax.nn.relu":
            floor = relax.const(known.zero, dtype_of(known.stored))
            moved = relax.op.maximum(known.stored, floor)
        else:
            moved = relax.Call(call.op, [known.stored, *call.args[1:]], call.attrs, call.ty_args)
        stored = self.builder_.emit(moved)
        if name == "relax.split":
            plain = self.builder_.emit(call)
            self._tuples[plain] = Quantized(stored, known.scale, known.zero)
            return plain
        return self._float(Quantized(stored, known.scale, known.zero))

    def _move_stored(self, call: Any) -> Any | None:
        """A move of what Q gave: beside it, the same of what is stored in this machine's type."""
        source = call.args[0]
        bound = self.lookup_binding(source) if isinstance(source, relax.Var) else source
        fields = list(bound.fields) if isinstance(bound, relax.Tuple) else [source]
        stored = [self._stored.get(self._resolve(field)) for field in fields]
        if any(each is None for each in stored):
            return None
        operand = relax.Tuple(stored) if isinstance(bound, relax.Tuple) else stored[0]
        moved = self.builder_.emit(relax.Call(call.op, [operand, *call.args[1:]], call.attrs, call.ty_args))
        plain = self.builder_.emit(call)
        self._stored[plain] = moved
        return plain

    def _turned(self, call: Any, weight: Weight) -> Any:
        rank = weight.values.ndim
        axes = numbers(call.attrs.axes) if call.attrs.axes is not None else tuple(reversed(range(rank)))
        axes = tuple(axis % rank for axis in axes)
        exact = self._constant(call.args[0])
        assert exact is not None
        result = self.builder_.emit(relax.const(np.ascontiguousarray(exact.transpose(axes))))
        axis = None if weight.axis is None else axes.index(weight.axis)
        self._weights[result] = Weight(np.ascontiguousarray(weight.values.transpose(axes)), weight.scale, axis)
        return result

    def _concat(self, call: Any) -> Any | None:
        fields = call.args[0]
        bound = self.lookup_binding(fields) if isinstance(fields, relax.Var) else fields
        known = [self._known(field) for field in bound.fields] if isinstance(bound, relax.Tuple) else []
        first = known[0] if known else None
        if first is None or any(each is None or (each.scale, each.zero) != (first.scale, first.zero) for each in known):
            return None
        stored = relax.op.concat([each.stored for each in known if each is not None], axis=call.attrs.axis)
        return self._float(Quantized(self.builder_.emit(stored), first.scale, first.zero))


def _is_dense_cheaper(weight: Array, groups: int, pixels: int, moved: int, machine: Machine) -> bool:
    """Whether a convolution in groups behind a shuffle is less work as one of a single group, which takes the order of
    its channels into its weights, than with a copy of so many bytes in front.

    Args:
        weight: [O, I of a group, H, W].
        pixels: of the result.
    """
    band = band_of(weight.transpose(0, 2, 3, 1), groups, machine)
    window = pixels * int(prod(weight.shape[2:]))
    return window * len(weight) * band.channels <= window * band.products + moved * _MOVED


def _dense(weight: Array, groups: int) -> Array:
    """The weight [O, I / groups, ...] of a convolution in groups as one of a single group, zeros between groups."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    full = np.zeros((len(weight), inputs * groups, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        full[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return full
