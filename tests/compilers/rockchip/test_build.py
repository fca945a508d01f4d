"""The real toolkit: builds, their reproducibility, the simulator, refusals. Skipped where it is not installed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.protocol import CompileJob, RunJob
from modelforge.compilers.rockchip import RockchipCompiler
from modelforge.compilers.rockchip.container import read_container
from modelforge.errors import BuildError, UnsupportedError
from modelforge.options import PreprocessSection
from modelforge.recipe import Dim
from modelforge.store import digest_file
from modelforge.target import Registry
from modelforge.toolchains.environments import Environment
from tests.conftest import Forge, edit_targets

pytestmark = pytest.mark.rockchip


def write_model(path: Path, tail: str = "Relu") -> Path:
    """Conv -> tail, batch open; weights from a fixed seed."""
    weight = np.random.default_rng(3).normal(0, 0.2, (8, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4, name="conv"),
            helper.make_node(tail, ["c"], ["y"], name="last"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 16, 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def job_of(model: Path, workdir: Path, tag: str = "rk3588") -> CompileJob:
    workdir.mkdir(parents=True)
    return CompileJob(
        model=model,
        target=Registry().get(tag),
        precision="fp16",
        inputs={"x": ("batch", 3, 16, 16)},
        dims={"batch": Dim(values=(2,))},
        workdir=workdir,
        timeout=300,
    )


def run_job(files: dict[str, Path], samples: np.ndarray, folder: Path) -> RunJob:
    folder.mkdir()
    np.savez(folder / "inputs.npz", x=samples)
    return RunJob(
        files=files,
        artifact="main_b2.rknn",
        target=Registry().get("rk3588"),
        inputs=folder / "inputs.npz",
        batch=2,
        outputs=folder / "outputs.npz",
        workdir=folder / "run",
        timeout=300,
    )


def reference(model: Path, samples: np.ndarray) -> np.ndarray:
    import onnxruntime

    (found,) = onnxruntime.InferenceSession(model).run(None, {"x": samples})
    assert isinstance(found, np.ndarray)
    return found


def test_two_builds_are_one_file_and_the_simulator_runs_it(environment: Environment, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m" / "model.onnx")
    compiler = RockchipCompiler()
    compiled = compiler.compile(job_of(model, tmp_path / "first"))
    again = compiler.compile(job_of(model, tmp_path / "below" / "a-folder-with-a-longer-name" / "second"))
    one, two = compiled.files["main_b2.rknn"], again.files["main_b2.rknn"]
    assert digest_file(one) == digest_file(two)
    assert (tmp_path / "first/worker.log").read_text() == (two.parent.parent / "worker.log").read_text()

    container = read_container(one)
    assert (container.platforms, container.version) == (("rk3588",), environment.version)
    assert compiled.needs == {"librknnrt": f">={environment.version}", "platform": "rk3588"}
    assert compiled.report["delegation"]["operators"]["npu"] >= 1
    assert compiled.report["delegation"]["macs"] == {"npu": 2 * 8 * 16 * 16 * 27, "cpu": 0}
    assert "main_b2.rknn" in json.loads(compiled.files["rockchip.json"].read_text())["gears"][0]["file"]

    samples = np.random.default_rng(4).normal(size=(3, 3, 16, 16)).astype(np.float32)  # the second batch is half full
    job = run_job({**compiled.files, "model.onnx": model}, samples, tmp_path / "run")
    ran = compiler.run(job)
    assert ran.evidence == "simulator"
    assert "to the same bytes" in ran.notes[0]
    with np.load(job.outputs) as outputs:
        np.testing.assert_allclose(outputs["y"], reference(model, samples), atol=2e-2)


def test_only_the_file_that_ships_is_simulated(environment: Environment, tmp_path: Path) -> None:
    """Another model behind the same names: built again, it is not the file of the bundle."""
    model = write_model(tmp_path / "m" / "model.onnx")
    compiled = RockchipCompiler().compile(job_of(model, tmp_path / "work"))
    other = write_model(tmp_path / "other" / "model.onnx", tail="Sigmoid")
    samples = np.zeros((2, 3, 16, 16), np.float32)
    with pytest.raises(BuildError, match="built again"):
        RockchipCompiler().run(run_job({**compiled.files, "model.onnx": other}, samples, tmp_path / "run"))


def test_preprocessing_is_built_in(environment: Environment, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m" / "model.onnx")
    section = PreprocessSection(mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0))
    job = replace(job_of(model, tmp_path / "work"), preprocess={"x": section})
    compiled = RockchipCompiler().compile(job)
    assert any("raw pixels: uint8, NHWC" in note for note in compiled.notes)
    pixels = np.random.default_rng(5).integers(0, 256, (2, 3, 16, 16))
    samples = ((pixels - 127.5) / 64).astype(np.float32)
    run = run_job({**compiled.files, "model.onnx": model}, samples, tmp_path / "run")
    RockchipCompiler().run(run)
    with np.load(run.outputs) as outputs:
        np.testing.assert_allclose(outputs["y"], reference(model, samples), atol=2e-2)
    with pytest.raises(BuildError, match="are no pixels"):
        RockchipCompiler().run(run_job({**compiled.files, "model.onnx": model}, samples * 1.3, tmp_path / "wrong"))


def test_preprocessing_that_it_cannot_have_is_refused(environment: Environment, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m" / "model.onnx")
    section = PreprocessSection(source="yuv420sp", crop=(0, 0, 8, 8))
    job = replace(job_of(model, tmp_path / "work"), preprocess={"x": section})
    with pytest.raises(UnsupportedError, match=r"not: crop, source = \"yuv420sp\""):
        RockchipCompiler().compile(job)


def test_the_toolkits_own_quantizer_gets_the_calibration_samples(environment: Environment, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m" / "model.onnx")
    dice = np.random.default_rng(6)
    np.savez(tmp_path / "calibration.npz", x=dice.normal(size=(5, 3, 16, 16)).astype(np.float32))
    options = {"quantizer": "native"}
    asked = replace(job_of(model, tmp_path / "work"), precision="int8", options=options)
    with pytest.raises(UnsupportedError, match="needs calibration samples"):
        RockchipCompiler().compile(asked)
    built = replace(asked, calibration=tmp_path / "calibration.npz")
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "work").mkdir()
    compiled = RockchipCompiler().compile(built)
    assert set(compiled.report["delegation"]["dtypes"]) & {"INT8"}
    assert any("toolkit's own quantization" in note for note in compiled.notes)
    assert any("do_quantization=True" in word for command in compiled.commands for word in command)
    assert "optimization_level" not in json.loads(compiled.files["rockchip.json"].read_text())["config"]

    samples = dice.normal(size=(2, 3, 16, 16)).astype(np.float32)
    run = run_job({**compiled.files, "model.onnx": model}, samples, tmp_path / "run")
    with pytest.raises(UnsupportedError, match="calibration samples, is not in the bundle"):
        RockchipCompiler().run(run)
    ran = RockchipCompiler().run(replace(run, calibration=built.calibration))
    assert "to the same bytes" in ran.notes[0]
    with np.load(run.outputs) as outputs:
        exact = reference(model, samples)
        error = outputs["y"] - exact
        assert 20 < 10 * np.log10((exact**2).sum() / (error**2).sum()) < 60, "INT8, and not FP16"

    other = dice.normal(size=(5, 3, 16, 16)).astype(np.float32) * 100
    np.savez(tmp_path / "calibration.npz", x=other)
    with pytest.raises(BuildError, match="built again"):
        RockchipCompiler().run(replace(run, calibration=built.calibration))


def test_the_toolkits_own_quantizer_gets_raw_pixels(environment: Environment, tmp_path: Path) -> None:
    """Mean and deviation are built in: it takes back what they made of the samples."""
    model = write_model(tmp_path / "m" / "model.onnx")
    section = PreprocessSection(mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0))
    pixels = np.random.default_rng(7).integers(0, 256, (4, 3, 16, 16))
    samples = ((pixels - 127.5) / 64).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", x=samples)
    job = replace(
        job_of(model, tmp_path / "work"), precision="int8", options={"quantizer": "native"}, preprocess={"x": section},
        calibration=tmp_path / "calibration.npz",
    )  # fmt: skip
    compiled = RockchipCompiler().compile(job)
    run = run_job({**compiled.files, "model.onnx": model}, samples[:2], tmp_path / "run")
    RockchipCompiler().run(replace(run, calibration=job.calibration))
    with np.load(run.outputs) as outputs:
        exact = reference(model, samples[:2])
        assert 10 * np.log10((exact**2).sum() / ((outputs["y"] - exact) ** 2).sum()) > 25


def test_the_toolkits_refusal_names_the_reason(environment: Environment, tmp_path: Path) -> None:
    """A return code of -1, without an exception: the reason is in the log alone."""
    model = write_model(tmp_path / "m" / "model.onnx")
    with pytest.raises(UnsupportedError) as caught:
        RockchipCompiler().compile(job_of(model, tmp_path / "work", tag="rv1106"))
    assert "rv1106" in (caught.value.fix or "")


def test_digits_for_rk3588(rockchip_forge: Forge, digits: Path) -> None:
    edit_targets(digits, {"rk3588": ["int8", "fp16"]})
    built = rockchip_forge("build", digits, "--json")
    assert built.code == 0, built.err
    (record,) = built.json["variants"]
    assert (record["status"], record["precision"]) == ("compiled", "int8")
    assert record["accuracy"]["evidence"] == "simulator"
    assert record["accuracy"]["gate"] == "passed"
    assert record["accuracy"]["samples"] == 360
    assert record["runtime"]["needs"]["platform"] == "rk3588"

    digest = built.json["digest"]
    shutil.rmtree(rockchip_forge.cwd / "dist")
    shutil.rmtree(rockchip_forge.home / "steps")
    again = rockchip_forge("build", digits, "--json")
    assert again.json["digest"] == digest

    verified = rockchip_forge("verify", again.json["path"], "--json")
    assert verified.code == 0, verified.err
    (golden,) = verified.json["golden"]
    assert (golden["outcome"], golden["evidence"]) == ("passed", "simulator")


def test_digits_by_the_toolkits_own_quantizer(rockchip_forge: Forge, digits: Path) -> None:
    edit_targets(digits, {"rk3588": ["int8"]}, extra='[target.rockchip]\nquantizer = "native"')
    built = rockchip_forge("build", digits, "--json")
    assert built.code == 0, built.err
    (record,) = built.json["variants"]
    assert (record["precision"], record["accuracy"]["gate"]) == ("int8", "passed")
    assert record["calibration"]["samples"] == 128
    assert record["delegation"]["macs"]["npu"] > 0
    planned = rockchip_forge("plan", digits, "--json").json
    assert not any("lower to int8" in step["title"] for step in planned["steps"])
    verified = rockchip_forge("verify", built.json["path"], "--json")
    (golden,) = verified.json["golden"]
    assert golden["outcome"] == "not run"
    assert "calibration samples" in golden["reason"]
