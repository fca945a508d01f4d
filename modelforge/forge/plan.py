"""The pure plan: reads, decides, refuses, and writes nothing. Everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelforge.errors import RecipeError, ToolchainMissing, UnsupportedError, nearest
from modelforge.forge.choice import Choice, choose
from modelforge.forge.intake import Intake, require_build_extra, take_in
from modelforge.forge.partition import CPU_COMPILER, host_of, is_npu
from modelforge.forge.rungs import RungPlan, Rungs, aids, all_needs, compile_params
from modelforge.forge.split_stages import Split, chosen_stages, partition, split
from modelforge.forge.stages import Stage, make_step, whole
from modelforge.forge.step import Step
from modelforge.recipe import Recipe, TargetSection, load_recipe
from modelforge.target import Registry, Target


@dataclass(frozen=True)
class VariantPlan:
    """What will be done for one target.

    Attributes:
        outcome: ``compiled`` is wanted, or it is known already that it will be ``deferred`` or ``skipped``.
        ladder: the recipe's precisions, best first.
        refused: rungs of the ladder that cannot be had, as ladder entries of the variant record.
        reason: why it is deferred or skipped.
        hint: how its variant could be checked with better evidence than here.
        prefer_speed: an INT8 rung that is slower than the next one is not chosen.
        job: parameters of the compile job, kept in the bundle where it is deferred.
    """

    target: Target
    stage: str
    required: bool
    outcome: Literal["compiled", "deferred", "skipped"]
    ladder: tuple[str, ...]
    compiler: str | None = None
    toolchain: Mapping[str, str] | None = None
    rungs: tuple[RungPlan, ...] = ()
    refused: tuple[Mapping[str, Any], ...] = ()
    reason: str = ""
    hint: str = ""
    prefer_speed: bool = False
    job: Mapping[str, Any] = field(default_factory=dict)
    aids: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class ChainPlan:
    """One variant of each stage of a split, in order; ``members`` are indices among the plan's variants."""

    split: Split
    members: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a build will do; each stage's steps serve all its variants.

    Attributes:
        whole: the model as one stage; its baseline comes before all else.
        split: what the recipe's [split] makes of it; None where it is not split.
        placement: holds the model against every target profile, by estimate.
        partitions: by target, how its NPU and the CPU beside it share the model.
        chains: of a split or partition, variants of all stages in order: what runs one after the other.
    """

    intake: Intake
    whole: Stage
    split: Split | None
    variants: tuple[VariantPlan, ...]
    placement: Step
    partitions: Mapping[str, Split] = field(default_factory=dict)
    chains: tuple[ChainPlan, ...] = ()

    @property
    def splits(self) -> tuple[Split, ...]:
        return (*([self.split] if self.split else []), *self.partitions.values())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages that a variant is made of."""
        used = {variant.stage for variant in self.variants}
        own = (self.whole, *(stage for split in self.splits for stage in split.stages))
        return tuple(stage for stage in own if stage.name in used)

    @property
    def first(self) -> tuple[Step, ...]:
        """What must succeed before any variant is begun."""
        steps = [self.whole.baseline, *(split.joined for split in self.splits)]
        return (*steps, *(each for stage in self.stages for each in (stage.prepare, stage.baseline)))

    @property
    def recipe(self) -> Recipe:
        return self.intake.recipe

    def title(self, chain: ChainPlan) -> str:
        """A chain's variants in order, for people."""
        members = [self.variants[place] for place in chain.members]
        return " -> ".join(f"{each.stage} on {each.target.tag}" for each in members)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def steps(self) -> list[Step]:
        """Every step once, in an order in which each comes after what it needs."""
        ordered: list[Step] = []
        for step in self.first:
            ordered += [each for each in [*all_needs(step), step] if isinstance(each, Step)]
        for variant in self.variants:
            for rung in variant.rungs:
                ordered += rung.steps
        ordered.append(self.placement)
        return list({step.key: step for step in ordered}.values())

    def certain(self) -> frozenset[str]:
        """Keys of the steps that run whatever the gates say: those of lower rungs run only if a higher one fails.

        All of a deferred variant's do: on the device, a lower rung may be needed.
        """
        steps = [*self.first, self.placement]
        for variant in self.variants:
            for rung in variant.rungs if variant.outcome == "deferred" else variant.rungs[:1]:
                steps += rung.steps
        below = [need for step in steps for need in all_needs(step) if isinstance(need, Step)]
        return frozenset(step.key for step in [*steps, *below])


def make_plan(path: Path, *, tags: Sequence[str] = (), allow_deferred: bool = False) -> Plan:
    """Plan a build.

    Args:
        path: the recipe's folder or file.
        tags: only these targets of the recipe; all if empty.
        allow_deferred: a required target whose toolchain is missing is deferred instead of refused.

    Raises:
        InputError: of any branch: recipe, target, model, data, unsupported.
        ToolchainMissing: for a required target, or where this is the deployer's install.
    """
    recipe = load_recipe(path)
    sections = _sections(recipe, tags)
    registry = Registry([recipe.folder / "targets"])
    places = [recipe.where("target", recipe.targets.index(section), "tag") for section in sections]
    targets = [registry.get(section.tag, where=where) for section, where in zip(sections, places, strict=True)]
    for index, tag in enumerate(recipe.serving.fallback):
        registry.get(tag, where=recipe.where("serving", "fallback", index))
    require_build_extra()
    intake = take_in(recipe)
    one = whole(intake)
    parts = None if recipe.split is None else split(intake, recipe.split, one, registry)
    rungs = {stage.name: Rungs(intake, stage) for stage in (parts.stages if parts else (one,))}
    variants: list[VariantPlan] = []
    partitions: dict[str, Split] = {}
    for section, target, where in zip(sections, targets, places, strict=True):
        shared = partition(intake, section, target, one, registry) if section.partition else None
        if shared is not None:
            partitions[target.tag] = shared
            variants += _shared(intake, shared, section, target, registry, where, allow_deferred)
            continue
        for stage in chosen_stages(parts, section.stages, where.removesuffix("tag") + "stages"):
            variants.append(_variant(rungs[stage], section, target, where, allow_deferred))
    chains = [] if parts is None else _chains(parts, variants, recipe.where("target"))
    chains += [chain for shared in partitions.values() for chain in _chains(shared, variants, recipe.where("target"))]
    return Plan(intake, one, parts, tuple(variants), _placement(intake, registry), partitions, tuple(chains))


def _placement(intake: Intake, registry: Registry) -> Step:
    params = {
        "model": intake.recipe.model.name,
        "inputs": {name: list(shape) for name, shape in intake.inputs.items()},
        "targets": {target.tag: target.path.read_text(encoding="utf-8") for target in registry},
        "budget_ms": intake.recipe.serving.latency_budget_ms,
    }
    return make_step("placement", "estimate where the model can run", params, {"model": intake.model})


def _shared(
    intake: Intake, shared: Split, section: TargetSection, target: Target, registry: Registry, where: str,
    allow_deferred: bool,
) -> list[VariantPlan]:  # fmt: skip
    """The variants of a partition: the NPU's by its own compiler, the others for the CPU beside it, in FP32."""
    host = host_of(target, registry, where)
    beside = section.for_compiler(CPU_COMPILER, "fp32")
    rungs = [Rungs(intake, stage, part.flops) for stage, part in zip(shared.stages, shared.plan.stages, strict=True)]
    return [
        _variant(each, section, target, where, allow_deferred)
        if is_npu(each.stage.name)
        else _variant(each, beside, host, where, allow_deferred)
        for each in rungs
    ]


def _chains(parts: Split, variants: Sequence[VariantPlan], where: str) -> list[ChainPlan]:
    """Chains that hold every variant of every stage at least once: the first targets of all stages, the second ...

    Raises:
        RecipeError: a stage has no target.
    """
    by_stage = [[place for place, each in enumerate(variants) if each.stage == stage.name] for stage in parts.stages]
    for stage, places in zip(parts.stages, by_stage, strict=True):
        if not places:
            raise RecipeError(
                f'no target serves the stage "{stage.name}"', where=where, fix=f'give one `stages = ["{stage.name}"]`'
            )
    count = max(map(len, by_stage))
    return [ChainPlan(parts, tuple(places[min(each, len(places) - 1)] for places in by_stage)) for each in range(count)]


def _sections(recipe: Recipe, tags: Sequence[str]) -> list[TargetSection]:
    known = {section.tag: section for section in recipe.targets}
    for tag in tags:
        if tag not in known:
            raise RecipeError(
                f'the recipe has no target "{tag}"; {nearest(tag, known)}', where="--target", fix="add a [[target]]"
            )
    return [section for section in recipe.targets if not tags or section.tag in tags]


def _variant(rungs: Rungs, section: TargetSection, target: Target, where: str, allow_deferred: bool) -> VariantPlan:
    def skipped(reason: str, refused: tuple[Mapping[str, Any], ...] = ()) -> VariantPlan:
        return VariantPlan(
            target, rungs.stage.name, section.required, "skipped", section.precision, refused=refused, reason=reason
        )

    try:
        choice = choose(rungs.intake, rungs.stage, section, target, where)
    except (ToolchainMissing, UnsupportedError) as error:
        if section.required:
            raise
        return skipped(error.what)
    if choice.missing is not None and not allow_deferred:
        what = f'target "{target.tag}": {choice.missing.reason}'
        if section.required:
            raise ToolchainMissing(what, where=where, fix=choice.missing.fix)
        return skipped(what, choice.refused)
    return _wanted(rungs, section, target, choice)


def _wanted(rungs: Rungs, section: TargetSection, target: Target, choice: Choice) -> VariantPlan:
    compiler, found = choice.compiler, choice.toolchain
    return VariantPlan(
        target=target,
        stage=rungs.stage.name,
        required=section.required,
        outcome="compiled" if found else "deferred",
        ladder=section.precision,
        compiler=compiler.name,
        toolchain=found.versions if found else None,
        rungs=rungs.raced([rungs.rung(section, target, choice, precision) for precision in choice.accepted]),
        refused=choice.refused,
        reason="" if found else f"{compiler.title} was not installed where this was built",
        hint=compiler.runner_hint(target) if found else "",
        prefer_speed=section.prefer == "speed",
        job=compile_params(rungs.intake, rungs.stage, section, compiler),
        aids=aids(rungs.intake, section, compiler),
    )
