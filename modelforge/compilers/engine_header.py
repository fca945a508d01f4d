"""Reads the header of a TensorRT or TensorRT-RTX engine with no GPU and no NVIDIA software. Nothing is loaded or run.

NVIDIA documents neither layout. It is used to refuse and to describe a file, never to judge that an engine runs; nor
is it a tamper check: digests are. Tag, serialization version and version are read as ``trtexec --getPlanVersionOnly``
reads them (NVIDIA/TensorRT 11.1, samples/common/sampleEngines.cpp); the size and the second tag were measured on
engines that TensorRT-RTX 1.7.1 built for every compute capability.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from modelforge.errors import IntegrityError

HEADER_BYTES = 64
"""What ``IRuntime.engine_header_size`` of TensorRT-RTX says; its body begins here."""

PRODUCTS = {"vtrt": "TensorRT-RTX", "ftrt": "TensorRT"}
"""By the first four bytes. Neither loads the other's engines."""

_BODY_MAGIC = b"NGNE"
_VERSION_END = 28
_AGAIN = "build or pull it again"


@dataclass(frozen=True)
class EngineHeader:
    """The header of an engine.

    Attributes:
        magic: ``vtrt`` or ``ftrt``; ``product`` is what that stands for.
        version: of the product that built it, four numbers: ``(1, 7, 1, 116)``.
        size: length of the file in bytes.
        is_whole: whether the size in the header is that of the file. None for classic TensorRT where the two differ:
            that its header holds the size at all is not known for sure, and its digest tells truncation anyway.
    """

    magic: str
    version: tuple[int, int, int, int]
    size: int
    is_whole: bool | None

    @property
    def product(self) -> str:
        return PRODUCTS[self.magic]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def is_engine(path: Path) -> bool:
    """Whether a file begins as an engine does."""
    try:
        with path.open("rb") as stream:
            return stream.read(4).decode("latin-1") in PRODUCTS
    except OSError:
        return False


def read_header(path: Path, *, magic: str | None = None, version: str | None = None) -> EngineHeader:
    """Read and check the header of an engine file. Only its first bytes are read; nothing is executed.

    Layout, little endian: the tag at 0; serialization version as u32 at 4, which must be 0; file size as u64 at 0x10;
    the version as four bytes at 0x18. TensorRT-RTX has its tag again at 0x1c, and ``NGNE`` at 0x40, where its body
    begins.

    Args:
        magic: the product that it must be of, ``vtrt`` or ``ftrt``; None accepts both.
        version: the version that the engine must have been built with, ``"1.7.1.116"``; None accepts any.

    Raises:
        IntegrityError: the file cannot be read, is no engine (of that product), is truncated or has bytes appended, or
            is of another version.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES + len(_BODY_MAGIC))
    except OSError as error:
        raise IntegrityError(f"the engine cannot be read: {error.strerror}", where=str(path)) from error
    tag = _check_magic(head, magic, path)
    needed = HEADER_BYTES + len(_BODY_MAGIC) if tag == "vtrt" else _VERSION_END
    if len(head) < needed:
        raise IntegrityError(
            f"the engine is truncated: {size} bytes are less than its header", where=str(path), fix=_AGAIN
        )
    is_whole = _check_layout(tag, head, size, path)
    major, minor, patch, build = head[0x18:_VERSION_END]
    header = EngineHeader(tag, (major, minor, patch, build), size, is_whole)
    if version is not None and not _same(header.version_text, version):
        raise IntegrityError(
            f"the engine was built by {header.product} {header.version_text}, not {version}",
            where=str(path),
            fix=f"install {header.product} {header.version_text}, or build the variant again",
        )
    return header


def _same(said: str, wanted: str) -> bool:
    """``10.3.0.26`` is ``10.3.0``: packages leave the build number out at times. What follows ``+`` does not count."""
    numbers = wanted.partition("+")[0].split(".")
    return said.split(".")[: len(numbers)] == numbers


def _check_magic(head: bytes, magic: str | None, path: Path) -> str:
    tag = head[:4].decode("latin-1")
    if tag in PRODUCTS and magic in (None, tag):
        return tag
    if not head:
        raise IntegrityError("an empty file", where=str(path), fix=_AGAIN)
    wanted = PRODUCTS[magic] if magic else "TensorRT or TensorRT-RTX"
    if tag in PRODUCTS:
        what = f"not a {wanted} engine but one of {PRODUCTS[tag]}: it begins with {tag!r}, not {magic!r}"
        fix = "engines of classic TensorRT do not load in TensorRT-RTX, nor the other way round"
    elif head[4:5] == b"{":
        what = f"not a bare {wanted} engine: metadata in JSON stands before it, as Ultralytics writes"
        fix = "build the engine with ModelForge from the ONNX model"
    else:
        starts = " or ".join(repr(each) for each in ([magic] if magic else PRODUCTS))
        what, fix = f"not a {wanted} engine: it begins with {head[:4]!r}, not {starts}", "give an engine file"
    raise IntegrityError(what, where=str(path), fix=fix)


def _check_layout(tag: str, head: bytes, size: int, path: Path) -> bool | None:
    """Whether the file is as long as its header says; None where that cannot be known."""
    (serialization,) = struct.unpack_from("<I", head, 4)
    damaged = "the engine's header is damaged, or of a version whose layout is not known"
    if serialization != 0:
        raise IntegrityError(damaged, where=str(path), fix=_AGAIN)
    said = struct.unpack_from("<Q", head, 0x10)[0]
    if tag == "ftrt":
        return True if said == size else None
    if said != size:
        kind = "truncated" if size < said else "longer than it should be"
        raise IntegrityError(
            f"the engine is {kind}: its header says {said} bytes, the file has {size}", where=str(path), fix=_AGAIN
        )
    if head[0x1C:0x20] != tag.encode() or head[HEADER_BYTES:] != _BODY_MAGIC:
        raise IntegrityError(damaged, where=str(path), fix=_AGAIN)
    return True
