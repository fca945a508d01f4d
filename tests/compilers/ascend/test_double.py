"""The double of ATC against the contract's recorded data: parser, exit codes, both streams, file names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelforge.compilers.ascend.check import check
from modelforge.compilers.ascend.install import read_version
from tests.compilers.ascend.double import SOURCE, install
from tests.compilers.ascend.models import conv_model

CASES = json.loads((SOURCE / "contract.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case["argv"]) or "nothing")
def test_it_keeps_to_the_contract(case: dict[str, Any], tmp_path: Path) -> None:
    conv_model(tmp_path / "m.onnx")
    conv_model(tmp_path / "dynamic.onnx", "n")
    conv_model(tmp_path / "qdq.onnx", qdq=True)
    done = subprocess.run(
        [sys.executable, SOURCE / "atc", *case["argv"]],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == case["exit"], done.stdout + done.stderr
    assert ("ATC run success" in done.stdout) == (case["exit"] == 0 and case["argv"] != ["--help"])
    for text in case.get("stdout", ()):
        assert text in done.stdout
    for text in case.get("stderr", ()):
        assert text in done.stderr
    for text in case.get("never", ()):
        assert text not in done.stdout
    made = sorted(path.name for path in tmp_path.glob("*.om"))
    assert made == sorted(case.get("files", []))


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case["argv"]) or "nothing")
def test_our_check_and_the_double_agree(case: dict[str, Any]) -> None:
    """Two readings of one contract, which share no code; only the double looks into the model."""
    accepted = check(case["argv"], cann="8.2.RC1").accepted
    assert accepted == (case["exit"] == 0 or case.get("by_the_model", False))


def test_its_version_says_that_it_is_none(tmp_path: Path) -> None:
    assert read_version(install(tmp_path, "7.0.0").root) == "7.0.0-double"


def test_the_package_never_names_it() -> None:
    root = Path(__file__).parents[3]
    for path in (root / "modelforge").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "doubles/" not in text, path
        assert "tests.doubles" not in text, path
        assert "ATC_DOUBLE" not in text, path
