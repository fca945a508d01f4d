"""Softmax, layer norm and reductions over the last axes: a row at a time, in cache, by vectors.

Idea: LLVM may not reorder sums of floats, so the order is written here: a row is read in steps of a few vectors, each
lane of each vector has a partial result of its own, and a tree of halves joins them, with what is left over beside. The
stages of one row follow each other (maximum, exponentials, sum, division), so that all but the first find it in the
first-level cache. Bound: the bytes of a row, read and written once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Final

from modelforge.compilers.tvm.api import (
    COMMREDUCE,
    OUT_FUSIBLE,
    block_name,
    blocks,
    count_rows_as_one,
    dtype_of,
    emit_kernel,
    extent,
    is_reduction,
    numbers,
    op_name,
    shape_of,
    te,
    tirx,
)
from modelforge.compilers.tvm.kernels import mathematics
from modelforge.compilers.tvm.kernels.loops import PARALLEL_WORK, partition
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.kernels.views import flat_index, split_index
from modelforge.compilers.tvm.machine import Machine

_STAGE: Final = "row_"
"""How the names of a row's stages begin: what else stands in a kernel was fused with it."""
_TOGETHER: Final = 4
"""Vectors of exponentials at a time: the polynomial's constants are brought to registers once for them, on Arm."""
Read = Callable[[Any, Any], Any]
"""An element of a row: ``read(row, position)``."""


@dataclass(frozen=True)
class Row:
    """How a row of ``length`` elements is walked: ``step`` elements at once, a few vectors of ``lanes``."""

    length: int
    lanes: int
    step: int


def row_of(length: int, machine: Machine) -> Row:
    """Four vectors a step hide the latency of a sum; less where the row is shorter. A step is a power of two."""
    step = min(4 * machine.lanes(), 1 << (length.bit_length() - 1))
    return Row(length, min(step, machine.lanes()), step)


@dataclass(frozen=True)
class Rows:
    """Softmax and layer norm over the last axes; FP32."""

    name: str = "rows"
    operators: tuple[str, ...] = ("relax.nn.softmax", "relax.nn.log_softmax", "relax.nn.layer_norm")

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data = call.args[0]
        shape = shape_of(data)
        if not shape or 0 in shape or dtype_of(data) != "float32":
            return None
        name = op_name(call).rsplit(".", 1)[-1]
        axes = numbers(call.attrs.axes) if name == "layer_norm" else (int(call.attrs.axis),)
        count = _trailing(axes, len(shape))
        if count is None:
            return None if name == "layer_norm" else _across(data, axes[0] % len(shape), name, builder)
        leading, inner = shape[: len(shape) - count], shape[len(shape) - count :]
        row = row_of(prod(inner), machine)
        attrs = {RULE: self.name, MACS: 0, TILE: [row.lanes, row.step]}

        def compute(data: Any, *parameters: Any) -> Any:
            def read(r: Any, i: Any) -> Any:
                return data[(*split_index(r, leading), *split_index(i, inner))]

            result = _RESULTS[name](read, prod(leading), row, attrs, call.attrs, parameters, inner)
            return te.compute(
                shape,
                lambda *i: result(flat_index(i[: len(leading)], leading), flat_index(i[len(leading) :], inner)),
                name="result",
            )

        return emit_kernel(builder, compute, data, *call.args[1:], name=name, pattern=OUT_FUSIBLE)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        own = [block_name(sch, block) for block in blocks(sch)]
        last = max(index for index, name in enumerate(own) if name.startswith(_STAGE))
        for name in own[last + 1 : -1]:
            sch.compute_inline(sch.get_sblock(name))
        out = blocks(sch)[-1]
        lanes, step = (int(value) for value in sch.get(anchor).annotations[TILE])
        count_rows_as_one(sch, out)
        rows, elements = sch.get_loops(out)
        length = extent(sch, elements)
        _vectors(sch, elements, length, lanes)
        _stages(sch, rows, lanes, machine)
        return f"steps of {step}"


@dataclass(frozen=True)
class RowReductions:
    """Sums, means, extrema and products over the last axes, and the position of an extremum."""

    name: str = "row reduction"
    operators: tuple[str, ...] = (
        "relax.sum",
        "relax.mean",
        "relax.max",
        "relax.min",
        "relax.prod",
        "relax.argmax",
        "relax.argmin",
    )

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        data = call.args[0]
        shape = shape_of(data)
        if not shape or 0 in shape or dtype_of(data) != "float32":
            return None
        name = op_name(call).rsplit(".", 1)[-1]
        count = _trailing(_axes(call, len(shape)), len(shape))
        if count is None:
            return None
        leading, inner = shape[: len(shape) - count], shape[len(shape) - count :]
        row = row_of(prod(inner), machine)
        kept = (*leading, *((1,) * count)) if bool(call.attrs.keepdims) else leading
        attrs = {RULE: self.name, MACS: 0, TILE: [row.lanes, row.step]}

        def compute(data: Any) -> Any:
            def read(r: Any, i: Any) -> Any:
                return data[(*split_index(r, leading), *split_index(i, inner))]

            finish = _reduction(name, read, prod(leading), row, attrs)
            return te.compute(kept, lambda *i: finish(flat_index(i[: len(leading)], leading)), name="result")

        return emit_kernel(builder, compute, data, name=name, pattern=COMMREDUCE)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        lanes, step = (int(value) for value in sch.get(anchor).annotations[TILE])
        for name in [block_name(sch, block) for block in blocks(sch)[:-1]]:
            if not name.startswith(_STAGE):
                sch.compute_inline(sch.get_sblock(name))
        loops = sch.get_loops(blocks(sch)[-1])
        rows = sch.fuse(*loops) if len(loops) > 1 else loops[0] if loops else None
        if rows is None:
            rows = sch.add_unit_loop(blocks(sch)[-1])
        _stages(sch, rows, lanes, machine)
        return f"steps of {step}"


def _across(data: Any, axis: int, name: str, builder: Any) -> Any:
    """Softmax over an axis that is not the last: the lanes of a vector are rows of their own, and :mod:`.generic`
    schedules it as it does every reduction over such an axis."""
    shape = shape_of(data) or ()
    kept = (*shape[:axis], *shape[axis + 1 :])

    def without(index: Any) -> Any:
        return (*index[:axis], *index[axis + 1 :])

    def compute(data: Any) -> Any:
        def over(read: Any, join: Any, label: str) -> Any:
            k = te.reduce_axis((0, shape[axis]), "k")
            return te.compute(kept, lambda *i: join(read(*i[:axis], k, *i[axis:]), axis=k), name=label)

        most = over(data, te.max, "most")
        powers = te.compute(shape, lambda *i: mathematics.exp_of_negative(data(*i) - most(*without(i))), name="powers")
        total = over(powers, te.sum, "total")
        if name == "softmax":
            return te.compute(shape, lambda *i: powers(*i) / total(*without(i)), name="result")
        shift = te.compute(kept, lambda *i: most(*i) + mathematics.log(total(*i)), name="shift")
        return te.compute(shape, lambda *i: data(*i) - shift(*without(i)), name="result")

    return emit_kernel(builder, compute, data, name=name, pattern=OUT_FUSIBLE)


def _stages(sch: Any, rows: Any, lanes: int, machine: Machine) -> None:
    """Put every stage under the loop over rows, last first, and turn each into vectors."""
    names = [name for name in (block_name(sch, block) for block in blocks(sch)) if name.startswith(_STAGE)]
    work = 0
    for name in reversed(names):
        block = sch.get_sblock(name)
        work += prod(extent(sch, loop) for loop in sch.get_loops(block))
        sch.compute_at(block, rows, preserve_unit_loops=True)
        sch.set_scope(block, 0, "local")
    if work >= PARALLEL_WORK and machine.cores > 1 and extent(sch, rows) > 1:
        sch.parallel(rows)
    for name in names:
        block = sch.get_sblock(name)
        own = sch.get_loops(block)[1:]
        if not is_reduction(sch, block):
            _vectors(sch, own[-1], extent(sch, own[-1]), lanes, _TOGETHER if name == _STAGE + "exp" else None)
            continue
        *_, element, k = own
        sch.reorder(k, element)
        if extent(sch, element) > 1:
            _vectors(sch, element, extent(sch, element), lanes, None)
        sch.decompose_reduction(block, k)


def _vectors(sch: Any, loop: Any, length: int, lanes: int, together: int | None = 1) -> None:
    """Vectors over a loop, so many (None: all) unrolled; where the last is not full, its elements one by one."""
    if length == 1:
        return
    if length <= lanes and length & (length - 1) == 0:
        sch.vectorize(loop)
        return
    outer, lane = sch.split(loop, factors=[None, lanes])
    sch.vectorize(lane)
    if length % lanes:
        partition(sch, outer)
    elif together != 1:
        sch.unroll(outer if together is None else sch.split(outer, factors=[None, gcd(length // lanes, together)])[1])


def _softmax(read: Read, rows: int, row: Row, attrs: Any, *_: Any) -> Read:
    most = _reduced(read, rows, row, "max", "max", attrs)
    powers = te.compute(
        (rows, row.length), lambda r, i: mathematics.exp_of_negative(read(r, i) - most(r, 0)), name=_STAGE + "exp"
    )
    total = _reduced(powers, rows, row, "sum", "sum")
    scale = te.compute((rows, 1), lambda r, j: mathematics.number(1.0) / total(r, j), name=_STAGE + "scale")
    return lambda r, i: powers(r, i) * scale(r, 0)


def _log_softmax(read: Read, rows: int, row: Row, attrs: Any, *_: Any) -> Read:
    most = _reduced(read, rows, row, "max", "max", attrs)
    total = _reduced(lambda r, i: mathematics.exp_of_negative(read(r, i) - most(r, 0)), rows, row, "sum", "sum")
    shift = te.compute((rows, 1), lambda r, j: mathematics.log(total(r, j)), name=_STAGE + "shift")
    return lambda r, i: read(r, i) - most(r, 0) - shift(r, 0)


def _layer_norm(
    read: Read, rows: int, row: Row, attrs: Any, options: Any, parameters: tuple[Any, ...], inner: tuple[int, ...]
) -> Read:
    share = mathematics.number(1.0 / row.length)
    total = _reduced(read, rows, row, "sum", "sum", attrs)
    mean = te.compute((rows, 1), lambda r, j: total(r, j) * share, name=_STAGE + "mean")

    def square(r: Any, i: Any) -> Any:
        return mathematics.let(read(r, i) - mean(r, 0), lambda rest: rest * rest)

    squares = _reduced(square, rows, row, "sum", "squares")
    epsilon = mathematics.number(float(options.epsilon))
    scale = te.compute(
        (rows, 1),
        lambda r, j: mathematics.number(1.0) / tirx.sqrt(squares(r, j) * share + epsilon),
        name=_STAGE + "scale",
    )

    def result(r: Any, i: Any) -> Any:
        value = (read(r, i) - mean(r, 0)) * scale(r, 0)
        position = split_index(i, inner)
        if bool(options.scale):
            value = value * parameters[0](*position)
        return value + parameters[1](*position) if bool(options.center) else value

    return result


_RESULTS: Final[dict[str, Callable[..., Any]]] = {
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "layer_norm": _layer_norm,
}


def _reduction(name: str, read: Read, rows: int, row: Row, attrs: Any) -> Callable[[Any], Any]:
    """What gives a row's result: ``finish(row)``."""
    if name in ("argmax", "argmin"):
        best = _reduced(read, rows, row, name[3:], "best", attrs)
        missing = tirx.const(row.length, "int32")

        def place(r: Any, i: Any) -> Any:
            return tirx.Select(read(r, i) == best(r, 0), tirx.Cast("int32", i), missing)

        found = _reduced(place, rows, row, "min", "place")
        return lambda r: tirx.Cast("int64", found(r, 0))
    total = _reduced(read, rows, row, "sum" if name == "mean" else name, name, attrs)
    return lambda r: total(r, 0) * mathematics.number(1.0 / row.length) if name == "mean" else total(r, 0)


_PRODUCT: Final = te.comm_reducer(lambda x, y: x * y, lambda dtype: tirx.const(1, dtype), name="prod")


def _infinite(sign: int, dtype: str) -> Any:
    """What every number of a type is beyond, or is itself: TVM's own reducers start at the largest finite float."""
    if "float" in dtype:
        return tirx.const(sign * float("inf"), dtype)
    return tirx.max_value(dtype) if sign > 0 else tirx.min_value(dtype)


def _greater(x: Any, y: Any) -> Any:  # TVM counts its parameters, and tirx.max has three
    return tirx.max(x, y)


def _less(x: Any, y: Any) -> Any:
    return tirx.min(x, y)


_GREATEST: Final = te.comm_reducer(_greater, lambda dtype: _infinite(-1, dtype), name="max")
_LEAST: Final = te.comm_reducer(_less, lambda dtype: _infinite(1, dtype), name="min")
_JOINS: Final[dict[str, tuple[Any, Callable[[Any, Any], Any]]]] = {
    "sum": (te.sum, operator.add),
    "max": (_GREATEST, tirx.max),
    "min": (_LEAST, tirx.min),
    "prod": (_PRODUCT, operator.mul),
}
"""How a join is written over an axis, and of two values."""


def _reduced(read: Read, rows: int, row: Row, join: str, name: str, attrs: Any = None) -> Any:
    """All elements of each row joined, as [rows, 1].

    Whole steps by lanes first, then halves with halves. What is left behind the last whole step joins where the halves
    have a width that it holds: 13 elements as 8, 4 and 1.
    """
    over, pair = _JOINS[join]
    steps, rest = divmod(row.length, row.step)
    k = te.reduce_axis((0, steps), "k")
    part = te.compute(
        (rows, row.step),
        lambda r, j: over(read(r, k * row.step + j), axis=k),
        name=f"{_STAGE}{name}_{row.step}",
        attrs=attrs,
    )
    width, start = row.step, steps * row.step
    while width > 1:
        width //= 2
        left = start if rest & width else None
        part = _halved(part, read, (rows, width), left, pair, f"{_STAGE}{name}_{width}")
        start += rest & width
    return part


def _halved(
    part: Any, read: Read, shape: tuple[int, int], left: int | None, pair: Callable[[Any, Any], Any], name: str
) -> Any:
    width = shape[1]

    def joined(r: Any, j: Any) -> Any:
        halves = pair(part(r, j), part(r, j + width))
        return halves if left is None else pair(halves, read(r, left + j))

    return te.compute(shape, joined, name=name)


def _axes(call: Any, rank: int) -> tuple[int, ...]:
    """The axes of a reduction; none means all."""
    axis = call.attrs.axis
    if axis is None:
        return tuple(range(rank))
    return numbers(axis) if hasattr(axis, "__len__") else (int(axis),)


def _trailing(axes: tuple[int, ...], rank: int) -> int | None:
    """How many axes there are, where they are the last ones."""
    wanted = sorted(axis % rank for axis in axes)
    return len(wanted) if wanted == list(range(rank - len(wanted), rank)) else None
