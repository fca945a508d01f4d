"""Which compiler serves a target, and which rungs of its ladder it accepts. Reads nothing but what `probe` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelforge.compilers import compiler_names, get_compiler
from modelforge.compilers.protocol import ChecksRecipe, Compiler, Missing, Refusal, Toolchain, Wanted
from modelforge.errors import ToolchainMissing, UnsupportedError, nearest
from modelforge.forge.intake import Intake
from modelforge.forge.stages import Stage
from modelforge.options import NO_OPTIONS
from modelforge.recipe import TargetSection
from modelforge.target import Target


@dataclass(frozen=True)
class Choice:
    """A compiler for a target.

    Attributes:
        toolchain: what it found installed; None where it is missing, and ``missing`` says how to get it.
        accepted: precisions, best first; never empty.
        refused: ladder entries of the variant record, with the reason.
    """

    compiler: Compiler
    toolchain: Toolchain | None
    missing: Missing | None
    accepted: tuple[str, ...]
    refused: tuple[Mapping[str, Any], ...]


def choose(intake: Intake, stage: Stage, section: TargetSection, target: Target, where: str) -> Choice:
    """The first compiler, in the profile's order, that is here and can have the model at some rung of the ladder.

    One that is not installed is taken only if no other serves.

    Raises:
        ToolchainMissing: none of the profile's compilers is built into this version.
        UnsupportedError: those that are refuse the model at every rung.
    """
    built = _built(section, target, where)
    _check_sections(section, target, built, where)
    absent: Choice | None = None
    lacking: list[tuple[Compiler, Missing]] = []
    reasons: list[str] = []
    fixes: list[str] = []
    for name in built:
        compiler = get_compiler(name)
        accepted: list[str] = []
        refused: list[dict[str, Any]] = []
        for precision in section.precision:
            refusals = _refusals(intake, stage, section, target, compiler, precision)
            if not refusals:
                accepted.append(precision)
                continue
            refused.append({"precision": precision, "gate": "none", "reason": refusals[0].what})
            reasons.append(f"{compiler.title}, {precision}: {refusals[0].what}")
            fixes.append(refusals[0].fix)
        if accepted:
            found = compiler.probe(target)
            if isinstance(found, Toolchain):
                return Choice(compiler, found, None, tuple(accepted), tuple(refused))
            # Nothing else can run or judge the user's own file, or what the compiler would quantize.
            if section.files(compiler.section) or section.quantizes(compiler.section):
                raise ToolchainMissing(f"{compiler.title}: {found.reason}", where=where, fix=found.fix)
            lacking.append((compiler, found))
            absent = absent or Choice(compiler, None, found, tuple(accepted), tuple(refused))
    if absent is not None:
        return replace(absent, missing=_any_of(lacking))
    raise UnsupportedError(
        f'target "{target.tag}" cannot have this model: ' + "; ".join(dict.fromkeys(reasons)),
        where=where,
        fix=next((fix for fix in fixes if fix), None),
    )


def _any_of(lacking: list[tuple[Compiler, Missing]]) -> Missing:
    """Any one of several compilers would do: the user may have a way to only one of them."""
    if len(lacking) == 1:
        return lacking[0][1]
    reason = "; ".join(f"{compiler.title}: {each.reason}" for compiler, each in lacking)
    return Missing(reason, "; or ".join(each.fix for _, each in lacking))


def _built(section: TargetSection, target: Target, where: str) -> list[str]:
    if section.compiler is not None and section.compiler not in compiler_names():
        what = f'there is no compiler "{section.compiler}"; {nearest(section.compiler, compiler_names())}'
        raise UnsupportedError(what, where=where)
    if section.compiler is not None and section.compiler not in target.compilers:
        known = ", ".join(target.compilers)
        what = f'the compiler "{section.compiler}" does not serve target "{target.tag}"; it has: {known}'
        raise UnsupportedError(what, where=where)
    built = [name for name in target.compilers if name in compiler_names()]
    if not built:
        raise ToolchainMissing(
            f'no compiler for target "{target.tag}" is built into this version ({", ".join(target.compilers)})',
            where=where,
            fix="leave the target out, or mark it `required = false`; `modelforge targets` shows what is built",
        )
    if section.compiler:
        return [section.compiler]
    # Only who is spoken to: what the recipe says to one compiler would be without effect on another.
    spoken_to = [name for name in built if get_compiler(name).section in section.sections]
    return spoken_to or built


def _check_sections(section: TargetSection, target: Target, built: list[str], where: str) -> None:
    """An option that no compiler of the target reads would be silently without effect."""
    sections = [get_compiler(name).section for name in built]
    read = sorted({each for each in sections if each is not None})
    for name in section.sections:
        if name not in read:
            raise UnsupportedError(
                f'[target.{name}] speaks to a compiler that does not serve target "{target.tag}"',
                where=where.removesuffix(".tag") + f".{name}",
                fix="take it out" + "".join(f"; what its compilers read is [target.{each}]" for each in read),
            )


def _refusals(
    intake: Intake, stage: Stage, section: TargetSection, target: Target, compiler: Compiler, precision: str
) -> list[Refusal]:
    if precision not in target.precisions:
        what = f"{target.title} has no hardware support for {precision}"
        return [Refusal("hardware", what, f"its precisions: {', '.join(target.precisions)}")]
    options = section.sections.get(compiler.section or "", NO_OPTIONS)
    refusals = compiler.supports(stage.facts, target, precision, stage.inputs, intake.recipe.dims, options)
    brings_own = bool(section.files(compiler.section))  # a file that the user quantized
    if not refusals and precision in ("int8", "mixed") and intake.calibration is None and not brings_own:
        what = f"{precision} needs calibration data, and the recipe has none"
        return [Refusal("no-calibration", what, "add [calibration] with `data`: some hundred real inputs")]
    model = intake.recipe.model if stage.name == "main" else None  # the stages of a split model are no files yet
    if not refusals and isinstance(compiler, ChecksRecipe):
        recipe = intake.recipe
        asked = Wanted(model, stage.facts, target, precision, stage.inputs, recipe.dims, options, recipe.preprocess)
        refusals = compiler.supports_recipe(asked)
    if refusals or model is None:
        return refusals
    return compiler.supports_model(model, target, options)
