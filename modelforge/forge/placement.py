"""Where a model can run: every target held against memory, precision, operators and a latency budget.

Estimates only (:mod:`modelforge.graph.roofline`), and marked so. The criterion is the same for every model: the share
of a device's memory in :data:`MEMORY_SHARE`, and a latency budget, given or by task from :data:`BUDGET_MS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from modelforge.compilers import compiler_names, get_compiler
from modelforge.compilers.protocol import OWN_FILE
from modelforge.errors import BuildError, InputError, nearest
from modelforge.forge.efficiency import FLOAT_BYTES, PRECISIONS, Factor, factor_for, machine_for
from modelforge.graph.cuts import live_bytes
from modelforge.graph.facts import ModelFacts
from modelforge.graph.roofline import (
    LayerWork,
    Machine,
    bottleneck,
    layer_times,
    layer_work,
    unpriced,
    weight_bytes,
)
from modelforge.graph.split_graph import LayerGraph
from modelforge.target import Target

MEMORY_SHARE: Mapping[str, float] = {"device": 0.25, "edge": 0.5, "cloud": 0.9}
"""How much of the memory a model may take. A device's is shared with its system, its camera and the application; an
edge box serves several models; a cloud card serves one, and its runtime takes the rest."""

BUDGET_MS: Mapping[str, float] = {
    "interactive": 50.0,
    "object-detection": 33.3,
    "text-generation": 40.0,
}
"""Milliseconds for one inference by task: 20 a second where nothing else is said, as in a recipe's example; video at 30
frames a second; one token at MLPerf Inference's interactive Llama-2-70B limit (time per output token)."""
DEFAULT_TASK = "interactive"
BATCHES = (1, 2, 4, 8, 16, 32)

Verdict = Literal["yes", "after quantization", "no", "unknown"]
TierVerdict = Literal["yes", "after quantization", "some", "no", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """One target at one precision.

    Attributes:
        verdict: ``yes``, ``memory``, ``latency``, ``unsupported``, or ``unknown`` where no time can be estimated.
        why: in one sentence; empty for ``yes``.
        needed_bytes, allowed_bytes: weights and peak activations at the precision; the share of the memory.
        latency_ms: for the model's own batch, an estimate; corrected by measurements where there are some.
        limit: what the time goes to: ``compute``, ``memory`` or ``overhead``.
        batches: estimated milliseconds by batch size, where the model's first dimension is open.
        error: of the estimate, where measurements tell it.
    """

    precision: str
    compiler: str
    verdict: str
    why: str
    needed_bytes: int
    allowed_bytes: int
    latency_ms: float | None
    throughput: float | None
    limit: str
    batches: Mapping[int, float]
    factor: Factor


@dataclass(frozen=True)
class Row:
    """One target.

    Attributes:
        best: the widest precision that does, None where none does.
        fastest: of those that do, the one with the shortest estimate.
    """

    target: Target
    verdict: Verdict
    best: Estimate | None
    fastest: Estimate | None
    estimates: tuple[Estimate, ...]
    why: str


@dataclass(frozen=True)
class TierRow:
    """A tier's verdict: that of at least half of its targets with an estimate, ``some`` where fewer do.

    Attributes:
        widest: the widest precision at which any of them does; None where none does.
        fastest: the precision that is fastest on most of those that do.
    """

    tier: str
    verdict: TierVerdict
    widest: str | None
    fastest: str | None
    able: tuple[str, ...]
    judged: int
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """All targets, and the criterion they were held against.

    Attributes:
        sizes: what open dimensions were bound to.
        notes: what the estimates leave out.
    """

    rows: tuple[Row, ...]
    tiers: tuple[TierRow, ...]
    budget_ms: float
    task: str
    sizes: Mapping[str, int]
    flops: int
    weight_bytes: int
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "estimate": True,
            "criterion": {
                "latency_budget_ms": self.budget_ms,
                "task": self.task,
                "memory_share": dict(MEMORY_SHARE),
                "tier": "at least half of the tier's targets that have an estimate",
            },
            "sizes": dict(self.sizes),
            "flops": self.flops,
            "weight_bytes": self.weight_bytes,
            "tiers": [asdict(tier) for tier in self.tiers],
            "targets": [
                {
                    "target": row.target.tag,
                    "tier": row.target.tier,
                    "verdict": row.verdict,
                    "precision": row.best.precision if row.best else None,
                    "fastest": row.fastest.precision if row.fastest else None,
                    "why": row.why,
                    "estimates": [asdict(each) for each in row.estimates],
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }


def placement_matrix(
    graph: LayerGraph,
    facts: ModelFacts,
    targets: Sequence[Target],
    *,
    task: str = DEFAULT_TASK,
    budget_ms: float | None = None,
    home: Path | None = None,
) -> Matrix:
    """Hold a model against targets.

    Args:
        graph: read at the sizes that the estimate is for.
        facts: of the same model, for what compilers say of its operators.
        budget_ms: for one inference; None: by task.
        home: of the cache with measured latencies.

    Raises:
        InputError: a task that has no budget, where none is given.
    """
    budget = _budget(task, budget_ms)
    load = Load(graph)
    rows = tuple(_row(load, facts, target, budget, home) for target in targets)
    order = {"device": 0, "edge": 1, "cloud": 2}
    tiers = sorted({row.target.tier for row in rows}, key=lambda tier: order[tier])
    return Matrix(
        rows=tuple(sorted(rows, key=lambda row: (order[row.target.tier], row.target.tag))),
        tiers=tuple(_tier(tier, [row for row in rows if row.target.tier == tier]) for tier in tiers),
        budget_ms=budget,
        task=task,
        sizes=dict(graph.sizes),
        flops=sum(layer.flops or 0 for layer in graph.layers),
        weight_bytes=sum(weight.bytes for weight in graph.weights.values()),
        notes=_notes(graph),
    )


def estimate(
    load: Load, facts: ModelFacts, target: Target, precision: str, budget_ms: float, home: Path | None = None
) -> Estimate:
    """One target at one precision, by the first of its compilers that takes the model."""
    compiler, refusal, own_file = _compiler(facts, target, precision)
    needed = load.memory(precision)
    allowed = int(target.memory.bytes * MEMORY_SHARE[target.tier])
    machine = machine_for(target, precision, compiler)
    factor = factor_for(target.tag, compiler, precision, home=home)
    latency, limit, batches = None, "", {}
    if machine is not None:
        times = layer_times(load.work(precision), machine)
        latency = sum(time.seconds for time in times) * factor.value * 1e3
        limit = bottleneck(times)
        fitting = [batch for batch in BATCHES if _is_open(facts) and load.memory(precision, batch) <= allowed]
        batches = {batch: load.seconds(precision, machine, batch) * factor.value * 1e3 for batch in fitting}
    verdict, why = "yes", ""
    if refusal:  # what it would say of a file that the user has yet to make is not known
        verdict, why = "unknown" if own_file else "unsupported", refusal
    elif needed > allowed:
        verdict, why = "memory", f"needs {needed / 2**20:.0f} MiB, may take {allowed / 2**20:.0f} MiB"
    elif latency is None:
        verdict, why = "unknown", f"the profile knows no peak rate for {precision}"
    elif latency > budget_ms:
        verdict, why = "latency", f"about {latency:.0f} ms, allowed are {budget_ms:g} ms"
    rates = [batch / time for batch, time in (batches or {1: latency or 0.0}).items() if time]
    throughput = 1e3 * max(rates) if rates else None
    return Estimate(
        precision, compiler, verdict, why, needed, allowed, latency, throughput, limit, batches, factor
    )  # fmt: skip


class Load:
    """What a model asks of any target, worked out once a precision."""

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self._work: dict[str, list[LayerWork]] = {}
        self._weights: dict[str, int] = {}
        self._live = max(live_bytes(graph), default=0)

    def work(self, precision: str) -> list[LayerWork]:
        """Of each layer."""
        if precision not in self._work:
            self._work[precision] = layer_work(self.graph, FLOAT_BYTES[precision])
        return self._work[precision]

    def seconds(self, precision: str, machine: Machine, batch: int) -> float:
        """Of one execution, uncorrected."""
        return sum(time.seconds for time in layer_times(self.work(precision), machine, batch))

    def memory(self, precision: str, batch: int = 1) -> int:
        """Weights and the peak of live activations; what a runtime itself takes is not counted."""
        if precision not in self._weights:
            self._weights[precision] = weight_bytes(self.graph, set(self.graph.weights), FLOAT_BYTES[precision])
        return int(self._weights[precision] + self._live * FLOAT_BYTES[precision] / 4 * batch)

    def precisions(self, target: Target) -> list[str]:
        """Those of the target, widest first; none wider than the model's own weights, if there is another."""
        has: list[str] = [each for each in PRECISIONS if each in target.precisions]
        floats = [weight.bytes / weight.elements for weight in self.graph.weights.values() if weight.is_float]
        if floats and max(floats) <= FLOAT_BYTES["fp16"]:
            return [each for each in has if each != "fp32"] or has
        return has


def _budget(task: str, budget_ms: float | None) -> float:
    if budget_ms is not None:
        return budget_ms
    if task not in BUDGET_MS:
        raise InputError(
            f'the task "{task}" has no latency budget here; {nearest(task, BUDGET_MS)}',
            where="--task",
            fix="--latency-budget MS says one",
        )
    return BUDGET_MS[task]


def _row(load: Load, facts: ModelFacts, target: Target, budget: float, home: Path | None) -> Row:
    estimates = tuple(estimate(load, facts, target, each, budget, home) for each in load.precisions(target))
    able = [each for each in estimates if each.verdict == "yes"]
    if able:
        verdict: Verdict = "after quantization" if able[0].precision == "int8" else "yes"
        fastest = min(able, key=lambda each: each.latency_ms or 0.0)
        return Row(target, verdict, able[0], fastest, estimates, _lost(estimates, able[0]))
    why = "; ".join(f"{each.precision}: {each.why}" for each in estimates)
    hopeless = all(each.verdict in ("memory", "unsupported") for each in estimates)
    unknown = any(each.verdict == "unknown" for each in estimates) and not hopeless
    return Row(target, "unknown" if unknown else "no", None, None, estimates, why)


def _lost(estimates: Sequence[Estimate], best: Estimate) -> str:
    """Why the wider precisions do not."""
    wider = estimates[: estimates.index(best)]
    return "; ".join(f"{each.precision}: {each.why}" for each in wider)


def _tier(tier: str, rows: Sequence[Row]) -> TierRow:
    judged = [row for row in rows if row.verdict != "unknown"]
    able = [row for row in judged if row.best is not None]
    unknown = tuple(row.target.tag for row in rows if row.verdict == "unknown")
    verdict: TierVerdict
    if not judged:
        verdict = "unknown"
    elif not able:
        verdict = "no"
    elif 2 * len(able) < len(judged):
        verdict = "some"
    else:
        quantized = sum(row.verdict == "after quantization" for row in able)
        verdict = "after quantization" if 2 * quantized > len(able) else "yes"
    widest = min((PRECISIONS.index(row.best.precision) for row in able if row.best), default=None)
    votes = Counter(row.fastest.precision for row in able if row.fastest)
    return TierRow(
        tier,
        verdict,
        None if widest is None else PRECISIONS[widest],
        votes.most_common(1)[0][0] if votes else None,
        tuple(row.target.tag for row in able),
        len(judged),
        unknown,
    )


def _compiler(facts: ModelFacts, target: Target, precision: str) -> tuple[str, str, bool]:
    """The first compiler that takes the model, and else why the first that is built does not: for want of a file?"""
    inputs = {tensor.name: tuple(_size(size) for size in tensor.shape or ()) for tensor in facts.inputs}
    refused: tuple[str, str, bool] | None = None
    for name in target.compilers:
        if name not in compiler_names():
            continue
        try:
            refusals = get_compiler(name).supports(facts, target, precision, inputs, {})
        except BuildError:  # another package's compiler that cannot be loaded; the next may do
            continue
        if not refusals:
            return name, "", False
        refused = refused or (name, refusals[0].what, refusals[0].rule == OWN_FILE)
    return refused or (target.compilers[0], "", False)


def _size(size: int | str) -> int | str:
    return size if isinstance(size, int) else 1


def _is_open(facts: ModelFacts) -> bool:
    """Whether the batch, the first dimension of every input, can be chosen."""
    return all(tensor.shape and isinstance(tensor.shape[0], str) for tensor in facts.inputs)


def _notes(graph: LayerGraph) -> tuple[str, ...]:
    notes = ["latencies are estimates by the roofline model; nothing was run"]
    unknown = unpriced(graph)
    if unknown:
        notes.append(
            f"{len(unknown)} of {len(graph.layers)} layers count as nothing, for their sizes are not known "
            f"(the first is {unknown[0].name}): give --size NAME=N for {', '.join(graph.sizes) or 'open dimensions'}"
        )
    if graph.sizes:
        bound = ", ".join(f"{name} = {size}" for name, size in graph.sizes.items())
        notes.append(f"estimated at {bound}; --size NAME=N says otherwise")
    return tuple(notes)
