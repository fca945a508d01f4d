"""Ladders walked down for a chain: whose stages each meet their own gate, and which misses its own with one of them.

The steps are those of ``test_run``. What judges a chain is a double here, with the facts that ``split_steps.chain``
gives; the real one is in ``tests/e2e/test_partition.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modelforge.bundle.record import Rung
from modelforge.forge import ladder
from modelforge.forge.ladder import known_failures
from modelforge.forge.plan import ChainPlan, Plan, VariantPlan
from modelforge.forge.run import Built, run_plan
from modelforge.forge.rungs import RungPlan
from modelforge.forge.step import Step
from modelforge.store import Store
from tests.forge.test_run import RUNS, Told, a_plan, rung, step, variant

FP32 = 1.0
ALLOWED = 0.02


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """What the chain of these precisions reaches; 1 for those that are not named."""
    found: dict[tuple[str, ...], float] = {}

    def chain_step(plan: Plan, chain: ChainPlan, rungs: Sequence[RungPlan]) -> Step:
        precisions = tuple(each.precision for each in rungs)
        value = found.get(precisions, FP32)
        drop = FP32 - value
        passed = drop <= ALLOWED
        reasons = [] if passed else [f"detections drops by {drop:.4f}, allowed is {ALLOWED:.4f}"]
        accuracy = {
            "metric": "detections", "reference": FP32, "value": value, "drop": drop, "max_drop": ALLOWED,
            "sqnr_db": 20.0, "identical": False, "cosine": 0.99, "agreement": None, "samples": 64,
            "gate": "passed" if passed else "failed", "reasons": reasons,
        }  # fmt: skip
        evidence = {plan.variants[place].stage: "simulator" for place in chain.members}
        facts = {"accuracy": accuracy, "evidence": evidence, "transport": {}}
        return step(f"chain {' '.join(precisions)}", *(each.verify for each in rungs), facts=facts)

    monkeypatch.setattr(ladder, "chain_step", chain_step)
    return found


def stage(name: str, *precisions: str, sqnr_db: Mapping[str, float] | None = None, gates: Sequence[str] = ()) -> Any:
    rungs = [rung(name, each, gate) for each, gate in zip(precisions, [*gates, *["passed"] * 9], strict=False)]
    if sqnr_db is not None:
        rungs = [replace(each, verify=_with_sqnr(each, name, sqnr_db[each.precision])) for each in rungs]
    return replace(variant("npu", *rungs), stage=name)


def _with_sqnr(plan: RungPlan, name: str, sqnr_db: float) -> Step:
    figures = {"value": None, "drop": None, "sqnr_db": sqnr_db, "agreement": None}
    assert plan.compile is not None
    facts = {"accuracy": {"gate": "passed", "reasons": [], **figures}}
    return step(f"verify {name} {plan.precision}", plan.compile, facts=facts)


def chained(*variants: VariantPlan, chains: Sequence[tuple[int, ...]] = ((0, 1),)) -> Any:
    plan = a_plan(*variants)
    split: Any = SimpleNamespace()
    plan.chains = tuple(ChainPlan(split, members) for members in chains)
    plan.title = lambda chain: Plan.title(plan, chain)
    return plan


def run(plan: Any, home: Path) -> Built:
    RUNS.clear()
    return run_plan(plan, Store(home), Told(), jobs=2)


def test_a_stage_falls_until_its_chain_meets_the_gate(tmp_path: Path, values: dict[tuple[str, ...], float]) -> None:
    values |= {("int8", "fp32"): 0.955, ("mixed", "fp32"): 0.977}
    plan = chained(stage("npu", "int8", "mixed", "fp16"), stage("cpu", "fp32"))
    built = run(plan, tmp_path)

    npu, cpu = built.variants
    assert npu.chosen is not None
    assert (npu.status, npu.chosen.plan.precision) == ("compiled", "fp16")
    assert [chain.passed for chain in built.chains] == [True]
    assert [(entry["precision"], entry["gate"]) for entry in npu.ladder] == [
        ("int8", "failed"), ("mixed", "failed"), ("fp16", "passed"),
    ]  # fmt: skip
    first = npu.ladder[0]
    assert first["reason"] == (
        "the chain npu on npu -> cpu on npu misses its gate with it: detections drops by 0.0450, allowed is 0.0200 "
        "(detections 0.955, wanted 0.98, 64 samples)"
    )
    assert (first["chain"]["value"], first["chain"]["evidence"], first["sqnr_db"]) == (0.955, "simulator", 20.0)
    assert Rung.model_validate(dict(first)).chain is not None, "the record takes it as it is"

    assert cpu.chosen is not None
    assert RUNS.count("compile cpu fp32") == 1
    assert all(RUNS.count(name) == 1 for name in RUNS), "nothing ran twice"


def test_what_is_cached_stays_valid(tmp_path: Path, values: dict[tuple[str, ...], float]) -> None:
    """A build that only the chain stops goes on, with another rung in the ladder, where it was."""
    values |= {("int8", "fp32"): 0.955}
    run(chained(stage("npu", "int8"), stage("cpu", "fp32")), tmp_path)
    built = run(chained(stage("npu", "int8", "fp16"), stage("cpu", "fp32")), tmp_path)
    assert built.chains[0].passed
    assert sorted(RUNS) == ["chain fp16 fp32", "compile npu fp16", "lower fp16", "verify npu fp16"]


def test_the_chain_fails_where_no_rung_is_left(tmp_path: Path, values: dict[tuple[str, ...], float]) -> None:
    values |= {("int8", "fp32"): 0.955, ("fp16", "fp32"): 0.97}
    built = run(chained(stage("npu", "int8", "fp16"), stage("cpu", "fp32")), tmp_path)
    assert not built.chains[0].passed
    assert built.chains[0].record is not None
    assert built.chains[0].record.facts["accuracy"]["value"] == 0.97
    assert [entry["gate"] for entry in built.variants[0].ladder] == ["failed", "passed"], "its own gate it did meet"


def test_a_rung_below_that_misses_its_own_gate_is_no_way_out(
    tmp_path: Path, values: dict[tuple[str, ...], float]
) -> None:
    values |= {("int8", "fp32"): 0.955}
    built = run(chained(stage("npu", "int8", "mixed", gates=["passed", "failed"]), stage("cpu", "fp32")), tmp_path)
    npu = built.variants[0]
    assert (npu.status, npu.gate_failed) == ("failed", True)
    assert [entry["reason"].split(" ")[0] for entry in npu.ladder] == ["the", "drops"]
    assert built.chains[0].record is None


def test_the_coarsest_stage_falls_first_and_of_two_the_noisier(
    tmp_path: Path, values: dict[tuple[str, ...], float]
) -> None:
    quiet, noisy = {"int8": 30.0, "fp16": 60.0}, {"int8": 12.0, "fp16": 60.0}
    values |= {("int8", "int8", "fp16"): 0.9, ("int8", "fp16", "fp16"): 0.9}
    plan = chained(
        stage("head", "int8", "fp16", sqnr_db=quiet), stage("body", "int8", "fp16", sqnr_db=noisy),
        stage("tail", "fp16", "fp32", sqnr_db={"fp16": 9.0, "fp32": 99.0}), chains=[(0, 1, 2)],
    )  # fmt: skip
    built = run(plan, tmp_path)
    assert [each.chosen and each.chosen.plan.precision for each in built.variants] == ["fp16", "fp16", "fp16"]
    assert [name for name in RUNS if name.startswith("chain")] == [
        "chain int8 int8 fp16", "chain int8 fp16 fp16", "chain fp16 fp16 fp16",
    ]  # fmt: skip


def test_a_variant_of_two_chains_falls_for_both(tmp_path: Path, values: dict[tuple[str, ...], float]) -> None:
    """One head, two tails: the chain that had passed is judged anew with what ships now."""
    values |= {("int8", "fp16"): 0.9}
    plan = chained(stage("head", "int8", "fp32"), stage("tail", "fp32"), stage("tail", "fp16"), chains=[(0, 1), (0, 2)])
    built = run(plan, tmp_path)
    assert [chain.passed for chain in built.chains] == [True, True]
    assert [name for name in RUNS if name.startswith("chain")] == [
        "chain int8 fp32", "chain int8 fp16", "chain fp32 fp32", "chain fp32 fp16",
    ]  # fmt: skip


def test_a_deferred_variant_forgets_the_rung_that_the_chain_left(
    tmp_path: Path, values: dict[tuple[str, ...], float]
) -> None:
    """`finalize` takes the rungs that passed: it must not go back to the one that the chain was wrong with."""
    values |= {("int8", "fp32"): 0.955}
    npu = stage("npu", "int8", "fp16")
    npu = replace(npu, outcome="deferred", rungs=tuple(replace(each, compile=None) for each in npu.rungs))
    built = run(chained(npu, stage("cpu", "fp32")), tmp_path)
    found = built.variants[0]
    assert (found.status, found.chosen and found.chosen.plan.precision) == ("deferred", "fp16")
    assert [each.plan.precision for each in found.tried if each.passed] == ["fp16"]


def test_a_plan_tells_what_an_earlier_build_left(tmp_path: Path, values: dict[tuple[str, ...], float]) -> None:
    values |= {("int8", "fp32"): 0.955}
    plan = chained(stage("npu", "int8", "fp16"), stage("cpu", "fp32"))
    store = Store(tmp_path)
    assert known_failures(plan, store) == [{}, {}]
    run(plan, tmp_path)
    RUNS.clear()
    npu, cpu = known_failures(plan, store)
    assert (list(npu), npu["int8"]["chain"]["value"], cpu) == (["int8"], 0.955, {})
    assert RUNS == [], "it only looks"
