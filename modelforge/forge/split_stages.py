"""The stages of a recipe's [split], each a model of its own on its way through the forge. Pure: it writes nothing.

The user's model is cut before it is prepared, so that the names of the tensors are the user's; each stage is prepared,
calibrated, lowered, compiled and judged by itself, on what the stages before it give in FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx

from modelforge.errors import RecipeError, UnsupportedError, nearest
from modelforge.forge.delegation import crossing_costs
from modelforge.forge.intake import Intake, Shapes
from modelforge.forge.partition import LEAST_SHARE, host_of, is_npu, npu_support
from modelforge.forge.split_choices import candidates, tier_choices
from modelforge.forge.splitting import Planned, SplitWish, plan_stages
from modelforge.forge.stages import Onward, Stage, front_steps, make_step, metric_of
from modelforge.forge.step import Source, Step
from modelforge.forge.tiers import TierSetup, TierWish, tier_problem
from modelforge.graph.inspect import inspect_proto
from modelforge.graph.split import BySupport, plan_split
from modelforge.graph.split_graph import Layer, read_layers
from modelforge.graph.split_plan import INPUT, CutTensor, SplitPlan, StagePlan, plan_from_facts
from modelforge.graph.split_tiers import Link, TierProblem
from modelforge.graph.split_write import describe, stage_models
from modelforge.recipe import SplitSection, TargetSection
from modelforge.samples import is_batched
from modelforge.target import Registry, Target

_ANY_OUTPUT = {"metric": "sqnr", "max_drop": None, "min_reference": None, "min_agreement": 0.0}
"""What a stage is judged by that does not give the model's outputs: a tensor inside has no label, and no decision."""


@dataclass(frozen=True)
class Split:
    """How the model is split, and the stages.

    Attributes:
        joined: holds the chain of FP32 stages against the whole model, on the evaluation data.
        costs: of a partition, what each stage on the NPU costs to hand over to, and saves.
    """

    plan: SplitPlan
    transport: str
    stages: tuple[Stage, ...]
    joined: Step
    planned: Planned
    problem: TierProblem | None = None
    costs: tuple[Mapping[str, Any], ...] = ()

    def facts(self) -> dict[str, Any]:
        """The stage manifest, as the bundle carries it."""
        costs = {"costs": [dict(each) for each in self.costs]} if self.costs else {}
        return {**describe(self.plan), "transport": self.transport, **costs}

    def choices(self) -> dict[str, Any]:
        """What the split was chosen among, for the report."""
        if self.problem is not None:
            return {"tiers": tier_choices(self.problem)}
        return {"candidates": candidates(self.planned)}


def split(intake: Intake, section: SplitSection, whole: Stage, registry: Registry) -> Split:
    """Plan the stages of a recipe's [split].

    Raises:
        InputError: of any branch: it cannot be split so, with the reason.
    """
    recipe = intake.recipe
    sizes = {symbol: dim.usual for symbol, dim in recipe.dims.items()}
    wish = _wish(intake, section)
    planned = plan_stages(recipe.model, wish, registry, sizes=sizes, shapes=intake.inputs)
    plan = _named(planned.plan, section, recipe.where("split", "names"))
    if section.transport == "int8" and intake.calibration is None:
        raise RecipeError(
            "INT8 transport needs the ranges of the tensors that cross, and the recipe has no calibration data",
            where=recipe.where("split", "transport"),
            fix="add [calibration], or take fp16",
        )
    for tensor in (each for stage in plan.stages for each in stage.inputs):
        _check_crossing(intake, tensor)
    problem = None if wish.tiers is None else tier_problem(planned.graph, wish.tiers, registry)
    return _assembled(intake, whole, Planned(planned.graph, plan, planned.notes), section.transport, problem)


def partition(intake: Intake, section: TargetSection, target: Target, whole: Stage, registry: Registry) -> Split | None:
    """Share a target's model out between its NPU and the CPU beside it; None where the NPU takes all of it.

    A part of the NPU's that costs more to hand over to than it saves, by estimate, is left to the CPU.

    Raises:
        InputError: of any branch: nothing is left for the NPU, or a tensor cannot cross.
    """
    recipe = intake.recipe
    where = recipe.where("target", recipe.targets.index(section), "partition")
    host = host_of(target, registry, where)
    sizes = {symbol: dim.usual for symbol, dim in recipe.dims.items()}
    graph = read_layers(recipe.model, sizes, intake.inputs)
    runs, left = npu_support(intake, section, target, graph), frozenset[int]()
    names = (f"{target.tag}-npu", f"{target.tag}-cpu")
    while True:
        way = BySupport(_without(left, runs), names=names, least_share=LEAST_SHARE)
        plan = plan_split(graph, way, intake.inputs)
        costs = crossing_costs(plan, graph, target, host, section.precision[0])
        losing = {each["stage"] for each in costs if (each["seconds"]["saved"] or 0) < 0}
        if not losing or len(plan.stages) == 1:
            break
        left |= {node for stage in plan.stages if stage.name in losing for node in stage.nodes}
    if not any(is_npu(stage.name) for stage in plan.stages):
        raise UnsupportedError(
            f"no part of the model is worth handing to the NPU of {target.tag}: each that its compiler takes has less "
            f"than {LEAST_SHARE:.0%} of the arithmetic, or costs more to hand over than it saves",
            where=where,
            fix="take `partition` out and choose a CPU target",
        )
    if len(plan.stages) == 1:
        return None
    for tensor in (each for stage in plan.stages for each in stage.inputs):
        _check_crossing(intake, tensor)
    split = _assembled(intake, whole, Planned(graph, plan, ()), "fp32", None)
    return replace(split, costs=tuple(costs))


def _without(nodes: frozenset[int], supports: Callable[[Layer], bool]) -> Callable[[Layer], bool]:
    return lambda layer: layer.node not in nodes and supports(layer)


def _assembled(intake: Intake, whole: Stage, planned: Planned, transport: str, problem: TierProblem | None) -> Split:
    """The stages of a plan, and the steps that make and join them."""
    recipe, plan = intake.recipe, planned.plan
    asked = {"model": recipe.model.name, "plan": plan.facts()}
    cut = make_step("split", "split the model", asked, {"model": intake.model})
    maker = _Maker(intake, plan, cut)
    for stage, model in zip(plan.stages, stage_models(recipe.model, plan), strict=True):
        maker.add(stage, model)
    needs: dict[str, Step | Source] = {f"from-{name}": each.reference for name, each in maker.stages.items()}
    needs |= {"samples": intake.samples, "reference": whole.reference}
    outputs = {"outputs": [[name, source] for name, source in plan.outputs]}
    joined = make_step("joined", "hold the chain of stages against the whole model", outputs, needs)
    stages = tuple(
        replace(stage, onward=_onward(intake, plan, whole, stage, maker.stages)) for stage in maker.stages.values()
    )
    return Split(plan, transport, stages, joined, planned, problem)


def _onward(intake: Intake, plan: SplitPlan, whole: Stage, stage: Stage, stages: Mapping[str, Stage]) -> Onward | None:
    """What follows a stage; None where it gives all of the model's outputs itself."""
    if {source for _, source in plan.outputs} == {stage.name}:
        return None
    names = list(stages)
    place = names.index(stage.name)
    after = [
        (each.name, stages[each.name].prepare, {tensor.name: tensor.source for tensor in each.inputs})
        for each in plan.stages[place + 1 :]
    ]
    read = {source for _, _, tensors in after for source in tensors.values()} | {source for _, source in plan.outputs}
    before = {name: stages[name].reference for name in names[:place] if name in read}
    return Onward(
        tuple(after), before, tuple(plan.outputs), intake.samples, whole.reference, whole.metric, whole.metric_needs
    )


def chosen_stages(split: Split | None, names: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """The stages that a target serves: those that it names, else all.

    Raises:
        RecipeError: it names one that there is not.
    """
    known = ("main",) if split is None else tuple(stage.name for stage in split.stages)
    for name in names or ():
        if name not in known:
            raise RecipeError(f'there is no stage "{name}"; {nearest(name, known)}', where=where)
    return known if names is None else names


def _wish(intake: Intake, section: SplitSection) -> SplitWish:
    tiers = None
    if section.tiers:
        ends = zip(section.tiers, section.tiers[1:], section.links, strict=False)
        links = {(near, far): Link(link.latency_ms / 1e3, link.bandwidth) for near, far, link in ends}
        tiers = TierSetup(tuple(TierWish(tag, tag) for tag in section.tiers), links, section.transport)
    return SplitWish(
        at=tuple((cut,) if isinstance(cut, str) else cut for cut in section.at),
        stages=section.stages,
        balance=section.balance,
        time_on=intake.recipe.targets[0].tag,
        max_stage_bytes=section.max_stage_bytes,
        activations=True,
        tiers=tiers,
    )


def _named(plan: SplitPlan, section: SplitSection, where: str) -> SplitPlan:
    """The plan with the recipe's names for its stages."""
    if not section.names:
        return plan
    if len(section.names) != len(plan.stages):
        raise RecipeError(
            f"there are {len(plan.stages)} stages, and {len(section.names)} names", where=where, fix="name each stage"
        )
    names = dict(zip((stage.name for stage in plan.stages), section.names, strict=True)) | {INPUT: INPUT}
    facts = plan.facts()

    def renamed(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {**each, "source": names[each["source"]], "readers": [names[reader] for reader in each["readers"]]}
            for each in tensors
        ]

    stages = [
        {**each, "name": names[each["name"]], "inputs": renamed(each["inputs"]), "outputs": renamed(each["outputs"])}
        for each in facts["stages"]
    ]
    outputs = [(name, names[source]) for name, source in facts["outputs"]]
    return plan_from_facts({**facts, "stages": stages, "outputs": outputs})


def _check_crossing(intake: Intake, tensor: CutTensor) -> None:
    """A stage's input must have sizes that the recipe bounds, and samples must go along its first dimension."""
    where, fix = intake.recipe.where("split"), "cut at another tensor"
    unknown = [size for size in tensor.shape or () if isinstance(size, str) and size not in intake.recipe.dims]
    if tensor.shape is None or unknown:
        told = "an unknown rank" if tensor.shape is None else f"the size {unknown[0]!r}, which no input declares"
        raise RecipeError(f'the tensor "{tensor.name}" crosses from stage to stage with {told}', where=where, fix=fix)
    free = all(shape and isinstance(shape[0], str) for shape in intake.inputs.values())
    if free and not is_batched(tensor.shape):
        raise RecipeError(
            f'the tensor "{tensor.name}" {list(tensor.shape)} crosses from stage to stage, and its first dimension is '
            "not the batch",
            where=where,
            fix=fix,
        )


class _Maker:
    """Makes the stages in order, each fed by those before it."""

    def __init__(self, intake: Intake, plan: SplitPlan, cut: Step) -> None:
        self.intake, self.plan, self.cut = intake, plan, cut
        self.stages: dict[str, Stage] = {}
        self._traces: dict[str, Step] = {}
        """The outputs of each stage on the calibration data."""

    def add(self, stage: StagePlan, model: onnx.ModelProto) -> None:
        intake = self.intake
        inputs: Shapes = {tensor.name: tensor.shape or () for tensor in stage.inputs}
        facts = inspect_proto(model, shapes=inputs, where=f"{intake.recipe.model} ({stage.name})", cost=False)
        judged = {tensor.name for tensor in stage.outputs} == {name for name, _ in self.plan.outputs}
        references = {name: each.reference for name, each in self.stages.items()}
        samples = _feed(stage, intake.samples, references, "evaluation data", labels=judged)
        prepare, reference = front_steps(intake, stage.name, self.cut, stage.file, inputs, samples)
        rules = {**_ANY_OUTPUT, "min_sqnr_db": intake.accuracy.min_sqnr_db}
        metric = metric_of(intake) if judged else {"rules": rules, "k": intake.accuracy.k, "output": None}
        needs: dict[str, Source] = {"metric": intake.metric} if judged and intake.metric is not None else {}
        baseline = make_step(
            "baseline",
            f"{stage.name}: check the FP32 baseline",
            {"metric": metric},
            {"samples": samples, "reference": reference, **needs},
        )
        self.stages[stage.name] = Stage(
            stage.name, facts, inputs, samples, self._calibration(stage), metric, needs, prepare, reference, baseline
        )

    def _calibration(self, stage: StagePlan) -> Step | None:
        intake = self.intake
        if intake.calibration is None:
            return None
        calibration = _feed(stage, intake.calibration, self._traces, "calibration data", labels=False)
        self._traces[stage.name] = make_step(
            "reference",
            f"{stage.name}: run on the calibration data",
            {"model": stage.file, "batch": intake.batch},
            {"model": self.cut, "samples": calibration},
        )
        return calibration


def _feed(stage: StagePlan, data: Step | Source, outputs: Mapping[str, Step], what: str, *, labels: bool) -> Step:
    """The step that gathers a stage's inputs: the model's own, and what the stages before it gave."""
    sources = {tensor.name: tensor.source for tensor in stage.inputs}
    needs: dict[str, Step | Source] = {"samples": data}
    needs |= {f"from-{name}": outputs[name] for name in sorted(set(sources.values()) - {INPUT})}
    return make_step("feed", f"{stage.name}: gather the {what}", {"tensors": sources, "labels": labels}, needs)
