"""Real contexts by the real toolchain: built, read back, emulated, and refused where the chip cannot have a node."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from modelforge.compilers.protocol import Compiled, Missing, RunJob, Toolchain
from modelforge.compilers.qualcomm import QualcommCompiler
from modelforge.compilers.qualcomm.manifest import FILE_NAME
from modelforge.errors import BuildError, UnsupportedError
from modelforge.recipe import Dim
from modelforge.target import Registry, Target
from tests.compilers.qualcomm.conftest import job
from tests.compilers.qualcomm.test_reading import shared_constant
from tests.graph.conftest import sqnr_db

pytestmark = [pytest.mark.qualcomm, pytest.mark.usefixtures("installed")]
QNN = QualcommCompiler()


@pytest.fixture(scope="module")
def built(int8: Path, qualcomm_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELFORGE_HOME", str(qualcomm_home))
        folder = tmp_path_factory.mktemp("contexts") / "built"
        return QNN.compile(job(int8, Registry().get("qualcomm-htp-v73"), folder))


def emulate(built: Compiled, target: Target, samples: Path, tmp_path: Path, batch: int) -> dict[str, np.ndarray]:
    (tmp_path / "run").mkdir(exist_ok=True)
    outputs = tmp_path / "outputs.npz"
    run = RunJob(built.files, built.artifact, target, samples, batch, outputs, tmp_path / "run", 120.0)
    assert QNN.run(run).evidence == "emulator"
    with np.load(outputs) as archive:
        return dict(archive)


def on_cpu(model: Path, samples: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with np.load(samples) as archive:
        result: np.ndarray = session.run(None, {"x": archive["x"]})[0]
    return result


def test_a_context_for_each_gear_and_nothing_beside(built: Compiled) -> None:
    assert sorted(built.files) == [
        "main_b1.onnx", "main_b1_qnn.bin", "main_b3.onnx", "main_b3_qnn.bin", FILE_NAME,
    ]  # fmt: skip
    assert built.artifact == "main_b1_qnn.bin"
    assert built.needs == {"qnn": ">=2.51", "htp_arch": 73, "soc_model": 43}
    wrapper = onnx.load(built.files["main_b3.onnx"])
    assert [node.op_type for node in wrapper.graph.node] == ["EPContext"]
    assert [dim.dim_value for dim in wrapper.graph.input[0].type.tensor_type.shape.dim] == [3, 1, 8, 8]
    delegation = built.report["delegation"]
    assert delegation["operators"] == {"npu": 18, "cpu": 0}
    assert delegation["macs"]["npu"] > 100_000
    assert delegation["macs"]["cpu"] == 0
    log = built.files["main_b1.onnx"].parent.parent / "worker.log"
    assert "\x1b" not in log.read_text()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_emulator_runs_the_file_that_ships(
    built: Compiled, int8: Path, v73: Target, few: Path, tmp_path: Path, batch: int
) -> None:
    """Near the same integers in ONNX Runtime: a misread scale or zero point would be far off."""
    found = emulate(built, v73, few, tmp_path, batch)["logits"]
    exact = on_cpu(int8, few)
    assert found.shape == exact.shape
    assert (found.argmax(1) == exact.argmax(1)).all()
    assert sqnr_db(exact, found) > 30


def test_the_same_bytes_in_two_processes(built: Compiled, int8: Path, v73: Target, tmp_path: Path) -> None:
    again = QNN.compile(job(int8, v73, tmp_path / "again"))
    assert {name: path.read_bytes() for name, path in built.files.items()} == {
        name: path.read_bytes() for name, path in again.files.items()
    }
    logs = [path.parent.parent / "worker.log" for path in (built.files["main_b1.onnx"], again.files["main_b1.onnx"])]
    assert logs[0].read_text() == logs[1].read_text()


def test_fp16_and_one_file_with_the_context_inside(fp16: Path, v73: Target, few: Path, tmp_path: Path) -> None:
    built = QNN.compile(job(fp16, v73, tmp_path / "built", "fp16", embed=True, optimization=3))
    assert sorted(built.files) == ["main_b1.onnx", "main_b3.onnx", FILE_NAME]
    assert built.artifact == "main_b1.onnx"
    assert any("optimization_mode=3" in word for word in built.commands[0])
    found = emulate(built, v73, few, tmp_path, 3)["logits"]
    assert sqnr_db(on_cpu(fp16, few), found) > 45


def test_another_chip_is_another_context(built: Compiled, int8: Path, tmp_path: Path, few: Path) -> None:
    v68 = Registry().get("qualcomm-htp-v68")
    other = QNN.compile(job(int8, v68, tmp_path / "v68"))
    assert other.files[other.artifact].read_bytes() != built.files[built.artifact].read_bytes()
    with pytest.raises(BuildError, match="is for SM8550, not for qualcomm-htp-v68"):
        emulate(built, v68, few, tmp_path, 1)


def test_two_numbers_in_one_constant_stay_two(v73: Target, tmp_path: Path) -> None:
    """QNN's provider gives a constant the scale of its first reader: without a copy this ends 36 times too large."""
    shared_constant(tmp_path / "model.onnx")
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=np.linspace(0, 4, 8, dtype=np.float32).reshape(1, 8))
    asked = replace(job(tmp_path / "model.onnx", v73, tmp_path / "work"), inputs={"x": (1, 8)}, dims={})
    built = QNN.compile(asked)
    assert sorted(built.files) == ["main.onnx", "main_qnn.bin", FILE_NAME]
    found = emulate(built, v73, samples, tmp_path, 1)["y"]
    np.testing.assert_allclose(found, np.linspace(0, 4, 8).reshape(1, 8), atol=0.1)


def test_a_node_that_the_npu_cannot_have_is_named(int8: Path, v73: Target, tmp_path: Path) -> None:
    """Without the switch for it, ONNX Runtime would leave the node to the CPU and call that a success."""
    model = onnx.load(int8)
    output = model.graph.output[0]
    model.graph.node.append(helper.make_node("Det", ["square"], ["det"], name="the_det"))
    model.graph.node.append(helper.make_node("MatMul", [output.name, "side"], ["square"], name="square"))
    side = np.ones((3, 10, 10), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(side, "side"))
    model.graph.output.append(helper.make_tensor_value_info("det", TensorProto.FLOAT, None))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:-2], nodes[-1], nodes[-2]])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(UnsupportedError, match=r"cannot run on the tensor processor: .*the_det \(Det\)") as caught:
        QNN.compile(replace(job(path, v73, tmp_path / "work"), dims={"batch": Dim(values=(10,))}))
    assert caught.value.where == "qualcomm-htp-v73"
    assert "Unsupported nodes in QNN EP" in (tmp_path / "work" / "worker.log").read_text()


def test_float_nodes_on_a_chip_of_integers_are_refused(fp16: Path, prepared: Path, tmp_path: Path) -> None:
    v68 = Registry().get("qualcomm-htp-v68")
    with pytest.raises(UnsupportedError, match=r"SM8350 computes in integers only.*\(Conv\)"):
        QNN.compile(job(prepared, v68, tmp_path / "work"))
    v73 = Registry().get("qualcomm-htp-v73")
    with pytest.raises(UnsupportedError, match="must stay FP32"):
        QNN.compile(job(prepared, v73, tmp_path / "other", "fp16"))


def test_a_spoiled_manifest_is_told(built: Compiled, v73: Target, few: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / FILE_NAME
    spoiled.write_text(json.dumps({"schema": 2}))
    with pytest.raises(BuildError, match="cannot be read"):
        emulate(replace(built, files={**built.files, FILE_NAME: spoiled}), v73, few, tmp_path, 1)


def test_probe_and_runner_follow_the_environment(v73: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = QNN.probe()
    assert isinstance(found, Toolchain)
    assert found.versions["onnxruntime-qnn"] == "2.7.0"
    assert QNN.runner(v73) == "emulator"
    assert QNN.runner(Registry().get("t4")) is None
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path))
    missing = QNN.probe()
    assert isinstance(missing, Missing)
    assert missing.fix == "modelforge toolchain install qualcomm --accept-license"
    assert QNN.runner(v73) is None
    assert missing.fix in QNN.runner_hint(v73)
