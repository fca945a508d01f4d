"""The plan of the digits recipe: pure, ordered, and every key there before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.errors import RecipeError
from modelforge.forge import rungs
from modelforge.forge.plan import Plan, make_plan
from modelforge.forge.step import Step
from tests.conftest import ROOT, edit_targets


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


@pytest.mark.qemu
def test_an_emulator_runs_what_it_has_time_for_or_what_the_recipe_asks(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_targets(digits, {"cortex-a76": ["fp32"]})
    monkeypatch.setattr(rungs, "EMULATED_FLOPS", 1.0)

    def judged() -> tuple[str, int]:
        (variant,) = make_plan(digits).variants
        return variant.rungs[0].evidence, variant.rungs[0].verify.params["samples"]

    assert judged() == ("emulator", rungs.EMULATED_AT_LEAST)
    recipe = digits / "recipe.toml"
    text = recipe.read_text()
    for asked, found in ((100, 100), (10_000, 360)):  # no more than there are
        recipe.write_text(text.replace("[accuracy]", f"[accuracy]\nemulated = {asked}"))
        assert judged() == ("emulator", found)


def test_only_the_targets_asked_for(plan: Plan) -> None:
    one = make_plan(ROOT / "recipes" / "digits", tags=["t4"])
    assert [variant.target.tag for variant in one.variants] == ["t4"]
    assert {step.key for step in one.steps()} < {step.key for step in plan.steps()}
    with pytest.raises(RecipeError, match='did you mean "t4"'):
        make_plan(ROOT / "recipes" / "digits", tags=["t44"])
