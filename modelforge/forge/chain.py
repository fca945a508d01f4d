"""The chain of a split model's variants, one a stage: the step that runs what ships and judges it as the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelforge.forge.plan import ChainPlan, Plan
from modelforge.forge.rungs import RungPlan, Rungs
from modelforge.forge.split_stages import Split
from modelforge.forge.stages import make_step
from modelforge.forge.step import Source, Step
from modelforge.graph.split_plan import INPUT

COARSEST = ("int8", "mixed", "fp16", "fp32")
"""Precisions, the noisiest first."""


def chain_step(plan: Plan, chain: ChainPlan, rungs: Sequence[RungPlan]) -> Step:
    """The step that runs the chosen rungs of all stages, in order, each as its own verification ran it."""
    split, variants = chain.split, [plan.variants[place] for place in chain.members]
    stages: list[dict[str, Any]] = []
    needs: dict[str, Step | Source] = {
        "samples": plan.intake.samples,
        "reference": plan.whole.reference,
        **plan.whole.metric_needs,
    }
    for part, variant, rung in zip(split.plan.stages, variants, rungs, strict=True):
        profile = {name: rung.verify.params[name] for name in ("compiler", "tag", "target", "precision", "evidence")}
        sources = {tensor.name: tensor.source for tensor in part.inputs}
        stages.append({"name": part.name, **profile, "tensors": sources})
        needs[f"lowered-{part.name}"] = rung.lower
        if rung.compile is not None:
            needs[f"compiled-{part.name}"] = rung.compile
            if "calibration" in rung.compile.needs:
                needs[f"calibration-{part.name}"] = rung.compile.needs["calibration"]
        assert variant.stage == part.name, "chains are in the order of the stages"
    crossing = transport_step(plan, split)
    if crossing is not None:
        needs["transport"] = crossing
    precisions = {rung.precision for rung in rungs}
    params = {
        "stages": stages,
        "outputs": [[name, source] for name, source in split.plan.outputs],
        "batch": plan.intake.batch,
        "count": plan.intake.count,
        "samples": max(min(rung.verify.params["samples"] for rung in rungs), plan.intake.emulated),
        # The outputs carry the coarsest stage's noise: its floors hold for the chain.
        "precision": next(each for each in COARSEST if each in precisions),
        "metric": dict(plan.whole.metric),
    }
    return make_step("chain", f"run the chain {plan.title(chain)}", params, needs)


def transport_step(plan: Plan, split: Split) -> Step | None:
    """Chooses how float tensors cross; None where they cross as they are."""
    if split.transport == "fp32":
        return None
    reads = {
        tensor.name: stage.name
        for stage in split.plan.stages
        for tensor in stage.inputs
        if tensor.source != INPUT and tensor.dtype == "float32"
    }
    needs: dict[str, Step | Source] = {}
    if split.transport == "int8":
        by_name = {stage.name: stage for stage in split.stages}
        needs = {f"ranges-{name}": Rungs(plan.intake, by_name[name]).ranges for name in sorted(set(reads.values()))}
    params = {"kind": split.transport, "tensors": reads}
    return make_step("transport", "choose how tensors cross", params, needs)
