"""A Jetson's variant from build to finished bundle, with the double of TensorRT in the device's place.

Everything but NVIDIA's part is real: the program in a process of its own, the bundle, the golden samples, the gate.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT, Forge, edit_targets
from tests.doubles.install_tensorrt import Doubles, install, make_python

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
    assert {"main.engine", "engine.json", "compile.log", "layers.json", "timing.cache"} <= names


def test_the_time_of_each_layer_is_in_the_bundle_and_in_its_report(
    deferred: Forge, jetson: Doubles, tmp_path: Path
) -> None:
    done = deferred("finalize", BUNDLE, "--target", ORIN, "-o", tmp_path / "out", "--json", **jetson.env)
    assert done.code == 0, done.err
    (variant,) = deferred("report", tmp_path / "out", "--json").json["variants"]
    told = variant["reports"]["layers"]
    assert told["layers"][0]["name"] == "the whole model, by the double"
    assert deferred("report", tmp_path / "out", "--html", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "the whole model, by the double" in page
    assert f"Time of 1 layer on the device, batch {told['batch']}" in page


def test_the_timing_cache_goes_with_the_bundle_and_comes_back(deferred: Forge, tmp_path: Path) -> None:
    """Build, finalize, name what it left in the next version's recipe, finalize on a device that never built before."""
    jetson = install(tmp_path / "jetson", version="10.3.0", sm=87)
    jetson.behave(measured="convolution")
    first = Forge(tmp_path / "device", tmp_path)
    assert first("finalize", deferred.cwd / BUNDLE, "--target", ORIN, "-o", "first", **jetson.env).code == 0
    cache = digest_of(first, "first", "timing.cache")
    (kept,) = (tmp_path / "device" / "timing-caches").iterdir()
    assert kept.read_bytes() == blob(tmp_path / "first", cache) == b"timing 10.3.0+double convolution"

    forge = Forge(deferred.home, tmp_path)
    shutil.copytree(ROOT / "recipes" / "digits", tmp_path / "digits")
    shutil.copyfile(kept, tmp_path / "digits" / "orin.cache")
    edit_targets(tmp_path / "digits", {ORIN: ["int8", "fp16"]}, '[target.tensorrt]\ntiming_cache = "orin.cache"')
    built = forge("build", "digits", "--allow-deferred", "--json")
    assert built.code == 0, built.err
    assert digest_of(forge, BUNDLE, "timing-cache") == cache
    job = json.loads(blob(tmp_path / BUNDLE, digest_of(forge, BUNDLE, "job.json")))
    assert job["aids"] == {"timing_cache": {"file": "timing-cache", "digest": cache}}
    assert "orin.cache" not in json.dumps(job)
    again = forge("build", "digits", "--allow-deferred", "-o", "again", "--json")
    assert again.json["digest"] == built.json["digest"]

    jetson.behave(measured="softmax")
    second = Forge(tmp_path / "another-device", tmp_path)
    done = second("finalize", BUNDLE, "--target", ORIN, "-o", "second", "--json", **jetson.env)
    assert done.code == 0, done.err
    report = json.loads(blob(tmp_path / "second", digest_of(second, "second", "report.json")))["compile"][
        "timing_cache"
    ]
    assert (report["given"], report["given_used"], report["read"]) == (cache, True, None)
    renewed = digest_of(second, "second", "timing.cache")
    assert report["digest"] == renewed
    (kept,) = (tmp_path / "another-device" / "timing-caches").iterdir()
    assert kept.read_bytes() == blob(tmp_path / "second", renewed) == b"timing 10.3.0+double convolution softmax"


def test_a_timing_cache_that_is_not_there_is_told_before_anything_runs(forge: Forge, digits: Path) -> None:
    edit_targets(digits, {ORIN: ["fp16"]}, '[target.tensorrt]\ntiming_cache = "orin.cache"')
    refused = forge("build", digits, "--allow-deferred")
    assert refused.code == 2
    assert "there is no file orin.cache" in refused.err
    assert "timing_cache" in refused.err


def test_tensorrt_of_another_interpreter_finalizes(deferred: Forge, jetson: Doubles, tmp_path: Path) -> None:
    """A stock JetPack: TensorRT is in the system's Python, and ModelForge in one of its own."""
    python = make_python(tmp_path / "python", jetson.folder, sysconfig.get_path("purelib"))
    env = {"LD_LIBRARY_PATH": jetson.env["LD_LIBRARY_PATH"]}
    assert deferred("finalize", BUNDLE, "--target", ORIN, "-o", tmp_path / "out", **env).code == 4
    env["MODELFORGE_TENSORRT_PYTHON"] = str(python)
    done = deferred("finalize", BUNDLE, "--target", ORIN, "-o", tmp_path / "out", "--json", **env)
    assert done.code == 0, done.err
    (record,) = done.json["variants"]
    assert record["toolchain"]["tensorrt"] == "10.3.0+double"
    assert record["toolchain"]["python"].startswith("3.")
    assert record["accuracy"]["evidence"] == record["latency"]["evidence"] == "device"
    assert str(tmp_path) not in json.dumps(record)
    told = deferred("doctor", "--json", **env).json
    (tensorrt,) = [each for each in told["compilers"] if each["name"] == "tensorrt"]
    assert tensorrt["status"] == "ready"
    assert any(str(python) in warning for warning in tensorrt["warnings"])
    env["MODELFORGE_TENSORRT_PYTHON"] = "/nowhere/python3"
    done = deferred("finalize", BUNDLE, "--target", ORIN, "-o", tmp_path / "not", **env)
    assert done.code == 4
    assert "MODELFORGE_TENSORRT_PYTHON names /nowhere/python3, which is no program here" in done.err


def digest_of(forge: Forge, bundle: str, title: str) -> str:
    files = forge("inspect", bundle, "--target", ORIN, "--json").json["files"]
    (digest,) = [each["digest"] for each in files if each["file"] == title]
    return str(digest)


def blob(bundle: Path, digest: str) -> bytes:
    return (bundle / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()


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
