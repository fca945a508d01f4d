"""The executor: runs the steps of a plan that the store does not have, in parallel, as the ladders ask for them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from modelforge.forge.ladder import ChainResult, VariantResult, if_possible, walk_chains, walk_ladder
from modelforge.forge.plan import Plan
from modelforge.forge.step import Source, Step, execute
from modelforge.store import StepRecord, Store
from modelforge.toolchains import process


class Reporter(Protocol):
    """Who is told what happens; called from several threads."""

    def started(self, step: Step) -> None: ...

    def finished(self, step: Step, record: StepRecord, cached: bool) -> None: ...

    def failed(self, step: Step, error: BaseException) -> None: ...


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
            results = [drivers.submit(walk_ladder, runner, variant) for variant in plan.variants]
            walked = [future.result() for future in results]
            placed = if_possible(runner, plan.placement)
            variants, chains = walk_chains(runner, plan, walked)
        except BaseException:
            process.kill_all()
            steps.shutdown(wait=False, cancel_futures=True)
            drivers.shutdown(wait=False, cancel_futures=True)
            raise
    return Built(plan, prepared, baseline, variants, chains, placed)
