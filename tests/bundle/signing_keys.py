"""Key pairs for tests, and statements signed by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelforge.bundle.keys import PrivateKey, generate, load_private_key

PASSWORD = "correct horse battery staple"


@dataclass(frozen=True)
class KeyPair:
    private: Path
    public: Path
    key: PrivateKey


def make_pair(stem: Path) -> KeyPair:
    private, public = generate(stem, PASSWORD)
    return KeyPair(private, public, load_private_key(private, PASSWORD))
