"""The plan of the digits recipe: pure, ordered, and every key there before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.errors import RecipeError
from modelforge.forge.plan import Plan, make_plan
from modelforge.forge.step import Step
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(ROOT / "recipes" / "digits")


def test_each_step_comes_after_what_it_needs(plan: Plan) -> None:
    seen: set[str] = set()
    for step in plan.steps():
        missing = [need.title for need in step.needs.values() if isinstance(need, Step) and need.key not in seen]
        assert missing == [], step.title
        seen.add(step.key)
    assert plan.certain() <= seen


def test_keys_do_not_depend_on_where_or_when(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    copy = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "recipes" / "digits", copy)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))
    again = make_plan(Path("elsewhere"))
    assert [step.key for step in again.steps()] == [step.key for step in plan.steps()]


def test_planning_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    make_plan(ROOT / "recipes" / "digits")
    assert list(tmp_path.iterdir()) == []


def test_shared_steps_are_shared(plan: Plan) -> None:
    titles = [step.title for step in plan.steps()]
    assert titles.count("calibrate") == 1
    assert titles.count("lower to int8 (tensorrt)") == 1
    variants = {variant.target.tag: variant for variant in plan.variants}
    assert variants["t4"].rungs[0].lower.key == variants["a100"].rungs[0].lower.key
    assert variants["t4"].rungs[0].compile is not None
    assert variants["a100"].rungs[0].compile is not None
    assert variants["t4"].rungs[0].compile.key != variants["a100"].rungs[0].compile.key


def test_only_the_targets_asked_for(plan: Plan) -> None:
    one = make_plan(ROOT / "recipes" / "digits", tags=["t4"])
    assert [variant.target.tag for variant in one.variants] == ["t4"]
    assert {step.key for step in one.steps()} < {step.key for step in plan.steps()}
    with pytest.raises(RecipeError, match='did you mean "t4"'):
        make_plan(ROOT / "recipes" / "digits", tags=["t44"])
