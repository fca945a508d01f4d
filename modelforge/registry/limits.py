"""Every bound that a registry's answers and our own patience have, in one place; tests set smaller ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one conversation with a registry. Times in seconds, sizes in bytes.

    Attributes:
        connect: until TCP and TLS stand.
        answer: until the first byte of an answer; a registry may hash a large upload meanwhile.
        idle: between two bytes of an answer.
        window, pace: over each ``window`` spent waiting, an answer must bring ``pace`` bytes a second.
        document: for all of a small answer (a manifest, a token, a list).
        attempts: how often one request is tried; a transfer that brought ``progress`` bytes begins to count anew.
        patience: after this long no further attempt is begun.
        backoff: before the second attempt; doubled each time, up to ``longest_wait``, with jitter.
        document_size: what registries accept of a manifest (distribution-spec: at least 4 MiB).
        pages: of a list of tags.
        redirects: followed for one request.
        chunk: of an upload; what one PATCH carries.
        jobs: blobs at a time.
    """

    connect: float = 10.0
    answer: float = 300.0
    idle: float = 30.0
    window: float = 30.0
    pace: float = 1024.0
    document: float = 60.0
    attempts: int = 6
    progress: int = 1 << 20
    patience: float = 120.0
    backoff: float = 0.5
    longest_wait: float = 30.0
    document_size: int = 4 << 20
    pages: int = 1000
    redirects: int = 5
    chunk: int = 64 << 20
    jobs: int = 4
