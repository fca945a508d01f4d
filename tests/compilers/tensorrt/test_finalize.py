"""A Jetson's variant from build to finished bundle, with the double of TensorRT in the device's place.

Everything but NVIDIA's part is real: the program in a process of its own, the bundle, the golden samples, the gate.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, Forge, edit_targets
from tests.doubles.install_tensorrt import Doubles, install

BUNDLE = "dist/digits-1.0.0"
ORIN = "jetson-agx-orin"


@pytest.fixture(scope="module")
def deferred(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    """Digits for the Jetson AGX Orin, all prepared and nothing compiled."""
    folder = tmp_path_factory.mktemp("deferred")
    forge = Forge(folder / "home", folder)
    shutil.copytree(ROOT / "recipes" / "digits", folder / "digits")
    edit_targets(folder / "digits", {ORIN: ["int8", "fp16"]})
    refused = forge("build", "digits")
    assert refused.code == 4, refused.err
    assert ORIN in refused.err
    done = forge("build", "digits", "--allow-deferred", "--json")
    assert done.code == 0, done.err
    (record,) = done.json["variants"]
    assert (record["status"], record["compiler"], record["artifact"]) == ("deferred", "tensorrt", None)
    assert record["latency"]["evidence"] == "none"
    return forge


@pytest.fixture
def jetson(tmp_path: Path) -> Doubles:
    return install(tmp_path / "jetson", version="10.3.0", sm=87)


def test_without_tensorrt_it_says_what_is_missing(deferred: Forge) -> None:
    done = deferred("finalize", BUNDLE, "--target", ORIN)
    assert done.code == 4
    assert "NVIDIA TensorRT is not installed" in done.err
    assert "JetPack" in done.err


def test_on_another_gpu_it_says_which(deferred: Forge, tmp_path: Path) -> None:
    doubles = install(tmp_path / "t4", sm=75)
    done = deferred("finalize", BUNDLE, "--target", ORIN, "-o", tmp_path / "out", **doubles.env)
    assert done.code == 4
    assert "the GPU here is double of a GPU (7.5)" in done.err
    assert "8.7" in done.err
    assert not (tmp_path / "out").exists()


def test_it_is_built_loaded_checked_timed_and_recorded(deferred: Forge, jetson: Doubles, tmp_path: Path) -> None:
    done = deferred("finalize", BUNDLE, "--target", ORIN, "-o", tmp_path / "out", "--json", **jetson.env)
    assert done.code == 0, done.err
    (record,) = done.json["variants"]
    assert (record["status"], record["precision"]) == ("compiled", "int8")
    assert record["toolchain"] == {"tensorrt": "10.3.0+double"}  # the record says that a double made it
    assert record["artifact"]["file"] == "main.engine"
    assert record["accuracy"]["evidence"] == record["latency"]["evidence"] == "device"
    assert record["accuracy"]["gate"] == "passed"
    assert record["latency"]["gpu"] == "double of a GPU"
    assert record["latency"]["p50_ms"] > 0
    assert record["runtime"]["needs"]["sm"] == 87
    assert "built on double of a GPU" in record["notes"]
    names = {each["file"] for each in deferred("inspect", tmp_path / "out", "--target", ORIN, "--json").json["files"]}
    assert {"main.engine", "engine.json", "compile.log"} <= names


def test_wrong_outputs_fail_the_gate_at_every_rung(deferred: Forge, jetson: Doubles, tmp_path: Path) -> None:
    jetson.behave(outputs="zeros")
    done = deferred("finalize", BUNDLE, "--target", ORIN, "-o", tmp_path / "out", **jetson.env)
    assert done.code == 3
    assert "int8" in done.err
    assert "fp16" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("behaviour", [{"build": "out of memory"}, {"deserialize": "magicTag"}, {"context": "none"}])
def test_an_engine_that_is_not_to_be_had_is_a_failed_build(
    deferred: Forge, jetson: Doubles, tmp_path: Path, behaviour: dict[str, str]
) -> None:
    jetson.behave(**behaviour)
    done = deferred("finalize", BUNDLE, "--target", ORIN, "-o", tmp_path / "out", **jetson.env)
    assert done.code == 1, done.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_bundle_compiles_and_loads_nothing(deferred: Forge, jetson: Doubles, tmp_path: Path) -> None:
    shutil.copytree(deferred.cwd / BUNDLE, tmp_path / "copy")
    blob = max((tmp_path / "copy" / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    done = deferred("finalize", tmp_path / "copy", "--target", ORIN, "-o", tmp_path / "out", **jetson.env)
    assert done.code == 5
    assert not jetson.deserialized()
