"""Reads the header of a TensorRT-RTX engine with no GPU and no NVIDIA software: whole, truncated or garbage.

The layout is not documented by NVIDIA. It was measured on engines that 1.7.1 built for every compute capability,
so it is used to refuse and to describe a file, never to judge that an engine runs. It is no tamper check either.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from modelforge.errors import IntegrityError

HEADER_BYTES = 64
"""What ``IRuntime.engine_header_size`` says; the body begins here."""

_MAGIC = b"vtrt"
_BODY_MAGIC = b"NGNE"


@dataclass(frozen=True)
class EngineHeader:
    """The header of a ``vtrt`` engine.

    Attributes:
        magic: ``vtrt``.
        version: of the TensorRT-RTX that built it, four numbers: ``(1, 7, 1, 116)``.
        size: length of the whole engine in bytes, equal to that of the file.
    """

    magic: str
    version: tuple[int, int, int, int]
    size: int

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def read_header(path: Path, *, version: str | None = None) -> EngineHeader:
    """Read and check the header of an engine file. Only its first bytes are read; nothing is executed.

    Layout, little endian: ``vtrt`` at 0; file size as u64 at 0x10; version as four bytes at 0x18; ``vtrt`` at 0x1c;
    the body at 0x40 begins with ``NGNE``.

    Args:
        version: the version that the engine must have been built with, ``"1.7.1.116"``; None accepts any.

    Raises:
        IntegrityError: the file cannot be read, is no TensorRT-RTX engine, is truncated or has bytes appended, or
            is of another version.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES + len(_BODY_MAGIC))
    except OSError as error:
        raise IntegrityError(f"the engine cannot be read: {error.strerror}", where=str(path)) from error
    _check_magic(head, size, path)
    (said,) = struct.unpack_from("<Q", head, 0x10)
    if said != size:
        kind = "truncated" if size < said else "longer than it should be"
        raise IntegrityError(
            f"the engine is {kind}: its header says {said} bytes, the file has {size}",
            where=str(path),
            fix="build or pull it again",
        )
    major, minor, patch, build = head[0x18:0x1C]
    header = EngineHeader(_MAGIC.decode(), (major, minor, patch, build), size)
    if version is not None and header.version_text != version:
        raise IntegrityError(
            f"the engine was built by TensorRT-RTX {header.version_text}, not {version}",
            where=str(path),
            fix=f"install TensorRT-RTX {header.version_text}, or build the variant again",
        )
    return header


def _check_magic(head: bytes, size: int, path: Path) -> None:
    if head[:4] != _MAGIC:
        raise IntegrityError(
            f"not a TensorRT-RTX engine: it begins with {head[:4]!r}, not {_MAGIC!r}" if head else "an empty file",
            where=str(path),
            fix="engines of classic TensorRT do not load in TensorRT-RTX, nor the other way round",
        )
    if len(head) < HEADER_BYTES + len(_BODY_MAGIC):
        raise IntegrityError(
            f"the engine is truncated: {size} bytes are less than its header", where=str(path), fix="build it again"
        )
    if head[0x1C:0x20] != _MAGIC or head[HEADER_BYTES:] != _BODY_MAGIC:
        raise IntegrityError(
            "the engine's header is damaged, or of a version whose layout is not known",
            where=str(path),
            fix="build or pull it again",
        )
