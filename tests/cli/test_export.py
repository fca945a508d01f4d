"""`modelforge export` on a really built bundle, and the exported repository in a real ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from modelforge.bundle.read import export_files, open_bundle
from tests.bundle.triton_config import dtype, parse
from tests.cli.conftest import Built


@pytest.mark.parametrize("lowered", [False, True])
def test_a_model_repository_gives_the_golden_outputs(built: Built, tmp_path: Path, lowered: bool) -> None:
    arguments = ["--format", "triton", "-o", tmp_path / "models", *(["--lowered"] if lowered else [])]
    done = built.forge("export", built.second, *arguments, "--json")
    assert done.code == 0, done.err
    (folder,) = map(Path, done.json["folders"])
    config = parse((folder / "config.pbtxt").read_text())
    assert (config.name, config.backend) == ("digits", "onnxruntime")
    assert list(config.input[0].dims) == [1, 8, 8]
    assert dtype(config, config.input[0]) == "TYPE_FP32"
    assert config.max_batch_size >= 4
    session = onnxruntime.InferenceSession(folder / "1/model.onnx", providers=["CPUExecutionProvider"])
    bundle = open_bundle(built.second)
    golden = export_files(bundle, bundle.variants[0], tmp_path / "golden", roles=["golden"])
    inputs = np.load(golden["golden-inputs.npz"])
    reference = np.load(golden["golden-outputs.npz"])[config.output[0].name]
    assert set(inputs) == {each.name for each in config.input} == {each.name for each in session.get_inputs()}
    size = config.dynamic_batching.preferred_batch_size[-1]
    feeds = {name: np.resize(inputs[name], (size, *inputs[name].shape[1:])) for name in inputs}
    (value,) = session.run([config.output[0].name], feeds)
    assert value.shape == (size, *config.output[0].dims)
    expected = np.resize(reference, value.shape)
    assert (value.argmax(1) == expected.argmax(1)).all()


def test_a_real_engine_is_refused_and_its_lowered_model_served(built: Built, tmp_path: Path) -> None:
    built.require_t4()
    arguments = ["--format", "triton", "--target", "t4", "-o", tmp_path / "models"]
    refused = built.forge("export", built.first, *arguments)
    assert refused.code == 2
    assert "not engines of TensorRT-RTX" in refused.err
    assert not (tmp_path / "models").exists()
    assert built.forge("export", built.first, *arguments, "--lowered").code == 0
    config = parse((tmp_path / "models/digits/config.pbtxt").read_text())
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    session = onnxruntime.InferenceSession(tmp_path / "models/digits/1/model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(float)", "an FP16 model keeps its FP32 inputs"


def test_plain_files(built: Built, tmp_path: Path) -> None:
    done = built.forge("export", built.first, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out/x86-64/main/record.json").read_text())
    assert record == built.forge("inspect", built.first, "--target", "x86-64", "--json").json["variants"][0]
    assert (tmp_path / "out/x86-64/main" / record["artifact"]["file"]).stat().st_size == record["artifact"]["size"]
    again = built.forge("export", built.first, "-o", tmp_path / "out")
    assert again.code == 2
    assert "--force" in again.err
    assert built.forge("export", built.first, "-o", tmp_path / "out", "--force").code == 0


def test_what_was_pulled_is_a_bundle_too(built: Built, tmp_path: Path) -> None:
    """A checkout: the files lie under their titles, and the bundle's own files were not fetched."""
    pulled = tmp_path / "pulled"
    done = built.forge("pull", f"oci:{built.second}", "--target", "x86-64", "-o", pulled)
    assert done.code == 0, done.err
    for place in (pulled, built.second):
        arguments = ["--format", "triton", "-o", tmp_path / f"models-of-{place.name}", "--json"]
        assert built.forge("export", place, *arguments).code == 0
    files = [sorted(path.relative_to(each) for path in each.rglob("*")) for each in tmp_path.glob("models-of-*")]
    assert files[0] == files[1]
    assert (
        built.forge("select", pulled, "--json").json["stages"]
        == built.forge("select", built.second, "--json").json["stages"]
    )
    assert "the same bundle" in built.forge("diff", pulled, built.second).out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "x86"], 'has no variant for the target "x86"'),
        (["--format", "ort"], "invalid choice"),
        (["--lowered"], "--lowered is for --format triton"),
        (["-o", "digits/recipe.toml/out"], "cannot be made a folder"),
    ],
)
def test_bad_input(built: Built, arguments: list[str], said: str) -> None:
    done = built.forge("export", built.first, *arguments)
    assert done.code == 2
    assert said in done.err
