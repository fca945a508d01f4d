"""What may lie in a bundle's folder beside its blobs: the OCI documents, and signatures. The rest is a stray."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from modelforge.bundle import format as words
from modelforge.bundle import parts


def signature_strays(root: Path) -> list[str]:
    """What lies in ``signatures/`` and is no signature by its name, relative to ``root``.

    Args:
        root: the folder of the OCI documents.

    Raises:
        OSError: the folder cannot be listed.
    """
    place = root / words.SIGNATURES
    if not os.path.lexists(place):
        return []
    if not stat.S_ISDIR(os.lstat(place).st_mode):
        return [words.SIGNATURES]
    known = set(signature_names(root))
    return sorted(f"{words.SIGNATURES}/{name}" for name in os.listdir(place) if name not in known)


def signature_names(root: Path) -> list[str]:
    """Files in ``signatures/`` that are signatures by their names; none where there is no such folder.

    Raises:
        OSError: the folder cannot be listed, or is none.
    """
    place = root / words.SIGNATURES
    if not os.path.lexists(place):
        return []
    if place.is_symlink():
        raise NotADirectoryError(0, "is a symbolic link", str(place))
    return sorted(
        name
        for name in os.listdir(place)
        if words.is_signature_name(name) and stat.S_ISREG(os.lstat(place / name).st_mode)
    )


def keep_signatures(standing: Path, root: Path) -> None:
    """Copy the signatures of a bundle that is about to be replaced by the same one: they hold for it too."""
    for name in signature_names(standing):
        (root / words.SIGNATURES).mkdir(exist_ok=True)
        document = (standing / words.SIGNATURES / name).read_bytes()
        parts.write_file(root / words.SIGNATURES / name, document, mode=0o666)
