"""What a variant brings along beside its model library: TVM's runtime and the runner, for the device's machine."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from modelforge.errors import ToolchainMissing
from modelforge.store import Store, digest_file
from modelforge.toolchains import linker, wheels
from modelforge.toolchains.host import isa_of

TVM_VERSION = "0.27.0.post1"
FFI_VERSION = "0.1.14.post1"
"""The pair that works: docs/decisions/0004-tvm-pair.md."""
RUNTIME = "libtvm_runtime.so"
FFI = "libtvm_ffi.so"
RUNNER = "run"
SOURCE = Path(__file__).parent / "runner.c"
SERVER = "rpc_server"
SERVER_SOURCE = Path(__file__).parent / "rpc_server.c"
PLAYER = "player.py"
"""For those who call from Python: it stands alone, and lies beside the runner under its own name."""

_MEMBERS = {"apache-tvm": ("tvm/lib/libtvm_runtime.so", RUNTIME), "apache-tvm-ffi": ("tvm_ffi/lib/libtvm_ffi.so", FFI)}
# The wheels' own tags: TVM's is built for 2.27 and 2.28, the FFI's for 2.24 and 2.28.
_GLIBC_TAGS = ("2_28", "2_27", "2_24", "2_17")
_LIBRARIES = ("m", "dl")
_MACHINE = {"x86-64": "x86_64", "aarch64": "aarch64"}
# Of the wheels on pypi.org, for the pinned pair: another file under the same version is refused.
_DIGESTS = {
    "aarch64": {
        RUNTIME: "sha256:ba06950fac134b8d71549111fad2c6605cd6f738061fe0482f217c37ccbdff05",
        FFI: "sha256:673d816bd962daddb55d8b0f8ae137e797500307951d0f721227731df0c13e24",
    }
}


@dataclass(frozen=True)
class Files:
    """``files`` by bundle file name; ``commands`` in neutral words."""

    files: dict[str, Path]
    commands: tuple[tuple[str, ...], ...]


def device_files(isa: str, store: Store, folder: Path) -> Files:
    """The runtime libraries and the runners for ``isa``, copied into ``folder``.

    What is fetched and compiled is so once, then kept in the store's home.

    Raises:
        ToolchainMissing: the wheels of another machine cannot be fetched, or nothing here compiles C.
        BuildError: the runner does not compile.
        IntegrityError: a fetched library is not the expected one.
    """
    command = linker.compile_command(isa, SOURCE.name, RUNNER, libraries=_LIBRARIES)
    folder.mkdir(parents=True)
    kept = {**_libraries(isa, store), RUNNER: _program(isa, store, SOURCE, RUNNER)}
    for name, path in kept.items():
        copy_program(path, folder / name)
    shutil.copyfile(Path(__file__).parent / PLAYER, folder / PLAYER)
    return Files({name: folder / name for name in (*kept, PLAYER)}, (command,))


def server_files(isa: str, store: Store, folder: Path) -> list[Path]:
    """The server that a tuning measures on, and the libraries that it needs, copied into ``folder``.

    Raises:
        As :func:`device_files`.
    """
    kept = {SERVER: _program(isa, store, SERVER_SOURCE, SERVER), **_libraries(isa, store)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in kept.items():
        partial = folder / f".part-{name}"
        copy_program(path, partial)
        partial.replace(folder / name)
    return [folder / name for name in kept]


def _libraries(isa: str, store: Store) -> dict[str, Path]:
    versions = installed_pair()
    if isa_of(platform.machine()) == isa:
        return {
            name: Path(str(importlib.metadata.distribution(package).locate_file(member)))
            for package, (member, name) in _MEMBERS.items()
        }
    pinned = versions == {"apache-tvm": TVM_VERSION, "apache-tvm-ffi": FFI_VERSION}
    digests = _DIGESTS.get(isa, {}) if pinned else {}
    wanted = [
        wheels.Wheel(
            requirement=f"{package}=={versions[package]}",
            members={member: name},
            digests={name: digests[name]} if name in digests else {},
        )
        for package, (member, name) in _MEMBERS.items()
    ]
    tags = [f"manylinux_{glibc}_{_MACHINE[isa]}" for glibc in _GLIBC_TAGS]
    key = f"tvm-{isa}-{versions['apache-tvm']}-{versions['apache-tvm-ffi']}"
    return wheels.fetch(wanted, tags, key=key, store=store)


def installed_pair() -> dict[str, str]:
    """The versions of the installed packages.

    Raises:
        ToolchainMissing: one is not installed.
    """
    try:
        return {package: importlib.metadata.version(package) for package in _MEMBERS}
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolchainMissing(f"{error.name} is not installed", fix="pip install 'modelforge[build]'") from None


def _program(isa: str, store: Store, path: Path, name: str) -> Path:
    """One of our programs in C, compiled for ``isa`` once and kept."""
    include = Path(str(importlib.metadata.distribution("apache-tvm-ffi").locate_file("tvm_ffi/include")))
    source = digest_file(path).digest.removeprefix("sha256:")[:16]
    tool = linker.require(isa).name.replace(" ", "-").replace(":", "-")

    def fill(folder: Path) -> None:
        with store.workdir() as workdir:
            folders = [include, include / "dlpack"]
            linker.compile_program(isa, path, folder / name, include=folders, workdir=workdir, libraries=_LIBRARIES)

    key = f"tvm-{'runner' if name == RUNNER else name}-{isa}-{source}-{installed_pair()['apache-tvm-ffi']}-{tool}"
    return wheels.kept(key, fill, store=store)[name]


def copy_program(source: Path, target: Path) -> None:
    """Copy a file that is to be run: what comes from the store has lost its executable bit."""
    shutil.copyfile(source, target)
    target.chmod(0o755)
