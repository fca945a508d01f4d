"""Installs the doubles of TensorRT and of the CUDA driver into a folder, as a device would have the real ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
API = HERE.parent / "compilers" / "tensorrt" / "api"


@dataclass(frozen=True)
class Doubles:
    """Where the doubles lie, and the environment in which a program finds them."""

    folder: Path
    version: str

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.folder), "LD_LIBRARY_PATH": str(self.folder / "lib")}

    def behave(self, **behaviour: Any) -> None:
        """What shall go wrong from now on; nothing without arguments. See ``_BEHAVIOUR`` in the double."""
        (self.folder / "tensorrt" / "behaviour.json").write_text(json.dumps(behaviour))

    def deserialized(self) -> bool:
        """Whether an engine was ever given to the runtime."""
        return (self.folder / "tensorrt" / "deserialized").exists()


def install(folder: Path, *, version: str = "10.13.3.9", sm: int = 75, memory: int = 1 << 30) -> Doubles:
    """A double of TensorRT ``version``, and of a GPU of compute capability ``sm`` with ``memory`` bytes."""
    package = folder / "tensorrt"
    package.mkdir(parents=True)
    shutil.copyfile(HERE / "tensorrt_double.py", package / "__init__.py")
    shutil.copyfile(API / f"{version}.json", package / "api.json")
    doubles = Doubles(folder, f"{version}+double")
    doubles.behave()
    metadata = folder / f"tensorrt-{doubles.version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {doubles.version}\n")
    (folder / "lib").mkdir()
    compiler = [shutil.which("cc") or ""] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    subprocess.run(
        [
            *compiler, "-shared", "-fPIC", "-O1", f"-DSM={sm}", f"-DMEMORY={memory}ull", "-Wl,-soname,libcuda.so.1",
            "-o", str(folder / "lib" / "libcuda.so.1"), str(HERE / "libcuda_double.c"),
        ],
        check=True,
        timeout=120,
    )  # fmt: skip
    return doubles


def make_python(folder: Path, *paths: Path | str) -> Path:
    """An interpreter of its own that has the packages in ``paths``, and none of this one's."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "them.pth").write_text("\n".join(map(str, paths)) + "\n")
    return folder / "bin" / "python"
