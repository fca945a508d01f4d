"""YOLOv8n on real NPU compilers: INT8 on the NPU, its mixed head cut off by itself and built by TVM for the ARM cores.

The chain is run whole: Rockchip's simulator or QNN's HTP emulation for the NPU's part, qemu for the other, on
compositions of photographs; detections are held against FP32's (AP at IoU 0.5, as ``benchmarks/int8_accuracy.py``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelforge.bundle.read import open_bundle
from modelforge.target import Registry
from tests.compilers.installed import home_with
from tests.conftest import ROOT, Forge

sys.path.insert(0, str(ROOT / "benchmarks"))

import int8_tasks

BOXES = 4
RECIPE = """
schema = 1
name = "yolov8n"
version = "1.0.0"
[model]
path = "package:nudenet/320n.onnx"
[inputs.images]
shape = [1, 3, 320, 320]
[calibration]
data = "calibration.npz"
[accuracy]
data = "evaluation.npz"
metric = "agreement:with_fp32"
max_drop = 0.02
[[target]]
tag = "{tag}"
precision = ["int8"]
partition = "npu"
"""
METRIC = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from int8_tasks import detection_agreement
def with_fp32(outputs, labels):
    return detection_agreement(outputs["output0"], labels)
"""

rockchip = pytest.param("rk3588", "rockchip", "simulator", marks=pytest.mark.rockchip)
qualcomm = pytest.param("qualcomm-htp-v73", "qualcomm", "emulator", marks=pytest.mark.qualcomm)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration and evaluation images, and what FP32 says of the latter as their labels."""
    pytest.importorskip("skimage", reason="a photograph of a person, for the detector")
    import onnxruntime

    task = int8_tasks.yolo_task(16)
    session = onnxruntime.InferenceSession(str(task.model), providers=["CPUExecutionProvider"])
    exact = np.concatenate([np.asarray(session.run(None, {"images": image[None]})[0]) for image in task.evaluation])
    folder = tmp_path_factory.mktemp("photographs")
    np.savez(folder / "calibration.npz", images=task.calibration)
    np.savez(folder / "evaluation.npz", images=task.evaluation, label=exact)
    return folder


def built(forge: Forge, data: Path, tag: str) -> dict[str, Any]:
    folder = forge.cwd / "yolov8n"
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(tag=tag))
    (folder / "agreement.py").write_text(METRIC)
    for name in ("calibration.npz", "evaluation.npz"):
        (folder / name).symlink_to(data / name)
    done = forge("build", folder, "--json")
    assert done.code == 0, done.err
    return done.json


@pytest.mark.slow  # lowers, compiles and runs a detector on two processors that are not here: a minute
@pytest.mark.qemu
@pytest.mark.parametrize(("tag", "compiler", "evidence"), [rockchip, qualcomm])
def test_a_detector_on_npu_and_arm_cores(tag: str, compiler: str, evidence: str, data: Path, tmp_path: Path) -> None:
    forge = Forge(home_with(compiler, tmp_path / "home"), tmp_path)
    document = built(forge, data, tag)

    npu, cpu = document["variants"]
    assert (npu["compiler"], npu["precision"], npu["accuracy"]["evidence"]) == (compiler, "int8", evidence)
    assert (cpu["compiler"], cpu["precision"], cpu["accuracy"]["evidence"]) == ("tvm", "fp32", "emulator")
    partition = document["partitions"][tag]
    assert [each["name"] for each in partition["outputs"]] == ["output0"]
    crossing = {each["name"]: each["shape"][1] for each in partition["stages"][1]["inputs"]}
    assert sorted(crossing.values()) == [BOXES, 18], "boxes and scores cross apart, each with a scale of its own"

    (chain,) = partition["chains"]
    assert [each["evidence"] for each in chain["stages"]] == [evidence, "emulator"]
    accuracy = chain["accuracy"]
    assert (accuracy["gate"], accuracy["metric"]) == ("passed", "agreement:with_fp32")
    assert accuracy["samples"] >= (16 if evidence == "simulator" else 8)
    assert accuracy["value"] >= 0.98

    scores = next(name for name, channels in crossing.items() if channels == 18)
    row = next(row for row in npu["accuracy"]["per_output"] if row["output"] == scores)
    assert row["sqnr_db"] > 15, "class scores are alive on the NPU"

    host = Registry().get(Registry().get(tag).host or "")
    assert host.arch.kind == "cpu"
    assert f"-mcpu={host.arch.mcpu}" in json.dumps(cpu["commands"]), "TVM compiles for the cores that the profile names"

    on_npu = npu["delegation"]["macs"]["npu"] / sum(npu["delegation"]["macs"].values())
    assert on_npu == 1.0

    verified = forge("verify", document["path"], "--chain", "--json")
    assert verified.code == 0, verified.err
    assert [each["outcome"] for each in verified.json["chains"]] == ["passed"]
    assert {variant.record.stage for variant in open_bundle(forge.cwd / document["path"]).variants} == {
        each["name"] for each in partition["stages"]
    }
