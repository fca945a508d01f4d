"""Constants as parameters: all that a model has learned lies once in the library, and is read where it lies.

A constant inside TVM's executable is copied to the heap of every process that loads it, for every entry anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from modelforge.compilers.tvm.api import Mutator, constant_value, graphs, mutator, relax
from modelforge.compilers.tvm.signature import ALIGNMENT, DTYPES, Weight

SMALLEST: Final = 256
"""Bytes. Smaller constants stay in the executable: a parameter costs a check at each call (about 50 ns), and 64 bytes
in the table of the runner."""


@dataclass(frozen=True)
class Weights:
    """What was lifted.

    Attributes:
        blob: the file that holds all arrays, C order, little endian, each at a multiple of ``ALIGNMENT``.
        size: its length in bytes.
        table: where each array lies in it; two arrays of the same bytes share a place.
        uses: by entry, the rows of ``table`` that it takes as parameters, in their order, after its inputs.
    """

    blob: Path
    size: int
    table: tuple[Weight, ...]
    uses: Mapping[str, tuple[int, ...]]


def lift(module: Any, blob: Path) -> tuple[Any, Weights]:
    """Turn the constants of every entry into parameters of it, and write their bytes to ``blob``.

    The order in the file is that of first use, so that running the model reads it from the front to the back.
    """
    uses: dict[str, tuple[int, ...]] = {}
    with blob.open("wb") as stream:
        writer = _Writer(stream)
        for name, graph in graphs(module):
            lifter = _Lift(module, writer)
            lifted = lifter.visit_expr(graph)
            parameters = [*lifted.params, *lifter.parameters.values()]
            full = relax.Function(parameters, lifted.body, lifted.ret_ty, lifted.is_pure, lifted.attrs)
            module[name] = full
            uses[name.name_hint] = tuple(lifter.parameters)
    return module, Weights(blob, writer.size, tuple(writer.table), uses)


@mutator
class _Lift(Mutator):  # type: ignore[misc]  # TVM ships no types
    def __init__(self, module: Any, writer: _Writer) -> None:
        super().__init__(module)
        self._writer = writer
        self.parameters: dict[int, Any] = {}

    def visit_generic_const_(self, op: Any) -> Any:
        array = constant_value(op)
        if array.nbytes < SMALLEST or array.dtype.name not in DTYPES:
            return op
        row = self._writer.row(np.ascontiguousarray(array))
        if row not in self.parameters:
            self.parameters[row] = relax.Var(f"weight_{row}", op.ty)
        return self.parameters[row]


class _Writer:
    """Writes arrays one behind the other, each content once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._places: dict[bytes, int] = {}
        self._rows: dict[Weight, int] = {}
        self.size = 0

    @property
    def table(self) -> list[Weight]:
        return list(self._rows)

    def row(self, array: np.ndarray[Any, Any]) -> int:
        """The row of the table that stands for this array; it is written if nothing like it was."""
        content = array.data.cast("B")
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            padding = -self.size % ALIGNMENT
            self._stream.write(b"\0" * padding)
            self._stream.write(content)
            self._places[digest] = self.size + padding
            self.size += padding + array.nbytes
        weight = Weight(self._places[digest], array.dtype.name, tuple(array.shape))
        return self._rows.setdefault(weight, len(self._rows))
