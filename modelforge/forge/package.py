"""From what the steps left behind to the content of a bundle: variant records and files. No time, no path of here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelforge import __version__
from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent
from modelforge.bundle.record import VariantRecord
from modelforge.forge.delegation import planned_delegation, together
from modelforge.forge.ladder import RungResult, VariantResult, chain_figures
from modelforge.forge.partition import CPU_COMPILER
from modelforge.forge.plan import VariantPlan
from modelforge.forge.run import Built
from modelforge.forge.split_stages import Split
from modelforge.graph.facts import TensorFacts
from modelforge.recipe import Recipe
from modelforge.store import Blob, Store, canonical_json, digest_file
from modelforge.target import Registry

_MEDIA_TYPES = {".onnx": "application/vnd.onnx", ".npz": "application/x-npz", ".json": "application/json"}
JOB_FILE = "job.json"
"""In a deferred variant: all that `modelforge finalize` needs beside the lowered models. docs/bundle-format.md."""


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
        "batch": _batch(built, plan.stage),
    }
    if chosen is None:
        return VariantRecord.model_validate({**data, "notes": tuple(notes)})
    data["accuracy"] = _accuracy(chosen)
    race = chosen.race.facts if chosen.race else {}
    data["latency"] = _latency(chosen, race)
    if chosen.slower:
        notes.append(chosen.slower)
    if chosen.untuned_because:
        notes.append(f"not tuned: {chosen.untuned_because}")
    if chosen.describe is not None or (chosen.plan.compile and "calibration" in chosen.plan.compile.needs):
        data["calibration"] = dict(built.plan.intake.calibration_facts)
    data["delegation"] = _delegation(result, built)
    if chosen.compile is not None:
        facts = chosen.compile.facts
        blob = chosen.compile.files[facts["artifact"]]
        data["artifact"] = {"file": facts["artifact"], "digest": blob.digest, "size": blob.size}
        data["runtime"] = {"requires": facts["requires"]} | ({"needs": facts["needs"]} if facts["needs"] else {})
        data["commands"] = tuple(tuple(command) for command in facts["commands"])
        notes = [*facts["notes"], *notes]
        if chosen.verify.facts["evidence"] == "reference" and not chosen.verify.facts.get("own"):
            notes.append("the artifact itself was not run: its lowered model was, in ONNX Runtime")
    notes += chosen.verify.facts["notes"]
    if suspicion := chosen.verify.facts["accuracy"].get("suspicion"):
        notes.append(suspicion)
    return VariantRecord.model_validate({**data, "notes": tuple(dict.fromkeys(notes))})


def _delegation(result: VariantResult, built: Built) -> dict[str, Any] | None:
    """What the compiler told of NPU and CPU; of the CPU's stage in a partition, what the plan knows."""
    chosen = result.chosen
    if chosen is None or chosen.compile is None:
        return None
    told = chosen.compile.facts["report"].get("delegation")
    if told is None and result.plan.compiler == CPU_COMPILER and result.plan.target.tag in built.plan.partitions:
        told = planned_delegation(built.plan, result.plan)
    return None if told is None else {**told, "off_npu": tuple(told["off_npu"])}


def bundle_content(built: Built, store: Store) -> BundleContent:
    """All that goes into the bundle."""
    recipe = built.plan.recipe
    variants = [
        VariantContent(variant_record(result, built), tuple(_files(result, built, store))) for result in built.variants
    ]
    return BundleContent(
        name=recipe.name, version=recipe.version, about=_about(recipe, built), variants=tuple(variants)
    )


def _batch(built: Built, stage: str) -> dict[str, Any] | None:
    """The bounds of the first dimension; None where it is fixed."""
    firsts = {shape[0] for shape in built.plan.stage(stage).inputs.values() if shape}
    symbols = sorted(first for first in firsts if isinstance(first, str))
    if not symbols:
        return None
    dim = built.plan.recipe.dims[symbols[0]]
    return {"values": dim.values} if dim.values else {"min": dim.min, "opt": dim.opt, "max": dim.max}


def _latency(chosen: RungResult, race: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on a device, and beside it what a model of the device says."""
    measured = chosen.verify.facts["latency"]
    evidence = chosen.verify.facts["evidence"] if measured else "none"
    estimate = chosen.estimate.facts if chosen.estimate else {"by_batch": {}}
    return {
        "evidence": evidence,
        **measured,
        **race,
        **({"estimate": dict(estimate)} if estimate["by_batch"] else {}),
    }


_OUTPUT_FIGURES = ("output", "group", "sqnr_db", "identical", "cosine", "agreement")


def _accuracy(chosen: RungResult) -> dict[str, Any]:
    facts = dict(chosen.verify.facts["accuracy"])
    facts.pop("reasons")
    facts.pop("suspicion")
    per_output = tuple(
        {key: value for key, value in row.items() if key in _OUTPUT_FIGURES} for row in facts.pop("per_output")
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
            files.append(_file(name, file_role(name, artifact), blob, store))
    for name, blob in chosen.lower.files.items():
        files.append(_file(name, "lowered-model", blob, store))
    if result.status == "deferred":
        files += _job(result, built, store)
    for name, blob in built.baseline[result.plan.stage].files.items():
        files.append(_file(name, "golden", blob, store))
    for name, blob in (chosen.describe.files if chosen.describe else {}).items():
        files.append(_file(name, "report", blob, store))
    for name, blob in chosen.verify.files.items():
        files.append(_file(name, "report", blob, store))
    accuracy = {"schema": 1, **chosen.verify.facts["accuracy"], "ladder": [dict(entry) for entry in result.ladder]}
    files.append(_report("accuracy.json", accuracy, store))
    report = {"schema": 1, "prepare": built.prepare[result.plan.stage].facts, "lower": chosen.lower.facts}
    if chosen.compile is not None:
        report["compile"] = chosen.compile.facts["report"]
    files.append(_report("report.json", report, store))
    return files


def _job(result: VariantResult, built: Built, store: Store) -> list[BundleFile]:
    """What `finalize` needs on the device: job.json, and the lowered models of the rungs below the first."""
    rungs, files = [], []
    for rung in (each for each in result.tried if each.passed):
        prefix = "" if rung is result.chosen else f"{rung.plan.precision}-"
        rungs.append(
            {
                "precision": rung.plan.precision,
                "files": {name: prefix + name for name in rung.lower.files},
                "accuracy": _accuracy(rung),
            }
        )
        if prefix:
            for name, blob in rung.lower.files.items():
                files.append(_file(prefix + name, "lowered-model", blob, store))
    plan = result.plan
    aids = {option: bundle_file(option.replace("_", "-"), "job", path) for option, path in plan.aids.items()}
    job = {
        "schema": 1,
        "compiler": plan.compiler,
        "target": plan.target.path.read_text(encoding="utf-8"),
        **plan.job,
        "rungs": rungs,
    }
    if aids:
        job["aids"] = {option: {"file": each.name, "digest": each.digest} for option, each in aids.items()}
    return [*files, *aids.values(), _report(JOB_FILE, job, store, role="job")]


def file_role(name: str, artifact: str) -> str:
    """What a file of a compiler's answer is for."""
    if name == artifact:
        return "artifact"
    if name.startswith(artifact + ".") or _is_gear(name, artifact):
        return "artifact-data"
    if name.startswith("lib"):
        return "runtime-library"
    if name.endswith(".cache"):
        return "job"
    if name.endswith((".log", ".txt")):
        return "log"
    return "report" if name.endswith(".json") else "runner"


def _is_gear(name: str, artifact: str) -> bool:
    """``main_b4.rknn`` beside ``main_b1.rknn``: the same for another batch."""
    stem, _, ending = artifact.partition(".")
    return stem.startswith("main_b") and name.startswith("main_b") and name.endswith("." + ending)


def bundle_file(name: str, role: str, path: Path, blob: Blob | None = None) -> BundleFile:
    """A file for a bundle; ``blob`` is what it is known to be, else it is read."""
    media_type = next((kind for end, kind in _MEDIA_TYPES.items() if name.endswith(end)), "application/octet-stream")
    blob = blob or digest_file(path)
    return BundleFile(name=name, role=role, media_type=media_type, path=path, digest=blob.digest, size=blob.size)


def _file(name: str, role: str, blob: Blob, store: Store) -> BundleFile:
    return bundle_file(name, role, store.blob_path(blob.digest), blob)


def _report(name: str, report: Mapping[str, Any], store: Store, role: str = "report") -> BundleFile:
    with store.workdir() as folder:
        path = folder / name
        path.write_bytes(canonical_json(report))
        blob = store.add(path)
    return _file(name, role, blob, store)


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
        "outputs": [_tensor(tensor.name, tensor.dtype, tensor.shape) for tensor in _outputs(built)],
        "targets": {
            _profile_name(variant): {
                "title": variant.target.title,
                "tier": variant.target.tier,
                "arch": variant.target.arch.model_dump(mode="json", exclude_none=True),
            }
            for variant in built.plan.variants
        },
        "profiles": _profiles(built),
        **({"placement": dict(built.placement.facts)} if built.placement else {}),
        "dims": {symbol: dim.facts() for symbol, dim in recipe.dims.items()},
        **_preprocess(recipe),
        **_split(built),
        "serving": recipe.serving.model_dump(mode="json"),
        "accuracy": {} if recipe.accuracy is None else recipe.accuracy.model_dump(mode="json", exclude={"data"}),
    }


def _profile_name(variant: VariantPlan) -> str:
    """The tag; with the stage where that is for the CPU beside the tag's NPU, and so has another profile."""
    tag = variant.target.tag
    return tag if variant.target.path.stem == tag else f"{tag}/{variant.stage}"


def _profiles(built: Built) -> dict[str, str]:
    """The text of each target's profile, and of the CPU beside it: the recipe may have its own."""
    registry = Registry([built.plan.recipe.folder / "targets"])
    tags = {variant.target.tag for variant in built.plan.variants}
    tags |= {target.host for target in map(registry.get, sorted(tags)) if target.host is not None}
    return {tag: registry.get(tag).path.read_text(encoding="utf-8") for tag in sorted(tags)}


def _split(built: Built) -> dict[str, Any]:
    """The stages in order, how tensors cross between them, and what the chains of variants gave."""
    plan = built.plan
    found: dict[str, Any] = {}
    if plan.split is not None:
        found |= {"stages": _stages(plan.split), "split": _split_facts(built, plan.split)}
    if plan.partitions:
        found["partitions"] = {tag: _split_facts(built, split) for tag, split in sorted(plan.partitions.items())}
        found["stages"] = [stage for split in plan.partitions.values() for stage in _stages(split)]
    return found


def _split_facts(built: Built, split: Split) -> dict[str, Any]:
    ran = [chain.record.facts for chain in built.chains if chain.record is not None and chain.plan.split is split]
    crossing = next((dict(facts["transport"]) for facts in ran), {})
    return {**split.facts(), **split.choices(), "transport": crossing, "chains": chain_facts(built, split)}


def _stages(split: Split) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "inputs": [_tensor(each.name, each.dtype, each.shape) for each in stage.inputs],
            "outputs": [_tensor(each.name, each.dtype, each.shape) for each in stage.outputs],
        }
        for stage in split.plan.stages
    ]


def _outputs(built: Built) -> tuple[TensorFacts, ...]:
    """The outputs with the batch by its name, as the recipe's input shapes give it."""
    from modelforge.graph.inspect import inspect_model

    intake = built.plan.intake
    return inspect_model(intake.recipe.model, shapes=intake.inputs, cost=False).outputs


def chain_facts(built: Built, split: Split) -> list[dict[str, Any]]:
    """What each chain of variants gave, judged as the whole model."""
    found: list[dict[str, Any]] = []
    for chain in (each for each in built.chains if each.plan.split is split):
        members = [built.plan.variants[place] for place in chain.plan.members]
        row: dict[str, Any] = {"stages": [{"stage": each.stage, "target": each.target.tag} for each in members]}
        shared = together([_delegation(built.variants[place], built) for place in chain.plan.members])
        row |= {} if shared is None else {"delegation": shared}
        if chain.record is None:
            row["reason"] = chain.error.what if chain.error else "a variant of it is missing"
        else:
            facts = chain.record.facts
            row["accuracy"] = chain_figures(facts["accuracy"])
            row |= {"lowered": chain_figures(facts["lowered"])} if "lowered" in facts else {}
            for stage in row["stages"]:
                stage["evidence"] = facts["evidence"][stage["stage"]]
        found.append(row)
    return found


def _preprocess(recipe: Recipe) -> dict[str, Any]:
    given = {name: each.model_dump(mode="json") for name, each in sorted(recipe.preprocess.items())}
    return {"preprocess": given} if given else {}


def _tensor(name: str, dtype: str, shape: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": None if shape is None else list(shape)}
