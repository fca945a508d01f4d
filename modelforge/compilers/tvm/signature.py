"""What a compiled library says of itself: inputs, outputs and entries, as a text that ``runner.c`` reads.

The format is one line per item; ``*`` is the batch, and a name is the rest of its line::

    modelforge-tvm 1
    input float32 4 * 3 48 192 x
    output float32 2 * 2 probabilities
    entry 4 main_b4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEADER = "modelforge-tvm 1"
FILE_NAME = "signature.txt"
"""The linker makes the symbols ``_binary_signature_txt_start`` and ``_end`` from this name."""


@dataclass(frozen=True)
class Tensor:
    """``shape`` has ``"*"`` first where the leading dimension is the batch; all else is fixed."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Entry:
    """The function that takes ``batch`` samples at once."""

    batch: int
    function: str


@dataclass(frozen=True)
class Signature:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    entries: tuple[Entry, ...]

    def text(self) -> str:
        lines = [HEADER]
        lines += [_line("input", tensor) for tensor in self.inputs]
        lines += [_line("output", tensor) for tensor in self.outputs]
        lines += [f"entry {entry.batch} {entry.function}" for entry in sorted(self.entries, key=lambda e: e.batch)]
        return "\n".join(lines) + "\n"


def parse(text: str) -> Signature:
    """Read what :meth:`Signature.text` wrote.

    Raises:
        ValueError: it is not such a text.
    """
    lines = text.splitlines()
    if not lines or lines[0] != HEADER:
        raise ValueError(f"not a signature: it does not begin with {HEADER!r}")
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    entries: list[Entry] = []
    for line in lines[1:]:
        word, _, rest = line.partition(" ")
        if word == "entry":
            batch, _, function = rest.partition(" ")
            entries.append(Entry(int(batch), function))
        elif word in ("input", "output"):
            (inputs if word == "input" else outputs).append(_tensor(rest))
        else:
            raise ValueError(f"not a line of a signature: {line!r}")
    return Signature(tuple(inputs), tuple(outputs), tuple(entries))


def merge_shapes(shapes: Sequence[tuple[int, ...]], batches: Sequence[int]) -> tuple[int | str, ...]:
    """One shape for a tensor from its shapes at each batch.

    Raises:
        ValueError: it does not have the batch as its leading dimension, and only there: padding a batch up to the
            next entry would change it.
    """
    first = shapes[0]
    follows = all(shape[:1] == (batch,) for shape, batch in zip(shapes, batches, strict=True))
    if not follows or any(shape[1:] != first[1:] for shape in shapes):
        raise ValueError(f"its shapes are {', '.join(map(str, shapes))} at the batches {', '.join(map(str, batches))}")
    return ("*", *first[1:])


def _line(word: str, tensor: Tensor) -> str:
    sizes = "".join(f" {size}" for size in tensor.shape)
    return f"{word} {tensor.dtype} {len(tensor.shape)}{sizes} {tensor.name}"


def _tensor(text: str) -> Tensor:
    dtype, rank, rest = text.split(" ", 2)
    *sizes, name = rest.split(" ", int(rank))
    return Tensor(name, dtype, tuple("*" if size == "*" else int(size) for size in sizes))
