"""Runs the golden samples of a split model through its stages, each variant as well as it can run on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelforge.bundle.read import Bundle, Variant, export_files
from modelforge.compilers import compiler_names, get_compiler
from modelforge.compilers.protocol import Toolchain
from modelforge.errors import InputError, ModelForgeError, UnsupportedError
from modelforge.forge.golden import TIMEOUT, compare_golden, lowered_models, run_artifact, running_target
from modelforge.toolchains import worker

_COARSEST = ("int8", "mixed", "fp16", "fp32")


@dataclass(frozen=True)
class ChainResult:
    """What the golden samples gave, having gone through one variant of each stage.

    Attributes:
        stages: by stage: the target, and the evidence; ``reference`` where its lowered model stood in for it.
        outcome: ``passed``, ``failed``, or ``not run`` with the reason.
    """

    stages: tuple[Mapping[str, str], ...]
    outcome: str
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def check_chains(bundle: Bundle) -> list[ChainResult]:
    """Run every chain that the bundle names. Call after ``verify_integrity``.

    Raises:
        InputError: the bundle holds no split model.
    """
    splits = [*bundle.about.get("partitions", {}).values()]
    if "split" in bundle.about:
        splits.append(bundle.about["split"])
    if not splits:
        raise InputError("the model is not split: it has no chain", where=str(bundle.path), fix="leave out --chain")
    return [_check(bundle, split, chain) for split in splits for chain in split["chains"]]


def _check(bundle: Bundle, split: Mapping[str, Any], chain: Mapping[str, Any]) -> ChainResult:
    ran: list[dict[str, str]] = []
    workdir = Path(tempfile.mkdtemp(prefix="modelforge-chain-"))
    try:
        outputs: dict[str, Path] = {}
        golden: dict[str, Path] = {}
        precisions = set()
        lowered: list[Path] = []
        by_name = {stage["name"]: stage for stage in split["stages"]}
        for member in chain["stages"]:
            name, tag = member["stage"], member["target"]
            (variant,) = bundle.select(tag, name)[:1]
            folder = workdir / name
            files = export_files(bundle, variant, folder / "files")
            tensors = {tensor["name"]: tensor["from"] for tensor in by_name[name]["inputs"]}
            inputs = folder / "inputs.npz"
            archives = {**outputs, "input": files["golden-inputs.npz"]}
            _gather(archives, tensors, split["transport"], inputs, folder)
            outputs[name], golden[name] = folder / "outputs.npz", files["golden-outputs.npz"]
            evidence = _run(bundle, variant, files, inputs, outputs[name], folder)
            ran.append({"stage": name, "target": tag, "evidence": evidence})
            precisions.add(variant.record.precision)
            lowered += lowered_models(variant, files)
        wanted = {output["name"]: output["from"] for output in split["outputs"]}
        _gather(outputs, wanted, {}, workdir / "value.npz", workdir)
        _gather(golden, wanted, {}, workdir / "reference.npz", workdir)
        coarsest = next(each for each in _COARSEST if each in precisions)
        value = workdir / "value.npz"
        figures = compare_golden(workdir / "reference.npz", value, coarsest, lowered, workdir, "the chain")
    except UnsupportedError as error:
        planned = ({"stage": each["stage"], "target": each["target"], "evidence": "none"} for each in chain["stages"])
        return ChainResult(tuple(planned), "not run", error.what)
    except ModelForgeError as error:
        return ChainResult(tuple(ran), "failed", str(error))
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    outcome = "failed" if figures["reasons"] else "passed"
    return ChainResult(tuple(ran), outcome, "; ".join(figures["reasons"]), figures)


def _gather(
    archives: Mapping[str, Path], tensors: Mapping[str, str], transport: Mapping[str, Any], out: Path, folder: Path
) -> None:
    request = {
        "archives": {name: str(path) for name, path in archives.items()},
        "tensors": dict(tensors),
        "labels": False,
        "transport": {name: transport[name] for name in tensors if name in transport},
        "out": str(out),
    }
    worker.call(
        "modelforge.forge.worker:feed", request, workdir=folder / "gather", timeout=TIMEOUT,
        what="handing tensors from stage to stage",
    )  # fmt: skip


def _run(bundle: Bundle, variant: Variant, files: Mapping[str, Path], inputs: Path, outputs: Path, folder: Path) -> str:
    """Run one stage: its artifact where it can run here, else its lowered model in ONNX Runtime; gives the evidence."""
    record = variant.record
    target = running_target(bundle, record)
    if record.artifact is not None and record.compiler in compiler_names():
        compiler = get_compiler(record.compiler or "")
        if isinstance(compiler.probe(target), Toolchain) and compiler.runner(target) is not None:
            return run_artifact(compiler, target, record.artifact.file, files, inputs, outputs, folder).evidence
    model = files["model.onnx"]
    asked = {"model": str(model), "folder": str(folder / "emulated")}
    emulated = worker.call(
        "modelforge.forge.worker:emulate", asked, workdir=folder / "emulate", timeout=TIMEOUT,
        what="making FP16 rounding explicit",
    )["model"]  # fmt: skip
    request = {
        "model": str(emulated or model),
        "inputs": str(inputs),
        "outputs": str(outputs),
        "batch": 1,
        "threads": 1,
    }
    worker.call(
        "modelforge.compilers.onnxruntime_worker:run_model", request, workdir=folder / "onnxruntime", timeout=TIMEOUT,
        what=f"running the stage {record.stage} in ONNX Runtime",
    )  # fmt: skip
    return "reference"
