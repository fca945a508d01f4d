"""A .rknn file read back without the toolkit: which chip and which toolkit it says that it is for.

Layout, read from files of rknn-toolkit2 2.5.0: ``RKNN``, four zero bytes, then little-endian 64-bit the layout's
version and the size of the body; the body begins at byte 64. After it, a 64-bit length and as much JSON, to the end.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.errors import BuildError

_BODY = 64


@dataclass(frozen=True)
class Container:
    """What a .rknn file says of itself.

    Attributes:
        layout: version of the container.
        platforms: chips that it is for: ``rk3588``.
        version: of the toolkit that wrote it.
    """

    layout: int
    platforms: tuple[str, ...]
    version: str
    size: int


def read_container(path: Path) -> Container:
    """Read the header and the JSON at the end.

    Raises:
        BuildError: it is no whole .rknn file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_BODY)
        if len(head) < _BODY or head[:8] != b"RKNN\0\0\0\0":
            raise BuildError("it does not begin as a .rknn file does", where=path.name)
        layout, body = struct.unpack_from("<QQ", head, 8)
        if _BODY + body + 8 > size:
            raise BuildError("it is cut off: its header promises more bytes than there are", where=path.name)
        stream.seek(_BODY + body)
        (length,) = struct.unpack("<Q", stream.read(8))
        if _BODY + body + 8 + length != size:
            raise BuildError("its last part has not the length that it gives", where=path.name)
        facts = _facts(stream.read(), path.name)
    platforms, version = facts.get("target_platform"), facts.get("version")
    if not isinstance(platforms, list) or not platforms or not isinstance(version, str):
        raise BuildError("it names no chip or no version of the toolkit", where=path.name)
    return Container(layout, tuple(str(each) for each in platforms), version, size)


def _facts(data: bytes, where: str) -> dict[str, Any]:
    try:
        facts = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise BuildError(f"its last part is not JSON: {error}", where=where) from None
    if not isinstance(facts, dict):
        raise BuildError("its last part is not a JSON object", where=where)
    return facts
