"""The emulator: found only where both QEMU and an arm64 C library are."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from modelforge.toolchains import qemu


def _root(folder: Path, without: tuple[str, ...] = ()) -> Path:
    (folder / "lib").mkdir(parents=True)
    for name in qemu.LIBRARIES:
        if name not in without:
            (folder / "lib" / name).touch()
    return folder


def _program(folder: Path, content: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / "qemu-aarch64-static"
    program.write_bytes(content)
    program.chmod(0o755)
    return program


def test_finds_the_program_on_path_and_the_root_that_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, root = _program(tmp_path / "bin"), _root(tmp_path / "root")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("QEMU_LD_PREFIX", str(root))
    found = qemu.find()
    assert found == qemu.Emulator(program, root)
    assert qemu.why_not() == ""
    assert found.command("run", "-b", "4", cpu="max") == [
        str(program),
        "-L",
        str(root),
        "-cpu",
        "max",
        "run",
        "-b",
        "4",
    ]


def test_a_root_without_libstdcxx_is_no_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("QEMU_LD_PREFIX", str(_root(tmp_path / "root", without=("libstdc++.so.6",))))
    assert qemu.find() is None
    assert "libstdc++.so.6" in qemu.why_not()
    assert "libc.so.6" not in qemu.why_not()


def test_without_the_program_there_is_no_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("QEMU_LD_PREFIX", str(_root(tmp_path / "root")))
    assert qemu.find() is None
    assert "PATH" in qemu.why_not()


def test_libraries_are_found_in_a_multiarch_root(tmp_path: Path) -> None:
    folder = tmp_path / "usr" / "lib" / "aarch64-linux-gnu"
    folder.mkdir(parents=True)
    for name in qemu.LIBRARIES:
        (folder / name).touch()
    assert qemu.missing_libraries(tmp_path) == []


def test_a_program_that_does_not_tell_its_version(tmp_path: Path) -> None:
    assert qemu.version(_program(tmp_path / "bin", b"something else")) == "unknown"


@pytest.mark.qemu
def test_the_version_is_the_one_that_the_program_prints() -> None:
    found = qemu.find()
    if found is None:
        pytest.skip(qemu.why_not())
    printed = subprocess.run([found.program, "--version"], capture_output=True, text=True, check=True).stdout
    assert f"version {found.version()} " in printed
