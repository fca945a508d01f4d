"""`modelforge inspect ENGINE`: its header, and whether it is whole; nothing is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Forge
from tests.doubles.install_tensorrt import install

VTRT = (
    b"vtrt"
    + bytes(12)
    + (100).to_bytes(8, "little")
    + bytes((1, 7, 1, 116))
    + b"vtrt"
    + bytes(32)
    + b"NGNE"
    + bytes(32)
)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "main.engine"
    path.write_bytes(VTRT)
    return path


def test_its_header_is_told(forge: Forge, engine: Path) -> None:
    document = forge("inspect", engine, "--json").json
    assert document["product"] == "TensorRT-RTX"
    assert (document["version"], document["size"], document["is_whole"]) == ("1.7.1.116", 100, True)
    told = forge("inspect", engine)
    assert "an engine of TensorRT-RTX 1.7.1.116; not loaded" in told.out


def test_a_version_that_is_not_the_installed_one_is_told(forge: Forge, engine: Path, tmp_path: Path) -> None:
    engine.write_bytes(b"ftrt" + bytes(20) + bytes((8, 6, 1, 6)) + bytes(72))
    assert forge("inspect", engine, "--json").json["same_version"] is None
    env = install(tmp_path / "installed", version="10.3.0").env
    assert forge("inspect", engine, "--json", **env).json["same_version"] is False
    assert "10.3.0+double, another: it belongs to 8.6.1.6" in forge("inspect", engine, **env).out
    engine.write_bytes(b"ftrt" + bytes(20) + bytes((10, 3, 0, 26)) + bytes(72))
    assert forge("inspect", engine, "--json", **env).json["same_version"] is True


@pytest.mark.parametrize(
    ("data", "what"),
    [(VTRT[:-1], "truncated"), (VTRT + b"\0", "longer"), (b"", "empty"), (b"\x7fELF" + bytes(99), "not a TensorRT")],
)
def test_what_is_no_whole_engine_is_refused(forge: Forge, engine: Path, data: bytes, what: str) -> None:
    engine.write_bytes(data)
    done = forge("inspect", engine)
    assert done.code == 5
    assert what in done.err


def test_it_imports_nothing_heavy(forge: Forge, engine: Path) -> None:
    code = (
        "import sys; from modelforge.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    argv = [sys.executable, "-c", code, "inspect", str(engine)]
    done = subprocess.run(argv, env=forge.env(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
