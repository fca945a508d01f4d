"""From a compile job to what ATC is told: options, configuration files, environment. Starts and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelforge.compilers.ascend import aipp
from modelforge.compilers.ascend.check import Verdict, check
from modelforge.compilers.ascend.limits import (
    QUANT_OPSETS,
    Chip,
    Version,
    chip_of,
    least_cann,
    newest_opset,
    parse_version,
    spell,
)
from modelforge.compilers.ascend.options import AtcOptions, render, typed
from modelforge.compilers.ascend.shapes import Build, plan_builds
from modelforge.compilers.protocol import CompileJob
from modelforge.errors import InputError, UnsupportedError
from modelforge.options import AtcSection, PreprocessSection
from modelforge.target import AscendArchitecture

MODEL = "model.onnx"
AIPP, KEEP, PRECISION = "aipp.cfg", "keep_dtype.cfg", "op_precision.ini"


@dataclass(frozen=True)
class LoweredFacts:
    """What was read from the lowered model (:func:`modelforge.compilers.ascend.worker.describe`).

    Attributes:
        inputs: name, dtype and rank, in the model's order; ``outputs`` are names.
        quantized: names of its AscendQuant nodes.
        unparsed: operators that ATC has no parser for.
        half: whether it has FP16 weights.
        wide_products: matrix products and convolutions that are FP32.
        keep_fp32: nodes that FP16 would overflow, where the compiler makes the FP16.
    """

    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[str, ...]
    opset: int
    domains: tuple[str, ...]
    quantized: tuple[str, ...]
    unparsed: tuple[str, ...]
    half: bool
    wide_products: tuple[str, ...]
    keep_fp32: tuple[str, ...]

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> LoweredFacts:
        values: dict[str, Any] = {
            name: tuple(each) if isinstance(each, list) else each for name, each in answer.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class Request:
    """Everything for the runs of ATC that one variant takes.

    Attributes:
        runs: one for each .om.
        files: configuration files by name, that stand beside the model.
        environment: variables for CANN's compilers.
        memory: bytes that one run may take; None: no limit.
        least_cann: the oldest CANN whose documents allow the model.
        external_weight: weights lie in a folder ``weight`` beside the .om.
    """

    runs: tuple[tuple[Build, AtcOptions], ...]
    files: Mapping[str, str]
    environment: Mapping[str, str]
    memory: int | None
    least_cann: str
    external_weight: bool
    notes: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)


def make_request(job: CompileJob, facts: LoweredFacts, cann: str, help_text: str | None = None) -> Request:
    """What to run.

    Args:
        cann: the version of the CANN that is here.
        help_text: what its ``atc --help`` prints; None where that is not known.

    Raises:
        UnsupportedError: the chip, this CANN or ATC itself cannot have it; or options contradict each other.
    """
    arch = job.target.arch
    if not isinstance(arch, AscendArchitecture):
        raise UnsupportedError(f"ATC compiles for Ascend, {job.target.tag} is none", where=str(job.target.path))
    chip = chip_of(arch.soc_version)
    section = AtcSection.model_validate(dict(job.options))
    least = _check_model(facts, chip, cann)
    builds = plan_builds(
        [each["name"] for each in facts.inputs], job.inputs, job.dims, split=bool(facts.quantized), most=chip.most_gears
    )
    precision, files, notes = _precision(job.precision, facts, chip, section)
    given, taken = _from_command(section, arch.soc_version, bool(facts.quantized), cann)
    runs = []
    for build in builds:
        options = {
            "model": MODEL,
            "framework": "5",
            "output": build.stem,
            "soc_version": arch.soc_version,
            **build.options,
            **precision,
            **_hosts(section),
        }
        if config := aipp_configuration(
            [(each["name"], each["dtype"]) for each in facts.inputs], build, job.preprocess
        ):
            files[AIPP] = config
            options["insert_op_conf"] = AIPP
        runs.append((build, _checked({**given, **options}, cann, help_text)))
    return Request(
        runs=tuple(runs),
        files=files,
        environment=_environment(section),
        memory=section.memory_bytes,
        least_cann=spell(least),
        external_weight=section.external_weight,
        notes=(*notes, *taken, *_shape_notes(builds, bool(facts.quantized)), *_image_notes(job)),
        report={"soc_version": arch.soc_version, "opset": facts.opset, "least_cann": spell(least)},
    )


def _checked(options: Mapping[str, str], cann: str, help_text: str | None) -> AtcOptions:
    """Our own command line, judged as a user's would be: what ATC would refuse is refused before it runs."""
    made = typed(options)
    verdict = check(render(made), cann=cann if parse_version(cann) else None, help_text=help_text or None)
    reason = verdict.reason
    if reason is not None:
        raise UnsupportedError(
            f"ATC would refuse --{reason.option or 'its options'} ({reason.code}): {reason.what}", fix=reason.fix
        )
    return made


def command_words(options: AtcOptions) -> tuple[str, ...]:
    """The command as it is run and recorded: relative, neutral names only (the .om embeds it)."""
    return ("atc", *render(options))


def _check_model(facts: LoweredFacts, chip: Chip, cann: str) -> tuple[int, ...]:
    if facts.domains:
        raise UnsupportedError(
            f"the model imports the operator domain {facts.domains[0]}; ATC takes the standard one alone (E16005)",
            fix="export the model with standard ONNX operators",
        )
    if facts.unparsed:
        raise UnsupportedError(
            f"ATC has no parser for {facts.unparsed[0]}",
            fix='give the FP32 model and let ModelForge quantize it: precision = ["int8", "fp16"]',
        )
    least, why = least_cann(chip, facts.opset, quantized=bool(facts.quantized))
    here = parse_version(cann)
    if here is not None and here < least:
        raise UnsupportedError(
            f"this model needs CANN {spell(least)} ({why}), and {cann} is here",
            fix=f"use a newer CANN, or export the model with opset {_newest(here, bool(facts.quantized))} or lower",
        )
    if here is not None and chip.until is not None and here[: len(chip.until)] > chip.until:
        raise UnsupportedError(
            f"CANN {cann} has no {chip.title} any more; the last line with it is {spell(chip.until)}",
            fix="install an older CANN for this target",
        )
    return least


def _newest(here: Version, quantized: bool) -> int:
    newest = newest_opset(here).newest
    return min(newest, newest_opset(here, QUANT_OPSETS).newest) if quantized else newest


def _precision(
    precision: str, facts: LoweredFacts, chip: Chip, section: AtcSection
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Options, files and notes. The lowered model says the precision; ATC is told to keep to it as far as it can."""
    notes: list[str] = []
    asked = section.precision_mode
    if facts.quantized:
        # CANN's general restrictions: quantized models take no mode that keeps FP32. The rest is FP32 in the file,
        # and becomes FP16 here, but for the nodes that would overflow.
        mode = "force_fp16"
        if asked in ("must_keep_origin_dtype", "force_fp32", "cube_fp16in_fp32out"):
            raise UnsupportedError(
                f"precision_mode = {asked} cannot be had with INT8",
                where="target.atc.precision_mode",
                fix="take it out",
            )
        notes.append("the float rest of the INT8 model is made FP16 by ATC (force_fp16)")
    elif facts.wide_products and not chip.fp32_products:
        mode = "allow_fp32_to_fp16"
        notes.append(
            f"{facts.wide_products[0]} is FP32 in the lowered model, and {chip.title} multiplies matrices in FP16: "
            "ATC lowers it (allow_fp32_to_fp16)"
        )
    else:
        mode = "must_keep_origin_dtype"
    if asked is not None and asked != mode:
        notes.append(f"precision_mode = {asked} is the recipe's; accuracy was judged for {mode}")
    options, files = {"precision_mode": asked or mode}, {}
    keep = (*facts.keep_fp32, *section.keep_dtype)
    if keep and options["precision_mode"] != "must_keep_origin_dtype":
        files[KEEP] = _lines(keep, "keep_dtype")
        options["keep_dtype"] = KEEP
    if section.op_precision:
        rows = [f"{_word(kind)}={mode}" for kind, mode in sorted(section.op_precision.items())]
        files[PRECISION] = "\n".join(["[ByOpType]", *rows, ""])
        options["op_precision_mode"] = PRECISION
    return options, files, notes


def aipp_configuration(
    inputs: Sequence[tuple[str, str]], build: Build, preprocess: Mapping[str, PreprocessSection]
) -> str:
    """AIPP's configuration file for one .om; empty where nothing is preprocessed.

    Args:
        inputs: name and dtype of the model's inputs, in its order.

    Raises:
        UnsupportedError: AIPP cannot do what the recipe asks for.
    """
    fed = [
        (aipp.ImageInput(name, rank, dtype, build.shapes[name]), preprocess[name])
        for rank, (name, dtype) in enumerate(inputs)
        if name in preprocess
    ]
    if fed and "dynamic_dims" in build.options:
        raise UnsupportedError(
            "AIPP cannot be had with these gears (dynamic_dims): only the batch, or height with width, may vary",
            where=f"inputs.{fed[0][0].name}.preprocess",
            fix="fix the other dimensions, or leave `preprocess` out for this target",
        )
    return aipp.render(fed)


def _image_notes(job: CompileJob) -> list[str]:
    return [
        f"AIPP: the .om takes {name} as 8-bit {section.source} images, batch x height x width x channels, not as floats"
        for name, section in sorted(job.preprocess.items())
    ]


def _hosts(section: AtcSection) -> dict[str, str]:
    options = {"external_weight": "1"} if section.external_weight else {}
    if section.host is not None:
        system, _, cpu = section.host.partition("-")
        options |= {"host_env_os": system, "host_env_cpu": cpu}
    return options


def _environment(section: AtcSection) -> dict[str, str]:
    """Variables of CANN's operator compiler: fewer processes take less memory."""
    found = {}
    if section.parallel_compilers is not None:
        found["TE_PARALLEL_COMPILER"] = str(section.parallel_compilers)
    if section.compile_cores is not None:
        found["MAX_COMPILE_CORE_NUMBER"] = str(section.compile_cores)
    return found


# What the recipe, the target or the model say; a pasted command cannot say otherwise.
_OWNED = frozenset({
    "model", "weight", "output", "framework", "mode", "om", "json", "input_shape", "input_shape_range",
    "input_hint_shape", "input_format", "dynamic_batch_size", "dynamic_image_size", "dynamic_dims", "soc_version",
    "log", "precision_mode", "precision_mode_v2", "external_weight", "host_env_os", "host_env_cpu", "debug_dir",
    "op_compiler_cache_dir", "op_compiler_cache_mode",
})  # fmt: skip

# Options whose value is a file of the machine that the command was written on -> what stands for it in a recipe.
_FILES = {
    "insert_op_conf": "[inputs.NAME.preprocess]", "keep_dtype": "`keep_dtype` under [target.atc]",
    "op_precision_mode": "`op_precision` under [target.atc]",
}  # fmt: skip
_OTHER_FILES = (
    "modify_mixlist", "customize_dtypes", "fusion_switch_file", "compress_weight_conf", "compression_optimize_conf",
    "op_bank_path", "mdl_bank_path", "singleop", "op_name_map", "cluster_config", "raw_ge_options", "build_config",
)  # fmt: skip


def _from_command(
    section: AtcSection, soc_version: str, quantized: bool, cann: str
) -> tuple[dict[str, str], list[str]]:
    """Options of a pasted ``atc …`` line that the recipe does not decide itself, and what was left out or mended."""
    if section.command is None:
        return {}, []
    where = "target.atc.command"
    text = section.command if re.match(r"\s*\S*\batc(\.bin)?\s", section.command) else f"atc {section.command}"
    try:
        verdict = check(text, cann=cann if parse_version(cann) else None)
    except InputError as error:
        raise UnsupportedError(f"the command cannot be read: {error.what}", where=where, fix=error.fix) from None
    said = dict(verdict.given if verdict.options is None else _by_name(verdict.options))
    _check_command(said, verdict, soc_version, where)
    if quantized and said.get("op_select_implmode", "").startswith("high_precision"):
        raise UnsupportedError("--op_select_implmode=high_precision cannot be had with INT8", where=where)
    kept = {name: value for name, value in said.items() if name not in _OWNED}
    ignored = _OWNED - {"model", "output", "framework", "soc_version", "mode", "log"}
    left = sorted(name for name in said if name in ignored)
    notes = [f"of the recipe's atc command, the recipe itself decides: {', '.join(left)}"] if left else []
    notes += [
        f"of the recipe's atc command: {each.what}; {each.fix}" for each in verdict.findings if each.level == "fixed"
    ]
    return kept, notes


def _check_command(said: Mapping[str, str], verdict: Verdict, soc_version: str, where: str) -> None:
    if said.get("soc_version", soc_version) != soc_version:
        raise UnsupportedError(
            f"the command is for {said['soc_version']}, and the target is {soc_version}",
            where=where,
            fix="take --soc_version out, or choose the target that has it",
        )
    if said.get("framework", "5") != "5":
        raise UnsupportedError("the command is not for an ONNX model (--framework=5)", where=where)
    for name in said:
        if name in _FILES or name in _OTHER_FILES:
            raise UnsupportedError(
                f"--{name} names a file of the machine that the command is from",
                where=where,
                fix=f"say it as {_FILES[name]}" if name in _FILES else "take it out: this version does not carry it",
            )
    for finding in verdict.findings:
        # What the recipe decides need not be right, or there at all, in the command.
        if finding.level == "error" and finding.option not in _OWNED:
            raise UnsupportedError(f"the command is wrong: {finding.what}", where=where, fix=finding.fix)


def _by_name(options: AtcOptions) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in render(options))


def _shape_notes(builds: Sequence[Build], quantized: bool) -> list[str]:
    if len(builds) > 1:
        return [f"INT8 takes no gears on Ascend: {len(builds)} .om files, one for each size; main.json names them"]
    if builds[0].is_dynamic:
        count = len(builds[0].gears)
        return [
            f"{count} gears: compiling takes about {count} times as long, memory is the largest's, other sizes fail"
        ]
    return []


def _lines(names: Sequence[str], what: str) -> str:
    for name in names:
        if not name.strip() or not name.isprintable():
            raise UnsupportedError(f'"{name!r}" is no name of a node', where=f"target.atc.{what}")
    return "".join(f"{name}\n" for name in dict.fromkeys(names))


def _word(kind: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]+", kind):
        raise UnsupportedError(f'"{kind}" is no type of an operator', where="target.atc.op_precision")
    return kind
