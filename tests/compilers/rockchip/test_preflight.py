"""What is refused at plan time, and what the definition and the targets promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from modelforge.compilers.protocol import Missing
from modelforge.compilers.rockchip import RockchipCompiler, toolchain
from modelforge.compilers.rockchip.preflight import PLATFORMS
from modelforge.graph.facts import ModelFacts
from modelforge.graph.inspect import inspect_model
from modelforge.recipe import Dim
from modelforge.target import Registry, RockchipArchitecture
from modelforge.toolchains import environments

TAGS = ("rk3566", "rk3576", "rk3588", "rv1106")
INPUTS: dict[str, tuple[int | str, ...]] = {"x": ("batch", 3, 8, 8)}
DIMS = {"batch": Dim(values=(1, 4))}


def facts(tmp_path: Path, op: str = "Relu", opset: int = 17) -> ModelFacts:
    nodes = [helper.make_node(op, ["x"], ["y"], name="odd")]
    kind = TensorProto.INT64 if op == "NonZero" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return inspect_model(path, cost=False)


def rules(found: ModelFacts, tag: str = "rk3588", precision: str = "fp16", **changes: object) -> set[str]:
    arguments = {"inputs": INPUTS, "dims": DIMS, "options": {}, **changes}
    refused = RockchipCompiler().supports(found, Registry().get(tag), precision, **arguments)  # type: ignore[arg-type]  # cases of several types
    assert all(each.what and each.fix for each in refused)
    return {each.rule for each in refused}


def test_a_plain_model_is_taken_everywhere(tmp_path: Path) -> None:
    found = facts(tmp_path)
    for tag in TAGS:
        assert rules(found, tag, "int8") == set()
    assert rules(found, "rk3588", "mixed") == set()


def test_rv1106_computes_in_int8_only(tmp_path: Path) -> None:
    assert rules(facts(tmp_path), "rv1106", "fp16") == {"precision"}
    assert rules(facts(tmp_path), "rk3588", "fp32") == {"precision"}


def test_the_toolkits_own_quantizer_has_no_mixed(tmp_path: Path) -> None:
    found, native = facts(tmp_path), {"quantizer": "native"}
    assert rules(found, precision="int8", options=native) == set()
    assert rules(found, precision="fp16", options=native) == set()
    assert rules(found, precision="mixed", options=native) == {"native-mixed"}


def test_newer_opsets(tmp_path: Path) -> None:
    assert rules(facts(tmp_path, opset=19)) == set()
    assert rules(facts(tmp_path, opset=21)) == {"opset"}


def test_only_the_batch_may_be_open(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert rules(found, inputs={"x": ("batch", 3, "height", 8)}) == {"dynamic-shape"}
    assert rules(found, inputs={"x": ("batch", 3, 8, 8), "z": ("other", 3)}) == {"dynamic-shape"}


def test_an_operator_is_named_with_its_node(tmp_path: Path) -> None:
    found = RockchipCompiler().supports(facts(tmp_path, "NonZero"), Registry().get("rk3588"), "fp16", INPUTS, DIMS)
    assert "NonZero (node odd)" in found[0].what


def test_single_core_is_for_chips_with_several(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert rules(found, options={"single_core": True}) == set()
    assert rules(found, "rk3566", options={"single_core": True}) == {"single-core"}


def test_another_chip_is_refused(tmp_path: Path) -> None:
    target = Registry().get("rk3588")
    arch = RockchipArchitecture(kind="rockchip", platform="rk9999", cores=1)
    found = RockchipCompiler().supports(facts(tmp_path), replace(target, arch=arch), "fp16", INPUTS, DIMS)
    assert [each.rule for each in found] == ["platform"]
    assert rules(facts(tmp_path), "cortex-a76") == {"target"}


@pytest.mark.parametrize("tag", TAGS)
def test_profiles_promise_what_the_toolkit_builds(tag: str) -> None:
    target = Registry().get(tag)
    assert isinstance(target.arch, RockchipArchitecture)
    assert set(target.precisions) == set(PLATFORMS[target.arch.platform])


def test_without_the_toolchain_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path))
    compiler = RockchipCompiler()
    missing = compiler.probe()
    assert isinstance(missing, Missing)
    assert missing.fix == "modelforge toolchain install rockchip --accept-license"
    assert compiler.runner(Registry().get("rk3588")) is None
    assert missing.fix in compiler.runner_hint(Registry().get("rk3588"))


def test_the_definition_keeps_the_hash_seed() -> None:
    """-I would hide PYTHONHASHSEED, on which the order of names in the file depends."""
    definition = toolchain()
    assert definition.environment["PYTHONHASHSEED"] == "0"
    assert "-I" not in definition.flags
    assert "-E" not in definition.flags
    assert definition.licence.accept
    assert environments.install_command(definition).endswith("--accept-license")
