"""The pure plan: reads, decides, refuses, and writes nothing. Everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from modelforge.compilers.protocol import Compiler, Toolchain
from modelforge.errors import RecipeError, ToolchainMissing, UnsupportedError, nearest
from modelforge.forge.choice import Choice, choose
from modelforge.forge.intake import GRAPH_TOOLS, Intake, package_version, require_build_extra, take_in
from modelforge.forge.step import Source, Step
from modelforge.recipe import Recipe, TargetSection, load_recipe
from modelforge.target import Registry, Target

TIMEOUT = 3600.0
"""Seconds that any one child process may take."""

EMULATED_FLOPS = 20e9
"""How much arithmetic an emulated or simulated run may cost: qemu runs a few hundred MFLOP/s of unscheduled code, so
that this is a minute or two. Bounds the samples by the model's own cost, so that the count is the same anywhere."""
EMULATED_AT_LEAST = 2


@dataclass(frozen=True)
class RungPlan:
    """One precision to try: lowered, compiled and judged by these steps.

    Attributes:
        compile: None where it is deferred.
        describe: writes what the reports say of a quantization, once the gate has passed; None without one.
        race: times the artifact beside the next float rung's, where both run here; None where that cannot be.
    """

    precision: str
    lower: Step
    compile: Step | None
    verify: Step
    describe: Step | None
    evidence: str
    race: Step | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """In an order in which each comes after what it needs."""
        own = [step for step in (self.lower, self.compile, self.verify, self.describe, self.race) if step is not None]
        ordered = [each for step in own for each in [*_all_needs(step), step] if isinstance(each, Step)]
        return tuple({step.key: step for step in ordered}.values())


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


@dataclass(frozen=True)
class Plan:
    """Everything that a build will do; ``prepare``, ``reference`` and ``baseline`` serve all variants."""

    intake: Intake
    prepare: Step
    reference: Step
    baseline: Step
    variants: tuple[VariantPlan, ...]

    @property
    def recipe(self) -> Recipe:
        return self.intake.recipe

    def steps(self) -> list[Step]:
        """Every step once, in an order in which each comes after what it needs."""
        ordered = [self.prepare, self.reference, self.baseline]
        for variant in self.variants:
            for rung in variant.rungs:
                ordered += rung.steps
        return list({step.key: step for step in ordered}.values())

    def certain(self) -> frozenset[str]:
        """Keys of the steps that run whatever the gates say: those of lower rungs run only if a higher one fails."""
        steps = [self.prepare, self.baseline]
        steps += [step for variant in self.variants if variant.rungs for step in variant.rungs[0].steps]
        below = [need for step in steps for need in _all_needs(step) if isinstance(need, Step)]
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
    steps = _Steps(intake)
    variants = tuple(
        _variant(steps, section, target, where, allow_deferred)
        for section, target, where in zip(sections, targets, places, strict=True)
    )
    return Plan(intake, steps.prepare, steps.reference, steps.baseline, variants)


def _sections(recipe: Recipe, tags: Sequence[str]) -> list[TargetSection]:
    known = {section.tag: section for section in recipe.targets}
    for tag in tags:
        if tag not in known:
            raise RecipeError(
                f'the recipe has no target "{tag}"; {nearest(tag, known)}', where="--target", fix="add a [[target]]"
            )
    return [section for section in recipe.targets if not tags or section.tag in tags]


def _variant(steps: _Steps, section: TargetSection, target: Target, where: str, allow_deferred: bool) -> VariantPlan:
    def skipped(reason: str, refused: tuple[Mapping[str, Any], ...] = ()) -> VariantPlan:
        return VariantPlan(
            target, "main", section.required, "skipped", section.precision, refused=refused, reason=reason
        )

    try:
        choice = choose(steps.intake, section, target, where)
    except (ToolchainMissing, UnsupportedError) as error:
        if section.required:
            raise
        return skipped(error.what)
    if choice.missing is not None and not allow_deferred:
        what = f'target "{target.tag}": {choice.missing.reason}'
        if section.required:
            raise ToolchainMissing(what, where=where, fix=choice.missing.fix)
        return skipped(what, choice.refused)
    return _wanted(steps, section, target, choice)


def _wanted(steps: _Steps, section: TargetSection, target: Target, choice: Choice) -> VariantPlan:
    compiler, found = choice.compiler, choice.toolchain
    hint = compiler.runner_hint(target) if found else ""
    return VariantPlan(
        target=target,
        stage="main",
        required=section.required,
        outcome="compiled" if found else "deferred",
        ladder=section.precision,
        compiler=compiler.name,
        toolchain=found.versions if found else None,
        rungs=steps.raced([steps.rung(target, compiler, found, precision) for precision in choice.accepted]),
        refused=choice.refused,
        reason="" if found else f"{compiler.title} was not installed where this was built",
        hint=hint,
        prefer_speed=section.prefer == "speed",
    )


class _Steps:
    """Makes the steps: those that serve all variants, and those of each rung."""

    def __init__(self, intake: Intake) -> None:
        accuracy = intake.accuracy
        self.intake = intake
        self._shapes = {name: list(shape) for name, shape in intake.inputs.items()}
        self._dims = {symbol: dim.facts() for symbol, dim in intake.recipe.dims.items()}
        self._tools = {package: package_version(package) for package in GRAPH_TOOLS}
        rules = accuracy.model_dump(include={"metric", "max_drop", "min_reference", "min_agreement", "min_sqnr_db"})
        self._metric = {"rules": rules, "k": accuracy.k, "output": accuracy.output}
        self._metric_need: dict[str, Source] = {} if intake.metric is None else {"metric": intake.metric}
        model = {"model": intake.recipe.model.name}
        data: dict[str, Step | Source] = {"samples": intake.samples}
        sizes = {symbol: dim.usual for symbol, dim in intake.recipe.dims.items()}
        self.prepare = self._step(
            "prepare", "prepare the model", {**model, "inputs": self._shapes, "sizes": sizes}, {"model": intake.model}
        )
        self.reference = self._step(
            "reference", "run the FP32 reference", {**model, "batch": intake.batch}, {"model": intake.model, **data}
        )
        self.baseline = self._step(
            "baseline",
            "check the FP32 baseline",
            {"metric": self._metric},
            {**data, "reference": self.reference, **self._metric_need},
        )

    def rung(self, target: Target, compiler: Compiler, found: Toolchain | None, precision: str) -> RungPlan:
        """The steps of one rung; without a toolchain (deferred) the lowered model is judged and nothing compiled."""
        profile = {
            "compiler": compiler.name,
            "tag": target.tag,
            "target": target.path.read_text(encoding="utf-8"),
            "precision": precision,
        }
        lower = self._lower(precision, compiler.dialect(target), _needs_reduced_range(target))
        needs: dict[str, Step | Source] = {
            "lowered": lower,
            "samples": self.intake.samples,
            "reference": self.reference,
            "baseline": self.baseline,
            **self._metric_need,
        }
        build = None
        if found is not None:
            params = {**profile, "code": compiler.code_version, "inputs": self._shapes, "dims": self._dims}
            title = f"compile {target.tag} {precision}"
            build = self._step("compile", title, params, {"lowered": lower}, found.versions)
            needs["compiled"] = build
        evidence = (compiler.runner(target) if build else None) or "reference"
        judged = {
            **profile,
            "evidence": evidence,
            "batch": self.intake.batch,
            "samples": self._judged(evidence),
            "metric": self._metric,
        }
        verify = self._step("verify", f"verify {target.tag} {precision}", judged, needs)
        describe = None
        if "ranges" in lower.needs:
            told = {name: need for name, need in lower.needs.items() if name in ("ranges", "ranking", "search")}
            params = {"dialect": compiler.dialect(target), "metric": self.intake.accuracy.metric}
            describe = self._step("describe", f"describe {precision}", params, {"lowered": lower, **told})
        return RungPlan(precision, lower, build, verify, describe, evidence)

    def raced(self, rungs: Sequence[RungPlan]) -> tuple[RungPlan, ...]:
        """Give each INT8 rung that runs here a race against the first float rung after it."""
        return tuple(self._raced(rung, rungs[place + 1 :]) for place, rung in enumerate(rungs))

    def _raced(self, rung: RungPlan, after: Sequence[RungPlan]) -> RungPlan:
        rival = next((each for each in after if each.precision in ("fp16", "fp32")), None)
        if rung.precision not in ("int8", "mixed") or rung.evidence != "device" or rival is None:
            return rung
        if rung.compile is None or rival.compile is None:
            return rung
        params = {name: rung.verify.params[name] for name in ("compiler", "tag", "target", "batch")}
        params |= {"precision": rung.precision, "rival": rival.precision}
        title = f"time {rung.verify.title.removeprefix('verify ')} beside {rival.precision}"
        needs: dict[str, Step | Source] = {
            "compiled": rung.compile,
            "rival": rival.compile,
            "samples": self.intake.samples,
        }
        return replace(rung, race=self._step("race", title, params, needs))

    def _lower(self, precision: str, dialect: str, reduce_range: bool) -> Step:
        """The step that writes the lowered model: shared by all targets of one precision and dialect."""
        needs: dict[str, Step | Source] = {"prepared": self.prepare}
        if precision == "fp32":
            return self._step("lower", f"lower to {precision}", {"precision": precision}, needs)
        # FP16 alone asks the ranges only what would overflow: without calibration data, the evaluation data tells it.
        data = self.intake.calibration or self.intake.samples
        calibration = {"calibration": data}
        digest = data.digests["samples.npz"].removeprefix("arrays-")
        ranges = self._step("calibrate", "calibrate", {"data_digest": digest}, {**needs, **calibration})
        if precision == "fp16":
            return self._step("lower", "lower to fp16", {"precision": precision}, {**needs, "half_ranges": ranges})
        how = {"dialect": dialect, "reduce_range": reduce_range, "method": self.intake.calibration_facts["method"]}
        params = {"precision": precision, **how}
        needs |= {"ranges": ranges}
        ranking = self._step("rank", f"rank layers ({dialect})", how, {**needs, **calibration})
        needs |= {"ranking": ranking}
        if precision == "int8":
            needs |= calibration
        if precision == "mixed":
            needs["search"] = self._step(
                "search",
                f"search layers to keep ({dialect})",
                {**params, "batch": self.intake.batch, "metric": self._metric},
                {**needs, "samples": self.intake.samples, "reference": self.reference, **self._metric_need},
            )
        return self._step("lower", f"lower to {precision} ({dialect})", params, needs)

    def _judged(self, evidence: str) -> int:
        """How many samples are judged: all, or as many as an emulator can run in a minute or two."""
        count = self.intake.count
        if evidence not in ("emulator", "simulator"):
            return count
        flops = self._flops()
        return count if flops is None else min(count, max(EMULATED_AT_LEAST, int(EMULATED_FLOPS / max(flops, 1))))

    def _flops(self) -> float | None:
        """Arithmetic of one sample; None where a shape is unknown."""
        from modelforge.graph.inspect import inspect_model

        recipe = self.intake.recipe
        bound = {symbol: dim.usual for symbol, dim in recipe.dims.items()}
        flops = inspect_model(recipe.model, bound=bound, shapes=self.intake.inputs).flops
        return None if flops is None else flops / self.intake.batch

    def _step(
        self,
        name: str,
        title: str,
        params: Mapping[str, Any],
        needs: Mapping[str, Step | Source],
        tools: Mapping[str, str] | None = None,
    ) -> Step:
        from modelforge.forge.steps import CODE_VERSIONS

        return Step(
            name=name,
            title=title,
            function=f"modelforge.forge.steps:{name}",
            code_version=CODE_VERSIONS[name],
            params={**params, "timeout": TIMEOUT},
            tools=self._tools if tools is None else tools,
            needs=needs,
        )


def _all_needs(step: Step) -> list[Step | Source]:
    """Everything below a step, deepest first."""
    found: list[Step | Source] = []
    for need in step.needs.values():
        if isinstance(need, Step):
            found += _all_needs(need)
        found.append(need)
    return found


def _needs_reduced_range(target: Target) -> bool:
    """Whether 8-bit products overflow this CPU's 16-bit sums: x86 without VNNI (facts of ONNX Runtime's quantizer)."""
    arch = target.arch
    return arch.kind == "cpu" and arch.isa == "x86-64" and not any("vnni" in flag for flag in arch.cpuinfo)
