"""The whole driver against a double of TensorRT: build, load, run, time, and every way in which that goes wrong.

The double has what the real bindings of one version have, and no more (test_contract.py); it executes by ONNX
Runtime on host memory. What these tests say of outputs and times, they say of the double: no engine of NVIDIA's ran.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from modelforge.compilers.protocol import Compiled, CompileJob, Missing, RunJob, Toolchain
from modelforge.compilers.tensorrt import device
from modelforge.compilers.tensorrt.driver import TensorRtCompiler, TensorRtRtxCompiler
from modelforge.errors import BuildError, IntegrityError, ModelForgeError, ToolchainMissing, UnsupportedError
from modelforge.recipe import Dim
from modelforge.store import digest_file
from tests.compilers.tensorrt.models import BATCH, conv_net, gpu, one_node
from tests.doubles.install_tensorrt import Doubles

COMPILER = TensorRtCompiler()
Make = Callable[..., Doubles]


def compile_net(tmp_path: Path, sm: int = 75, *, dtype: Any = np.float32, **changes: Any) -> Compiled:
    workdir = tmp_path / "work"
    workdir.mkdir(exist_ok=True)
    job = CompileJob(
        model=conv_net(tmp_path / "model.onnx", dtype),
        target=gpu(sm, dla=sm == 87),
        precision="fp16",
        inputs={"x": ("batch", 1, 8, 8)},
        dims={"batch": BATCH},
        workdir=workdir,
        timeout=60,
    )
    return COMPILER.compile(dataclasses.replace(job, **changes))


_BUILT: dict[str, Path] = {}


def built_net(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """What :func:`compile_net` builds, built once for all tests that only want to load it."""
    if not _BUILT:
        folder = tmp_path_factory.mktemp("built")
        _BUILT.update(compile_net(folder).files, model=folder / "model.onnx")
    (tmp_path / "work").mkdir()
    files = {name: tmp_path / "work" / name for name in ("main.engine", "engine.json")}
    for name, path in files.items():
        shutil.copyfile(_BUILT[name], path)
    shutil.copyfile(_BUILT["model"], tmp_path / "model.onnx")
    return Compiled("main.engine", files, (), "")


def run_job(tmp_path: Path, compiled: Compiled, samples: int = 5, sm: int = 75, **changes: Any) -> RunJob:
    inputs = np.random.default_rng(0).standard_normal((samples, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=inputs)
    (tmp_path / "run").mkdir(exist_ok=True)
    job = RunJob(
        files=compiled.files, artifact=compiled.artifact, target=gpu(sm), inputs=tmp_path / "inputs.npz", batch=4,
        outputs=tmp_path / "outputs.npz", workdir=tmp_path / "run", timeout=60,
    )  # fmt: skip
    return dataclasses.replace(job, **changes)


def expected(tmp_path: Path) -> Any:
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.load(tmp_path / "inputs.npz")["x"]})[0]


# -- found, or not


def test_it_is_missing_where_it_is_not_installed() -> None:
    missing = COMPILER.probe()
    assert isinstance(missing, Missing)
    assert "not installed" in missing.reason
    assert "JetPack" in missing.fix


def test_without_a_gpu_it_builds_nothing(double: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    double()
    monkeypatch.delenv("LD_LIBRARY_PATH")
    missing = COMPILER.probe()
    assert isinstance(missing, Missing)
    assert "no NVIDIA GPU is here" in missing.reason
    assert "finalize" in missing.fix
    with pytest.raises(
        ToolchainMissing, match=r"no NVIDIA GPU is here, and sm75 has compute capability 7\.5"
    ) as caught:
        compile_net(tmp_path)
    assert caught.value.exit_code == 4
    assert not list((tmp_path / "work").iterdir())


def test_a_double_says_that_it_is_one(double: Make, tmp_path: Path) -> None:
    double(version="10.3.0")
    toolchain = COMPILER.probe()
    assert isinstance(toolchain, Toolchain)
    assert toolchain.versions == {"tensorrt": "10.3.0+double"}
    assert toolchain.warnings == ()
    compiled = compile_net(tmp_path)
    assert "10.3.0+double" in compiled.requires
    assert compiled.report["engine_version"] == "10.3.0+double"
    assert "built on double of a GPU" in compiled.notes


def test_a_gpu_of_another_kind_is_named(double: Make, tmp_path: Path) -> None:
    double(sm=80)
    assert COMPILER.runner(gpu(80)) == "device"
    assert COMPILER.runner(gpu(75)) is None
    assert isinstance(COMPILER.probe(gpu(80)), Toolchain)
    assert isinstance(COMPILER.probe(gpu(75)), Missing)
    with pytest.raises(ToolchainMissing, match=r"the GPU here is double of a GPU \(8\.0\), and sm75 has .*7\.5"):
        compile_net(tmp_path)


def test_a_version_without_package_metadata_is_read_from_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text('__version__ = "9.9.0.1"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(device, "gpus", lambda: (device.Gpu(0, "g", 75, 1, "12.6"),))
    toolchain = COMPILER.probe()
    assert isinstance(toolchain, Toolchain)
    assert toolchain.versions == {"tensorrt": "9.9.0.1"}
    assert "untested; 10.3 and 10.13 and 11.4" in toolchain.warnings[0]


def test_a_module_that_cannot_be_imported_is_a_missing_toolchain(double: Make, tmp_path: Path) -> None:
    doubles = double()
    (doubles.folder / "tensorrt" / "__init__.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')")
    with pytest.raises(ToolchainMissing, match=r"cannot be loaded: libnvinfer\.so\.10") as caught:
        compile_net(tmp_path)
    assert "LD_LIBRARY_PATH" in str(caught.value.fix)


# -- built


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9", "11.4.0.106"])
def test_an_engine_is_built_run_and_timed_in_every_version(double: Make, tmp_path: Path, version: str) -> None:
    double(version=version)
    compiled = compile_net(tmp_path)
    assert sorted(compiled.files) == ["engine.json", "main.engine", "timing.cache"]
    assert compiled.needs["sm"] == 75
    assert compiled.needs["tensorrt"].startswith(f"=={version}")
    assert compiled.report["engine_bytes"] == compiled.files["main.engine"].stat().st_size
    assert set(compiled.report["seconds"]) == {"parse", "build"}
    job = run_job(tmp_path, compiled)
    ran = COMPILER.run(job)
    assert ran.evidence == "device"
    assert ran.notes == ("ran on double of a GPU, driver for CUDA 12.6",)
    np.testing.assert_allclose(np.load(job.outputs)["y"], expected(tmp_path), rtol=1e-5)
    assert [each["batch"] for each in ran.latency["batches"]] == [1, 4, 8]
    assert ran.latency["batch"] == 4
    assert 0 < ran.latency["p50_ms"] <= ran.latency["p90_ms"] <= ran.latency["p99_ms"]
    assert set(ran.latency["batches"][0]["transfers"]) == {"in_ms", "out_ms"}
    assert ran.latency["device_memory_bytes"] >= 8 * 64 * 4
    told = json.loads(ran.files["layers.json"].read_text())
    assert (told["schema"], told["batch"]) == (1, 8)
    assert told["layers"][0]["name"] == "the whole model, by the double"
    assert told["layers"][0]["ms"] > 0


def test_two_engines_are_timed_round_by_round(double: Make, tmp_path: Path) -> None:
    double()
    job = run_job(tmp_path, compile_net(tmp_path))
    timed = COMPILER.race(job, job)
    assert timed is not None
    assert 0.2 < timed[0] / timed[1] < 5
    assert COMPILER.race(dataclasses.replace(job, target=gpu(80)), job) is None


def test_gears_have_profiles_and_any_count_of_samples_runs(double: Make, tmp_path: Path) -> None:
    double()
    compiled = compile_net(tmp_path, dims={"batch": Dim(values=(2, 4, 8))})
    profiles = compiled.report["profiles"]
    assert [[shapes[0][0], shapes[1][0], shapes[2][0]] for shapes in (each["x"] for each in profiles)] == [
        [2, 2, 2],
        [3, 4, 4],
        [5, 8, 8],
    ]
    job = run_job(tmp_path, compiled, samples=9)  # 4, 4 and 1: the last is padded up to 2
    ran = COMPILER.run(job)
    np.testing.assert_allclose(np.load(job.outputs)["y"], expected(tmp_path), rtol=1e-5)
    assert [each["batch"] for each in ran.latency["batches"]] == [2, 4, 8]


def test_half_inputs_take_the_samples_of_the_fp32_model(double: Make, tmp_path: Path) -> None:
    double()
    job = run_job(tmp_path, compile_net(tmp_path, dtype=np.float16))
    COMPILER.run(job)
    assert np.load(job.outputs)["y"].dtype == np.float16


def test_a_weight_stripped_engine_gets_its_weights_as_it_is_loaded(double: Make, tmp_path: Path) -> None:
    doubles = double()
    compiled = compile_net(tmp_path, options={"strip_plan": True})
    assert sorted(compiled.files) == ["engine.json", "main.engine", "timing.cache", "weights.onnx"]
    assert b"classifier" not in compiled.files["main.engine"].read_bytes()
    job = run_job(tmp_path, compiled)
    COMPILER.run(job)
    np.testing.assert_allclose(np.load(job.outputs)["y"], expected(tmp_path), rtol=1e-5)
    doubles.behave(refit="fail")
    with pytest.raises(BuildError, match="weights could not be put into the engine"):
        COMPILER.run(job)


def test_the_timing_cache_is_kept_by_version_and_gpu_and_used_again(double: Make, tmp_path: Path) -> None:
    double()
    first = compile_net(tmp_path).report["timing_cache"]
    again = compile_net(tmp_path).report["timing_cache"]
    assert first["read"] is None
    assert again["read"] == first["digest"]
    assert again["file"] == "tensorrt-10.13.3.9-double-double-of-a-gpu-sm75.cache"
    kept = tmp_path / "home" / "timing-caches" / again["file"]
    kept.write_bytes(b"of another version")
    compiled = compile_net(tmp_path)
    assert compiled.report["timing_cache"]["read"] is None
    assert any(f"{kept.name} was not accepted" in warning for warning in compiled.report["warnings"])
    assert kept.read_bytes() == compiled.files["timing.cache"].read_bytes() == b"timing 10.13.3.9+double convolution"


def test_a_timing_cache_that_the_recipe_names_is_joined_to_the_local_one(double: Make, tmp_path: Path) -> None:
    doubles = double()
    compile_net(tmp_path)
    given = tmp_path / "given.cache"
    given.write_bytes(b"timing 10.13.3.9+double pooling")
    doubles.behave(measured="softmax")
    compiled = compile_net(tmp_path, options={"timing_cache": str(given)})
    report = compiled.report["timing_cache"]
    assert report["given_used"]
    assert report["given"] == digest_file(given).digest
    kept = tmp_path / "home" / "timing-caches" / report["file"]
    assert kept.read_bytes() == b"timing 10.13.3.9+double convolution pooling softmax"
    assert report["digest"] == digest_file(kept).digest
    assert given.read_bytes() == b"timing 10.13.3.9+double pooling"


def test_a_timing_cache_of_another_version_is_told_and_not_used(double: Make, tmp_path: Path) -> None:
    double()
    given = tmp_path / "given.cache"
    given.write_bytes(b"timing 10.3.0+double pooling")
    compiled = compile_net(tmp_path, options={"timing_cache": str(given)})
    assert not compiled.report["timing_cache"]["given_used"]
    assert any("given.cache was not accepted" in warning for warning in compiled.report["warnings"])
    assert b"pooling" not in compiled.files["timing.cache"].read_bytes()


def test_what_falls_back_from_the_dla_is_reported(double: Make, tmp_path: Path) -> None:
    doubles = double(version="10.3.0", sm=87)
    doubles.behave(dla_cores=2)
    model = onnx.load(conv_net(tmp_path / "fixed.onnx", np.float32))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "fixed.onnx")
    fixed = {"inputs": {"x": (4, 1, 8, 8)}, "dims": {}, "options": {"dla_core": 1}, "model": tmp_path / "fixed.onnx"}
    compiled = compile_net(tmp_path, 87, **fixed)
    assert compiled.report["dla"] == {"core": 1, "layers": 2, "on_gpu": ["pool", "flat", "classifier"]}
    assert "DLA core 1: 2 layers, 3 on the GPU" in compiled.notes
    doubles.behave(dla_cores=1)
    with pytest.raises(UnsupportedError, match="there is no DLA core 1: this device has 1"):
        compile_net(tmp_path, 87, **fixed)


def test_options_reach_the_builder_and_the_record(double: Make, tmp_path: Path) -> None:
    double(sm=86)
    options = {"version_compatible": True, "hardware_compatibility": "ampere+", "builder_optimization_level": 5}
    compiled = compile_net(tmp_path, 86, options=options)
    assert b"VERSION_COMPATIBLE" in compiled.files["main.engine"].read_bytes()
    assert compiled.needs == {"tensorrt": ">=10.13.3.9", "sm": ">=80"}
    assert "8.0 or newer" in compiled.requires
    said = compiled.commands[0]
    assert {"--version-compatible", "--hardware-compatibility=AMPERE_PLUS", "--optimization-level=5"} <= set(said)
    COMPILER.run(run_job(tmp_path, compiled, sm=86))


# -- not built


@pytest.mark.parametrize(
    ("said", "kind", "what"),
    [
        ("Error Code 1: Cuda Runtime (out of memory)", BuildError, "not enough memory"),
        ("some internal assertion", BuildError, "the builder gave no engine: some internal assertion"),
        ("CUDA initialization failure with error: 35", ToolchainMissing, "no NVIDIA GPU that TensorRT can use"),
    ],
)
def test_a_builder_that_gives_nothing_is_an_error_with_its_reason(
    double: Make, tmp_path: Path, said: str, kind: type[ModelForgeError], what: str
) -> None:
    double().behave(build=said)
    with pytest.raises(kind, match=what):
        compile_net(tmp_path)
    assert not (tmp_path / "work" / "main.engine").exists()


def test_a_builder_that_hangs_is_stopped_and_one_that_crashes_is_told(double: Make, tmp_path: Path) -> None:
    doubles = double()
    doubles.behave(build="crash")
    with pytest.raises(BuildError, match="was killed by SIGABRT"):
        compile_net(tmp_path)
    doubles.behave(build="hang")
    with pytest.raises(BuildError, match="its time limit"):
        compile_net(tmp_path, timeout=2)


def test_a_parser_refusal_names_the_node(double: Make, tmp_path: Path) -> None:
    double().behave(refuse="Gemm")
    with pytest.raises(UnsupportedError, match="refused Gemm, UNSUPPORTED_NODE") as caught:
        compile_net(tmp_path)
    assert caught.value.where == "node classifier"


def test_garbage_parses_to_an_empty_network_and_is_refused(double: Make, tmp_path: Path) -> None:
    double()
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"hello world" * 100)
    with pytest.raises(ModelForgeError):
        compile_net(tmp_path, model=garbage)
    assert not (tmp_path / "work" / "main.engine").exists()


def test_an_unused_input_name_is_refused(double: Make, tmp_path: Path) -> None:
    double()
    with pytest.raises(BuildError, match="the model has no input z"):
        compile_net(tmp_path, inputs={"x": ("batch", 1, 8, 8), "z": ("batch",)})


# -- not run


@pytest.mark.parametrize(
    ("behaviour", "what"),
    [
        ({"deserialize": "magicTag mismatch"}, "the engine was not loaded: magicTag mismatch"),
        ({"deserialize": "Version tag does not match"}, "of another version"),
        ({"context": "none"}, "no execution context"),
        ({"execute": "fail"}, "the engine did not run"),
    ],
)
def test_an_engine_that_gives_nothing_is_an_error(
    double: Make, tmp_path: Path, behaviour: dict[str, str], what: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    doubles = double()
    job = run_job(tmp_path, built_net(tmp_path, tmp_path_factory))
    doubles.behave(**behaviour)
    with pytest.raises(ModelForgeError, match=what):
        COMPILER.run(job)
    assert not job.outputs.exists()


def test_a_gpu_with_too_little_memory_is_told(
    double: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    double(memory=1024)
    with pytest.raises(BuildError, match="CUDA_ERROR_OUT_OF_MEMORY") as caught:
        COMPILER.run(run_job(tmp_path, built_net(tmp_path, tmp_path_factory)))
    assert "smaller batch" in str(caught.value.fix)


def spoil(compiled: Compiled, change: Callable[[bytes], bytes]) -> None:
    engine = compiled.files["main.engine"]
    engine.write_bytes(change(engine.read_bytes()))


def flip(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 0xFF]) + data[-8:]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (flip, "its digest is sha256:.*it was not loaded"),
        (lambda data: data[:-100], "truncated"),
        (lambda data: data + b"\0", "longer than it was"),
        (lambda data: b"vtrt" + data[4:], "one of TensorRT-RTX"),
        (lambda data: data[:24] + bytes((10, 3, 0, 26)) + data[28:], r"built by TensorRT 10\.3\.0\.26, not 10\.13"),
        (lambda data: b"", "an empty file"),
    ],
    ids=["flipped bit", "truncated", "appended", "other product", "other version", "empty"],
)
def test_an_engine_that_is_not_the_built_one_never_reaches_the_runtime(
    double: Make, tmp_path: Path, change: Callable[[bytes], bytes], what: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    doubles = double()
    job = run_job(tmp_path, compiled := built_net(tmp_path, tmp_path_factory))
    spoil(compiled, change)
    with pytest.raises(IntegrityError, match=what) as caught:
        COMPILER.run(job)
    assert caught.value.exit_code == 5
    assert not doubles.deserialized()
    assert not job.outputs.exists()


def test_an_engine_of_another_version_is_not_loaded(
    double: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As after an upgrade of JetPack: the file is whole, the toolchain is another."""
    doubles = double(version="10.3.0")
    job = run_job(tmp_path, compile_net(tmp_path))
    package = doubles.folder / "tensorrt"
    api = json.loads((package / "api.json").read_text()) | {"version": "10.4.0"}
    (package / "api.json").write_text(json.dumps(api))
    with pytest.raises(IntegrityError, match=r"built by version 10\.3\.0\+double, and 10\.4\.0\+double is installed"):
        COMPILER.run(job)
    assert not doubles.deserialized()


def test_facts_that_are_missing_or_damaged_are_refused(
    double: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    doubles = double()
    compiled = built_net(tmp_path, tmp_path_factory)
    alone = {"main.engine": compiled.files["main.engine"]}
    with pytest.raises(IntegrityError, match="its digest is not known, so it is not loaded"):
        COMPILER.run(run_job(tmp_path, compiled, files=alone))
    compiled.files["engine.json"].write_text("{")
    with pytest.raises(IntegrityError, match=r"engine\.json cannot be read"):
        COMPILER.run(run_job(tmp_path, compiled))
    assert not doubles.deserialized()


def test_wrong_inputs_are_told_by_name(double: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    double()
    job = run_job(tmp_path, built_net(tmp_path, tmp_path_factory))
    np.savez(job.inputs, x=np.zeros((2, 1, 8, 8), np.int64))
    with pytest.raises(BuildError, match="input x is int64, the engine takes float32"):
        COMPILER.run(job)
    np.savez(job.inputs, x=np.zeros((2, 1, 8, 9), np.float32))
    with pytest.raises(BuildError, match=r"no optimisation profile of the engine takes x \[2, 1, 8, 9\]"):
        COMPILER.run(job)


def test_an_output_whose_shape_depends_on_values_is_refused(
    double: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    double()
    model = onnx.load(one_node(tmp_path / "fixed.onnx", "NonZero", (4, 4)))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [2, "found"]))
    onnx.save(model, tmp_path / "fixed.onnx")
    compiled = compile_net(tmp_path, model=tmp_path / "fixed.onnx", inputs={"x": (4, 4)}, dims={})
    np.savez(tmp_path / "rows.npz", x=np.zeros((2, 4, 4), np.float32))
    with pytest.raises(UnsupportedError, match="the shape of output y depends on the values"):
        COMPILER.run(run_job(tmp_path, compiled, inputs=tmp_path / "rows.npz", batch=1))


def test_the_two_products_do_not_take_each_others_place(
    double: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    double()
    job = run_job(tmp_path, built_net(tmp_path, tmp_path_factory))
    rtx = TensorRtRtxCompiler()
    with pytest.raises((IntegrityError, BuildError)):
        rtx.run(job)
