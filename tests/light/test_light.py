"""The deployer's install: no numpy, no onnx. `nox -s light` runs this in an environment that has neither."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.record import Artifact, Runtime, VariantRecord
from modelforge.store import digest_file
from tests.conftest import ROOT, Forge

BUILD_EXTRA = find_spec("onnx") is not None


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "main.onnx"
    path.write_bytes(b"an artifact")
    blob = digest_file(path)
    record = VariantRecord(
        target="x86-64",
        status="compiled",
        compiler="onnxruntime",
        precision="fp32",
        artifact=Artifact(file="main.onnx", digest=blob.digest, size=blob.size),
        runtime=Runtime(requires="ONNX Runtime"),
    )
    files = (BundleFile("main.onnx", "artifact", "application/vnd.onnx", path, blob.digest, blob.size),)
    content = BundleContent("tiny", "1.0.0", {}, (VariantContent(record, files),))
    return write_bundle(tmp_path / "tiny-1.0.0", content).path


@pytest.mark.parametrize(
    "command",
    [["inspect", "BUNDLE"], ["verify", "BUNDLE", "--no-run"], ["targets"], ["doctor"], ["cache", "ls"]],
    ids=" ".join,
)
def test_commands_of_a_deployer(forge: Forge, bundle: Path, command: list[str]) -> None:
    argv = [str(bundle) if word == "BUNDLE" else word for word in command]
    done = forge(*argv)
    assert done.code == 0, done.err
    assert forge(*argv, "--json").json


@pytest.mark.parametrize(
    "command", [["inspect", "BUNDLE"], ["verify", "BUNDLE", "--no-run"], ["targets"], ["--help"]], ids=" ".join
)
def test_they_import_nothing_heavy(forge: Forge, bundle: Path, command: list[str]) -> None:
    argv = [str(bundle) if word == "BUNDLE" else word for word in command]
    code = (
        "import sys; from modelforge.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'onnx_ir', 'tvm', 'tensorrt_rtx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=forge.cwd, env=forge.env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_no_pydantic(forge: Forge) -> None:
    code = (
        "import sys; from modelforge.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(1 if {'pydantic', 'rich'} & set(sys.modules) else 0)\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=forge.env(), capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(BUILD_EXTRA, reason="the build extra is installed here; `nox -s light` runs this without it")
@pytest.mark.parametrize(
    "command", [["build", "RECIPE"], ["plan", "RECIPE"], ["inspect", "MODEL"], ["init", "MODEL"]], ids=" ".join
)
def test_building_says_what_it_needs(forge: Forge, command: list[str]) -> None:
    digits = ROOT / "recipes" / "digits"
    places = {"RECIPE": str(digits), "MODEL": str(digits / "model.onnx")}
    done = forge(*(places.get(word, word) for word in command))
    assert done.code == 4, done.err
    assert "modelforge[build]" in done.err
