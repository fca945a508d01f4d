"""The executor: shared steps once, the ladder, errors of one target beside successes of others."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modelforge.errors import BuildError
from modelforge.forge.plan import VariantPlan
from modelforge.forge.run import run_plan
from modelforge.forge.rungs import RungPlan
from modelforge.forge.step import Context, Result, Source, Step
from modelforge.store import StepRecord, Store

RUNS: list[str] = []
LOCK = threading.Lock()


def work(context: Context) -> Result:
    """A step function of this test: does what its parameters say."""
    with LOCK:
        RUNS.append(context.params["name"])
    if context.params.get("fail"):
        raise BuildError("told to fail", where=context.params["name"])
    return Result(context.params.get("facts", {}))


def step(name: str, *needs: Step | Source, **params: Any) -> Step:
    inputs = {str(index): need for index, need in enumerate(needs)}
    return Step(name, name, "tests.forge.test_run:work", 1, {"name": name, **params}, {}, inputs)


def verify_step(name: str, gate: str, *needs: Step | Source) -> Step:
    figures = {"value": 0.9, "drop": 0.1, "sqnr_db": 20.0, "agreement": 0.95}
    reasons = [] if gate == "passed" else ["drops too far"]
    return step(name, *needs, facts={"accuracy": {"gate": gate, "reasons": reasons, **figures}})


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.cached: list[str] = []
        self.failed_steps: list[str] = []

    def started(self, step: Step) -> None:
        pass

    def finished(self, step: Step, record: StepRecord, cached: bool) -> None:
        if cached:
            self.cached.append(step.name)

    def failed(self, step: Step, error: BaseException) -> None:
        self.failed_steps.append(step.name)


def a_plan(*variants: VariantPlan) -> Any:
    source = Source("model", {}, lambda folder: None)
    baseline = step("baseline", step("reference", source))
    stage = SimpleNamespace(name="main", prepare=step("prepare", source), baseline=baseline)
    first = (baseline, stage.prepare)
    intake = SimpleNamespace(sources=(source,))
    return SimpleNamespace(intake=intake, stages=(stage,), first=first, variants=variants, chains=(), placement=None)


def variant(tag: str, *rungs: RungPlan) -> VariantPlan:
    target: Any = SimpleNamespace(tag=tag)
    return VariantPlan(target, "main", True, "compiled", tuple(rung.precision for rung in rungs), "c", {}, rungs)


def rung(tag: str, precision: str, gate: str = "passed", **compile_params: Any) -> RungPlan:
    prepare = step("prepare", Source("model", {}, lambda folder: None))
    lower = step(f"lower {precision}", prepare)
    build = step(f"compile {tag} {precision}", lower, **compile_params)
    return RungPlan(precision, lower, build, verify_step(f"verify {tag} {precision}", gate, build), None, "device")


def build(tmp_path: Path, *variants: VariantPlan, jobs: int = 4):
    RUNS.clear()
    told = Told()
    return run_plan(a_plan(*variants), Store(tmp_path / "home"), told, jobs=jobs), told


def test_shared_steps_run_once(tmp_path: Path) -> None:
    variants = [variant(f"t{index}", rung(f"t{index}", "fp16")) for index in range(6)]
    built, _ = build(tmp_path, *variants)
    assert [result.status for result in built.variants] == ["compiled"] * 6
    assert RUNS.count("lower fp16") == 1
    assert RUNS.count("prepare") == 1
    assert RUNS.index("baseline") < min(RUNS.index(f"compile t{index} fp16") for index in range(6))


def test_one_job_is_enough_for_any_number_of_variants(tmp_path: Path) -> None:
    variants = [variant(f"t{index}", rung(f"t{index}", "fp16")) for index in range(5)]
    built, _ = build(tmp_path, *variants, jobs=1)
    assert [result.status for result in built.variants] == ["compiled"] * 5


def test_a_rung_that_fails_its_gate_falls_to_the_next(tmp_path: Path) -> None:
    built, _ = build(tmp_path, variant("t", rung("t", "int8", "failed"), rung("t", "fp16"), rung("t", "fp32")))
    (result,) = built.variants
    assert result.chosen is not None
    assert result.chosen.plan.precision == "fp16"
    assert [(entry["precision"], entry["gate"]) for entry in result.ladder] == [("int8", "failed"), ("fp16", "passed")]
    assert result.ladder[0]["reason"] == "drops too far"
    assert "compile t fp32" not in RUNS


def test_a_rung_that_does_not_compile_falls_to_the_next(tmp_path: Path) -> None:
    built, told = build(tmp_path, variant("t", rung("t", "int8", fail=True), rung("t", "fp16")))
    (result,) = built.variants
    assert result.status == "compiled"
    assert "told to fail" in result.ladder[0]["reason"]
    assert told.failed_steps == ["compile t int8"]


def test_one_failure_leaves_the_others_alone(tmp_path: Path) -> None:
    built, _ = build(tmp_path, variant("bad", rung("bad", "fp16", fail=True)), variant("good", rung("good", "fp16")))
    bad, good = built.variants
    assert (bad.status, good.status) == ("failed", "compiled")
    assert bad.error is not None
    assert not bad.gate_failed
    # What succeeded is kept: the next run does only what failed.
    again, told = build(tmp_path, variant("bad", rung("bad", "fp16", fail=True)), variant("good", rung("good", "fp16")))
    assert again.variants[1].status == "compiled"
    assert RUNS == ["compile bad fp16"]
    assert "compile good fp16" in told.cached


def raced(rung_plan: RungPlan, ratio: float) -> RungPlan:
    times = {"p50_ms": ratio, "rival": {"precision": "fp32", "p50_ms": 1.0}, "ratio": ratio, "batch": 1}
    assert rung_plan.compile is not None
    race = step(f"race {ratio}", rung_plan.compile, facts={"evidence": "device", **times})
    return replace(rung_plan, race=race)


def test_int8_that_is_not_faster_is_told(tmp_path: Path) -> None:
    built, _ = build(tmp_path, variant("t", raced(rung("t", "int8"), 1.5), rung("t", "fp32")))
    (result,) = built.variants
    assert result.chosen is not None
    assert result.chosen.plan.precision == "int8"
    assert "1.50 times as long" in str(result.chosen.slower)


def test_int8_that_is_not_faster_is_not_chosen_where_speed_is_preferred(tmp_path: Path) -> None:
    for ratio, chosen in ((1.5, "fp32"), (0.5, "int8")):
        plan = replace(variant("t", raced(rung("t", "int8"), ratio), rung("t", "fp32")), prefer_speed=True)
        built, _ = build(tmp_path, plan)
        (result,) = built.variants
        assert result.chosen is not None
        assert result.chosen.plan.precision == chosen
    assert "reason" not in result.ladder[0]


def test_all_rungs_failing_their_gates(tmp_path: Path) -> None:
    built, _ = build(tmp_path, variant("t", rung("t", "int8", "failed"), rung("t", "fp16", "failed")))
    (result,) = built.variants
    assert (result.status, result.gate_failed, len(result.ladder)) == ("failed", True, 2)


def deferred(tag: str, *rungs: RungPlan) -> VariantPlan:
    return replace(variant(tag, *(replace(rung, compile=None) for rung in rungs)), outcome="deferred")


def test_every_rung_of_a_deferred_variant_is_judged(tmp_path: Path) -> None:
    built, _ = build(tmp_path, deferred("t", rung("t", "int8"), rung("t", "fp16"), rung("t", "fp32", "failed")))
    (result,) = built.variants
    assert (result.status, result.chosen and result.chosen.plan.precision) == ("deferred", "int8")
    assert [each.plan.precision for each in result.tried if each.passed] == ["int8", "fp16"]
    assert [entry["gate"] for entry in result.ladder] == ["passed", "passed", "failed"]
