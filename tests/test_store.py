"""The store: whole or not at all, one worker at a time, and damage told."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from modelforge.errors import InputError
from modelforge.store import StepRecord, Store, digest_file


def put(store: Store, folder: Path, key: str, text: str) -> StepRecord:
    (folder / "file").write_text(text)
    record = StepRecord(key, "step", 1.0, {"fact": 1}, {"file": store.add(folder / "file")})
    store.write(record)
    return record


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    record = put(store, tmp_path, "a" * 64, "hello")
    assert store.read("a" * 64) == record
    blob = record.files["file"]
    assert store.blob_path(blob.digest).read_text() == "hello"
    assert digest_file(store.blob_path(blob.digest)) == blob
    assert store.read("b" * 64) is None


def test_a_record_without_its_blob_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    record = put(store, tmp_path, "a" * 64, "hello")
    path = store.blob_path(record.files["file"].digest)
    path.chmod(0o644)
    path.write_text("hell")
    assert store.read("a" * 64) is None
    path.unlink()
    assert store.read("a" * 64) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}'])
def test_a_garbled_record_is_none(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path / "home")
    put(store, tmp_path, "a" * 64, "hello")
    (store.home / "steps" / f"{'a' * 64}.json").write_text(text)
    assert store.read("a" * 64) is None


def test_verify_removes_what_is_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    record = put(store, tmp_path, "a" * 64, "hello")
    put(store, tmp_path, "b" * 64, "world")
    assert store.verify() == []
    path = store.blob_path(record.files["file"].digest)
    path.chmod(0o644)
    path.write_text("jello")
    assert store.verify() == [record.files["file"].digest]
    assert store.read("a" * 64) is None
    assert store.read("b" * 64) is not None


def test_prune_goes_by_use_and_keeps_young_blobs(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    old = put(store, tmp_path, "a" * 64, "old")
    put(store, tmp_path, "b" * 64, "used")
    (tmp_path / "file").write_text("not named yet")
    young = store.add(tmp_path / "file")
    ago = time.time() - 40 * 24 * 3600
    for key in ("a" * 64, "b" * 64):
        os.utime(store.home / "steps" / f"{key}.json", (ago, ago))
    os.utime(store.blob_path(old.files["file"].digest), (ago, ago))
    store.touch("b" * 64)
    removed = store.prune(30)
    assert (removed.steps, removed.blobs) == (1, 1)
    assert store.read("b" * 64) is not None
    assert store.has(young)
    store.prune(0)
    assert store.usage() == (0, 0)


def test_sweep_takes_only_what_is_stale(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    with store.workdir() as folder:
        (folder / "x").write_text("x")
        stale = store.home / "work" / "stale"
        stale.mkdir()
        os.utime(stale, (1, 1))
        store.sweep()
        assert folder.exists()
        assert not stale.exists()
    assert not folder.exists()


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = Store(Path("/proc/nowhere"))
    with pytest.raises((InputError, OSError)):
        store.add(tmp_path / "file")
