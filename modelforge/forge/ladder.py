"""Walks ladders: each variant's until a rung meets its gate, and on where a chain of variants misses its own with it.

Asks for records and knows nothing of how one is made: a build runs what is missing, a plan only looks into the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from types import MappingProxyType
from typing import Any, Literal, Protocol

from modelforge.errors import BuildError, ModelForgeError
from modelforge.forge.chain import COARSEST, chain_step
from modelforge.forge.plan import ChainPlan, Plan, VariantPlan
from modelforge.forge.rungs import RungPlan
from modelforge.forge.step import Step
from modelforge.store import StepRecord, Store


class Records(Protocol):
    """Who gives a step's record."""

    def obtain(self, need: Step) -> StepRecord:
        """The record.

        Raises:
            ModelForgeError: the step failed.
        """


@dataclass(frozen=True)
class ChainMiss:
    """Why a rung was left that met its own gate: the chain that it was part of missed its gate.

    Attributes:
        chain: the variants of the chain in order, for people.
        found: facts of the chain's step.
    """

    chain: str
    found: Mapping[str, Any]

    @property
    def reason(self) -> str:
        return f"the chain {self.chain} misses its gate with it: {missed(self.found)}"

    def facts(self) -> dict[str, Any]:
        """What the ladder's entry says of it."""
        weakest = max(self.found["evidence"].values(), key=_STRONGEST.index)
        return {"name": self.chain, "evidence": weakest, **chain_figures(self.found["accuracy"])}


_STRONGEST = ("device", "emulator", "simulator", "reference")
_CHAIN_FIGURES = (
    "metric", "reference", "value", "drop", "sqnr_db", "identical", "cosine", "agreement", "samples", "max_drop", "gate"
)  # fmt: skip


def chain_figures(accuracy: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of a chain's accuracy."""
    return {name: accuracy[name] for name in _CHAIN_FIGURES if name in accuracy}


def missed(found: Mapping[str, Any]) -> str:
    """Why a chain missed its gate, with the value that was reached and the one that was wanted."""
    accuracy = found["accuracy"]
    told = [f"{accuracy['samples']} samples"]
    if accuracy["value"] is not None and accuracy["drop"] is not None and accuracy["max_drop"] is not None:
        wanted = accuracy["reference"] - accuracy["max_drop"]
        told.insert(0, f"{accuracy['metric']} {accuracy['value']:.5g}, wanted {wanted:.5g}")
    if set(found["evidence"].values()) == {"reference"}:
        told.append("the lowered models in ONNX Runtime")
    return f"{'; '.join(accuracy['reasons'])} ({', '.join(told)})"


@dataclass(frozen=True)
class RungResult:
    """One rung that was tried to its end; ``left`` where a chain does not meet its gate with it."""

    plan: RungPlan
    lower: StepRecord
    compile: StepRecord | None
    verify: StepRecord
    describe: StepRecord | None = None
    race: StepRecord | None = None
    estimate: StepRecord | None = None
    untuned_because: str = ""
    left: ChainMiss | None = None

    @property
    def slower(self) -> str | None:
        """Says that INT8 is not faster than the next float rung, where that was measured and is so."""
        if self.race is None or self.race.facts["evidence"] == "none" or self.race.facts["ratio"] < 1:
            return None
        facts, rival = self.race.facts, self.race.facts["rival"]
        times = f"{facts['p50_ms']:.3g} ms beside {rival['p50_ms']:.3g} ms, {facts['ratio']:.2f} times as long"
        return (
            f"{self.plan.precision} is not faster than {rival['precision']} where this was built: {times} "
            f"(batch of {facts['batch']}, one thread)"
        )

    @property
    def passed(self) -> bool:
        return self.left is None and bool(self.verify.facts["accuracy"]["gate"] == "passed")


@dataclass(frozen=True)
class VariantResult:
    """What became of one target.

    Attributes:
        ladder: one entry a rung, as the variant record wants it.
        chosen: the rung that passed its gate; None where there is none.
        error: why there is none, where it failed.
        tried: the rungs that came to a verdict, in order.
        seconds: what its own steps took when they ran (not what a cache hit takes).
    """

    plan: VariantPlan
    status: Literal["compiled", "deferred", "failed", "skipped"]
    ladder: tuple[Mapping[str, Any], ...]
    chosen: RungResult | None = None
    error: ModelForgeError | None = None
    tried: tuple[RungResult, ...] = ()
    seconds: float = 0.0

    @property
    def gate_failed(self) -> bool:
        """Whether a rung came to a verdict, and none passed."""
        return self.status == "failed" and bool(self.tried)


@dataclass(frozen=True)
class ChainResult:
    """What a chain of variants gave, one variant of each stage.

    Attributes:
        record: None where it could not run: a variant of it is missing, or failed as part of the chain.
    """

    plan: ChainPlan
    record: StepRecord | None
    error: ModelForgeError | None = None

    @property
    def passed(self) -> bool:
        return self.record is not None and bool(self.record.facts["accuracy"]["gate"] == "passed")


def walk_ladder(
    records: Records, variant: VariantPlan, left: Mapping[str, ChainMiss] = MappingProxyType({})
) -> VariantResult:
    """The first rung that meets its gate, and what became of those above it.

    Args:
        left: by precision, rungs that a chain did not meet its gate with: passed over.
    """
    ladder: list[Mapping[str, Any]] = list(variant.refused)
    if variant.outcome == "skipped":
        return VariantResult(variant, "skipped", tuple(ladder))
    error: ModelForgeError | None = None
    tried: list[RungResult] = []
    seconds = 0.0
    for rung in variant.rungs:
        try:
            result = replace(_build_rung(records, rung), left=left.get(rung.precision))
        except ModelForgeError as caught:
            error = caught
            ladder.append({"precision": rung.precision, "gate": "none", "reason": _sentence(caught)})
            continue
        seconds += result.verify.seconds + (result.compile.seconds if result.compile else 0.0)
        tried.append(result)
        ladder.append(_ladder_entry(result))
        if result.passed and result.slower and variant.prefer_speed:
            ladder[-1] = {**ladder[-1], "reason": f"not chosen: {result.slower}"}
            continue
        if result.passed and variant.outcome == "compiled":
            return VariantResult(variant, "compiled", _ordered(ladder, variant), result, None, tuple(tried), seconds)
    if ready := next((result for result in tried if result.passed), None):
        # Deferred: every rung was judged, as the device may need a lower one. Else the rungs after a slow one failed.
        status: Literal["compiled", "deferred"] = "compiled" if ready.compile else "deferred"
        entries = [_ladder_entry(ready) if entry["precision"] == ready.plan.precision else entry for entry in ladder]
        return VariantResult(variant, status, _ordered(entries, variant), ready, None, tuple(tried), seconds)
    error = error or BuildError(f"no rung of the ladder {list(variant.ladder)} met its gate", where=variant.target.tag)
    return VariantResult(variant, "failed", _ordered(ladder, variant), None, error, tuple(tried), seconds)


def walk_chains(
    records: Records, plan: Plan, variants: Sequence[VariantResult]
) -> tuple[tuple[VariantResult, ...], tuple[ChainResult, ...]]:
    """Run the chains; where one misses its gate, a variant of it falls to its next rung, until none can.

    Stages that each meet their own gate do not make a chain that does: what a stage hands on has no label, and the
    errors of several add up. Only the variant that falls is built again, as the others' inputs are FP32's.
    """
    results, left = list(variants), [dict[str, ChainMiss]() for _ in variants]
    while True:
        chains = [_run_chain(records, plan, results, chain) for chain in plan.chains]
        falling = next((each for each in map(partial(_falling, results), chains) if each is not None), None)
        if falling is None:
            return tuple(results), tuple(chains)
        chain, place = falling
        chosen = results[place].chosen
        assert chain.record is not None, "only a chain that ran misses its gate"
        assert chosen is not None, "a chain runs chosen rungs"
        left[place][chosen.plan.precision] = ChainMiss(plan.title(chain.plan), chain.record.facts)
        results[place] = walk_ladder(records, plan.variants[place], left[place])


class _NotRun(BuildError):
    """A step whose record the cache does not have."""


@dataclass(frozen=True)
class _Kept:
    """Records of the cache alone."""

    store: Store

    def obtain(self, need: Step) -> StepRecord:
        if (record := self.store.read(need.key)) is None:
            raise _NotRun("it was not run yet")
        return record


def known_failures(plan: Plan, store: Store) -> list[dict[str, Mapping[str, Any]]]:
    """For each variant, by precision, the ladder entries of the rungs that an earlier run left, as the cache has it."""
    kept = _Kept(store)
    variants, _ = walk_chains(kept, plan, [walk_ladder(kept, variant) for variant in plan.variants])
    return [{each["precision"]: each for each in found.ladder if each["gate"] == "failed"} for found in variants]


def _falling(results: Sequence[VariantResult], chain: ChainResult) -> tuple[ChainResult, int] | None:
    """Which variant of a chain that missed its gate falls; None where it met it, or nothing is below any rung.

    The one of the coarsest precision; of several, the one that lost most by its own judgement.
    """
    if chain.record is None or chain.passed:
        return None

    def coarseness(place: int) -> tuple[int, float]:
        chosen = results[place].chosen
        assert chosen is not None, "a chain runs chosen rungs"
        sqnr_db = chosen.verify.facts["accuracy"]["sqnr_db"]
        return COARSEST.index(chosen.plan.precision), inf if sqnr_db is None else sqnr_db

    able = [place for place in dict.fromkeys(chain.plan.members) if _has_lower(results[place])]
    return (chain, min(able, key=coarseness)) if able else None


def _has_lower(result: VariantResult) -> bool:
    """Whether a rung below the one that was chosen is yet to be tried, or met its gate."""
    assert result.chosen is not None, "a chain runs chosen rungs"
    precisions = [rung.precision for rung in result.plan.rungs]
    below = precisions[precisions.index(result.chosen.plan.precision) + 1 :]
    lost = {entry["precision"] for entry in result.ladder if entry["gate"] != "passed"}
    return not lost.issuperset(below)


def _run_chain(records: Records, plan: Plan, variants: Sequence[VariantResult], chain: ChainPlan) -> ChainResult:
    chosen = [variants[place].chosen for place in chain.members]
    rungs = [each.plan for each in chosen if each is not None]
    if len(rungs) < len(chosen):
        return ChainResult(chain, None)
    try:
        return ChainResult(chain, records.obtain(chain_step(plan, chain, rungs)))
    except ModelForgeError as error:
        return ChainResult(chain, None, error)


def _build_rung(records: Records, rung: RungPlan) -> RungResult:
    lowered = records.obtain(rung.lower)
    if rung.tune is not None and rung.untuned is not None:
        try:
            records.obtain(rung.tune)
        except ModelForgeError as error:
            return replace(_build_rung(records, rung.untuned), untuned_because=_sentence(error))
    compiled = records.obtain(rung.compile) if rung.compile else None
    result = RungResult(rung, lowered, compiled, records.obtain(rung.verify))
    if not result.passed:
        return result
    described = records.obtain(rung.describe) if rung.describe else None
    # The rival may be one whose tuning failed: then there is nothing to hold a tuned one against.
    raced = if_possible(records, rung.race) if rung.tune else records.obtain(rung.race) if rung.race else None
    return replace(result, describe=described, race=raced, estimate=if_possible(records, rung.estimate))


def if_possible(records: Records, step: Step | None) -> StepRecord | None:
    """An estimate that cannot be made costs nothing else: the artifact is there, and was judged."""
    try:
        return records.obtain(step) if step else None
    except ModelForgeError:
        return None


def _ladder_entry(result: RungResult) -> dict[str, Any]:
    accuracy = result.verify.facts["accuracy"]
    figures = {name: accuracy[name] for name in ("value", "drop", "sqnr_db", "agreement")}
    entry = {"precision": result.plan.precision, "gate": accuracy["gate"], **figures}
    if result.left is not None:
        return {**entry, "gate": "failed", "reason": result.left.reason, "chain": result.left.facts()}
    return entry if result.passed else {**entry, "reason": "; ".join(accuracy["reasons"])}


def _ordered(ladder: list[Mapping[str, Any]], variant: VariantPlan) -> tuple[Mapping[str, Any], ...]:
    return tuple(sorted(ladder, key=lambda entry: variant.ladder.index(entry["precision"])))


def _sentence(error: ModelForgeError) -> str:
    return error.what if error.where is None else f"{error.where}: {error.what}"
