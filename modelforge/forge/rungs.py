"""The rungs of a variant's ladder, and the steps of each: lower, compile, verify, and what the reports say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from modelforge.compilers.protocol import Compiler, Tuner
from modelforge.errors import RecipeError
from modelforge.forge.choice import Choice
from modelforge.forge.intake import Intake, file_source
from modelforge.forge.stages import Stage, make_step
from modelforge.forge.step import Source, Step
from modelforge.recipe import TargetSection
from modelforge.target import Target

EMULATED_FLOPS = 20e9
"""How much arithmetic an emulated or simulated run may cost: qemu runs a few hundred MFLOP/s of unscheduled code, so
that this is a minute or two. Bounds the samples by the model's own cost, so that the count is the same anywhere."""
SIMULATED_FLOPS = 400e9
"""The same for a vendor's PC simulator: Rockchip's does 20 GFLOP/s (YOLOv8n at 320 x 320: 0.1 s an image)."""
EMULATED_AT_LEAST = 2


@dataclass(frozen=True)
class RungPlan:
    """One precision to try: lowered, compiled and judged by these steps.

    Attributes:
        compile: None where it is deferred.
        describe: writes what the reports say of a quantization, once the gate has passed; None without one.
        estimate: what a model of the device says of its latency; None where its profile knows no rate.
        tune: measures what the compile step then takes; None where the recipe asks for no tuning.
        untuned: what takes this one's place where tuning fails; None where the recipe requires it.
        race: times the artifact beside the next float rung's, where both run here; None where that cannot be.
    """

    precision: str
    lower: Step
    compile: Step | None
    verify: Step
    describe: Step | None
    evidence: str
    race: Step | None = None
    estimate: Step | None = None
    tune: Step | None = None
    untuned: RungPlan | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """In an order in which each comes after what it needs."""
        own = [self.lower, self.tune, self.compile, self.verify, self.describe, self.race, self.estimate]
        ordered = [
            each for step in own if step is not None for each in [*all_needs(step), step] if isinstance(each, Step)
        ]
        return tuple({step.key: step for step in ordered}.values())


def compile_params(intake: Intake, stage: Stage, section: TargetSection, compiler: Compiler) -> dict[str, Any]:
    """What a compile job needs beside the model, the target and the precision; JSON."""
    params: dict[str, Any] = {
        "inputs": stage_shapes(stage),
        "dims": {symbol: dim.facts() for symbol, dim in intake.recipe.dims.items()},
    }
    aids = section.aids(compiler.section)  # the compiler gets their paths, which differ from machine to machine
    given = section.sections.get(compiler.section or "", {})
    if options := {name: value for name, value in given.items() if name not in aids}:
        params["options"] = options
    if intake.recipe.preprocess:
        params["preprocess"] = {
            name: each.model_dump(mode="json") for name, each in sorted(intake.recipe.preprocess.items())
        }
    return params


def own_files(intake: Intake, section: TargetSection, compiler: Compiler) -> dict[str, Source]:
    """The user's own files that a target's options name, by option.

    Raises:
        RecipeError: there is no such file.
    """
    named = section.files(compiler.section)
    return _sources({option: _named_file(intake, section, compiler, option, name) for option, name in named.items()})


def aids(intake: Intake, section: TargetSection, compiler: Compiler) -> dict[str, Path]:
    """The files that a target's options name to help a compile along, by option.

    Raises:
        RecipeError: there is no such file.
    """
    named = section.aids(compiler.section)
    return {option: _named_file(intake, section, compiler, option, name) for option, name in named.items()}


def _sources(paths: dict[str, Path]) -> dict[str, Source]:
    return {f"own-{option}": file_source(option, path) for option, path in paths.items()}


def _named_file(intake: Intake, section: TargetSection, compiler: Compiler, option: str, name: str) -> Path:
    path = intake.recipe.folder / name
    if not path.is_file():
        index = intake.recipe.targets.index(section)
        where = intake.recipe.where("target", index, str(compiler.section), option)
        raise RecipeError(f"there is no file {name}", where=where, fix="give a path relative to the recipe")
    return path


def stage_shapes(stage: Stage) -> dict[str, list[int | str]]:
    """The shapes of a stage's inputs, as JSON."""
    return {name: list(shape) for name, shape in stage.inputs.items()}


class Rungs:
    """Makes the rungs of one stage."""

    def __init__(self, intake: Intake, stage: Stage, flops: float | None = None) -> None:
        """``flops`` of one run of the stage, where it is known to be only a part of the model."""
        self.intake = intake
        self.stage = stage
        self._part = flops

    def rung(self, section: TargetSection, target: Target, choice: Choice, precision: str) -> RungPlan:
        """The steps of one rung; where the recipe asks for tuning, with what stands in where that fails."""
        plain = self._rung(section, target, choice, precision)
        tune = self._tune(section, target, choice, plain)
        if tune is None or section.tune is None:
            return plain
        tuned = self._rung(section, target, choice, precision, tune)
        return replace(tuned, tune=tune, untuned=None if section.tune.required else plain)

    def _tune(self, section: TargetSection, target: Target, choice: Choice, plain: RungPlan) -> Step | None:
        compiler = choice.compiler
        options = section.sections.get(compiler.section or "", {})
        if plain.compile is None or compiler.section != "tune" or not options or not isinstance(compiler, Tuner):
            return None
        named = section.databases(compiler.section)
        databases = _sources(
            {option: _named_file(self.intake, section, compiler, option, name) for option, name in named.items()}
        )
        told = {name: value for name, value in options.items() if name in ("trials", "device")}
        params = {**plain.compile.params, "options": told, "on": compiler.tuned_on(options)}
        needs: dict[str, Step | Source] = {"lowered": plain.lower, **databases}
        title = self.stage.titled(f"tune {target.tag} {plain.precision}")
        return make_step("tune", title, params, needs, plain.compile.tools)

    def _rung(
        self, section: TargetSection, target: Target, choice: Choice, precision: str, tune: Step | None = None
    ) -> RungPlan:
        """The steps of one rung; without a toolchain (deferred) the lowered model is judged and nothing compiled."""
        compiler, found = choice.compiler, choice.toolchain
        profile = {
            "compiler": compiler.name,
            "tag": target.tag,
            "target": target.path.read_text(encoding="utf-8"),
            "precision": precision,
        }
        own = own_files(self.intake, section, compiler)
        calibration: dict[str, Step | Source] = {}
        if precision == "int8" and section.quantizes(compiler.section) and self.stage.calibration is not None:
            calibration = {"calibration": self.stage.calibration}
        lowered = "fp32" if own or calibration else precision  # the user's own file is lowered already
        lower = self._lower(lowered, compiler.dialect(target), _needs_reduced_range(target))
        needs: dict[str, Step | Source] = {
            "lowered": lower,
            "samples": self.stage.samples,
            "reference": self.stage.reference,
            "baseline": self.stage.baseline,
            **self.stage.metric_needs,
        }
        build = None
        if found is not None:
            job = compile_params(self.intake, self.stage, section, compiler)
            if section.tune is not None and compiler.section == "tune":
                job.pop("options", None)  # what tuning found is a need of the step; untuned, it is any other build's
            params = {**profile, "code": compiler.code_version, **job}
            title = self.stage.titled(f"compile {target.tag} {precision}")
            helped = _sources(aids(self.intake, section, compiler))
            tuning: dict[str, Step | Source] = {} if tune is None else {"own-tuning": tune}
            build = make_step(
                "compile", title, params, {"lowered": lower, **own, **helped, **tuning, **calibration}, found.versions
            )
            needs |= {"compiled": build, **calibration}
        evidence = (compiler.runner(target) if build else None) or "reference"
        judged = {
            **profile,
            "evidence": evidence,
            "batch": self.intake.batch,
            "samples": self._judged(evidence),
            "metric": dict(self.stage.metric),
        }
        if own:
            judged["own"] = True
        if evidence == "device" and self.intake.recipe.serving.latency_budget_ms is not None:
            judged["timed"] = list(self._batches)
        verify = make_step("verify", self.stage.titled(f"verify {target.tag} {precision}"), judged, needs)
        describe = None
        if "ranges" in lower.needs:
            told = {name: need for name, need in lower.needs.items() if name in ("ranges", "ranking", "search")}
            params = {"dialect": compiler.dialect(target), "metric": self.stage.metric["rules"]["metric"]}
            describe = make_step(
                "describe", self.stage.titled(f"describe {precision}"), params, {"lowered": lower, **told}
            )
        timing = {**profile, "batches": list(self._batches), "inputs": stage_shapes(self.stage)}
        estimate = make_step(
            "estimate",
            self.stage.titled(f"estimate {target.tag} {precision}"),
            timing,
            {"prepared": self.stage.prepare},
        )
        return RungPlan(precision, lower, build, verify, describe, evidence, None, estimate)

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
        title = f"{rung.verify.title.replace('verify', 'time', 1)} beside {rival.precision}"
        needs: dict[str, Step | Source] = {
            "compiled": rung.compile,
            "rival": rival.compile,
            "samples": self.stage.samples,
        }
        race = make_step("race", title, params, needs)
        untuned = None if rung.untuned is None else self._raced(rung.untuned, after)
        return replace(rung, race=race, untuned=untuned)

    @cached_property
    def ranges(self) -> Step:
        """Measures the ranges of all activations, once for all precisions, dialects and targets.

        FP16 alone asks them only what would overflow: without calibration data, the evaluation data tells it.
        """
        data = self.stage.calibration or self.stage.samples
        needs: dict[str, Step | Source] = {"prepared": self.stage.prepare, "calibration": data}
        return make_step("calibrate", self.stage.titled("calibrate"), {"data_digest": _digest(data)}, needs)

    def _lower(self, precision: str, dialect: str, reduce_range: bool) -> Step:
        """The step that writes the lowered model: shared by all targets of one precision and dialect."""
        needs: dict[str, Step | Source] = {"prepared": self.stage.prepare}
        titled = self.stage.titled
        if precision == "fp32":
            return make_step("lower", titled(f"lower to {precision}"), {"precision": precision}, needs)
        ranges = self.ranges
        calibration = {"calibration": ranges.needs["calibration"]}
        if precision == "fp16":
            # Nodes to keep in FP32 are never found on what judges them: without calibration data, none are looked for.
            needs |= {"half_ranges": ranges} | (calibration if self.stage.calibration is not None else {})
            floor = self.stage.metric["rules"].get("min_sqnr_db")
            asked = {} if floor is None else {"floor_db": floor}
            return make_step("lower", titled("lower to fp16"), {"precision": precision, **asked}, needs)
        how = {"dialect": dialect, "reduce_range": reduce_range, "method": self.intake.calibration_facts["method"]}
        params = {"precision": precision, **how}
        needs |= {"ranges": ranges}
        ranking = make_step("rank", titled(f"rank layers ({dialect})"), how, {**needs, **calibration})
        needs |= {"ranking": ranking}
        if precision == "int8":
            needs |= calibration
        if precision == "mixed":
            needs["search"] = self._search(params, needs, titled(f"search layers to keep ({dialect})"))
        return make_step("lower", titled(f"lower to {precision} ({dialect})"), params, needs)

    def _search(self, params: dict[str, Any], needs: dict[str, Step | Source], title: str) -> Step:
        """Finds the layers that stay in float; of a stage, by what becomes of the model's outputs."""
        stage, onward = self.stage, self.stage.onward
        asked = {**params, "batch": self.intake.batch, "metric": dict(stage.metric)}
        needs = {**needs, "samples": stage.samples, "reference": stage.reference, **stage.metric_needs}
        if onward is not None:
            asked["onward"] = {**onward.params(), "own": stage.name}
            needs |= onward.needs()
        return make_step("search", title, asked, needs)

    def _judged(self, evidence: str) -> int:
        """How many samples are judged: all, or as many as an emulator can run in a minute or two.

        The recipe may ask for more where its metric judges; a stage inside needs no more for its SQNR.
        """
        count = self.intake.count
        if evidence not in ("emulator", "simulator"):
            return count
        least = EMULATED_AT_LEAST if self.stage.onward else max(EMULATED_AT_LEAST, self.intake.emulated)
        flops = self._flops if self._part is None else self._part / self.intake.batch
        budget = SIMULATED_FLOPS if evidence == "simulator" else EMULATED_FLOPS
        return count if flops is None else min(count, max(least, int(budget / max(flops, 1))))

    @cached_property
    def _batches(self) -> tuple[int, ...]:
        """The batch sizes that matter: those worth code of their own; the one size where it is fixed."""
        firsts = {shape[0] for shape in self.stage.inputs.values() if shape}
        symbols = sorted(first for first in firsts if isinstance(first, str))
        if symbols:
            return self.intake.recipe.dims[symbols[0]].gears
        return (max((first for first in firsts if isinstance(first, int)), default=1),)

    @cached_property
    def _flops(self) -> float | None:
        """Arithmetic of one sample through the whole model; None where a shape is unknown."""
        from modelforge.graph.inspect import inspect_model

        recipe = self.intake.recipe
        bound = {symbol: dim.usual for symbol, dim in recipe.dims.items()}
        flops = inspect_model(recipe.model, bound=bound, shapes=self.intake.inputs).flops
        return None if flops is None else flops / self.intake.batch


def _digest(data: Step | Source) -> str:
    """What a range table says that it was measured on: the digest of the arrays, or the step that makes them."""
    return data.key if isinstance(data, Step) else data.digests["samples.npz"].removeprefix("arrays-")


def all_needs(step: Step) -> list[Step | Source]:
    """Everything below a step, deepest first."""
    found: list[Step | Source] = []
    for need in step.needs.values():
        if isinstance(need, Step):
            found += all_needs(need)
        found.append(need)
    return found


def _needs_reduced_range(target: Target) -> bool:
    """Whether 8-bit products overflow this CPU's 16-bit sums: x86 without VNNI (facts of ONNX Runtime's quantizer)."""
    arch = target.arch
    return arch.kind == "cpu" and arch.isa == "x86-64" and not any("vnni" in flag for flag in arch.cpuinfo)
