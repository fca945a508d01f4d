"""Blobs on their way from a registry to a folder, through the store: each is downloaded once, by whoever comes first.

A blob's bytes go into the store and into the folder in one pass. Nothing is in the store, under its name, before its
digest is right; what a broken download left is gone on with. A blob is read through a file that is open already, so
that a prune meanwhile takes nothing away from a pull.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from modelforge.bundle import parts
from modelforge.errors import IntegrityError
from modelforge.store import CHUNK, Blob, Removed, StepRecord, Store

STEP = "pull"
"""What a pulled variant is called among the store's step records."""
GRACE_SECONDS = 24 * 3600.0
_TRIES = 3


class Cache:
    """The store, as a place for blobs of registries. Parts of downloads lie in its ``ingest/``."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store()
        self._ingest = self.store.home / "ingest"

    def bring(
        self, blob: Blob, targets: Sequence[Path], download: Callable[[Incoming], None], *, mode: int = 0o666
    ) -> bool:
        """Make new files of a blob; gives whether it was downloaded for that.

        Of several processes that want one blob, one downloads it and the others wait.

        Args:
            download: brings the bytes that ``Incoming`` still lacks.

        Raises:
            IntegrityError: what was downloaded is not what its digest says. BuildError: no space.
        """
        for _ in range(_TRIES):
            if self._copy(blob, targets, mode):
                return False
            with self.store.lock(f"blob-{blob.digest.removeprefix('sha256:')}"):
                if not self.store.has(blob):
                    self._receive(blob, targets, download, mode)
                    return True
        raise IntegrityError(
            f"the blob {blob.digest} vanishes from the store again and again", where=str(self.store.home)
        )

    def record(self, variant: str, facts: dict[str, object], files: dict[str, Blob]) -> None:
        """Note what a pulled variant is made of, so that the store keeps it while it is used."""
        self.store.write(StepRecord(variant.removeprefix("sha256:"), STEP, 0.0, facts, files))

    def prune(self, *, days: float, grace: float = GRACE_SECONDS) -> Removed:
        """Remove variants that no pull has wanted for so many days, the blobs that nothing names any more, and what
        broken downloads and uploads left; nothing that is younger than ``grace`` seconds.

        What builds keep in the same store is left to `modelforge cache prune`.
        """
        now = time.time()
        steps = blobs = freed = 0
        for entry in self.store.entries():
            path = self.store.home / "steps" / f"{entry.record.key}.json"
            with contextlib.suppress(OSError):
                if entry.record.step == STEP and now - path.stat().st_mtime >= max(days * 24 * 3600, grace):
                    path.unlink()
                    steps += 1
        named = {blob.digest for entry in self.store.entries() for blob in entry.record.files.values()}
        for path in self.store.home.glob("blobs/sha256/*"):
            if f"sha256:{path.name}" not in named and (size := _remove_older(path, now - grace)) is not None:
                blobs, freed = blobs + 1, freed + size
        for path in self._ingest.glob("*.part"):
            freed += self._remove_part(path, now - grace)
        for path in uploads(self.store).glob("*"):
            _remove_older(path, now - grace)
        return Removed(steps, blobs, freed)

    def _copy(self, blob: Blob, targets: Sequence[Path], mode: int) -> bool:
        """Copy the blob out, hashing it; False where the store has none, or had a damaged one."""
        source = self.store.blob_path(blob.digest)
        try:
            reading = parts.open_regular(source, follow=False)
        except OSError:
            return False
        with reading:
            if os.fstat(reading.fileno()).st_size == blob.size:
                # A prune goes by this: what is being read is in use.
                with contextlib.suppress(OSError):
                    os.utime(source)
                try:
                    parts.copy_stream(reading, source, targets, blob.digest, blob.size, mode=mode)
                    return True
                except IntegrityError:
                    _remove(targets)
        with self.store.lock(f"blob-{blob.digest.removeprefix('sha256:')}"), contextlib.suppress(OSError):
            source.unlink()
        return False

    def _receive(self, blob: Blob, targets: Sequence[Path], download: Callable[[Incoming], None], mode: int) -> None:
        with self.store.writing():
            self._ingest.mkdir(parents=True, exist_ok=True)
            (self.store.home / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        part = self._ingest / f"{blob.digest.removeprefix('sha256:')}.part"
        for _ in range(2):
            with Incoming(part, blob, targets, mode, self.store) as incoming:
                gone_on = incoming.size > 0
                download(incoming)
                if incoming.finish():
                    with self.store.writing():
                        os.chmod(part, 0o444)
                        os.replace(part, self.store.blob_path(blob.digest))
                    return
            part.unlink(missing_ok=True)
            _remove(targets)
            if not gone_on:
                break  # the registry itself sent it so; else what an earlier download left may be to blame
        raise IntegrityError(
            f"what the registry sends is not what its digest says ({blob.digest})",
            fix="nothing of it was kept; tell who runs the registry",
        )

    def _remove_part(self, path: Path, oldest: float) -> int:
        """Remove what a broken download left; not one that goes on."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.store.home / "locks" / f"blob-{path.stem}.lock", timeout=0)
        try:
            with lock:
                return _remove_older(path, oldest) or 0
        except (Timeout, OSError):
            return 0


class Incoming:
    """A blob that comes in: hashed, and written to its part and its targets in one pass (see ``client.Sink``).

    ``size``: bytes that are here, those of an earlier download included.
    """

    def __init__(self, part: Path, blob: Blob, targets: Sequence[Path], mode: int, store: Store) -> None:
        self._part = part
        self._blob = blob
        self._targets = targets
        self._mode = mode
        self._store = store
        # Unbuffered: a full disk is told by the write, and not once more by the close.
        self._streams: list[BinaryIO] = []
        self._hashing = Hashing()
        self._flushing = _Flushing()
        self.size = 0

    def __enter__(self) -> Incoming:
        try:
            with self._store.writing():
                if self._part.is_symlink():
                    self._part.unlink()
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._streams.append(os.fdopen(os.open(self._part, flags, 0o600), "r+b", 0))
            for target in self._targets:
                with parts.writing_to(target.parent):
                    self._streams.append(parts.create(target, self._mode, buffering=0))
            self._take_up()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._hashing.close()
        with contextlib.suppress(OSError):  # told by `finish`; whoever comes here without it, has another error
            self._flushing.close()
        for stream in self._streams:
            stream.close()
        if kind is not None:
            _remove(self._targets)

    def write(self, block: bytes) -> None:
        self._hashing.update(block)
        self._write(block, 0)
        self.size += len(block)
        with self._told():
            self._flushing.wrote(len(block), self._streams[1:])

    def restart(self) -> None:
        """Begin at the beginning."""
        for stream in self._streams:
            stream.seek(0)
            stream.truncate()
        self._hashing.close()
        self._hashing = Hashing()
        self.size = 0

    def finish(self) -> bool:
        """Whether all of it is here and right; then the targets are on the disk.

        The store's own copy is not synced: half of a pull's time would go into that. After a power cut it may be short
        (then the store does not have it) or wrong (then the next copy, which is hashed, finds out and fetches it anew).
        """
        if self.size != self._blob.size or self._hashing.digest() != self._blob.digest:
            return False
        with self._told():
            self._flushing.close()
            for stream in self._streams[1:]:
                os.fsync(stream.fileno())
        return True

    def _take_up(self) -> None:
        """Hash what an earlier download left, and give it to the targets."""
        while block := self._streams[0].read(CHUNK):
            self._hashing.update(block)
            self._write(block, 1)
            self.size += len(block)
            if self.size > self._blob.size:
                self.restart()
                return

    def _write(self, block: bytes, first: int) -> None:
        with self._told():
            for stream in self._streams[first:]:
                view = memoryview(block)
                while view:
                    view = view[stream.write(view) :]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with self._store.writing():
                yield
        except BaseException:
            # A full disk would stay full with half a blob on it.
            self._part.unlink(missing_ok=True)
            raise


def uploads(store: Store) -> Path:
    """Where begun uploads are noted."""
    return store.home / "uploads"


class Hashing:
    """sha256 in a thread of its own, while the next block is received and written: half the time of a pull."""

    _AHEAD = 32

    def __init__(self) -> None:
        self._hasher = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._room = threading.Semaphore(self._AHEAD)

    def update(self, block: bytes) -> None:
        self._room.acquire()
        self._thread.submit(self._update, block)

    def digest(self) -> str:
        """Of all that came; nothing more may come."""
        self.close()
        return f"sha256:{self._hasher.hexdigest()}"

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _update(self, block: bytes) -> None:
        self._hasher.update(block)
        self._room.release()


class _Flushing:
    """Brings files to the disk while they are written, so that the sync at the end finds little left to do."""

    _EVERY = 64 << 20

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._written = 0
        self._last: Future[None] | None = None

    def wrote(self, count: int, streams: Sequence[BinaryIO]) -> None:
        self._written += count
        if self._written >= self._EVERY and (self._last is None or self._last.done()):
            if self._last is not None:
                self._last.result()  # a disk's fault is told once: by the call that met it
            self._written = 0
            self._last = self._thread.submit(self._flush, [stream.fileno() for stream in streams])

    def close(self) -> None:
        """Raises what went wrong, once."""
        self._thread.shutdown(wait=True)
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _flush(self, handles: Sequence[int]) -> None:
        for handle in handles:
            os.fdatasync(handle)


class Share:
    """Adds up what several threads bring in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.fetched = 0
        self.reused = 0

    def fetch(self, count: int) -> None:
        """Bytes came from the registry; what is negative was only told to a progress bar."""
        with self._lock:
            self.fetched += max(count, 0)

    def reuse(self, count: int) -> None:
        with self._lock:
            self.reused += count


def _remove(targets: Sequence[Path]) -> None:
    for target in targets:
        with contextlib.suppress(OSError):
            target.unlink()


def _remove_older(path: Path, oldest: float) -> int | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        if status.st_mtime <= oldest:
            path.unlink()
            return status.st_size
    return None
