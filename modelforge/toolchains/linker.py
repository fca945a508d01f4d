"""Links object files into a shared library, and compiles a small C program, for x86-64 or aarch64 Linux.

The first choice is the ``ziglang`` wheel (LLVM's linker and clang with the C libraries of both machines): it gives
the same bytes on every machine. Without it, what is on PATH serves: no compiler has to be installed by hand.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from modelforge.errors import BuildError, ToolchainMissing
from modelforge.toolchains import process

GLIBC = "2.28"
"""The oldest GNU C library that a compiled program asks for, where the compiler lets us choose (Debian 10, RHEL 8)."""
_LINK_FLAGS = ("-shared", "-soname", "{name}", "--build-id=none", "--strip-all", "-z", "noexecstack")
_EMULATION = {"x86-64": "elf_x86_64", "aarch64": "aarch64linux"}
_TRIPLE = {"x86-64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
_LINK_SECONDS = 300.0
_COMPILE_SECONDS = 600.0


@dataclass(frozen=True)
class Tool:
    """A way to link and to compile for one machine.

    Attributes:
        name: what it is, with its version or its digest: goes into content keys.
        link: the command that links.
        compile: the command that compiles and links C.
        driver: whether ``link`` is a C compiler, which hands options on with ``-Wl,``.
    """

    name: str
    link: tuple[str, ...]
    compile: tuple[str, ...]
    driver: bool


def find(isa: str) -> Tool | None:
    """The tool for ``isa`` (``x86-64`` or ``aarch64``) on this machine, or None. Starts no process."""
    return _ziglang(isa) or _on_path(isa)


def require(isa: str) -> Tool:
    """As :func:`find`.

    Raises:
        ToolchainMissing: there is none.
    """
    tool = find(isa)
    if tool is None:
        raise ToolchainMissing(
            f"nothing here links and compiles for {isa}", fix="pip install 'modelforge[build]' (it brings ziglang)"
        )
    return tool


def link_shared(
    isa: str, objects: Sequence[Path], out: Path, *, embed: Sequence[Path] = (), workdir: Path
) -> tuple[str, ...]:
    """Link ``objects`` into the shared library ``out``; give the command in neutral words.

    Args:
        embed: files whose bytes the library carries, each from the start of a page, never to be written, between the
            symbols ``_binary_NAME_start`` and ``_end`` where NAME is its file name with ``_`` for all but letters and
            digits.

    Symbols that no object defines are left to the process that loads the library.

    Raises:
        ToolchainMissing: there is no linker for ``isa``.
        BuildError: it failed.
    """
    tool = require(isa)
    # Relative names and one folder: no path of this machine gets into what is linked.
    names = [_beside(path, workdir) for path in objects]
    names += [_embedded_object(tool, _beside(path, workdir), workdir) for path in embed]
    flags = [flag.format(name=out.name) for flag in _LINK_FLAGS]
    if tool.driver:
        arguments = ["-shared", "-nostdlib", *(f"-Wl,{flag}" for flag in _paired(flags[1:])), "-o", out.name, *names]
    else:
        arguments = ["-m", _EMULATION[isa], *flags, "-o", out.name, *names]
    _run([*tool.link, *arguments], out, workdir, _LINK_SECONDS, tool)
    return _neutral([*tool.link, *arguments])


_EMBEDDED = """\
.section .modelforge,"a"
.balign {page}
.globl {symbol}_start
{symbol}_start:
.incbin "{name}"
.globl {symbol}_end
{symbol}_end:
.section .note.GNU-stack,"",%progbits
"""
_PAGE = 4096
_SYMBOL = re.compile(r"[^0-9A-Za-z]")


def _embedded_object(tool: Tool, name: str, workdir: Path) -> str:
    """An object file with the bytes of a file. Through the assembler: linkers that read a file as binary themselves
    (``--format=binary``) put it where it may be written, aligned to 8 bytes or to none, and GNU's exports no symbol."""
    made, source = f"{name}.o", workdir / f"{name}.s"
    symbol = f"_binary_{_SYMBOL.sub('_', name)}"
    source.write_text(_EMBEDDED.format(page=_PAGE, symbol=symbol, name=name), encoding="ascii")
    _run([*tool.compile, "-c", "-o", made, source.name], workdir / made, workdir, _LINK_SECONDS, tool)
    return made


def compile_program(
    isa: str, source: Path, out: Path, *, include: Sequence[Path], workdir: Path, libraries: Sequence[str] = ()
) -> None:
    """Compile one C file into the program ``out``; what runs is :func:`compile_command`.

    Raises:
        ToolchainMissing: there is no C compiler for ``isa``.
        BuildError: it failed.
    """
    tool = require(isa)
    name = _beside(source, workdir)
    argv = [*_compile_arguments(tool, name, out.name, libraries), *(f"-I{folder}" for folder in include)]
    _run(argv, out, workdir, _COMPILE_SECONDS, tool)


def compile_command(isa: str, source: str, out: str, *, libraries: Sequence[str] = ()) -> tuple[str, ...]:
    """The command of :func:`compile_program` in neutral words, without the include folders."""
    return _neutral(_compile_arguments(require(isa), source, out, libraries))


def _compile_arguments(tool: Tool, source: str, out: str, libraries: Sequence[str]) -> list[str]:
    options = ["-std=c11", "-O2", "-s", "-Wl,--build-id=none"]
    return [*tool.compile, *options, "-o", out, source, *(f"-l{library}" for library in libraries)]


def _ziglang(isa: str) -> Tool | None:
    try:
        version = importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        return None
    zig = (sys.executable, "-m", "ziglang")
    return Tool(
        name=f"ziglang {version}",
        link=(*zig, "ld.lld"),
        compile=(*zig, "cc", "-target", f"{_TRIPLE[isa]}.{GLIBC}"),
        driver=False,
    )


def _on_path(isa: str) -> Tool | None:
    native = platform.machine() == isa.replace("-", "_")
    names = [f"{_TRIPLE[isa]}-gcc", *(["gcc", "cc"] if native else [])]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    return Tool(_named(Path(compiler)), (compiler,), (compiler,), driver=True)


@cache
def _named(program: Path) -> str:
    """A name that changes with the program, without running it."""
    real = program.resolve()
    return f"{program.name} sha256:{hashlib.sha256(real.read_bytes()).hexdigest()[:16]}"


def _beside(path: Path, workdir: Path) -> str:
    """The file's name; ``workdir`` gets a link to it if it lies elsewhere."""
    if path.parent.resolve() != workdir.resolve():
        beside = workdir / path.name
        beside.unlink(missing_ok=True)
        beside.symlink_to(path.resolve())
    return path.name


def _paired(flags: Sequence[str]) -> list[str]:
    """Options and their values joined by commas: ``["-z", "noexecstack"]`` as ``["-z,noexecstack"]``."""
    joined: list[str] = []
    for flag in flags:
        if joined and not flag.startswith("-"):
            joined[-1] += f",{flag}"
        else:
            joined.append(flag)
    return joined


def _environment(workdir: Path) -> Mapping[str, str]:
    # zig keeps what it builds of the C library; in the private folder it leaves nothing behind.
    return {"ZIG_GLOBAL_CACHE_DIR": str(workdir / "zig"), "ZIG_LOCAL_CACHE_DIR": str(workdir / "zig")}


def _run(argv: Sequence[str], out: Path, workdir: Path, timeout: float, tool: Tool) -> None:
    log = workdir / "linker.log"
    try:
        finished = process.run(argv, cwd=workdir, log=log, timeout=timeout, env=_environment(workdir))
    except OSError as error:
        raise BuildError(f"{tool.name} cannot be started: {error}") from error
    finally:
        shutil.rmtree(workdir / "zig", ignore_errors=True)
    made = workdir / out.name
    if not finished.ok or not made.is_file():
        raise BuildError(
            f"{tool.name} {finished.ending()} and made no {out.name}", fix=f"what it said:\n{finished.tail()}"
        )
    if made.resolve() != out.resolve():
        shutil.move(made, out)


def _neutral(argv: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        "python" if word == sys.executable else Path(word).name if word.startswith("/") else word for word in argv
    )
