"""What a compiled library says of itself: a text that ``runner.c`` and ``player.py`` read.

The format is one line per item; ``*`` is the batch, and a name is the rest of its line::

    modelforge-tvm 2
    threads 4                               as many as the profile has cores
    input float32 4 * 3 48 192 x            type, rank, shape, name
    output float32 2 * 2 probabilities
    weights 1024                            bytes of all weights together
    weight 0 float32 5 2 3 3 3 8            where it lies in them, type, rank, shape
    weight 960 float32 1 16
    entry 4 main_b4 0 1                     batch, function, the weights (by line, from 0) that follow its inputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

HEADER: Final = "modelforge-tvm 2"
FILE_NAME: Final = "signature.txt"
"""The linker makes the symbols ``_binary_signature_txt_start`` and ``_end`` from this name."""
WEIGHTS_NAME: Final = "weights.bin"
"""Likewise."""
ALIGNMENT: Final = 64
"""Bytes: every weight lies at a multiple of it. TVM's kernels are made for tensors that do (``kAllocAlignment``)."""
DTYPES: Final = frozenset(
    ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
)
"""What the runners read and write, in NumPy's names."""


@dataclass(frozen=True)
class Tensor:
    """``shape`` has ``"*"`` first where the leading dimension is the batch; all else is fixed."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Weight:
    """An array of the weights: its first byte is the ``offset``-th of them all."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """The function that takes ``batch`` samples at once; ``weights`` are the rows of ``Signature.weights`` that it
    takes after its inputs."""

    batch: int
    function: str
    weights: tuple[int, ...] = ()


@dataclass(frozen=True)
class Signature:
    """``threads`` is how many the code was made for, ``weight_bytes`` the length of all weights together."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    entries: tuple[Entry, ...]
    weights: tuple[Weight, ...] = ()
    weight_bytes: int = 0
    threads: int = 1

    def text(self) -> str:
        lines = [HEADER, f"threads {self.threads}"]
        lines += [_line("input", tensor) for tensor in self.inputs]
        lines += [_line("output", tensor) for tensor in self.outputs]
        lines.append(f"weights {self.weight_bytes}")
        lines += [_numbers(f"weight {each.offset} {each.dtype} {len(each.shape)}", each.shape) for each in self.weights]
        entries = sorted(self.entries, key=lambda entry: entry.batch)
        lines += [_numbers(f"entry {entry.batch} {entry.function}", entry.weights) for entry in entries]
        return "\n".join(lines) + "\n"


def parse(text: str) -> Signature:
    """Read what :meth:`Signature.text` wrote.

    Raises:
        ValueError: it is not such a text.
    """
    lines = text.splitlines()
    if not lines or lines[0] != HEADER:
        begun = lines[0][:40] if lines else ""
        raise ValueError(f"not a signature that this version reads: it begins with {begun!r}, not with {HEADER!r}")
    found: dict[str, list[Any]] = {word: [] for word in _PARSERS}
    for line in lines[1:]:
        word, _, rest = line.partition(" ")
        if word not in _PARSERS:
            raise ValueError(f"not a line of a signature: {line!r}")
        found[word].append(_PARSERS[word](rest))
    if not found["entry"]:
        raise ValueError("not a whole signature: it has no entry")
    return Signature(
        inputs=tuple(found["input"]),
        outputs=tuple(found["output"]),
        entries=tuple(found["entry"]),
        weights=tuple(found["weight"]),
        weight_bytes=sum(found["weights"]),
        threads=max(found["threads"], default=1),
    )


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
    return _numbers(f"{word} {tensor.dtype} {len(tensor.shape)}", tensor.shape) + f" {tensor.name}"


def _numbers(text: str, numbers: Sequence[int | str]) -> str:
    return " ".join([text, *map(str, numbers)])


def _tensor(text: str) -> Tensor:
    dtype, rank, rest = text.split(" ", 2)
    *sizes, name = rest.split(" ", int(rank))
    return Tensor(name, dtype, tuple("*" if size == "*" else int(size) for size in sizes))


def _weight(text: str) -> Weight:
    offset, dtype, _, *sizes = text.split(" ")
    return Weight(int(offset), dtype, tuple(map(int, sizes)))


def _entry(text: str) -> Entry:
    batch, function, *rows = text.split(" ")
    return Entry(int(batch), function, tuple(map(int, rows)))


_PARSERS: Final[dict[str, Callable[[str], Any]]] = {
    "threads": int,
    "input": _tensor,
    "output": _tensor,
    "weights": int,
    "weight": _weight,
    "entry": _entry,
}
