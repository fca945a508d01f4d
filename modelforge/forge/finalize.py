"""Compiles a deferred variant where its toolchain is: on the device, or on a host of its kind.

The bundle carries all that it takes: the lowered model of each rung, job.json, golden samples. The result is a bundle
of its own beside the first, holding the finished variant; the bundle that was released is never changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, Written, write_bundle
from modelforge.bundle.read import Bundle, Variant, export_files, open_bundle, verify_integrity
from modelforge.bundle.record import VariantRecord
from modelforge.compilers import compiler_names, get_compiler
from modelforge.compilers.protocol import CompileJob, Compiler, Missing, Toolchain
from modelforge.errors import AccuracyError, InputError, IntegrityError, ModelForgeError, ToolchainMissing
from modelforge.forge.compiling import compile_model
from modelforge.forge.golden import compare_golden, run_artifact
from modelforge.forge.package import JOB_FILE, bundle_file, file_role
from modelforge.options import PreprocessSection
from modelforge.recipe import Dim
from modelforge.store import Store, canonical_json
from modelforge.target import Target, load_target

TIMEOUT = 4 * 3600.0
"""Seconds for each compile: a device may be slow."""


@dataclass(frozen=True)
class Finalized:
    """The finished bundle, and the records of its variants as JSON."""

    written: Written
    records: tuple[Mapping[str, Any], ...]


def finalize(
    path: Path, tag: str, *, stage: str | None = None, output: Path | None = None, force: bool = False,
    store: Store | None = None,
) -> Finalized:  # fmt: skip
    """Compile, check and package the deferred variants of one target.

    Args:
        path: the bundle, or what `pull` made of it.
        stage: only this stage.
        output: the folder of the finished bundle; default: beside ``path``, named NAME-VERSION-TAG.

    Raises:
        InputError: there is no such variant, or it is not deferred.
        IntegrityError: the bundle is damaged. Nothing of it is loaded then.
        ToolchainMissing: the variant's compiler is not installed here.
        AccuracyError: no rung met its gate on the golden samples.
        BuildError: no rung could be compiled, or run.
    """
    verify_integrity(path)
    bundle = open_bundle(path)
    wanted = [variant for variant in bundle.select(tag, stage) if variant.record.status == "deferred"]
    if not wanted:
        states = ", ".join(sorted({variant.record.status for variant in bundle.select(tag, stage)}))
        raise InputError(
            f'the variant for "{tag}" is {states}, not deferred: there is nothing to finish',
            where=str(path),
            fix="`modelforge verify` runs the golden samples of a compiled variant",
        )
    store = store or Store()
    with store.workdir() as folder:
        contents = [_finish(bundle, variant, folder / str(place)) for place, variant in enumerate(wanted)]
        content = BundleContent(
            name=bundle.name,
            version=bundle.version,
            about={**bundle.about, "finalized": {"from": bundle.digest}},
            variants=contents,
        )
        written = write_bundle(output or path.parent / f"{bundle.name}-{bundle.version}-{tag}", content, force=force)
    return Finalized(written, tuple(each.record.to_json() for each in contents))


@dataclass(frozen=True)
class _Device:
    """One variant on its way: where its files lie, and who compiles it."""

    folder: Path
    files: Mapping[str, Path]
    job: Mapping[str, Any]
    compiler: Compiler
    toolchain: Toolchain
    target: Target


def _finish(bundle: Bundle, variant: Variant, folder: Path) -> VariantContent:
    record = variant.record
    where = f"target {record.target}" + ("" if record.stage == "main" else f", stage {record.stage}")
    files = export_files(bundle, variant, folder / "bundle")
    job = _read_job(files, where)
    profile = folder / f"{record.target}.toml"
    profile.write_text(job["target"], encoding="utf-8")
    target = load_target(profile)
    compiler, toolchain = _compiler(str(job["compiler"]), target, where)
    device = _Device(folder, files, job, compiler, toolchain, target)
    ladder: list[dict[str, Any]] = []
    faults: list[ModelForgeError] = []
    for place, rung in enumerate(job["rungs"]):
        try:
            return _rung(device, variant, rung, ladder, folder / f"rung-{place}")
        except ModelForgeError as error:
            faults.append(error)
            gate = "failed" if isinstance(error, AccuracyError) else "none"
            ladder.append({"precision": rung["precision"], "gate": gate, "reason": error.what})
    told = "; ".join(f"{entry['precision']}: {entry['reason']}" for entry in ladder)
    kind = AccuracyError if any(isinstance(fault, AccuracyError) for fault in faults) else type(faults[0])
    raise kind(f"no rung could be finished here; {told}", where=where, fix=faults[0].fix)


def _read_job(files: Mapping[str, Path], where: str) -> Mapping[str, Any]:
    if JOB_FILE not in files:
        raise InputError(
            f"the bundle holds no {JOB_FILE} for this variant", where=where, fix="build it again with --allow-deferred"
        )
    job: Mapping[str, Any] = json.loads(files[JOB_FILE].read_text(encoding="utf-8"))
    if job.get("schema") != 1:
        raise InputError(f"{JOB_FILE} has schema {job.get('schema')!r}", where=where, fix="use a newer ModelForge")
    if not job.get("rungs"):
        raise IntegrityError(f"{JOB_FILE} names no rung", where=where, fix="get the bundle again from where it came")
    return job


def _compiler(name: str, target: Target, where: str) -> tuple[Compiler, Toolchain]:
    if name not in compiler_names():
        raise ToolchainMissing(
            f'this ModelForge has no compiler "{name}"', where=where, fix="install the package that brings it"
        )
    compiler = get_compiler(name)
    found = compiler.probe(target)
    if isinstance(found, Missing):
        raise ToolchainMissing(f"{compiler.title}: {found.reason}", where=where, fix=found.fix)
    return compiler, found


def _rung(
    device: _Device, variant: Variant, rung: Mapping[str, Any], ladder: list[dict[str, Any]], folder: Path
) -> VariantContent:
    """Compile one rung, run the golden samples on it, and make the finished variant of it."""
    lowered = folder / "lowered"
    lowered.mkdir(parents=True)
    for name, title in rung["files"].items():
        (lowered / name).write_bytes(device.files[title].read_bytes())
    (folder / "compile").mkdir()
    job = CompileJob(
        model=lowered / "model.onnx",
        target=device.target,
        precision=rung["precision"],
        inputs={name: tuple(shape) for name, shape in device.job["inputs"].items()},
        dims={symbol: Dim.model_validate(dim) for symbol, dim in device.job["dims"].items()},
        workdir=folder / "compile",
        timeout=TIMEOUT,
        options={**device.job.get("options", {}), **_aids(device)},
        preprocess={
            name: PreprocessSection.model_validate(each) for name, each in device.job.get("preprocess", {}).items()
        },
    )
    facts, files = compile_model(device.compiler, job, {str(device.folder): "WORK"})
    checked = _check(device, rung, facts["artifact"], files, folder)
    entry = {"precision": rung["precision"], "gate": "passed", **_figures(checked["accuracy"])}
    carried = [entry for entry in variant.record.ladder if entry.precision not in _precisions(device.job)]
    record = VariantRecord.model_validate_json(
        canonical_json(
            {
                **variant.record.to_json(),
                "status": "compiled",
                "precision": rung["precision"],
                "toolchain": dict(device.toolchain.versions),
                "ladder": [*(each.model_dump(mode="json") for each in carried), *ladder, entry],
                "artifact": _artifact(facts["artifact"], files),
                "runtime": {"requires": facts["requires"]} | ({"needs": facts["needs"]} if facts["needs"] else {}),
                "accuracy": checked["accuracy"],
                "latency": checked["latency"],
                "delegation": facts["report"].get("delegation"),
                "commands": facts["commands"],
                "calibration": variant.record.calibration and variant.record.calibration.model_dump(mode="json")
                if rung["precision"] in ("int8", "mixed") else None,
                "notes": list(dict.fromkeys([*facts["notes"], *checked["notes"]])),
            }
        )
    )  # fmt: skip
    return VariantContent(record, _contents(device, variant, rung, facts, files, checked, folder))


def _aids(device: _Device) -> dict[str, str]:
    """Options that name a file which helps the compile along: where the bundle's lies here."""
    return {option: str(device.files[entry["file"]]) for option, entry in device.job.get("aids", {}).items()}


def _precisions(job: Mapping[str, Any]) -> set[str]:
    return {rung["precision"] for rung in job["rungs"]}


def _artifact(name: str, files: Mapping[str, Path]) -> dict[str, Any]:
    blob = bundle_file(name, "artifact", files[name])
    return {"file": name, "digest": blob.digest, "size": blob.size}


def _figures(accuracy: Mapping[str, Any]) -> dict[str, Any]:
    return {name: accuracy.get(name) for name in ("value", "drop", "sqnr_db", "agreement")}


def _check(
    device: _Device, rung: Mapping[str, Any], artifact: str, files: Mapping[str, Path], folder: Path
) -> dict[str, Any]:
    """Run the golden samples on the artifact, read back under its own name, and hold them against FP32.

    Where the artifact cannot run here, the figures of the build stand, and the record says so.

    Raises:
        AccuracyError: the outputs are not those of the model.
        BuildError: it cannot run, or failed.
    """
    built = dict(rung["accuracy"])
    if device.compiler.runner(device.target) is None:
        hint = device.compiler.runner_hint(device.target)
        note = "not verified on a device: compiled where it cannot run, the figures are those of its lowered model"
        return {
            "accuracy": built, "latency": {"evidence": "none"}, "notes": [note, *([hint] if hint else [])], "files": {},
        }  # fmt: skip
    outputs, golden = folder / "outputs.npz", device.files["golden-inputs.npz"]
    ran = run_artifact(device.compiler, device.target, artifact, files, golden, outputs, folder)
    expected = device.files["golden-outputs.npz"]
    lowered = folder / "lowered" / "model.onnx"
    judged = compare_golden(expected, outputs, rung["precision"], [lowered], folder, device.target.tag)
    if judged["reasons"]:
        raise AccuracyError("; ".join(judged["reasons"]), where=device.target.tag)
    accuracy = {key: value for key, value in judged.items() if key not in ("reasons", "suspicion", "metric")}
    notes = [*ran.notes, "checked on its golden samples; " + _metric_note(built)]
    return {
        "accuracy": {**accuracy, "per_output": _rows(judged), "evidence": ran.evidence},
        "latency": {"evidence": ran.evidence if ran.latency else "none", **ran.latency},
        "notes": notes,
        "files": ran.files,
    }


def _metric_note(built: Mapping[str, Any]) -> str:
    """The user's own metric needs labels, which stay where it was built."""
    if built.get("value") is None:
        return "its lowered model met the gate where it was built"
    return (
        f"where it was built, its lowered model had {built['metric']} {built['value']:.4f} "
        f"(FP32 {built['reference']:.4f})"
    )


def _rows(judged: Mapping[str, Any]) -> list[dict[str, Any]]:
    kept = ("output", "group", "sqnr_db", "identical", "cosine", "agreement")
    return [{key: row[key] for key in kept if key in row} for row in judged["per_output"]]


def _contents(
    device: _Device, variant: Variant, rung: Mapping[str, Any], facts: Mapping[str, Any], files: Mapping[str, Path],
    checked: Mapping[str, Any], folder: Path,
) -> list[BundleFile]:  # fmt: skip
    contents = [bundle_file(name, file_role(name, facts["artifact"]), path) for name, path in files.items()]
    contents += [bundle_file(name, "lowered-model", device.files[title]) for name, title in rung["files"].items()]
    kept = [name for name, entry in variant.files.items() if entry.role == "golden"]
    contents += [bundle_file(name, "golden", device.files[name]) for name in kept]
    report = folder / "report.json"
    before = device.files.get("report.json")
    document = json.loads(before.read_text(encoding="utf-8")) if before else {"schema": 1}
    report.write_bytes(canonical_json({**document, "compile": facts["report"]}))
    accuracy = folder / "accuracy.json"
    accuracy.write_bytes(canonical_json({"schema": 1, **checked["accuracy"]}))
    reports = {**checked["files"], report.name: report, accuracy.name: accuracy}
    return contents + [bundle_file(name, "report", path) for name, path in reports.items()]
