"""Real models on every Arm profile under QEMU: what docs/make_arm_coverage.py writes, of its smaller models."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.compilers.tvm.models import needs_qemu

ROOT = Path(__file__).parents[3]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "docs"))  # neither is a package
    return importlib.import_module("make_arm_coverage")


@pytest.mark.qemu
@pytest.mark.slow  # six to eight compiles of a real network each: about a minute for each model on a quiet core
@pytest.mark.parametrize("name", ["ppocr-cls", "squeezenet", "shufflenet", "bert", "magika"])
def test_a_model_is_right_on_every_profile_and_precision(program: Any, tmp_path: Path, name: str) -> None:
    needs_qemu()
    (model,) = [each for each in program.models() if each.name == name]
    columns = list(program.columns(model))
    assert {tag for tag, precision in columns if precision == "fp32"} == {
        "cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "armv8",
    }  # fmt: skip
    wrong = []
    for tag, precision in columns:
        result = program.run_one(model, tag, precision, tmp_path)
        if not result.is_right:
            wrong.append((tag, precision, result))
    assert wrong == []


def test_a_result_below_its_tolerance_is_wrong(program: Any) -> None:
    import numpy as np

    exact = np.random.default_rng(0).standard_normal((1, 50))
    noisy = exact + 1e-2 * np.random.default_rng(1).standard_normal((1, 50))
    found = program.judged({"y": exact}, {"y": noisy})
    assert 35 < found.sqnr_db < 45
    assert found.is_right
    strict = program.replace(found, wanted_db=60.0)
    assert not strict.is_right
    assert strict.cell() == "**40**"
    assert program.judged({"y": exact}, {"y": exact}).cell() == "identical"
    assert not program.judged({"y": exact}, {"y": np.full_like(exact, np.nan)}).is_right
