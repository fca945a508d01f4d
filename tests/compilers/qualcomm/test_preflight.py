"""What is refused before anything is built, and the table of chips behind it. Needs no toolchain."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from modelforge.compilers.qualcomm import QualcommCompiler, toolchain
from modelforge.compilers.qualcomm.socs import SOCS, soc_of
from modelforge.graph.inspect import inspect_model
from modelforge.recipe import Dim
from modelforge.target import QualcommArchitecture, Registry, Target
from tests.compilers.qualcomm.conftest import DIGITS

QNN = QualcommCompiler()
BATCH = {"batch": Dim(values=(1, 4))}


def rules(target: Target, precision: str = "int8", shape: tuple[int | str, ...] = ("batch", 1, 8, 8)) -> list[str]:
    facts = inspect_model(DIGITS / "model.onnx", cost=False)
    return [each.rule for each in QNN.supports(facts, target, precision, {"x": shape}, BATCH)]


@pytest.mark.parametrize("tag", [tag for tag in Registry().tags() if tag.startswith("qualcomm")])
def test_every_profile_is_in_the_table_and_promises_no_more(tag: str) -> None:
    target = Registry().get(tag)
    assert isinstance(target.arch, QualcommArchitecture)
    soc = soc_of(target.arch)
    assert soc is not None
    assert ("fp16" in target.precisions) == (not soc.no_float)
    assert rules(target) == []


def test_no_chip_stands_twice() -> None:
    assert len({soc.model for soc in SOCS}) == len({soc.name for soc in SOCS}) == len(SOCS)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ({"htp_arch": 73}, "htp_arch 73 alone names no SoC"),
        ({"htp_arch": 75, "soc_model": 43}, "soc_model 43 with htp_arch 75"),  # QNN takes it, and builds for v73
        ({"htp_arch": 99, "soc_model": 1}, "soc_model 1 with htp_arch 99"),
    ],
)
def test_an_unknown_pair_is_refused_with_the_known_ones(
    v73: Target, tmp_path: Path, arch: dict[str, int], words: str
) -> None:
    from dataclasses import replace

    facts = inspect_model(DIGITS / "model.onnx", cost=False)
    target = replace(v73, arch=QualcommArchitecture(kind="qualcomm", **arch))
    (refusal,) = QNN.supports(facts, target, "int8", {"x": (1, 1, 8, 8)}, {})
    assert refusal.rule == "soc"
    assert words in refusal.what
    assert "SM8550 (43, 73)" in refusal.fix


def test_precisions_of_the_chip(v73: Target) -> None:
    assert rules(v73, "fp16") == rules(v73, "mixed") == []
    assert rules(v73, "fp32") == ["precision"]
    assert rules(Registry().get("qualcomm-qcm6490"), "fp16") == ["precision"]


def test_an_open_dimension_is_named(v73: Target) -> None:
    facts = inspect_model(DIGITS / "model.onnx", cost=False)
    (refusal,) = QNN.supports(facts, v73, "int8", {"x": ("batch", 1, 8, "width")}, BATCH)
    assert refusal.rule == "dynamic-shape"
    assert 'input x: dimension 3 "width"' in refusal.what


def test_another_vendors_target_is_refused() -> None:
    assert rules(Registry().get("t4")) == ["target"]


def test_the_worker_imports_the_standard_library_alone() -> None:
    """What it imports when it is called is the vendor's environment; it never sees modelforge."""
    tree = ast.parse(toolchain().worker.read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in top} <= sys.stdlib_module_names | {"__future__"}
    assert "modelforge" not in toolchain().worker.read_text()
