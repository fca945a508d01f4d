"""The linker and the C compiler: same bytes everywhere, for both machines, and clear words when they fail."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from modelforge.errors import BuildError, ToolchainMissing
from modelforge.store import digest_file
from modelforge.toolchains import linker, qemu

ELF_MACHINE = {"x86-64": 62, "aarch64": 183}
NATIVE = {"x86_64": "x86-64", "aarch64": "aarch64"}[platform.machine()]
SOURCE = "extern float expf(float); float call(float x) { return expf(x); } int answer(void) { return 42; }\n"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An object file per machine, with one symbol that it leaves to others."""
    made = {}
    for isa in ELF_MACHINE:
        folder = tmp_path_factory.mktemp(isa)
        (folder / "part.c").write_text(SOURCE)
        environment = linker._environment(folder)
        command = [*linker.require(isa).compile, "-c", "-fPIC", "-O1", "part.c", "-o", "part.o"]
        subprocess.run(command, cwd=folder, check=True, env={"PATH": "/usr/bin:/bin", **environment})
        made[isa] = folder / "part.o"
    return made


@pytest.mark.parametrize("isa", ["x86-64", "aarch64"])
def test_links_for_both_machines_with_the_same_bytes_in_any_folder(
    isa: str, objects: dict[str, Path], tmp_path: Path
) -> None:
    digests = set()
    for name in ("a", "another-folder"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "signature.txt").write_text("hello\n")
        out = folder / "main.so"
        command = linker.link_shared(isa, [objects[isa]], out, embed=[folder / "signature.txt"], workdir=folder)
        data = out.read_bytes()
        assert int.from_bytes(data[18:20], "little") == ELF_MACHINE[isa]
        assert str(tmp_path).encode() not in data
        assert not any("/" in word for word in command), command
        digests.add(digest_file(out).digest)
    assert len(digests) == 1


def test_the_library_carries_the_embedded_file_and_its_functions(objects: dict[str, Path], tmp_path: Path) -> None:
    embedded = tmp_path / "signature.txt"
    embedded.write_text("what it is\n")
    linker.link_shared(NATIVE, [objects[NATIVE]], tmp_path / "main.so", embed=[embedded], workdir=tmp_path)
    assert _embedded_text(tmp_path / "main.so") == b"what it is\n"


def test_embedded_files_begin_a_page_and_cannot_be_written(objects: dict[str, Path], tmp_path: Path) -> None:
    """What is only read stays one copy for all processes. They may lie elsewhere, and be empty."""
    (tmp_path / "elsewhere").mkdir()
    files = [tmp_path / "elsewhere" / name for name in ("signature.txt", "none", "weights-1.bin")]
    for path, content in zip(files, (b"text", b"", bytes(range(256)) * 33), strict=True):
        path.write_bytes(content)
    linker.link_shared(NATIVE, [objects[NATIVE]], tmp_path / "main.so", embed=files, workdir=tmp_path)
    assert _embedded_text(tmp_path / "main.so") == b"text"
    library = ctypes.CDLL(str(tmp_path / "main.so"))
    assert _place(library, "none", "start") == _place(library, "none", "end")
    begin, end = (_place(library, "weights_1_bin", part) for part in ("start", "end"))
    assert begin % 4096 == 0
    assert ctypes.string_at(begin, end - begin) == bytes(range(256)) * 33
    assert _permissions(begin) == "r--p"


def _permissions(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_ = line.split()
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return permissions
    return "not mapped"


def _place(library: ctypes.CDLL, name: str, part: str) -> int:
    return ctypes.addressof(ctypes.c_char.in_dll(library, f"_binary_{name}_{part}"))


def _embedded_text(path: Path) -> bytes:
    library = ctypes.CDLL(str(path))  # `expf` is left to the process
    assert library.answer() == 42
    begin, end = (_place(library, "signature_txt", part) for part in ("start", "end"))
    return ctypes.string_at(begin, end - begin)


def test_a_compiler_on_path_serves_without_ziglang(
    objects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc on PATH")
    _hide_ziglang(monkeypatch)
    tool = linker.require(NATIVE)
    assert "gcc sha256:" in tool.name
    (tmp_path / "signature.txt").write_text("hello\n")
    linker.link_shared(
        NATIVE, [objects[NATIVE]], tmp_path / "main.so", embed=[tmp_path / "signature.txt"], workdir=tmp_path
    )
    assert _embedded_text(tmp_path / "main.so") == b"hello\n"


def test_ziglang_comes_first_and_its_version_is_in_the_name() -> None:
    assert linker.require("aarch64").name == f"ziglang {importlib.metadata.version('ziglang')}"


def test_with_neither_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide_ziglang(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert linker.find("aarch64") is None
    with pytest.raises(ToolchainMissing, match=r"aarch64[\s\S]*pip install"):
        linker.require("aarch64")


def test_a_broken_object_ends_in_the_linkers_own_words(tmp_path: Path) -> None:
    (tmp_path / "part.o").write_bytes(b"not an object")
    with pytest.raises(BuildError, match=r"made no main\.so[\s\S]*part\.o"):
        linker.link_shared("aarch64", [tmp_path / "part.o"], tmp_path / "main.so", workdir=tmp_path)
    assert not (tmp_path / "main.so").exists()


def test_a_program_that_does_not_compile_ends_in_the_compilers_own_words(tmp_path: Path) -> None:
    (tmp_path / "run.c").write_text("int main(void) { return nonsense; }\n")
    with pytest.raises(BuildError, match="nonsense"):
        linker.compile_program(NATIVE, tmp_path / "run.c", tmp_path / "run", include=[], workdir=tmp_path)


def test_a_compiled_program_runs_and_leaves_no_cache_behind(tmp_path: Path) -> None:
    (tmp_path / "run.c").write_text('#include <stdio.h>\nint main(void) { puts("here"); return 7; }\n')
    linker.compile_program(NATIVE, tmp_path / "run.c", tmp_path / "run", include=[], workdir=tmp_path)
    ended = subprocess.run([tmp_path / "run"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (7, "here\n")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.c", "linker.log"}


@pytest.mark.qemu
def test_an_arm_program_runs_under_qemu(tmp_path: Path) -> None:
    emulator = qemu.find()
    if emulator is None:
        pytest.skip(qemu.why_not())
    (tmp_path / "run.c").write_text("int main(void) { return 7; }\n")
    linker.compile_program("aarch64", tmp_path / "run.c", tmp_path / "run", include=[], workdir=tmp_path)
    assert subprocess.run(emulator.command(str(tmp_path / "run"), cpu="max"), check=False).returncode == 7


def _hide_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(linker.importlib.metadata, "version", version)
