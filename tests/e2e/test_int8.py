"""INT8 through the whole way on the digits recipe: calibrated once, one dialect a compiler, gated, and the ladder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from modelforge.bundle.read import open_bundle
from tests.conftest import Forge, edit_targets

Edit = Callable[[str, str], None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for these tests: they share preparation, calibration and ranking."""
    return tmp_path_factory.mktemp("int8") / "home"


@pytest.fixture
def int8_forge(home: Path, tmp_path: Path) -> Forge:
    return Forge(home, tmp_path)


def test_int8_for_two_compilers_from_one_calibration(int8_forge: Forge, digits: Path) -> None:
    edit_targets(digits, {"x86-64": ["int8", "fp32"], "t4": ["int8", "fp16"]})
    plan = int8_forge("plan", digits, "--json").json
    assert sum(step["step"] == "calibrate" for step in plan["steps"]) == 1
    done = int8_forge("build", digits, "--json")
    assert done.code == 0, done.err
    bundle = open_bundle(int8_forge.cwd / "dist" / "digits-1.0.0")
    for tag in ("x86-64", "t4"):
        (variant,) = bundle.select(tag)
        record = variant.record
        assert (record.status, record.precision) == ("compiled", "int8")
        assert record.calibration is not None
        assert record.calibration.samples == 128
        assert record.accuracy.gate == "passed"
        assert record.accuracy.sqnr_db is not None
        assert 9 < record.accuracy.sqnr_db < 60, "rounding to 8 bits is neither free nor ruinous"
        lowered = onnx.load(bundle.file(variant, "model.onnx"))
        kinds = [node.op_type for node in lowered.graph.node]
        assert kinds.count("DequantizeLinear") > 5
        calibration = json.loads(bundle.file(variant, "calibration.json").read_bytes())
        assert calibration["samples"] == 128
        assert all(tensor["low"] <= 0 <= tensor["high"] for tensor in calibration["tensors"])
        sensitivity = json.loads(bundle.file(variant, "sensitivity.json").read_bytes())
        figures = [layer["sqnr_db"] for layer in sensitivity["ranking"]]
        assert figures[0] == min(figures)
        assert len(figures) >= 3
    (cpu,), (gpu,) = bundle.select("x86-64"), bundle.select("t4")
    assert cpu.record.latency.evidence == "device"
    zero_points = {
        tag: {onnx.numpy_helper.to_array(each).dtype.name for each in _zero_points(bundle.file(variant, "model.onnx"))}
        for tag, variant in (("cpu", cpu), ("gpu", gpu))
    }
    assert zero_points["gpu"] == {"int8"}, "TensorRT takes signed symmetric activations only"
    assert "uint8" in zero_points["cpu"]


def _zero_points(path: Path) -> list[onnx.TensorProto]:
    model = onnx.load(path)
    names = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    return [each for each in model.graph.initializer if each.name in names]


def test_a_gate_that_int8_misses_falls_to_the_next_rung(int8_forge: Forge, digits: Path, edit: Edit) -> None:
    edit_targets(digits, {"x86-64": ["int8", "fp32"]})
    edit("max_drop = 0.01", "max_drop = 0.01\nmin_sqnr_db = 80")
    record = int8_forge("build", digits, "--json").json["variants"][0]
    assert record["precision"] == "fp32"
    assert [rung["gate"] for rung in record["ladder"]] == ["failed", "passed"]
    assert "SQNR" in record["ladder"][0]["reason"]
    assert record["calibration"] is None


def test_int8_alone_that_misses_names_the_worst_layers(int8_forge: Forge, digits: Path, edit: Edit) -> None:
    edit_targets(digits, {"x86-64": ["int8"]})
    edit("max_drop = 0.01", "max_drop = 0.01\nmin_sqnr_db = 80")
    done = int8_forge("build", digits)
    assert done.code == 3
    assert "layers that lose most" in done.err
    assert not (int8_forge.cwd / "dist").exists()


def test_mixed_keeps_the_fewest_layers_that_do(int8_forge: Forge, digits: Path, edit: Edit) -> None:
    """Between what INT8 reaches and what FP32 is: some layers must stay in float, not all."""
    edit_targets(digits, {"x86-64": ["int8", "mixed", "fp32"]})
    edit("max_drop = 0.01", "max_drop = 0.01\nmin_sqnr_db = 38")
    done = int8_forge("build", digits, "--json")
    assert done.code == 0, done.err
    record = done.json["variants"][0]
    assert record["precision"] == "mixed"
    assert record["accuracy"]["sqnr_db"] >= 38
    bundle = open_bundle(int8_forge.cwd / "dist" / "digits-1.0.0")
    (variant,) = bundle.select("x86-64")
    sensitivity = json.loads(bundle.file(variant, "sensitivity.json").read_bytes())
    assert 0 < sensitivity["chosen"] < len(sensitivity["ranking"])
    assert {point["gate"] for point in sensitivity["curve"]} == {"passed", "failed"}


def test_int8_without_calibration_is_refused(int8_forge: Forge, digits: Path) -> None:
    edit_targets(digits, {"x86-64": ["int8"]})
    text = (digits / "recipe.toml").read_text()
    start, end = text.index("[calibration]"), text.index("[accuracy]")
    (digits / "recipe.toml").write_text(text[:start] + text[end:])
    done = int8_forge("build", digits)
    assert done.code == 2
    assert "needs calibration data" in done.err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda x: np.random.RandomState(0).randn(*x.shape).astype(np.float32),
            ["random"],
        ),
        (np.zeros_like, ["few", "constant"]),
        (lambda x: x[:3], ["few"]),
    ],
    ids=["random", "constant", "few"],
)
def test_data_that_is_no_calibration_data(
    int8_forge: Forge,
    digits: Path,
    edit: Edit,
    spoil: Callable[[np.ndarray], np.ndarray],
    words: list[str],
) -> None:
    """Refused with the word that would allow it; each fault must be allowed by its own."""
    edit_targets(digits, {"x86-64": ["int8", "fp32"]})
    edit("samples = 128\n", "allow = []\n")
    np.savez(digits / "calibration.npz", x=spoil(np.load(digits / "calibration.npz")["x"]))
    for count in range(len(words)):
        done = int8_forge("build", digits)
        assert done.code == 2, done.err
        assert f'allow = ["{words[count]}"]' in done.err
        edit(
            f"allow = {json.dumps(words[:count])}",
            f"allow = {json.dumps(words[: count + 1])}",
        )
    done = int8_forge("plan", digits)
    assert done.code == 0, done.err


def test_what_was_allowed_is_on_record(int8_forge: Forge, digits: Path, edit: Edit) -> None:
    edit_targets(digits, {"x86-64": ["int8"]})
    edit("samples = 128\n", 'samples = 8\nallow = ["few"]\n')
    done = int8_forge("build", digits, "--json")
    assert done.code == 0, done.err
    calibration = done.json["variants"][0]["calibration"]
    assert calibration["samples"] == 8
    assert "fewer than the 16" in calibration["allowed"][0]


def test_quantize_and_calibrate_alone(int8_forge: Forge, digits: Path) -> None:
    model = digits / "model.onnx"
    data = digits / "calibration.npz"
    done = int8_forge("calibrate", model, "--data", data, "-o", "ranges.json")
    assert done.code == 0, done.err
    one = int8_forge(
        "quantize",
        model,
        "--data",
        data,
        "--dialect",
        "tensorrt",
        "-o",
        "a.onnx",
        "--json",
    )
    assert one.code == 0, one.err
    two = int8_forge(
        "quantize",
        model,
        "--ranges",
        "ranges.json",
        "--dialect",
        "tensorrt",
        "-o",
        "b.onnx",
    )
    assert two.code == 0, two.err
    assert (int8_forge.cwd / "a.onnx").read_bytes() == (int8_forge.cwd / "b.onnx").read_bytes()
    assert one.json["quantize"]["quantized"]
    onnx.checker.check_model(str(int8_forge.cwd / "a.onnx"))
    x = np.load(data)["x"]
    np.savez(int8_forge.cwd / "first.npz", x=x[:64])
    np.savez(int8_forge.cwd / "second.npz", x=x[64:])
    for half in ("first", "second"):
        assert int8_forge("calibrate", model, "--data", f"{half}.npz", "-o", f"{half}.json").code == 0
    merged = int8_forge("calibrate", "--merge", "first.json", "second.json", "-o", "both.json", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["samples"] == 128
    again = int8_forge("calibrate", "--merge", "first.json", "first.json", "-o", "twice.json")
    assert again.code == 2
    assert "same samples" in again.err


def test_quantize_refuses_what_is_wrong(int8_forge: Forge, digits: Path) -> None:
    model, data = digits / "model.onnx", digits / "calibration.npz"
    done = int8_forge("quantize", model, "--data", data, "--dialect", "tensort", "-o", "a.onnx")
    assert done.code == 2
    assert 'did you mean "tensorrt"?' in done.err
    done = int8_forge(
        "quantize",
        model,
        "--data",
        data,
        "--dialect",
        "tvm",
        "-o",
        "a.onnx",
        "--exclude",
        "nothing",
    )
    assert done.code == 2
    assert "nothing" in done.err
    (int8_forge.cwd / "garbage.json").write_text("{}")
    done = int8_forge(
        "quantize",
        model,
        "--ranges",
        "garbage.json",
        "--dialect",
        "tvm",
        "-o",
        "a.onnx",
    )
    assert done.code == 2
    assert "garbage.json" in done.err or "ranges" in done.err
    assert not (int8_forge.cwd / "a.onnx").exists()
