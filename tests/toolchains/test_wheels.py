"""Fetching with the real pip from a folder of wheels: once, then from the store, and never something else."""

from __future__ import annotations

import hashlib
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

from modelforge.errors import BuildError, IntegrityError, ToolchainMissing
from modelforge.store import Store
from modelforge.toolchains import wheels

PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64")
CONTENT = b"an arm64 library"
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "some_runtime-1.2-py3-none-manylinux_2_17_aarch64.whl", "w") as archive:
        archive.writestr("some/lib/libsome.so", CONTENT)
        archive.writestr("some/lib/huge.so", b"not wanted")
        archive.writestr(
            "some_runtime-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-runtime\nVersion: 1.2\n"
        )
        archive.writestr(
            "some_runtime-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-manylinux_2_17_aarch64\n"
        )
        archive.writestr("some_runtime-1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _wheel(digest: str = DIGEST, member: str = "some/lib/libsome.so") -> wheels.Wheel:
    return wheels.Wheel("some-runtime==1.2", {member: "libsome.so"}, {"libsome.so": digest})


def _fetch(store: Store, wheel: wheels.Wheel | None = None) -> dict[str, Path]:
    return wheels.fetch([wheel or _wheel()], PLATFORMS, key="some-aarch64-1.2", store=store)


def test_takes_only_the_named_file_and_needs_no_index_the_second_time(index: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    assert _fetch(store)["libsome.so"].read_bytes() == CONTENT
    kept = sorted(path.name for path in (tmp_path / "home" / "runtimes" / "some-aarch64-1.2").iterdir())
    assert kept == ["digests.json", "libsome.so"]
    shutil.rmtree(index)
    assert _fetch(store)["libsome.so"].read_bytes() == CONTENT


def test_offline_with_an_empty_store_names_the_command(index: Path, tmp_path: Path) -> None:
    shutil.rmtree(index)
    with pytest.raises(ToolchainMissing, match=r"some-runtime==1\.2") as caught:
        _fetch(Store(tmp_path / "home"))
    assert "pip download" in str(caught.value)
    assert "--platform manylinux_2_28_aarch64" in str(caught.value)
    assert not (tmp_path / "home" / "runtimes").exists()


def test_another_build_under_the_same_version_is_refused_and_not_kept(index: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"libsome\.so"):
        _fetch(Store(tmp_path / "home"), _wheel(digest="sha256:" + "0" * 64))
    assert not (tmp_path / "home" / "runtimes").exists()


def test_a_kept_file_that_changed_is_fetched_again(index: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    _fetch(store)["libsome.so"].write_bytes(b"something else")
    assert _fetch(store)["libsome.so"].read_bytes() == CONTENT


def test_a_wheel_without_the_file_is_said_so(index: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has no some/lib/moved\.so"):
        _fetch(Store(tmp_path / "home"), _wheel(member="some/lib/moved.so"))


def test_many_at_once_fill_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    filled: list[Path] = []

    def fill(folder: Path) -> None:
        filled.append(folder)
        (folder / "file").write_bytes(CONTENT)

    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(wheels.kept("k", fill, store=store)["file"].read_bytes()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1
    assert results == [CONTENT] * 8


def test_a_fill_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise BuildError("no")

    with pytest.raises(BuildError):
        wheels.kept("k", fill, store=Store(tmp_path / "home"))
    assert not (tmp_path / "home" / "runtimes").exists()
