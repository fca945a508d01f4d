"""Huawei's ATC: offline models (.om) for one exact Ascend chip, compiled here, in a container or on another host.

Knows what ATC can have and how it is asked; ATC itself runs in a session of :mod:`launcher`, judged by :mod:`driver`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelforge.compilers.ascend import device, install, recipe
from modelforge.compilers.ascend.driver import Run, run_atc, survey
from modelforge.compilers.ascend.install import NotHere, Place
from modelforge.compilers.ascend.launcher import Settings
from modelforge.compilers.ascend.limits import (
    OLDEST_OPSET,
    OPSETS,
    QUANT_OPSETS,
    UNPARSED,
    chip_of,
    image_for,
    known_images,
    newest_opset,
    parse_version,
    spell,
)
from modelforge.compilers.ascend.shapes import Build, plan_builds
from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain, Wanted
from modelforge.errors import UnsupportedError
from modelforge.graph.facts import ModelFacts
from modelforge.options import NO_OPTIONS, Options
from modelforge.recipe import Dim
from modelforge.target import AscendArchitecture, Target
from modelforge.toolchains import worker

MANIFEST = "main.json"
"""Says which .om is for which sizes, and what each of them takes."""

NOTE_NOT_RUN = "not verified on a device"

_FP32_MODES = ("must_keep_origin_dtype", "force_fp32", "cube_fp16in_fp32out")
_GE = "github.com/hicann/ge, docs/zh/user_guides/atc_tools"


class AscendCompiler:
    """Compiles ``main.om`` with ATC, or one .om for each size where INT8 meets a dynamic dimension.

    What the lowered model says, ATC is told to keep to: FP16 and FP32 models with ``must_keep_origin_dtype``; the INT8
    form holds AscendQuant and AscendDequant, and its float rest is made FP16 by ATC itself. An .om is not reproducible
    byte for byte (it holds the time of its making); its digest names one file, the content key its inputs.
    """

    name = "ascend"
    title = "Huawei ATC"
    section = "atc"
    code_version = "1"

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        """Where ATC is, from ``$MODELFORGE_ATC``, ``PATH``, CANN's variables and usual folders; reads files only."""
        del target  # what it builds for one, it builds for all
        found = install.find()
        if isinstance(found, NotHere):
            return Missing(found.reason, f"{found.fix}; official images: {known_images()}, the same for other chips")
        return Toolchain({"cann": found.version, "atc": found.kind}, warnings=tuple(_warnings(found)))

    def dialect(self, target: Target) -> str:
        del target
        return "ascend"

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = NO_OPTIONS,
    ) -> list[Refusal]:
        """Say what is known to fail: the chip's name, CANN's age, opset, domains, gears, options."""
        arch = target.arch
        if not isinstance(arch, AscendArchitecture):
            return [
                Refusal("architecture", f"{target.tag} is no Ascend chip", "choose another compiler", target.path.name)
            ]
        try:
            chip = chip_of(arch.soc_version)
        except UnsupportedError as error:
            return [Refusal("soc-version", error.what, error.fix or "", f"{_GE}/CLI_options/--soc_version.md")]
        is_int8 = precision in ("int8", "mixed")
        refusals = _refuse_toolchain(facts, target, is_int8)
        refusals += _refuse_model(facts)
        if precision not in target.precisions:
            what = f"{target.tag} has no {precision}"
            refusals.append(Refusal("precision", what, f"choose from {', '.join(target.precisions)}", target.path.name))
        mode = options.get("precision_mode")
        if is_int8 and mode in _FP32_MODES:
            what = f"precision_mode = {mode} cannot be had with INT8"
            refusals.append(Refusal("precision-mode", what, "take it out", "CANN 8.0 to 9.1, general restrictions"))
        order = [tensor.name for tensor in facts.inputs if tensor.name in inputs]
        try:
            plan_builds(order, inputs, dims, split=is_int8, most=chip.most_gears)
        except UnsupportedError as error:
            refusals.append(Refusal("gears", error.what, error.fix or "", f"{_GE}/CLI_options/--dynamic_dims.md"))
        return refusals

    def supports_recipe(self, wanted: Wanted) -> list[Refusal]:
        """Say what AIPP cannot do of `[inputs.NAME.preprocess]`, for any of the .om that would be made."""
        arch = wanted.target.arch
        if not isinstance(arch, AscendArchitecture) or not wanted.preprocess:
            return []
        inputs = [(each.name, each.dtype) for each in wanted.facts.inputs if each.name in wanted.inputs]
        is_int8 = wanted.precision in ("int8", "mixed")
        try:
            builds = plan_builds(
                [name for name, _ in inputs],
                wanted.inputs,
                wanted.dims,
                split=is_int8,
                most=chip_of(arch.soc_version).most_gears,
            )
            for build in builds:
                recipe.aipp_configuration(inputs, build, wanted.preprocess)
        except UnsupportedError as error:
            what = error.what if error.where is None else f"{error.where}: {error.what}"
            fix = error.fix or "change [inputs.NAME.preprocess], or leave it out and preprocess on the host"
            return [Refusal("aipp", what, fix, f"{_GE}/AIPP")]
        return []

    def supports_model(self, model: Path, target: Target, options: Options = NO_OPTIONS) -> list[Refusal]:
        del model, target, options  # its facts say all that is known
        return []

    def compile(self, job: CompileJob) -> Compiled:
        """Run ATC, once for each .om.

        Raises:
            ToolchainMissing: there is no ATC.
            BuildError: ATC failed, crashed, ran out of time, or left something else than the .om that was asked for.
            UnsupportedError: it cannot have this model, or not with these options.
        """
        place = install.require()
        answer = worker.call(
            "modelforge.compilers.ascend.worker:describe",
            {"model": str(job.model)},
            workdir=job.workdir / "read",
            timeout=job.timeout,
            what=f"reading the lowered model for {job.target.tag}",
        )
        facts = recipe.LoweredFacts.from_answer(answer)
        job, facts, restated = _restated(job, facts, place)
        log = job.workdir / "worker.log"
        help_text = survey(place, Settings(job.timeout, python=_python_folder()), job.workdir, log)
        request = recipe.make_request(job, facts, place.version, help_text)
        staged = _staged(job, request)
        settings = Settings(job.timeout, request.environment, _python_folder(), request.memory)
        files: dict[str, Path] = {}
        models: list[dict[str, Any]] = []
        for build, options in request.runs:
            folder = job.workdir / f"build-{build.stem}"
            folder.mkdir()
            run = Run(recipe.command_words(options), staged, build.stem, request.external_weight)
            what = f"ATC, compiling {build.stem} for {job.target.tag}"
            made = run_atc(place, run, settings, folder, log, what)
            files |= made
            models.append(_model_entry(build, next(iter(made))))
        manifest = _manifest(job, facts, request, models)
        files[MANIFEST] = job.workdir / MANIFEST
        files[MANIFEST].write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return Compiled(
            artifact=models[0]["file"] if len(models) == 1 else MANIFEST,
            files=files,
            commands=tuple(recipe.command_words(options) for _, options in request.runs),
            requires=_requires(place, request),
            notes=(*restated, *request.notes, *_result_notes(job.target, models, place, request)),
            report={**request.report, "models": models, "files": dict(request.files)},
            needs={"cann": f">={place.version}", "soc_version": request.report["soc_version"]},
        )

    def runner(self, target: Target) -> str | None:
        """``device`` where this machine has the target's own NPU and CANN's Python interface to it."""
        return "device" if device.chip_here(target) else None

    def runner_hint(self, target: Target) -> str:
        soc = target.arch.soc_version if isinstance(target.arch, AscendArchitecture) else "the target's chip"
        return f"{NOTE_NOT_RUN}: run `modelforge verify` on a host with {soc}, CANN and ais_bench (or pyACL)"

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        """Median latency of one batch on the NPU; None where there is none."""
        return device.race(first, second)

    def run(self, job: RunJob) -> Ran:
        """Run the .om on this machine's NPU.

        Raises:
            BuildError: there is none of the target's kind, or it failed.
        """
        return device.run(job, MANIFEST)


def _restated(
    job: CompileJob, facts: recipe.LoweredFacts, place: Place
) -> tuple[CompileJob, recipe.LoweredFacts, tuple[str, ...]]:
    """The job with a lower opset number where this CANN needs that and no node changes its meaning, and a note."""
    version = parse_version(place.version)
    newest = newest_opset(version or (99,)).newest
    if version is None or facts.opset <= newest:
        return job, facts, ()
    folder = job.workdir / "restated"
    folder.mkdir()
    request = {"model": str(job.model), "folder": str(folder), "newest": newest}
    function = "modelforge.compilers.ascend.worker:restate"
    what = f"restating the opset for {job.target.tag}"
    opset = worker.call(function, request, workdir=job.workdir / "read", timeout=job.timeout, what=what)["opset"]
    if opset is None:
        return job, facts, ()
    note = f"ATC got the lowered model with opset {opset} instead of {facts.opset}: its operators are the same in both"
    return replace(job, model=folder / "model.onnx"), replace(facts, opset=opset), (note,)


def _staged(job: CompileJob, request: recipe.Request) -> dict[str, Path]:
    """What lies beside each other where ATC runs: the lowered model with its data, configuration files."""
    staged = {path.name: path for path in sorted(job.model.parent.glob(f"{job.model.name}*")) if path.is_file()}
    configuration = job.workdir / "configuration"
    configuration.mkdir()
    for name, text in request.files.items():
        path = configuration / name
        path.write_text(text, encoding="utf-8")
        staged[name] = path
    return staged


def _python_folder() -> str:
    chosen = install.python()
    return "" if chosen is None else str(chosen.parent)


def _model_entry(build: Build, file: str) -> dict[str, Any]:
    sizes = [dict(zip(build.symbols, gear, strict=True)) for gear in build.gears]
    kind = next((name for name in build.options if name.startswith("dynamic_")), None)
    return {
        "file": file,
        "shapes": {name: list(shape) for name, shape in build.shapes.items()},
        "sizes": sizes,
        "gears": kind,
    }


def _manifest(
    job: CompileJob, facts: recipe.LoweredFacts, request: recipe.Request, models: list[dict[str, Any]]
) -> dict[str, Any]:
    inputs = [
        {"name": each["name"], "dtype": each["dtype"], "shape": list(job.inputs[each["name"]])} for each in facts.inputs
    ]
    fed = {
        name: {**section.model_dump(mode="json"), "dtype": "uint8", "layout": "NHWC"}
        for name, section in sorted(job.preprocess.items())
    }
    weights = "weight-NAME belongs into the folder weight as NAME" if request.external_weight else None
    return {
        "schema": 1,
        "soc_version": request.report["soc_version"],
        "models": models,
        "inputs": inputs,
        "outputs": list(facts.outputs),
        "aipp": fed,
        **({"weights": weights} if weights else {}),
    }


def _requires(place: Place, request: recipe.Request) -> str:
    return (
        f"CANN runtime {place.version} or newer (an .om runs on no older CANN than it was compiled with), "
        f"{request.report['soc_version']} and its driver"
    )


def _result_notes(target: Target, models: list[dict[str, Any]], place: Place, request: recipe.Request) -> list[str]:
    notes = [] if device.chip_here(target) else [NOTE_NOT_RUN]
    notes += ["an .om is not reproducible byte for byte; its inputs are what the content key names"]
    notes.append(f"compiled with CANN {place.version}; the documents allow this model from {request.least_cann} on")
    bound = [model["file"] for model in models if "_linux_" in model["file"] or "_minios_" in model["file"]]
    if bound:
        notes.append(f"{bound[0]} carries code of its host: it runs on hosts of that architecture only")
    notes.append(f"for those who have MindStudio's msit, layer by layer on the device: {device.compare_command()}")
    return notes


def _warnings(place: Place) -> list[str]:
    if place.kind == "local" and place.set_env is None:
        return ["no set_env.sh beside this ATC: it runs with the environment as it is"]
    return []


def _refuse_toolchain(facts: ModelFacts, target: Target, is_int8: bool) -> list[Refusal]:
    """What the CANN that is here cannot have; without one, nothing is known."""
    assert isinstance(target.arch, AscendArchitecture)
    chip = chip_of(target.arch.soc_version)
    found = install.find()
    version = parse_version(found.version) if isinstance(found, Place) else None
    refusals = []
    if version is not None:
        assert isinstance(found, Place)
        image = f"use another CANN for this target, such as the image {image_for(chip)}"
        if chip.until is not None and version[: len(chip.until)] > chip.until:
            what = f"CANN {found.version} is here, and {chip.title} is gone since CANN {spell(chip.until)}"
            refusals.append(Refusal("cann-version", what, image, "documents of CANN 8.2 and 8.3, --soc_version"))
        if chip.since is not None and version < chip.since:
            what = f"CANN {found.version} is here, and {chip.title} needs {spell(chip.since)} or newer"
            refusals.append(Refusal("cann-version", what, image, "documents of CANN, --soc_version"))
    row = newest_opset(version) if version is not None else OPSETS[-1]
    opset = facts.opsets.get("", 0)
    if not OLDEST_OPSET <= opset <= row.newest:
        whose = f"CANN {found.version}" if isinstance(found, Place) else "CANN"
        what = f"the model has opset {opset}, and {whose} takes {OLDEST_OPSET} to {row.newest}"
        refusals.append(Refusal("opset", what, f"export it with opset {min(row.newest, 17)}", row.source))
    # Quantizing raises lower opsets to 13, and says 17 and 18 as 16 where that is the same.
    quantized, quant_row = max(13, min(opset, 16)), newest_opset(version, QUANT_OPSETS) if version else QUANT_OPSETS[-1]
    if is_int8 and quantized > quant_row.newest:
        what = f"the model has opset {opset}, and AscendQuant of this CANN takes {quant_row.newest} at most"
        refusals.append(Refusal("quant-opset", what, "export it with opset 13", quant_row.source))
    return refusals


def _refuse_model(facts: ModelFacts) -> list[Refusal]:
    refusals = []
    for op in facts.ops:
        if op.domain not in ("", "ai.onnx"):
            what = (
                f"node {op.example}: ATC takes operators of the standard domain only, not {op.domain}::{op.op} (E16005)"
            )
            refusals.append(Refusal("domain", what, "export the model with standard ONNX operators", "CANN up to 8.x"))
        elif op.op in UNPARSED:
            what = f"node {op.example}: ATC has no parser for {op.op}"
            fix = "give the FP32 model, and let ModelForge quantize it"
            refusals.append(Refusal("operator", what, fix, "CANN 9.0: No operator plugin is registered"))
    for tensor in (*facts.inputs, *facts.outputs):
        if tensor.dtype in ("string", "complex64", "complex128"):
            what = f"{tensor.name} holds {tensor.dtype}, which Ascend has not"
            refusals.append(
                Refusal("dtype", what, "do that part outside the model", f"{_GE}/CLI_options/--framework.md")
            )
    return refusals
