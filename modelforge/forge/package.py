"""From what the steps left behind to the content of a bundle: variant records and files. No time, no path of here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelforge import __version__
from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent
from modelforge.bundle.record import VariantRecord
from modelforge.forge.run import Built, RungResult, VariantResult
from modelforge.recipe import Recipe
from modelforge.store import Blob, Store, canonical_json, digest_file

_MEDIA_TYPES = {".onnx": "application/vnd.onnx", ".npz": "application/x-npz", ".json": "application/json"}


def variant_record(result: VariantResult, built: Built) -> VariantRecord:
    """The record of one variant, failed and skipped ones included."""
    plan, chosen = result.plan, result.chosen
    notes = [plan.reason] if plan.reason else []
    if result.error is not None:
        notes.append(result.error.what)
    data: dict[str, Any] = {
        "target": plan.target.tag,
        "stage": plan.stage,
        "status": result.status,
        "compiler": plan.compiler,
        "toolchain": dict(plan.toolchain or {}),
        "precision": chosen.plan.precision if chosen else None,
        "ladder": tuple(dict(entry) for entry in result.ladder),
        "batch": _batch(built),
    }
    if chosen is None:
        return VariantRecord.model_validate({**data, "notes": tuple(notes)})
    data["accuracy"] = _accuracy(chosen)
    race = chosen.race.facts if chosen.race else {}
    data["latency"] = {"evidence": "none", **chosen.verify.facts["latency"], **race}
    if chosen.slower:
        notes.append(chosen.slower)
    if chosen.describe is not None:
        data["calibration"] = dict(built.plan.intake.calibration_facts)
    if chosen.compile is not None:
        facts = chosen.compile.facts
        blob = chosen.compile.files[facts["artifact"]]
        data["artifact"] = {"file": facts["artifact"], "digest": blob.digest, "size": blob.size}
        data["runtime"] = {"requires": facts["requires"]}
        data["commands"] = tuple(tuple(command) for command in facts["commands"])
        notes = [*facts["notes"], *notes]
        if chosen.verify.facts["evidence"] == "reference":
            notes.append("the artifact itself was not run: its lowered model was, in ONNX Runtime")
    notes += chosen.verify.facts["notes"]
    if suspicion := chosen.verify.facts["accuracy"].get("suspicion"):
        notes.append(suspicion)
    return VariantRecord.model_validate({**data, "notes": tuple(dict.fromkeys(notes))})


def bundle_content(built: Built, store: Store) -> BundleContent:
    """All that goes into the bundle."""
    recipe = built.plan.recipe
    variants = [
        VariantContent(variant_record(result, built), tuple(_files(result, built, store))) for result in built.variants
    ]
    return BundleContent(
        name=recipe.name, version=recipe.version, about=_about(recipe, built), variants=tuple(variants)
    )


def _batch(built: Built) -> dict[str, Any] | None:
    """The bounds of the first dimension; None where it is fixed."""
    firsts = {shape[0] for shape in built.plan.intake.inputs.values() if shape}
    symbols = sorted(first for first in firsts if isinstance(first, str))
    if not symbols:
        return None
    dim = built.plan.recipe.dims[symbols[0]]
    return {"values": dim.values} if dim.values else {"min": dim.min, "opt": dim.opt, "max": dim.max}


def _accuracy(chosen: RungResult) -> dict[str, Any]:
    facts = dict(chosen.verify.facts["accuracy"])
    facts.pop("reasons")
    facts.pop("suspicion")
    per_output = tuple(
        {key: value for key, value in row.items() if key in ("output", "sqnr_db", "identical", "cosine", "agreement")}
        for row in facts.pop("per_output")
    )
    return {**facts, "evidence": chosen.verify.facts["evidence"], "per_output": per_output}


def _files(result: VariantResult, built: Built, store: Store) -> list[BundleFile]:
    chosen = result.chosen
    if chosen is None:
        return []
    files: list[BundleFile] = []
    if chosen.compile is not None:
        artifact = chosen.compile.facts["artifact"]
        for name, blob in chosen.compile.files.items():
            files.append(_file(name, _role(name, artifact), blob, store))
    for name, blob in chosen.lower.files.items():
        files.append(_file(name, "lowered-model", blob, store))
    for name, blob in built.baseline.files.items():
        files.append(_file(name, "golden", blob, store))
    for name, blob in (chosen.describe.files if chosen.describe else {}).items():
        files.append(_file(name, "report", blob, store))
    accuracy = {"schema": 1, **chosen.verify.facts["accuracy"], "ladder": [dict(entry) for entry in result.ladder]}
    files.append(_report("accuracy.json", accuracy, store))
    report = {"schema": 1, "prepare": built.prepare.facts, "lower": chosen.lower.facts}
    if chosen.compile is not None:
        report["compile"] = chosen.compile.facts["report"]
    files.append(_report("report.json", report, store))
    return files


def _role(name: str, artifact: str) -> str:
    if name == artifact or name.startswith(artifact + "."):
        return "artifact"
    if name.startswith("lib"):
        return "runtime-library"
    if name.endswith((".log", ".txt")):
        return "log"
    return "report" if name.endswith(".json") else "runner"


def _file(name: str, role: str, blob: Blob, store: Store) -> BundleFile:
    media_type = next((kind for end, kind in _MEDIA_TYPES.items() if name.endswith(end)), "application/octet-stream")
    return BundleFile(
        name=name,
        role=role,
        media_type=media_type,
        path=store.blob_path(blob.digest),
        digest=blob.digest,
        size=blob.size,
    )


def _report(name: str, report: Mapping[str, Any], store: Store) -> BundleFile:
    with store.workdir() as folder:
        path = folder / name
        path.write_bytes(canonical_json(report))
        blob = store.add(path)
    return _file(name, "report", blob, store)


def _about(recipe: Recipe, built: Built) -> dict[str, Any]:
    """What holds for the whole bundle: serving facts for schedulers, and where it comes from."""
    intake = built.plan.intake
    facts = intake.facts
    return {
        "modelforge": __version__,
        "recipe": {"digest": digest_file(recipe.path).digest},
        "model": {
            "digest": intake.model.digests[recipe.model.name],
            "producer": facts.producer,
            "opsets": dict(facts.opsets),
        },
        "inputs": [_tensor(tensor.name, tensor.dtype, intake.inputs[tensor.name]) for tensor in facts.inputs],
        "outputs": [_tensor(tensor.name, tensor.dtype, tensor.shape) for tensor in facts.outputs],
        "dims": {symbol: dim.facts() for symbol, dim in recipe.dims.items()},
        "serving": recipe.serving.model_dump(mode="json"),
        "accuracy": {} if recipe.accuracy is None else recipe.accuracy.model_dump(mode="json", exclude={"data"}),
    }


def _tensor(name: str, dtype: str, shape: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": None if shape is None else list(shape)}
