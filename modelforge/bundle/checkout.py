"""Writing what was pulled: a checkout (files of the chosen variants under their titles) or a whole layout.

A checkout keeps the OCI documents in ``.modelforge/``, so that it opens, verifies and inspects as the bundle that it
is a part of (:mod:`modelforge.bundle.read`). It appears whole or not at all. Knows no registry.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from modelforge.bundle import format as words
from modelforge.bundle import parts
from modelforge.bundle.documents import top_document
from modelforge.bundle.read import CHECKOUT, Bundle, documents_folder, open_bundle, recorded_digest, verify_integrity
from modelforge.errors import InputError, IntegrityError
from modelforge.store import digest_bytes

_BLOB_MODE = 0o444


def standing(destination: Path, *, force: bool) -> Bundle | None:
    """The whole and unchanged bundle or checkout that stands at ``destination`` and may be replaced; None where
    nothing stands there, an empty folder, or (with ``force``) a changed bundle.

    Raises:
        InputError: what stands there is not replaced.
    """
    where = str(destination)
    if not os.path.lexists(destination):
        return None
    if destination.is_symlink():
        raise InputError("is a symbolic link, and is not replaced", where=where, fix="remove the link")
    if not destination.is_dir():
        raise InputError("something stands there that is no folder", where=where, fix="give another folder with -o")
    if not os.listdir(destination):
        return None
    try:
        report = verify_integrity(destination)
        bundle = open_bundle(destination)
        changed = f"it holds other files too: {', '.join(report.strays[:5])}" if report.strays else None
    except IntegrityError as error:
        if recorded_digest(documents_folder(destination)) is None:
            raise _foreign(where) from None
        bundle, changed = None, error.what
    except InputError:
        raise _foreign(where) from None
    if changed is not None and not force:
        raise InputError(
            f"stands there already, and was changed since it was made: {changed}",
            where=where,
            fix="give another folder with -o, or replace it, changes and all, with --force",
        )
    return bundle if changed is None else None


@contextlib.contextmanager
def replacing(destination: Path, *, force: bool) -> Iterator[Path]:
    """A private folder to fill, which is then put in the place of ``destination``; or gone, if that fails.

    Raises:
        InputError: what stands there is not replaced, or nothing can be written there. BuildError: no space.
    """
    parent = destination.parent
    with parts.writing_to(parent):
        parent.mkdir(parents=True, exist_ok=True)
        with parts.part_folder(parent) as part:
            yield part
            _sync(part)
            with parts.locked(parent):
                # Again, under the lock: it may have been changed meanwhile.
                standing(destination, force=force)
                parts.put_in_place(part, destination)


def write_documents(root: Path, documents: Mapping[str, bytes], index: bytes, name: str, version: str) -> None:
    """Write the OCI documents of a bundle: of a layout into its folder, of a checkout into its ``.modelforge``.

    Args:
        documents: manifests, records and other small blobs, by digest.
        index: the image index.
    """
    (root / words.BLOBS / "sha256").mkdir(parents=True, exist_ok=True)
    digest = digest_bytes(index)
    for key, data in {**documents, digest: index}.items():
        parts.write_file(root / words.blob_name(key), data, mode=_BLOB_MODE)
    parts.write_file(root / words.LAYOUT_FILE, words.LAYOUT_JSON, mode=0o666)
    parts.write_file(root / words.INDEX_FILE, top_document(digest, len(index), name, version), mode=0o666)


def checkout_root(folder: Path) -> Path:
    """Make the place for the documents of a new checkout."""
    root = folder / CHECKOUT
    root.mkdir()
    return root


def _foreign(where: str) -> InputError:
    return InputError(
        "something stands there that is not a bundle, and is not replaced",
        where=where,
        fix="move it away, or give another folder with -o",
    )


def _sync(folder: Path) -> None:
    for here, _, _ in os.walk(folder, topdown=False):
        parts.sync_folder(Path(here))
