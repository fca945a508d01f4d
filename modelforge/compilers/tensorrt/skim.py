"""An ONNX file without its large weights: what the preflight wants of it, read in a tenth of the time.

Walks protobuf's wire format (https://protobuf.dev/programming-guides/encoding/) down to the initializers, and leaves
out the bytes of those that are large. Whatever it does not understand is left to protobuf, which knows what to say.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # its types are another package

LARGE = 64 * 1024
"""Bytes of an initializer's data from which on they are left out. Scales, zero points and shapes are far smaller."""

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, and the data fields of TensorProto.
_GRAPH, _INITIALIZER = 7, 5
_DATA = frozenset({4, 5, 7, 9, 10, 11})
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def skim(path: Path) -> onnx.ModelProto:
    """The model, with the data of large initializers left out.

    Raises:
        ModelError: the file is not an ONNX model.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            model = onnx.ModelProto()
            model.ParseFromString(_without_large(mapped, 0, len(mapped), (_GRAPH, _INITIALIZER)))
    except (OSError, ValueError, IndexError, DecodeError):
        return _as_protobuf_says(path)
    return model if model.graph.node else _as_protobuf_says(path)


def _as_protobuf_says(path: Path) -> onnx.ModelProto:
    from modelforge.graph.load import parse

    return parse(path)


def _without_large(data: mmap.mmap, start: int, end: int, path: tuple[int, ...]) -> bytes:
    """A message copied field by field; ``path`` are the fields that lead to tensors, whose large data is left out."""
    parts: list[bytes] = []
    for number, begin, content, after in _fields(data, start, end):
        if path and number == path[0] and content is not None:
            inner = _without_large(data, content, after, path[1:])
            parts += [_varint(number << 3 | _BYTES), _varint(len(inner)), inner]
        elif not path and number in _DATA and content is not None and after - content > LARGE:
            continue
        else:
            parts.append(data[begin:after])
    return b"".join(parts)


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int | None, int]]:
    """Number, where the field begins, where its content does (of length-delimited ones), where it ends."""
    while at < end:
        begin = at
        key, at = _read_varint(data, at)
        kind, content = key & 7, None
        if kind == _VARINT:
            _, at = _read_varint(data, at)
        elif kind == _BYTES:
            length, content = _read_varint(data, at)
            at = content + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError("a field that is longer than its message")
        yield key >> 3, begin, content, at


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
