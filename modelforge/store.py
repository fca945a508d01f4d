"""The content-addressed store on this machine: blobs by digest, step records by content key.

Layout of ``$MODELFORGE_HOME`` (default ``$XDG_CACHE_HOME/modelforge``)::

    blobs/sha256/<hex>      read-only files, named by what they hold
    steps/<key>.json        what a step gave: its facts, and the digests of its files
    locks/                  one lock file per step key; never unlinked while others may hold it
    work/                   private folders of running steps; what a killed build leaves here is swept

Knows neither models nor compilers. Every file appears under its final name whole, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from modelforge.errors import BuildError, InputError

CHUNK = 1 << 20
_STALE_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Blob:
    """A file in the store; ``digest`` is ``sha256:<hex>``."""

    digest: str
    size: int


@dataclass(frozen=True)
class StepRecord:
    """What a finished step left behind. ``facts`` is JSON; ``files`` maps names to blobs."""

    key: str
    step: str
    seconds: float
    facts: Mapping[str, Any]
    files: Mapping[str, Blob] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A step record and when it was last used (local time, for people)."""

    record: StepRecord
    used: str


@dataclass(frozen=True)
class Removed:
    """What a prune removed; ``freed`` in bytes."""

    steps: int
    blobs: int
    freed: int


def digest_file(path: Path) -> Blob:
    """Hash a file in chunks: memory does not grow with its size."""
    hasher = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            hasher.update(chunk)
            size += len(chunk)
    return Blob(f"sha256:{hasher.hexdigest()}", size)


def digest_bytes(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def canonical_json(value: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same folder, fsync, rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def default_home() -> Path:
    """``$MODELFORGE_HOME``, else ``modelforge`` in the user's cache folder."""
    if home := os.environ.get("MODELFORGE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelforge"


class Store:
    """One store folder, shared by many processes."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or default_home()

    # -- blobs

    def blob_path(self, digest: str) -> Path:
        return self.home / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def has(self, blob: Blob) -> bool:
        """Whether the blob is there with its size. The content is trusted: it was hashed as it came in, and is
        read-only since; ``cache verify`` hashes it again."""
        try:
            return self.blob_path(blob.digest).stat().st_size == blob.size
        except OSError:
            return False

    def add(self, path: Path) -> Blob:
        """Copy a file in, hashing what is copied.

        Raises:
            BuildError: no space, or the store cannot be written.
        """
        hasher = hashlib.sha256()
        size = 0
        with self.writing(), path.open("rb") as source:
            folder = self._folder("blobs", "sha256")
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=".part-")
            try:
                with os.fdopen(handle, "wb") as target:
                    while chunk := source.read(CHUNK):
                        hasher.update(chunk)
                        size += len(chunk)
                        target.write(chunk)
                    target.flush()
                    os.fsync(target.fileno())
                os.chmod(temporary, 0o444)
                blob = Blob(f"sha256:{hasher.hexdigest()}", size)
                os.replace(temporary, self.blob_path(blob.digest))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        return blob

    # -- step records

    def read(self, key: str) -> StepRecord | None:
        """The record of a finished step whose files are all still there, else None."""
        try:
            data = json.loads((self.home / "steps" / f"{key}.json").read_text(encoding="utf-8"))
            record = StepRecord(
                key=data["key"],
                step=data["step"],
                seconds=data["seconds"],
                facts=data["facts"],
                files={name: Blob(**blob) for name, blob in data["files"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if all(self.has(blob) for blob in record.files.values()) else None

    def touch(self, key: str) -> None:
        """Say that a step record was used: `prune` goes by that."""
        with contextlib.suppress(OSError):
            os.utime(self.home / "steps" / f"{key}.json")

    def write(self, record: StepRecord) -> None:
        data = {
            "key": record.key,
            "step": record.step,
            "seconds": record.seconds,
            "facts": record.facts,
            "files": {name: {"digest": blob.digest, "size": blob.size} for name, blob in record.files.items()},
        }
        with self.writing():
            write_atomically(self._folder("steps") / f"{record.key}.json", canonical_json(data))

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of a step: of several builds at once, one does the work and the others wait for it."""
        with self.writing():
            lock = FileLock(self._folder("locks") / f"{key}.lock")
        with lock:
            yield

    @contextlib.contextmanager
    def workdir(self) -> Iterator[Path]:
        """A private empty folder, gone afterwards."""
        with self.writing():
            folder = Path(tempfile.mkdtemp(dir=self._folder("work")))
        try:
            with self.writing():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed builds left: work folders and half-written files older than a day."""
        oldest = time.time() - _STALE_SECONDS
        for pattern in ("work/*", "blobs/sha256/.part-*", "steps/.part-*"):
            for path in self.home.glob(pattern):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    # -- housekeeping

    def entries(self) -> list[Entry]:
        """Every step record, last used first."""
        found = []
        for path in self.home.glob("steps/*.json"):
            record = self.read(path.stem)
            if record is not None:
                with contextlib.suppress(OSError):
                    found.append((path.stat().st_mtime, record))
        found.sort(key=lambda pair: (-pair[0], pair[1].key))
        return [Entry(record, time.strftime("%Y-%m-%d %H:%M", time.localtime(used))) for used, record in found]

    def usage(self) -> tuple[int, int]:
        """How many blobs there are, and their size in bytes."""
        sizes = [path.stat().st_size for path in self.home.glob("blobs/sha256/*") if not path.name.startswith(".")]
        return len(sizes), sum(sizes)

    def prune(self, days: float) -> Removed:
        """Remove step records not used for so many days, and the blobs that no record names any more.

        A blob younger than an hour stays: a running build may be about to name it.
        """
        self.sweep()
        now = time.time()
        steps = blobs = freed = 0
        for path in self.home.glob("steps/*.json"):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime >= days * 24 * 3600:
                    path.unlink()
                    steps += 1
        named = {blob.digest for entry in self.entries() for blob in entry.record.files.values()}
        for path in self.home.glob("blobs/sha256/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                if f"sha256:{path.name}" not in named and (now - status.st_mtime > 3600 or days == 0):
                    path.unlink()
                    blobs += 1
                    freed += status.st_size
        return Removed(steps, blobs, freed)

    def verify(self) -> list[str]:
        """Hash every blob; remove the damaged ones, and give their digests."""
        damaged = []
        for path in sorted(self.home.glob("blobs/sha256/*")):
            if path.name.startswith("."):
                continue
            if digest_file(path).digest != f"sha256:{path.name}":
                path.unlink()
                damaged.append(f"sha256:{path.name}")
        return damaged

    def _folder(self, *parts: str) -> Path:
        folder = self.home.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the file system says into what the user can do."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise BuildError(
                    "no space left on the device",
                    where=str(error.filename or self.home),
                    fix="free some (`modelforge cache prune`), or set MODELFORGE_HOME to a larger disk",
                ) from error
            if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise InputError(
                    "the cache folder cannot be written",
                    where=str(error.filename or self.home),
                    fix="set MODELFORGE_HOME to a folder that you may write to",
                ) from error
            raise
