"""Folders and files that appear whole or not at all: private part folders, their locks, copying with a digest.

A part folder is locked by its writer for as long as it lives; what killed writers left is swept by the next one.
Knows nothing of the bundle format.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from modelforge.errors import BuildError, InputError, IntegrityError
from modelforge.store import CHUNK

_PART = re.compile(r"\.part-bundle-[0-9a-f]{16}\Z")
_ASIDE = re.compile(r"\.part-aside-[0-9a-f]{16}-(?P<name>.+)\Z", re.DOTALL)
# What file systems answer that cannot lock a folder: NFS, some FUSE ones.
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def part_folder(parent: Path) -> Iterator[Path]:
    """A private empty folder in ``parent``, to be filled and then put in its place, or gone afterwards."""
    with locked(parent) as exclusive:
        if exclusive:
            _sweep(parent)
        part = parent / f".part-bundle-{secrets.token_hex(8)}"
        part.mkdir()
        handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
        _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; gives False where the file system has no locks. No lock file is left behind."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)


def put_in_place(part: Path, destination: Path) -> None:
    """Rename ``part`` to ``destination``; what stood there is gone afterwards, or stands there still.

    A kill between the two renames leaves the old folder aside: the next write in this folder puts it back.
    """
    if not os.path.lexists(destination):
        os.rename(part, destination)
        sync_folder(destination.parent)
        return
    aside = destination.parent / f".part-aside-{secrets.token_hex(8)}-{destination.name}"
    os.rename(destination, aside)
    try:
        os.rename(part, destination)
    except BaseException:
        os.rename(aside, destination)
        raise
    sync_folder(destination.parent)
    shutil.rmtree(aside, ignore_errors=True)


def copy_file(source: Path, target: Path, digest: str, size: int, *, mode: int) -> None:
    """Copy into a new file, hashing what is copied; memory does not grow with the size.

    Raises:
        IntegrityError: the source is not what its digest says.
        InputError: the source cannot be read.
    """
    try:
        reading = open_regular(source)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(source)) from error
    with reading:
        copy_stream(reading, source, [target], digest, size, mode=mode)


def copy_stream(reading: BinaryIO, source: Path, targets: Sequence[Path], digest: str, size: int, *, mode: int) -> None:
    """Copy an open file into new files, reading and hashing it once; as :func:`copy_file`.

    Raises:
        IntegrityError: the source is not what its digest says.
    """
    hasher = hashlib.sha256()
    copied = 0
    with contextlib.ExitStack() as stack:
        writings = [stack.enter_context(create(target, mode)) for target in targets]
        # One byte more than expected is enough to know; a file that grows for ever is not followed.
        while chunk := reading.read(min(CHUNK, size + 1 - copied)):
            hasher.update(chunk)
            for writing in writings:
                writing.write(chunk)
            copied += len(chunk)
            if copied > size:
                break
        for writing in writings:
            writing.flush()
            os.fsync(writing.fileno())
    if copied != size or f"sha256:{hasher.hexdigest()}" != digest:
        what = f"has {'more' if copied > size else 'other'} content than its digest says"
        raise IntegrityError(
            f"{what} ({digest}, {size} bytes)", where=str(source), fix="it was changed or damaged: make it again"
        )


def write_file(target: Path, data: bytes, *, mode: int) -> None:
    with create(target, mode) as writing:
        writing.write(data)
        writing.flush()
        os.fsync(writing.fileno())


def replace_file(target: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file, or another in its place: whole or not at all."""
    part = target.parent / f".part-{secrets.token_hex(8)}"
    try:
        write_file(part, data, mode=mode)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(target.parent)


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a file for reading; a folder, a device or a pipe (which would block) is refused.

    Raises:
        InputError: it is no regular file. OSError as ``open`` does.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError("is not a file", where=str(path))
    return os.fdopen(handle, "rb")


def create(path: Path, mode: int, *, buffering: int = -1) -> BinaryIO:
    """Create a new file; ``mode`` is what it may have at most, less the umask."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, mode), "wb", buffering)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last, where the file system can."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing_to(folder: Path, *, instead: str = "give another folder with -o") -> Iterator[None]:
    """Turn what the file system says into what the user can do: make room or leave, or ``instead``."""
    try:
        yield
    except OSError as error:
        where = str(folder)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError("no space left on the device", where=where, fix=f"free some, or {instead}") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(
                "the output folder cannot be written", where=where, fix=f"make it writable, or {instead}"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f"cannot be made a folder: {error.strerror}", where=where, fix=instead) from error
        raise


def _sweep(parent: Path) -> None:
    """Remove what killed writers left. Called under the lock of ``parent``, so no part is about to be locked."""
    for path in parent.iterdir():
        if path.is_symlink() or not path.is_dir():
            continue
        if aside := _ASIDE.match(path.name):
            original = parent / aside["name"]
            if os.path.lexists(original):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, original)
        elif _PART.match(path.name) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(part: Path) -> bool:
    try:
        handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _lock(handle: int, operation: int) -> bool:
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True
