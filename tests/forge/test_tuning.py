"""Tuning as a step: its place in the plan, what its key depends on, and what happens where it fails."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelforge.compilers.tvm import devices
from modelforge.compilers.tvm.devices import Device
from modelforge.errors import RecipeError, UnsupportedError
from modelforge.forge.plan import make_plan
from modelforge.forge.rungs import RungPlan
from modelforge.forge.step import Step
from modelforge.target import CpuArchitecture, Registry
from modelforge.toolchains import host
from tests.conftest import ROOT
from tests.forge.test_run import RUNS, build, rung, step, variant, verify_step

PROFILE = Registry().get("x86-64").arch
needs_host = pytest.mark.skipif(
    not isinstance(PROFILE, CpuArchitecture) or host.why_not(PROFILE) is not None,
    reason="this machine is not what the profile x86-64 asks for",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _recipe(folder: Path, tune: str, tag: str = "cortex-a76") -> Path:
    shutil.copytree(ROOT / "recipes" / "digits", folder, ignore=shutil.ignore_patterns("dist"))
    text = (folder / "recipe.toml").read_text(encoding="utf-8")
    before = text.index("# One table per device")
    section = f'[[target]]\ntag = "{tag}"\nprecision = ["fp32"]\n{tune}'
    (folder / "recipe.toml").write_text(text[:before] + section, encoding="utf-8")
    return folder


def _rung(folder: Path, tune: str, tag: str = "cortex-a76") -> RungPlan:
    (only,) = make_plan(_recipe(folder, tune, tag)).variants
    return only.rungs[0]


def _keys(planned: RungPlan) -> tuple[str, str, str]:
    assert planned.tune is not None
    assert planned.compile is not None
    assert planned.untuned is not None
    assert planned.untuned.compile is not None
    return planned.tune.key, planned.compile.key, planned.untuned.compile.key


def test_tuning_comes_between_lowering_and_compiling(tmp_path: Path) -> None:
    devices.add(Device("pi5", "192.168.1.20", 9090, "k"))
    planned = _rung(tmp_path / "a", '[target.tune]\ntrials = 9\ndevice = "pi5"\n')
    titles = [each.title for each in planned.steps]
    assert (
        titles.index("lower to fp32") < titles.index("tune cortex-a76 fp32") < titles.index("compile cortex-a76 fp32")
    )
    assert planned.tune is not None
    assert planned.tune.params["options"] == {"trials": 9, "device": "pi5"}


def test_keys_depend_on_what_is_measured_and_not_on_the_address(tmp_path: Path) -> None:
    devices.add(Device("pi5", "192.168.1.20", 9090, "k"))
    tune = '[target.tune]\ntrials = 9\ndevice = "pi5"\n'
    first = _keys(_rung(tmp_path / "a", tune))
    devices.add(Device("pi5", "192.168.1.99", 9091, "other"))
    assert _keys(_rung(tmp_path / "b", tune)) == first
    more = _keys(_rung(tmp_path / "c", tune.replace("9", "10")))
    assert more[0] != first[0]
    assert more[1] != first[1]
    assert more[2] == first[2]


def test_the_untuned_stand_in_is_the_build_without_tuning(tmp_path: Path) -> None:
    devices.add(Device("pi5", "192.168.1.20", 9090, "k"))
    plain = _rung(tmp_path / "a", "")
    assert plain.tune is None
    assert plain.compile is not None
    tuned = _rung(tmp_path / "b", '[target.tune]\ntrials = 9\ndevice = "pi5"\n')
    assert _keys(tuned)[2] == plain.compile.key
    required = _rung(tmp_path / "c", '[target.tune]\ntrials = 9\ndevice = "pi5"\nrequired = true\n')
    assert required.untuned is None
    assert required.compile is not None
    assert required.compile.key == _keys(tuned)[1]


def test_an_imported_database_is_part_of_the_key(tmp_path: Path) -> None:
    tune = '[target.tune]\ndatabase = "mine.json"\n'
    keys = []
    for name in ("a", "b"):
        folder = _recipe(tmp_path / name, tune)
        (folder / "mine.json").write_text(name, encoding="utf-8")
        (only,) = make_plan(folder).variants
        keys.append(_keys(only.rungs[0]))
    assert keys[0][:2] != keys[1][:2]
    assert keys[0][2] == keys[1][2]


@needs_host
def test_who_can_be_tuned_serves_a_target_that_asks_for_it(tmp_path: Path) -> None:
    """ONNX Runtime stands first in the profile, and would leave [target.tune] without effect."""
    (plain,) = make_plan(_recipe(tmp_path / "a", "", "x86-64")).variants
    (tuned,) = make_plan(_recipe(tmp_path / "b", "[target.tune]\ntrials = 3\n", "x86-64")).variants
    assert (plain.compiler, tuned.compiler) == ("onnxruntime", "tvm")
    assert tuned.rungs[0].tune is not None
    assert tuned.rungs[0].tune.params["on"] == host.cpu_name()


@pytest.mark.parametrize(
    ("tune", "what"),
    [
        ("[target.tune]\n", "give `trials`, `database`, or both"),
        ("[target.tune]\ntrials = -1\n", "greater than or equal to 0"),
        ('[target.tune]\ndatabase = "a"\ndevice = "pi5"\n', "there are none"),
        ("[target.tune]\ntrial = 3\n", "trials"),
        ('[target.tune]\ndatabase = "gone.json"\n', "there is no file gone.json"),
    ],
)
def test_what_is_no_tuning_is_refused_with_its_place(tmp_path: Path, tune: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(_recipe(tmp_path / "a", tune))
    assert what in str(caught.value)
    assert "recipe.toml:" in str(caught.value.where)


def test_an_unknown_device_is_refused_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match='no device "pi5"') as caught:
        make_plan(_recipe(tmp_path / "a", '[target.tune]\ntrials = 3\ndevice = "pi5"\n'))
    assert "modelforge devices add pi5" in str(caught.value.fix)


def test_tuning_here_for_another_machine_is_refused_by_the_plan(tmp_path: Path) -> None:
    if host.this_host().isa == "aarch64":
        pytest.skip("this machine may be the target")
    with pytest.raises(UnsupportedError, match="code for cortex-a76 does not run here"):
        make_plan(_recipe(tmp_path / "a", "[target.tune]\ntrials = 3\n"))


def _tuned(tag: str, *, required: bool, **tune_params: Any) -> RungPlan:
    plain = rung(tag, "fp32")
    tune = step(f"tune {tag}", plain.lower, **tune_params)
    compile_step = step(f"compile {tag} tuned", plain.lower, tune)
    verify = verify_step(f"verify {tag} tuned", "passed", compile_step)
    return replace(plain, tune=tune, compile=compile_step, verify=verify, untuned=None if required else plain)


def test_what_was_tuned_is_compiled(tmp_path: Path) -> None:
    built, _ = build(tmp_path, variant("t", _tuned("t", required=False)))
    (result,) = built.variants
    assert result.chosen is not None
    assert result.chosen.untuned_because == ""
    assert "compile t tuned" in RUNS
    assert "compile t fp32" not in RUNS


def test_where_tuning_fails_the_untuned_variant_is_built_and_says_why(tmp_path: Path) -> None:
    built, told = build(tmp_path, variant("t", _tuned("t", required=False, fail=True)))
    (result,) = built.variants
    assert result.status == "compiled"
    assert result.chosen is not None
    assert result.chosen.untuned_because == "tune t: told to fail"
    assert told.failed_steps == ["tune t"]
    assert "compile t fp32" in RUNS
    # A failure is not kept: the next build tries again.
    build(tmp_path, variant("t", _tuned("t", required=False, fail=True)))
    assert RUNS == ["tune t"]


def test_where_tuning_is_required_its_failure_is_the_variants(tmp_path: Path) -> None:
    built, _ = build(tmp_path, variant("t", _tuned("t", required=True, fail=True)))
    (result,) = built.variants
    assert result.status == "failed"
    assert result.error is not None
    assert "told to fail" in str(result.error)
    assert not any(name.startswith("compile") for name in RUNS)


def test_a_race_that_wants_a_failed_tuning_costs_only_the_race(tmp_path: Path) -> None:
    tuned = _tuned("t", required=False)
    race = step("race", step("tune rival", fail=True))
    built, _ = build(tmp_path, variant("t", replace(tuned, race=race)))
    (result,) = built.variants
    assert result.status == "compiled"
    assert result.chosen is not None
    assert result.chosen.race is None


def test_the_step_is_one_of_the_forge(tmp_path: Path) -> None:
    planned = _rung(tmp_path / "a", '[target.tune]\ndatabase = "recipe.toml"\n')
    assert isinstance(planned.tune, Step)
    assert planned.tune.function == "modelforge.forge.steps:tune"
