"""Softmax, layer norm and reductions over the last axes: a row at a time, in cache, by vectors.

Idea: LLVM may not reorder sums of floats, so the order is written here: a row is read in steps of a few vectors, each lane
of each vector has a partial result of its own, and a tree of halves joins them. The stages of one row follow each other
(maximum, exponentials, sum, division), so that all but the first find it in the first-level cache. A row that is no
multiple of a vector is first copied beside zeros (or what the operation ignores) when it is read more than once; else its
last elements are joined one by one. Bound: the bytes of a row, read and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
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
from modelforge.compilers.tvm.kernels.matmul import flat_index, split_index
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.machine import Machine

_STAGE: Final = "row_"
"""How the names of a row's stages begin: what else stands in a kernel was fused with it."""
Read = Callable[[Any, Any], Any]
"""An element of a row: ``read(row, position)``."""


@dataclass(frozen=True)
class Row:
    """How a row of ``length`` elements is walked: ``chains`` vectors of ``lanes`` a step.

    ``padded`` is the length in whole steps, rounded up.
    """

    length: int
    lanes: int
    chains: int

    @property
    def step(self) -> int:
        """Elements of one step."""
        return self.lanes * self.chains

    @property
    def padded(self) -> int:
        """The length in whole steps."""
        return -(-self.length // self.step) * self.step


def row_of(length: int, machine: Machine) -> Row:
    """Four vectors a step hide the latency of a sum; fewer where they would not be filled."""
    lanes = machine.lanes()
    while lanes > 4 and length <= lanes // 2:
        lanes //= 2
    vectors = -(-length // lanes)
    fitting = [chains for chains in (4, 2) if vectors % chains == 0 or (length % lanes and vectors >= 8 * chains)]
    return Row(length, lanes, fitting[0] if fitting else 1)


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
            return None
        leading, inner = shape[: len(shape) - count], shape[len(shape) - count :]
        row = row_of(prod(inner), machine)
        attrs = {RULE: self.name, MACS: 0, TILE: [row.lanes, row.chains]}

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
        lanes, chains = (int(value) for value in sch.get(anchor).annotations[TILE])
        count_rows_as_one(sch, out)
        rows, elements = sch.get_loops(out)
        length = extent(sch, elements)
        _vectors(sch, elements, length, lanes)
        _stages(sch, rows, lanes, machine)
        return f"{chains} vectors of {lanes}"


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
        if row.length < row.lanes:
            return None
        if row.length < row.step:
            row = Row(row.length, row.lanes, 1)
        kept = (*leading, *((1,) * count)) if bool(call.attrs.keepdims) else leading
        attrs = {RULE: self.name, MACS: 0, TILE: [row.lanes, row.chains]}

        def compute(data: Any) -> Any:
            def read(r: Any, i: Any) -> Any:
                return data[(*split_index(r, leading), *split_index(i, inner))]

            finish = _reduction(name, read, prod(leading), row, attrs)
            return te.compute(kept, lambda *i: finish(flat_index(i[: len(leading)], leading)), name="result")

        return emit_kernel(builder, compute, data, name=name, pattern=COMMREDUCE)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        lanes, chains = (int(value) for value in sch.get(anchor).annotations[TILE])
        for name in [block_name(sch, block) for block in blocks(sch)[:-1]]:
            if not name.startswith(_STAGE):
                sch.compute_inline(sch.get_sblock(name))
        loops = sch.get_loops(blocks(sch)[-1])
        rows = sch.fuse(*loops) if len(loops) > 1 else loops[0] if loops else None
        if rows is None:
            rows = sch.add_unit_loop(blocks(sch)[-1])
        _stages(sch, rows, lanes, machine)
        return f"{chains} vectors of {lanes}"


def _stages(sch: Any, rows: Any, lanes: int, machine: Machine) -> None:
    """Put every stage under the loop over rows, last first, and turn each into vectors."""
    names = [name for name in (block_name(sch, block) for block in blocks(sch)) if name.startswith(_STAGE)]
    work = 0
    for name in reversed(names):
        block = sch.get_sblock(name)
        work += prod(extent(sch, loop) for loop in sch.get_loops(block))
        sch.compute_at(block, rows, preserve_unit_loops=True)
        sch.set_scope(block, 0, "local" if "part" in name else "global")
    if work >= PARALLEL_WORK and machine.cores > 1 and extent(sch, rows) > 1:
        sch.parallel(rows)
    for name in names:
        block = sch.get_sblock(name)
        own = sch.get_loops(block)[1:]
        if not is_reduction(sch, block):
            _vectors(sch, own[-1], extent(sch, own[-1]), lanes, unroll="part" in name)
            continue
        *_, element, k = own
        sch.reorder(k, element)
        if extent(sch, element) > 1:
            _vectors(sch, element, extent(sch, element), lanes, unroll=True)
        sch.decompose_reduction(block, k)


def _vectors(sch: Any, loop: Any, length: int, lanes: int, unroll: bool = False) -> None:
    """Vectors over a loop; where the last is not full, its elements one by one."""
    if length == 1:
        return
    if length <= lanes and length & (length - 1) == 0:
        sch.vectorize(loop)
        return
    outer, lane = sch.split(loop, factors=[None, lanes])
    sch.vectorize(lane)
    if length % lanes:
        partition(sch, outer)
    elif unroll:
        sch.unroll(outer)


def _softmax(read: Read, rows: int, row: Row, attrs: Any, *_: Any) -> Any:
    whole = _whole(read, rows, row, -float("inf"))
    most = _joined(whole, rows, row, te.max, tirx.max, "max", attrs)
    powers = te.compute(
        (rows, row.padded),
        lambda r, i: mathematics.exp_of_negative(whole(r, i) - most[r, 0]),
        name=_STAGE + "exp",
    )
    total = _joined(powers, rows, row, te.sum, _add, "sum")
    scale = te.compute((rows, 1), lambda r, j: mathematics.number(1.0) / total[r, j], name=_STAGE + "part_scale")
    return lambda r, i: powers[r, i] * scale[r, 0]


def _log_softmax(read: Read, rows: int, row: Row, attrs: Any, *_: Any) -> Any:
    whole = _whole(read, rows, row, -float("inf"))
    most = _joined(whole, rows, row, te.max, tirx.max, "max", attrs)
    total = _joined(
        lambda r, i: mathematics.exp_of_negative(whole(r, i) - most[r, 0]), rows, row, te.sum, _add, "sum"
    )
    shift = te.compute((rows, 1), lambda r, j: most[r, j] + mathematics.log(total(r, j)), name=_STAGE + "part_shift")
    return lambda r, i: whole(r, i) - shift[r, 0]


def _layer_norm(
    read: Read, rows: int, row: Row, attrs: Any, options: Any, parameters: tuple[Any, ...], inner: tuple[int, ...]
) -> Any:
    share = mathematics.number(1.0 / row.length)
    whole = _whole(read, rows, row, 0.0)
    total = _joined(whole, rows, row, te.sum, _add, "sum", attrs)
    mean = te.compute((rows, 1), lambda r, j: total[r, j] * share, name=_STAGE + "part_mean")
    rest = _whole(lambda r, i: whole(r, i) - mean[r, 0], rows, row, 0.0, name="rest", always=True)
    squares = _joined(lambda r, i: rest(r, i) * rest(r, i), rows, row, te.sum, _add, "squares")
    epsilon = mathematics.number(float(options.epsilon))
    scale = te.compute(
        (rows, 1),
        lambda r, j: mathematics.number(1.0) / tirx.sqrt(squares[r, j] * share + epsilon),
        name=_STAGE + "part_scale",
    )

    def result(r: Any, i: Any) -> Any:
        value = rest(r, i) * scale[r, 0]
        position = split_index(i, inner)
        if bool(options.scale):
            value = value * parameters[0][position]
        return value + parameters[1][position] if bool(options.center) else value

    return result


_RESULTS: Final[dict[str, Callable[..., Any]]] = {
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "layer_norm": _layer_norm,
}


def _reduction(name: str, read: Read, rows: int, row: Row, attrs: Any) -> Callable[[Any], Any]:
    """What gives a row's result: ``finish(row)``."""
    if name in ("argmax", "argmin"):
        join, pair = (te.max, tirx.max) if name == "argmax" else (te.min, tirx.min)
        best = _reduced(read, rows, row, join, pair, "best", attrs)
        missing = tirx.const(row.length, "int32")
        found = _reduced(
            lambda r, i: tirx.Select(read(r, i) == best[r, 0], i, missing), rows, row, te.min, tirx.min, "position", attrs
        )
        return lambda r: tirx.Cast("int64", found[r, 0])
    join, pair = _JOINS["sum" if name == "mean" else name]
    total = _reduced(read, rows, row, join, pair, name, attrs)
    return lambda r: total[r, 0] * mathematics.number(1.0 / row.length) if name == "mean" else total[r, 0]


def _add(left: Any, right: Any) -> Any:
    return left + right


def _times(left: Any, right: Any) -> Any:
    return left * right


_PRODUCT: Final = te.comm_reducer(_times, lambda dtype: tirx.const(1, dtype), name="prod")
_JOINS: Final[dict[str, tuple[Any, Callable[[Any, Any], Any]]]] = {
    "sum": (te.sum, _add),
    "max": (te.max, tirx.max),
    "min": (te.min, tirx.min),
    "prod": (_PRODUCT, _times),
}


def _whole(read: Read, rows: int, row: Row, filler: float, name: str = "copy", always: bool = False) -> Read:
    """A row in whole steps: itself where it is, else a copy with ``filler`` behind it."""
    if row.padded == row.length and not always:
        return read
    value = mathematics.number(filler)

    def element(r: Any, i: Any) -> Any:
        if row.padded == row.length:
            return read(r, i)
        return tirx.if_then_else(tirx.likely(i < row.length), read(r, i), value)

    copy: Read = te.compute((rows, row.padded), element, name=_STAGE + name)
    return copy


def _joined(
    read: Read,
    rows: int,
    row: Row,
    join: Any,
    pair: Callable[[Any, Any], Any],
    name: str,
    attrs: Any = None,
    steps: int | None = None,
) -> Any:
    """All elements of whole steps joined into [rows, 1]: by lanes first, then by halves."""
    k = te.reduce_axis((0, row.padded // row.step if steps is None else steps), "k")
    part = te.compute(
        (rows, row.step),
        lambda r, j: join(read(r, k * row.step + j), axis=k),
        name=f"{_STAGE}part_{name}",
        attrs=attrs,
    )
    width = row.step
    while width > 1:
        width //= 2
        part = _halved(part, rows, width, pair, f"{_STAGE}part_{name}_{width}")
    return part


def _halved(part: Any, rows: int, width: int, pair: Callable[[Any, Any], Any], name: str) -> Any:
    return te.compute((rows, width), lambda r, j: pair(part[r, j], part[r, j + width]), name=name)


def _reduced(
    read: Read, rows: int, row: Row, join: Any, pair: Callable[[Any, Any], Any], name: str, attrs: Any
) -> Any:
    """A row that is read once: whole steps by lanes, what is left behind them one by one."""
    steps, rest = divmod(row.length, row.step)
    total = _joined(read, rows, row, join, pair, name, attrs, steps)
    if not rest:
        return total
    k = te.reduce_axis((0, rest), "t")
    tail = te.compute(
        (rows, 1), lambda r, j: join(read(r, steps * row.step + k), axis=k), name=f"{_STAGE}part_{name}_tail"
    )
    return te.compute((rows, 1), lambda r, j: pair(total[r, j], tail[r, j]), name=f"{_STAGE}part_{name}_all")


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
