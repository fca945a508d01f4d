"""The judge's own way, on a real detector: groups are found in the lowered model, and held to the floors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from modelforge.forge.worker import compare_golden, judge
from modelforge.verify.metrics import ChannelGroup, is_silent

RULES = {"metric": "cosine", "max_drop": 0.01, "min_reference": None, "min_agreement": None, "min_sqnr_db": None}


def _photographs(count: int = 8) -> np.ndarray[Any, Any]:
    """Crops of a real photograph of a person, ``[count, 3, 320, 320]`` in 0..1."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("matplotlib, which carries the photograph, is not installed")
    photo = Image.open(Path(spec.submodule_search_locations[0]) / "mpl-data/sample_data/grace_hopper.jpg")
    crops = [photo.crop((0, 0, 250 + 40 * each, 280 + 40 * each)).resize((320, 320)) for each in range(count)]
    return np.stack([np.asarray(crop.convert("RGB"), np.float32).transpose(2, 0, 1) / 255 for crop in crops])


def _one_scale(model: Path, out: Path) -> None:
    """Q/DQ over the Concat of boxes and scores: a third of a thousand levels for scores below one."""
    proto = onnx.load(model)
    (output,) = proto.graph.output
    concat = next(node for node in proto.graph.node if output.name in node.output)
    concat.output[0] = "joined"
    proto.graph.initializer.extend(
        [
            numpy_helper.from_array(np.float32(330 / 127), "joined/scale"),
            numpy_helper.from_array(np.int8(0), "joined/zero"),
        ]
    )
    pair = ["joined/scale", "joined/zero"]
    proto.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["joined", *pair], ["joined/quantized"]),
            helper.make_node("DequantizeLinear", ["joined/quantized", *pair], [output.name]),
        ]
    )
    assert concat.op_type == "Concat"
    assert output.type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.save(proto, out)


def test_one_scale_over_the_concat_of_yolov8_fails_the_gate(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("nudenet")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("nudenet is not installed")
    exact = Path(spec.submodule_search_locations[0]) / "320n.onnx"
    _one_scale(exact, tmp_path / "model.onnx")
    images = _photographs()
    outputs = {}
    for name, model in (("reference", exact), ("value", tmp_path / "model.onnx")):
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        outputs[name] = session.run(None, {"images": images})[0]
        np.savez(tmp_path / f"{name}.npz", output0=outputs[name])
    np.savez(tmp_path / "samples.npz", images=images)
    request = {
        "reference": str(tmp_path / "reference.npz"),
        "value": str(tmp_path / "value.npz"),
        "samples": str(tmp_path / "samples.npz"),
        "metric": {"rules": RULES, "k": 5, "output": None, "folder": str(tmp_path)},
        "precision": "int8",
        "count": len(images),
    }
    found = judge({**request, "models": [str(tmp_path / "model.onnx")]})
    assert found["value"] > 0.999
    assert found["gate"] == "failed"
    assert len(found["reasons"]) == 1
    assert "channels 4:22" in found["reasons"][0]
    boxes, scores = found["per_output"][1:]
    assert boxes["sqnr_db"] > 30
    assert scores["collapsed"] == 1.0
    assert judge({**request, "models": []})["gate"] == "passed"  # what it was without groups


def _detector(path: Path) -> Path:
    """``[n, 4, 10]`` boxes and ``[n, 3, 10]`` scores in one output."""
    nodes = [
        helper.make_node("Mul", ["b", "size"], ["boxes"]),
        helper.make_node("Sigmoid", ["s"], ["scores"]),
        helper.make_node("Concat", ["boxes", "scores"], ["y"], axis=1),
    ]
    shapes = {"b": ["n", 4, 10], "s": ["n", 3, 10]}
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 7, 10])],
        [numpy_helper.from_array(np.float32(300), "size")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("loudest", "outcome"), [(0.9, "failed"), (0.01, "passed")])
def test_dead_scores_fail_the_golden_samples_unless_nothing_was_there(
    tmp_path: Path, loudest: float, outcome: str
) -> None:
    """A few golden samples may show nothing; where they show something, good boxes do not hide that it is gone."""
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 300, (4, 4, 10))
    reference = np.concatenate([boxes, rng.uniform(0, loudest, (4, 3, 10))], axis=1).astype(np.float32)
    value = np.concatenate([boxes + rng.normal(size=boxes.shape), np.zeros((4, 3, 10))], axis=1).astype(np.float32)
    for name, array in (("reference", reference), ("value", value)):
        np.savez(tmp_path / f"{name}.npz", y=array)
    request = {name: str(tmp_path / f"{name}.npz") for name in ("reference", "value")} | {"precision": "int8"}
    found = compare_golden({**request, "models": [str(_detector(tmp_path / "model.onnx"))]})
    assert found["gate"] == outcome
    assert any("channels 4:7" in reason for reason in found["reasons"]) == (outcome == "failed")
    assert compare_golden({**request, "models": []})["gate"] == "passed"  # what it was without groups


def test_what_can_be_negative_is_never_silent() -> None:
    group = ChannelGroup("y", "boxes", 1, 0, 2, False)
    assert not is_silent(group, np.full((3, 2, 4), -0.01, np.float32))
    assert is_silent(group, np.full((3, 2, 4), 0.01, np.float32))
