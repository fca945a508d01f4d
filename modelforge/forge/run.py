"""The executor: runs the steps of a plan that the store does not have, in parallel, and walks each target's ladder."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from modelforge.errors import BuildError, ModelForgeError
from modelforge.forge.plan import ChainPlan, Plan, VariantPlan
from modelforge.forge.rungs import RungPlan
from modelforge.forge.step import Source, Step, execute
from modelforge.store import StepRecord, Store
from modelforge.toolchains import process


class Reporter(Protocol):
    """Who is told what happens; called from several threads."""

    def started(self, step: Step) -> None: ...

    def finished(self, step: Step, record: StepRecord, cached: bool) -> None: ...

    def failed(self, step: Step, error: BaseException) -> None: ...


@dataclass(frozen=True)
class RungResult:
    """One rung that was tried to its end."""

    plan: RungPlan
    lower: StepRecord
    compile: StepRecord | None
    verify: StepRecord
    describe: StepRecord | None = None
    race: StepRecord | None = None
    estimate: StepRecord | None = None
    untuned_because: str = ""

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
        return bool(self.verify.facts["accuracy"]["gate"] == "passed")


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


@dataclass(frozen=True)
class Built:
    """What a run gives: one result a variant, and by stage the records that serve all its variants."""

    plan: Plan
    prepare: Mapping[str, StepRecord]
    baseline: Mapping[str, StepRecord]
    variants: tuple[VariantResult, ...]
    chains: tuple[ChainResult, ...] = ()
    placement: StepRecord | None = None


@dataclass
class _Runner:
    """Obtains step records, each step once, however many variants ask for it."""

    store: Store
    executor: Executor
    reporter: Reporter
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _futures: dict[str, Future[StepRecord]] = field(default_factory=dict)

    def obtain(self, need: Step | Source) -> StepRecord:
        """The record of a step, run now if it must be. Blocks."""
        if isinstance(need, Source):
            return need.bring_in(self.store)
        with self._lock:
            future = self._futures.get(need.key)
            mine = future is None
            if future is None:
                future = self._futures[need.key] = Future()
        if not mine:
            return future.result()
        try:
            future.set_result(self._run(need))
        except BaseException as error:
            future.set_exception(error)
            raise
        return future.result()

    def _run(self, step: Step) -> StepRecord:
        if found := self.store.read(step.key):
            self.store.touch(step.key)
            self.reporter.finished(step, found, True)
            return found
        for need in step.needs.values():
            self.obtain(need)
        self.reporter.started(step)
        try:
            record = self.executor.submit(execute, step.task(), str(self.store.home)).result()
        except BaseException as error:
            self.reporter.failed(step, error)
            raise
        self.reporter.finished(step, record, False)
        return record


def run_plan(plan: Plan, store: Store, reporter: Reporter, *, jobs: int, executor: Executor | None = None) -> Built:
    """Run a plan.

    Args:
        jobs: how many steps run at once.
        executor: where steps run; threads of this process by default, which start child processes themselves. Tasks
            can be pickled: any executor of the ``concurrent.futures`` shape that sees the same store will do.

    Raises:
        ModelForgeError: what fails before the targets part: bringing in the inputs, preparing, the baseline.
    """
    store.sweep()
    with (
        executor or ThreadPoolExecutor(jobs, thread_name_prefix="step") as steps,
        # Drivers only wait: one for each variant, so that none ever holds up another.
        ThreadPoolExecutor(max(2, len(plan.variants)), thread_name_prefix="variant") as drivers,
    ):
        runner = _Runner(store, steps, reporter)
        try:
            for source in plan.intake.sources:
                runner.obtain(source)
            # The baseline comes first: nothing is compiled for a model that is wrong on the user's own data.
            for future in [drivers.submit(runner.obtain, step) for step in plan.first]:
                future.result()
            prepared = {stage.name: runner.obtain(stage.prepare) for stage in plan.stages}
            baseline = {stage.name: runner.obtain(stage.baseline) for stage in plan.stages}
            results = [drivers.submit(_build_variant, runner, variant) for variant in plan.variants]
            variants = tuple(future.result() for future in results)
            placed = _if_possible(runner, plan.placement)
            chains = tuple(_run_chain(runner, plan, variants, chain) for chain in plan.chains)
        except BaseException:
            process.kill_all()
            steps.shutdown(wait=False, cancel_futures=True)
            drivers.shutdown(wait=False, cancel_futures=True)
            raise
    return Built(plan, prepared, baseline, variants, chains, placed)


def _run_chain(runner: _Runner, plan: Plan, variants: tuple[VariantResult, ...], chain: ChainPlan) -> ChainResult:
    from modelforge.forge.chain import chain_step

    chosen = [variants[place].chosen for place in chain.members]
    rungs = [each.plan for each in chosen if each is not None]
    if len(rungs) < len(chosen):
        return ChainResult(chain, None)
    try:
        return ChainResult(chain, runner.obtain(chain_step(plan, chain, rungs)))
    except ModelForgeError as error:
        return ChainResult(chain, None, error)


def _build_variant(runner: _Runner, variant: VariantPlan) -> VariantResult:
    ladder: list[Mapping[str, Any]] = list(variant.refused)
    if variant.outcome == "skipped":
        return VariantResult(variant, "skipped", tuple(ladder))
    error: ModelForgeError | None = None
    tried: list[RungResult] = []
    seconds = 0.0
    for rung in variant.rungs:
        try:
            result = _build_rung(runner, rung)
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


def _build_rung(runner: _Runner, rung: RungPlan) -> RungResult:
    lowered = runner.obtain(rung.lower)
    if rung.tune is not None and rung.untuned is not None:
        try:
            runner.obtain(rung.tune)
        except ModelForgeError as error:
            return replace(_build_rung(runner, rung.untuned), untuned_because=_sentence(error))
    compiled = runner.obtain(rung.compile) if rung.compile else None
    result = RungResult(rung, lowered, compiled, runner.obtain(rung.verify))
    if not result.passed:
        return result
    described = runner.obtain(rung.describe) if rung.describe else None
    # The rival may be one whose tuning failed: then there is nothing to hold a tuned one against.
    raced = _if_possible(runner, rung.race) if rung.tune else runner.obtain(rung.race) if rung.race else None
    return replace(result, describe=described, race=raced, estimate=_if_possible(runner, rung.estimate))


def _if_possible(runner: _Runner, step: Step | None) -> StepRecord | None:
    """An estimate that cannot be made costs nothing else: the artifact is there, and was judged."""
    try:
        return runner.obtain(step) if step else None
    except ModelForgeError:
        return None


def _ladder_entry(result: RungResult) -> dict[str, Any]:
    accuracy = result.verify.facts["accuracy"]
    figures = {name: accuracy[name] for name in ("value", "drop", "sqnr_db", "agreement")}
    entry = {"precision": result.plan.precision, "gate": accuracy["gate"], **figures}
    return entry if result.passed else {**entry, "reason": "; ".join(accuracy["reasons"])}


def _ordered(ladder: list[Mapping[str, Any]], variant: VariantPlan) -> tuple[Mapping[str, Any], ...]:
    return tuple(sorted(ladder, key=lambda entry: variant.ladder.index(entry["precision"])))


def _sentence(error: ModelForgeError) -> str:
    return error.what if error.where is None else f"{error.where}: {error.what}"
