"""A compiler of another package: found by its entry point, it builds a bundle with PYTHONPATH alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT, Done, Forge, edit_targets

DUMMY = ROOT / "tests" / "doubles" / "dummy_toolchain"
BOARD = """
schema = 1
title = "A board of another vendor"
vendor = "dummy"
tier = "device"
compilers = ["dummy"]
precisions = ["fp32"]
[arch]
kind = "cpu"
isa = "aarch64"
mcpu = "cortex-a53"
cores = 4
vector_bits = 128
[memory]
bytes = 1_000_000_000
bandwidth = 1e9
[peak]
fp32 = 1e9
"""


@pytest.fixture
def recipe(digits: Path) -> Path:
    """The digits recipe for a board whose profile lies beside it."""
    edit_targets(digits, {"dummy-board": ["fp32"]}, "options = { level = 3 }")
    (digits / "targets").mkdir()
    (digits / "targets" / "dummy-board.toml").write_text(BOARD)
    return digits


def with_dummy(forge: Forge, *args: str | Path) -> Done:
    return forge(*args, PYTHONPATH=str(DUMMY))


def test_it_builds_a_bundle(forge: Forge, recipe: Path) -> None:
    missing = with_dummy(forge, "build", recipe)
    assert missing.code == 4
    assert "modelforge toolchain install dummy --accept-license" in missing.err
    assert with_dummy(forge, "toolchain", "install", "dummy", "--accept-license").code == 0

    built = with_dummy(forge, "build", recipe, "--json")
    assert built.code == 0, built.err
    (record,) = built.json["variants"]
    assert (record["status"], record["compiler"]) == ("compiled", "dummy")
    assert record["toolchain"]["flatbuffers"] == "25.12.19"
    assert record["commands"] == [["dummy", "compile", "--level=3", "model.onnx"]]
    assert record["runtime"]["needs"] == {"dummy": ">=25.12.19"}
    assert record["accuracy"]["evidence"] == "reference"
    assert record["accuracy"]["gate"] == "passed"
    digest = record["artifact"]["digest"].removeprefix("sha256:")
    blob = forge.cwd / built.json["path"] / "blobs" / "sha256" / digest
    assert blob.read_bytes().startswith(b"DUMMY\0")

    again = with_dummy(forge, "build", recipe, "--json")
    assert again.json["digest"] == built.json["digest"]
    assert "0 steps run" in again.err


def test_its_refusals_are_told_at_plan_time(forge: Forge, recipe: Path) -> None:
    edit_targets(recipe, {"dummy-board": ["fp32"]}, "options = { speed = 3 }")
    refused = with_dummy(forge, "plan", recipe)
    assert refused.code == 2
    assert 'the dummy has no option "speed"' in refused.err


def test_without_the_package_its_target_is_refused(forge: Forge, recipe: Path) -> None:
    refused = forge("plan", recipe)
    assert refused.code == 4
    assert "dummy" in refused.err
