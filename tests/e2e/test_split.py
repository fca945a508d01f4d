"""A split model the whole way: cut, each stage compiled for its own targets, the chain judged as the whole model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from modelforge.compilers import get_compiler
from modelforge.target import Registry
from tests.conftest import ROOT, Done, Forge

BUNDLE = "dist/digits-1.0.0"
TARGETS = """
[[target]]
tag = "cortex-a76"
precision = ["fp32"]
stages = ["head"]

[[target]]
tag = "x86-64"
precision = ["int8", "fp32"]
stages = ["tail"]
"""


def recipe_with(folder: Path, split: str, targets: str = TARGETS) -> Path:
    """The digits recipe, split."""
    shutil.copytree(ROOT / "recipes" / "digits", folder)
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text[: text.index("[[target]]")] + f"[split]\n{split}\n{targets}")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Forge, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("split")
    forge = Forge(folder / "home", folder)
    recipe_with(folder / "digits", 'stages = 2\nnames = ["head", "tail"]\ntransport = "int8"')
    done = forge("build", "digits", "--json")
    assert done.code == 0, done.err
    return forge, done.json


def test_each_stage_has_its_variant(built: tuple[Forge, dict[str, Any]]) -> None:
    records = {(record["stage"], record["target"]): record for record in built[1]["variants"]}
    assert set(records) == {("head", "cortex-a76"), ("tail", "x86-64")}
    head, tail = records["head", "cortex-a76"], records["tail", "x86-64"]
    assert (head["status"], tail["status"], tail["precision"]) == (
        "compiled",
        "compiled",
        "int8",
    )
    assert head["accuracy"]["metric"] == "sqnr"  # a tensor inside the model has no labels
    assert tail["accuracy"]["metric"] == "top1"
    assert tail["accuracy"]["value"] >= 0.97


def test_the_manifest_says_how_tensors_cross(
    built: tuple[Forge, dict[str, Any]],
) -> None:
    split = built[1]["split"]
    head, tail = split["stages"]
    assert (head["name"], tail["name"]) == ("head", "tail")
    crossing = [tensor["name"] for tensor in tail["inputs"] if tensor["from"] == "head"]
    assert crossing == [tensor["name"] for tensor in head["outputs"]]
    assert tail["inputs"][0]["shape"][0] == "batch"
    for name in crossing:
        way = split["transport"][name]
        assert way["dtype"] == "uint8"
        assert way["scale"] > 0
        assert 0 <= way["zero_point"] <= 255


def test_the_chain_is_judged_as_the_whole_model(
    built: tuple[Forge, dict[str, Any]],
) -> None:
    (chain,) = built[1]["split"]["chains"]
    arm = get_compiler("tvm").runner(Registry().get("cortex-a76")) or "reference"
    assert chain["stages"] == [
        {"stage": "head", "target": "cortex-a76", "evidence": arm},
        {"stage": "tail", "target": "x86-64", "evidence": "device"},
    ]
    accuracy = chain["accuracy"]
    assert accuracy["gate"] == "passed"
    assert accuracy["metric"] == "top1"
    assert accuracy["reference"] - accuracy["value"] <= 0.01
    # One byte a value leaves its trace: the chain is not just the stages' FP32 again.
    assert accuracy["sqnr_db"] < 60


def test_verify_runs_the_chain(built: tuple[Forge, dict[str, Any]]) -> None:
    done = built[0]("verify", BUNDLE, "--chain", "--json")
    assert done.code == 0, done.err
    (chain,) = done.json["chains"]
    assert chain["outcome"] == "passed"
    assert [stage["stage"] for stage in chain["stages"]] == ["head", "tail"]
    assert chain["figures"]["sqnr_db"] > 15


def test_again_runs_nothing(built: tuple[Forge, dict[str, Any]]) -> None:
    forge, before = built
    again = forge("build", "digits", "--json")
    assert again.json["digest"] == before["digest"]
    assert "0 steps run" in again.err


def test_fp32_all_the_way_is_the_whole_model(tmp_path: Path) -> None:
    """Cut at a named tensor, FP32 stages and transport: the chain equals the whole to FP32 rounding."""
    forge = Forge(tmp_path / "home", tmp_path)
    both = '[[target]]\ntag = "x86-64"\nprecision = ["fp32"]\n'
    recipe_with(tmp_path / "digits", f'at = ["{_inner_tensor()}"]', both)
    done = forge("build", "digits", "--json")
    assert done.code == 0, done.err
    (chain,) = done.json["split"]["chains"]
    assert [stage["target"] for stage in chain["stages"]] == ["x86-64", "x86-64"]
    assert chain["accuracy"]["value"] == chain["accuracy"]["reference"]
    assert chain["accuracy"].get("identical") or chain["accuracy"]["sqnr_db"] > 100
    assert done.json["split"]["transport"] == {}


def _inner_tensor() -> str:
    import onnx

    nodes = onnx.load(ROOT / "recipes" / "digits" / "model.onnx").graph.node
    return str(next(node.output[0] for node in nodes if node.op_type == "Relu"))


@pytest.mark.parametrize(
    ("split", "targets", "words"),
    [
        ('at = ["no_such_tensor"]', TARGETS, ["no_such_tensor"]),
        ("stages = 2", TARGETS, ['there is no stage "head"', "stage1"]),
        ('stages = 2\nnames = ["head"]', TARGETS, ["2 stages, and 1 names"]),
        ("stages = 2\nmax_stage_bytes = 1000", TARGETS, ["give one of"]),
        ("max_stage_bytes = 10", TARGETS, ["10"]),
        ('stages = 2\nnames = ["head", "tail"]', TARGETS.replace('["tail"]', '["head"]'), ['no target serves', "tail"]),
        ("stages = 900", TARGETS, ["900"]),
        ('tiers = ["cortex-a76", "a100"]', TARGETS, ["2 tiers need 1 links"]),
    ],
)  # fmt: skip
def test_impossible_splits_are_refused_at_plan_time(tmp_path: Path, split: str, targets: str, words: list[str]) -> None:
    forge = Forge(tmp_path / "home", tmp_path)
    recipe_with(tmp_path / "digits", split, targets)
    done: Done = forge("plan", "digits")
    assert done.code == 2, done.err
    for word in words:
        assert word in done.err
    assert not (tmp_path / "home").exists()


def test_stages_need_a_split(tmp_path: Path) -> None:
    forge = Forge(tmp_path / "home", tmp_path)
    recipe_with(tmp_path / "digits", "")
    text = (tmp_path / "digits" / "recipe.toml").read_text().replace("[split]\n", "")
    (tmp_path / "digits" / "recipe.toml").write_text(text)
    done = forge("plan", "digits")
    assert (done.code, "not split" in done.err) == (2, True), done.err


def test_int8_transport_needs_calibration_data(tmp_path: Path) -> None:
    forge = Forge(tmp_path / "home", tmp_path)
    targets = TARGETS.replace('"int8", ', "")
    folder = recipe_with(
        tmp_path / "digits",
        'stages = 2\nnames = ["head", "tail"]\ntransport = "int8"',
        targets,
    )
    text = (folder / "recipe.toml").read_text()
    begin, end = text.index("[calibration]"), text.index("[accuracy]")
    (folder / "recipe.toml").write_text(text[:begin] + text[end:])
    done = forge("plan", "digits")
    assert (done.code, "split.transport" in done.err) == (2, True), done.err


def test_a_tier_split_chooses_by_time(tmp_path: Path) -> None:
    """Two tiers over a slow link: the digits model stays where its input is, and the plan says so."""
    forge = Forge(tmp_path / "home", tmp_path)
    link = "tiers = ['cortex-a76', 'a100']\nlinks = [{ latency_ms = 10, bandwidth = 1e6 }]"
    recipe_with(tmp_path / "digits", link, '[[target]]\ntag = "x86-64"\nprecision = ["fp32"]\n')
    done = forge("plan", "digits", "--json")
    assert done.code == 0, done.err
    assert [stage["name"] for stage in done.json["split"]["stages"]] == ["cortex-a76"]
    assert any("all on" in note for note in done.json["split"]["notes"])


def test_verify_chain_of_an_unsplit_bundle(forge: Forge, digits: Path) -> None:
    assert forge("build", digits).code == 0
    done = forge("verify", BUNDLE, "--chain")
    assert (done.code, "not split" in done.err) == (2, True), done.err
