"""The real Python bindings of TensorRT without TensorRT: downloaded wheels, imported against a generated stub library.

A stub exports every symbol that the bindings import and that the system does not have, as a function that does
nothing. So every class, enum member and call signature can be read; nothing can be built. TensorRT-RTX is read
as it is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "api"

WHEELS = {
    "10.3.0": "tensorrt_cu12_bindings==10.3.0",
    "10.13.3.9": "tensorrt_cu12_bindings==10.13.3.9",
    "11.4.0.106": "tensorrt_cu13_bindings==11.4.0.106",
}
RTX = "1.7.1.116"
VERSIONS = (*WHEELS, RTX)


class NotHad(Exception):
    """The bindings cannot be had on this machine, and why."""


def recorded(version: str) -> dict[str, Any]:
    """What was read from the real bindings: ``classes`` by name, each with ``enum`` members and ``attributes``.

    An attribute is the list of its call signatures, or the type of a property.
    """
    document: dict[str, Any] = json.loads((RECORDS / f"{version}.json").read_text())
    return document


def read_real(version: str, workdir: Path, *, recorded_only: bool = True) -> dict[str, Any]:
    """Import the real bindings in a child process and list their classes.

    Raises:
        NotHad: no network, no wheel for this Python, no C compiler, or another TensorRT-RTX than the recorded one.
    """
    names = sorted(recorded(version)["classes"]) if recorded_only else []
    if version == RTX:
        if find_spec("tensorrt_rtx") is None:
            raise NotHad("tensorrt_rtx is not installed")
        argv = ["tensorrt_rtx", ""]
    else:
        folder = _unpacked(version)
        argv = ["tensorrt_bindings", str(folder), *map(str, _stubs(folder, workdir))]
    done = subprocess.run(
        [sys.executable, "-c", _READ, json.dumps(names), *argv],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    if document["version"] != version:
        raise NotHad(f"{document['version']} is installed, not {version}")
    return document


# In the child. Signatures are the lines of a docstring that begin with the function's own name; property types are
# those of its getter. Module names are cut off: they differ between the products and mean the same.
_READ = r"""
import ctypes, importlib, inspect, json, re, sys
names, module, folder, *stubs = json.loads(sys.argv[1]), *sys.argv[2:]
for stub in stubs:
    ctypes.CDLL(stub, ctypes.RTLD_GLOBAL)
if folder:
    sys.path.insert(0, folder)
trt = importlib.import_module(module)
plain = lambda text: re.sub(r"\b(?:[a-z_]+\.)*tensorrt(?:_rtx)?\.", "", text).strip()
def attribute(name, value):
    getter = getattr(value, "fget", None)
    if isinstance(value, property):
        found = re.search(r"-> (.+)", (getter and getter.__doc__) or "")
        return plain(found.group(1)) if found else "?"
    lines = [re.sub(r"^\d+\. ", "", line) for line in (value.__doc__ or "").splitlines()]
    return [plain(line) for line in lines if line.startswith(name + "(self")]
def describe(kind):
    members = {
        name: attribute(name, value) for name, value in sorted(vars(kind).items())
        if name == "__init__" or not name.startswith("_")
    }
    enum = sorted(getattr(kind, "__members__", ()))
    return {"enum": enum, "attributes": {name: value for name, value in members.items() if name not in enum}}
found = {name: kind for name, kind in vars(trt).items() if inspect.isclass(kind) and not name.startswith("_")}
for outer in list(found.values()):  # ILogger.Severity
    found |= {each.__name__: each for each in vars(outer).values() if inspect.isclass(each)}
classes = {name: describe(kind) for name, kind in sorted(found.items()) if not names or name in names}
print(json.dumps({"version": trt.__version__, "classes": classes}))
"""


def _unpacked(version: str) -> Path:
    """The wheel of this Python, downloaded once."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelforge-tests" / "bindings"
    folder = base / f"{version}-cp{sys.version_info.major}{sys.version_info.minor}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    argv = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "-d", str(temporary), WHEELS[version]]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *argv], capture_output=True, text=True, timeout=300, check=False
    )
    wheels = list(temporary.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        shutil.rmtree(temporary, ignore_errors=True)
        raise NotHad(f"pip cannot download {WHEELS[version]}: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(temporary)
    wheels[0].unlink()
    try:
        temporary.rename(folder)
    except OSError:  # another test process was first
        shutil.rmtree(temporary)
    return folder


def _stubs(folder: Path, workdir: Path) -> list[Path]:
    """A stub for each library that the bindings need and that is no system library."""
    compiler = _compiler()
    elf = read_elf(next(folder.glob("*/tensorrt.so")))
    symbols = [name for name in elf.unversioned if not name.lstrip("_").startswith("Py") and name not in _LIBC]
    source = workdir / "stub.c"
    source.write_text(
        "".join(
            f"void *{name}[64];\n" if name.startswith("_ZT") else f"void *{name}(void) {{ return 0; }}\n"
            for name in symbols
        )
    )
    (workdir / "empty.c").write_text("")
    built = []
    for place, name in enumerate(library for library in elf.needed if library.startswith("libnv")):
        path = workdir / name
        argv = [*compiler, "-shared", "-fPIC", "-w", "-o", str(path), f"-Wl,-soname,{name}"]
        subprocess.run([*argv, str(source if place == 0 else workdir / "empty.c")], check=True, timeout=120)
        built.append(path)
    return built


_LIBC = ("dlopen", "dlsym", "dlclose", "dlerror")
"""In libdl before glibc 2.34, without a version in these wheels; a stub of them would break the loader."""


def _compiler() -> list[str]:
    if found := shutil.which("cc") or shutil.which("gcc"):
        return [found]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise NotHad("there is no C compiler, and no ziglang, to make the stub library with")


@dataclass(frozen=True)
class Elf:
    """``needed``: libraries; ``unversioned``: undefined symbols that name no version, so are of no system library."""

    needed: tuple[str, ...]
    unversioned: tuple[str, ...]


_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_VERSYM = 6, 11, 0x6FFFFFFF
_DT_NEEDED, _STB_GLOBAL = 1, 1


def read_elf(path: Path) -> Elf:
    """The dynamic section of a 64-bit little-endian library (System V gABI, chapters 4 and 5)."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", path
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + index * size) for index in range(count)]
    by_type = {header[1]: header for header in headers if header[1] in (_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_VERSYM)}

    def text(strings: int, offset: int) -> str:
        start = headers[strings][4] + offset
        return data[start : data.index(b"\0", start)].decode()

    dynamic = by_type[_SHT_DYNAMIC]
    entries = struct.iter_unpack("<QQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
    needed = tuple(text(dynamic[6], value) for tag, value in entries if tag == _DT_NEEDED)
    symbols, versions = by_type[_SHT_DYNSYM], by_type[_SHT_VERSYM]
    found = []
    rows = struct.iter_unpack("<IBBHQQ", data[symbols[4] : symbols[4] + symbols[5]])
    for index, (name, info, _other, section, _value, _size) in enumerate(rows):
        (version,) = struct.unpack_from("<H", data, versions[4] + 2 * index)
        if name and section == 0 and info >> 4 == _STB_GLOBAL and version <= 1:
            found.append(text(symbols[6], name))
    return Elf(needed, tuple(found))
