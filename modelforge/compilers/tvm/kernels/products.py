"""Products of two activations, as in attention: sums held in registers, operands read where they lie.

Idea: the tile of :mod:`.matmul`, once per batch (head). The second operand is read in vectors along its columns; where
its columns are not neighbours in memory (keys, which come transposed), or do not fill vectors, it is first packed as
constant weights are, at run time, once per batch: a pass over inner x columns elements before rows times as many sums.
Operands are views (:mod:`.views`): the slices and permutations before them are indices. Bound: that of :mod:`.matmul`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from modelforge.compilers.tvm.api import (
    OUT_FUSIBLE,
    block_annotations,
    block_name,
    dtype_of,
    emit_kernel,
    extent,
    regroup,
    te,
    tirx,
    written_dtype,
)
from modelforge.compilers.tvm.kernels import halves, tiles
from modelforge.compilers.tvm.kernels.loops import PARALLEL_WORK, neighbours, partition, spread
from modelforge.compilers.tvm.kernels.matmul import choose, copy_rows, in_tiles, lanewise, split_off_loads, sum_tile
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, TILE
from modelforge.compilers.tvm.kernels.views import View, flat_index, split_index, view_of
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class Product:
    """The geometry of a batched product, and how its second operand is read."""

    batch: tuple[int, ...]
    rows: int
    inner: int
    columns: int
    tile: tiles.Tile
    depth: int
    packed: bool

    @property
    def tall(self) -> int:
        """Rows in whole tiles."""
        return tiles.up(self.rows, self.tile.rows)

    @property
    def deep(self) -> int:
        """The inner axis in whole loads."""
        return tiles.up(self.inner, self.depth)

    @property
    def blocks(self) -> int:
        """Tiles along the columns."""
        return -(-self.columns // self.tile.columns)


@dataclass(frozen=True)
class Products:
    """Products of two tensors that are known at run time, or have a matrix for each batch."""

    name: str = "product"
    operators: tuple[str, ...] = ("relax.matmul",)

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        dtype = dtype_of(call.args[0])
        if dtype not in ("float32", "float16") or dtype_of(call.args[1]) != dtype:
            return None
        left, right = (view_of(argument, builder) for argument in call.args)
        if min(len(left.shape), len(right.shape)) < 2 or 0 in left.shape + right.shape:
            return None
        return multiply(left, right, dtype, builder, machine)

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        rows, vectors, lanes, batched = (int(value) for value in block_annotations(sch, anchor)[TILE])
        total = halves.total_of(sch, anchor)
        prepared, after = neighbours(sch, total, machine)
        pads, loads = split_off_loads(sch, prepared if total is anchor else prepared[:-1])
        names = [block_name(sch, block) for block in pads]
        out = after[-1]
        work = prod(extent(sch, loop) for loop in sch.get_loops(anchor))
        columns = extent(sch, sch.get_loops(out)[-1])
        axes = len(sch.get_loops(out))
        regroup(sch, out, [axes - 2, 1, 1] if batched else [axes - 1, 1])
        *outermost, row, column = sch.get_loops(out)
        row, row_tile = sch.split(row, factors=[None, rows])
        block, column = sch.split(column, factors=[None, vectors * lanes])
        sch.reorder(*outermost, block, row, row_tile, column)
        sch.set_scope(total, 0, "local")
        sch.compute_at(total, row, preserve_unit_loops=True)
        begin = halves.sum_blocks(sch, anchor, total, lanes)
        vector, lane = sch.split(column, factors=[vectors, lanes])
        sch.vectorize(lane)
        sch.unroll(row_tile)
        sch.unroll(vector)
        whole = columns % lanes == 0
        if not whole:
            partition(sch, block if extent(sch, block) > 1 else vector)
        by_batch = bool(outermost) and extent(sch, outermost[0]) >= machine.cores
        if by_batch:
            for block_before in (*loads, *(sch.get_sblock(name) for name in reversed(names))):
                sch.compute_at(block_before, outermost[0], preserve_unit_loops=True)
            spread(sch, outermost, work, machine)
        elif whole:
            spread(sch, [*outermost, block, row], work, machine)
        elif work >= PARALLEL_WORK and machine.cores > 1:
            sch.parallel(block if extent(sch, block) > 1 else row)
        sum_tile(sch, anchor, vectors, lanes, loads, machine)
        if begin is not None:
            sch.decompose_reduction(total, begin)
        for name in names:
            _copy(sch, sch.get_sblock(name), by_batch, machine)
        return f"{rows}x{vectors * lanes}" + (" packed" if "pad_right" in names else "")


def multiply(left: View, right: View, dtype: str, builder: Any, machine: Machine) -> Any:
    """Emit the product of two views, [..., rows, inner] by [..., inner, columns]; the leading axes broadcast."""
    (*first, rows, inner), (*second, _, columns) = left.shape, right.shape
    batch = _broadcast(first, second)
    if prod(second) == 1:  # one matrix for all: the leading axes of the left count as rows
        rows = rows * prod(first)
    flat = batch if prod(second) > 1 else ()
    tile = choose(rows, columns, machine, dtype)
    depth = lanewise(inner, machine, dtype) if left.contiguous else 1
    packed = not right.contiguous or columns % tile.columns != 0 or inner % depth != 0
    product = Product(flat, rows, inner, columns, tile, depth, packed)
    macs = prod(flat) * rows * inner * columns
    attrs = {RULE: Products.name, MACS: macs, TILE: [tile.rows, tile.vectors, tile.lanes, bool(flat)]}
    shape = (*batch, left.shape[-2], columns)

    def compute(first_data: Any, second_data: Any) -> Any:
        def read_left(b: Any, r: Any, k: Any) -> Any:
            index = split_index(r, left.shape[:-1]) if not flat else (*_own(b, flat, first), r)
            return first_data(*left.at((*index, k)))

        def read_right(b: Any, k: Any, c: Any) -> Any:
            return second_data(*right.at((*_own(b, flat, second), k, c)))

        size, whole = (product.rows, product.inner), (product.tall, product.deep)
        read = in_tiles(read_left, (prod(flat),), size, whole, product.depth, dtype)
        full = _sums(product, read, _wide(product, read_right, dtype), machine, dtype, attrs)
        factor = left.factor * right.factor

        def result(*index: Any) -> Any:
            leading = index[:-1]
            place = (0, flat_index(leading, shape[:-1])) if not flat else (flat_index(leading[:-1], flat), leading[-1])
            value = full(*place, index[-1])
            return value if factor == 1.0 else value * tirx.const(factor, dtype)

        return te.compute(shape, result, name="crop")

    return emit_kernel(builder, compute, left.data, right.data, name="product", pattern=OUT_FUSIBLE)


def _wide(product: Product, read: Any, dtype: str) -> Any:
    """The right operand: read where it is, or packed as [batch][blocks][inner][columns of a tile]."""
    if not product.packed:
        return read
    width = product.tile.columns
    zero = tirx.const(0, dtype)

    def element(b: Any, block: Any, k: Any, c: Any) -> Any:
        value = read(b, k, block * width + c)
        if product.columns % width:
            value = tirx.if_then_else(block * width + c < product.columns, value, zero)
        return value if product.deep == product.inner else tirx.if_then_else(k < product.inner, value, zero)

    packed = te.compute(
        (prod(product.batch), product.blocks, product.deep, width),
        element,
        name="pad_right",
    )
    return lambda b, k, c: packed(b, c // width, k, c % width)


def _sums(product: Product, left: Any, right: Any, machine: Machine, dtype: str, attrs: Any) -> Any:
    shape = (prod(product.batch), product.tall, product.blocks * product.tile.columns)

    def term(b: Any, r: Any, c: Any, k: Any) -> Any:
        return left(b, r, k) * right(b, k, c)

    return halves.total(shape, (product.deep,), term, machine, dtype, name="product", attrs=attrs)


def _copy(sch: Any, block: Any, by_batch: bool, machine: Machine) -> None:
    """Vectors of a prepared operand; within a batch the threads are busy already."""
    if not by_batch:
        copy_rows(sch, block, machine)
        return
    last = sch.get_loops(block)[-1]
    lanes = machine.lanes(written_dtype(sch, block))
    if extent(sch, last) % lanes == 0:
        rest, lane = sch.split(last, factors=[None, lanes])
        sch.vectorize(lane)
        partition(sch, rest)


def _own(batch: Any, sizes: tuple[int, ...], wanted: list[int]) -> tuple[Any, ...]:
    """A batch's index in an operand that has fewer axes, or axes of one."""
    if not sizes:
        return (0,) * len(wanted)
    if not wanted:
        return ()
    index = split_index(batch, sizes)[len(sizes) - len(wanted) :]
    return tuple(0 if size == 1 else position for position, size in zip(index, wanted, strict=True))


def _broadcast(first: list[int], second: list[int]) -> tuple[int, ...]:
    count = max(len(first), len(second))
    padded = [[1] * (count - len(sizes)) + list(sizes) for sizes in (first, second)]
    return tuple(max(pair) for pair in zip(*padded, strict=True))
