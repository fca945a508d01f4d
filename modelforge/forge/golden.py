"""Runs the golden samples of a bundle's variants again, on what this machine has. Integrity is checked before."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelforge.bundle.read import Bundle, Variant, export_files
from modelforge.bundle.record import VariantRecord
from modelforge.compilers import compiler_names, get_compiler
from modelforge.compilers.protocol import Compiler, Ran, RunJob, Toolchain
from modelforge.errors import ModelForgeError, UnsupportedError
from modelforge.target import Registry, Target, parse_target
from modelforge.toolchains import worker

TIMEOUT = 600.0


@dataclass(frozen=True)
class GoldenResult:
    """What the golden samples of one variant gave.

    Attributes:
        outcome: ``passed``, ``failed``, or ``not run`` with the reason.
        figures: accuracy figures on the golden samples, where they ran.
    """

    target: str
    stage: str
    outcome: str
    evidence: str
    reason: str
    figures: dict[str, Any]


def check_golden(bundle: Bundle, variant: Variant) -> GoldenResult:
    """Run one variant's golden samples here, the best way there is. Call after ``verify_integrity``."""
    record = variant.record
    tag = record.target

    def not_run(reason: str) -> GoldenResult:
        return GoldenResult(tag, record.stage, "not run", "none", reason, {})

    if record.status != "compiled" or record.artifact is None or record.compiler is None or record.precision is None:
        return not_run(f"it is {record.status}")
    if record.compiler not in compiler_names():
        return not_run(f'this ModelForge has no "{record.compiler}"')
    compiler = get_compiler(record.compiler)
    target = running_target(bundle, record)
    found = compiler.probe(target)
    if not isinstance(found, Toolchain):
        return not_run(f"{found.reason}; {found.fix}")
    evidence = compiler.runner(target)
    if evidence is None:
        return not_run(compiler.runner_hint(target) or "it cannot run on this machine")
    workdir = Path(tempfile.mkdtemp(prefix="modelforge-verify-"))
    try:
        outputs = workdir / "outputs.npz"
        files = export_files(bundle, variant, workdir / "files")
        ran = run_artifact(compiler, target, record.artifact.file, files, files["golden-inputs.npz"], outputs, workdir)
        lowered = lowered_models(variant, files)
        figures = compare_golden(files["golden-outputs.npz"], outputs, record.precision, lowered, workdir, tag)
    except UnsupportedError as error:
        return not_run(error.what)
    except ModelForgeError as error:
        return GoldenResult(tag, record.stage, "failed", evidence, str(error), {})
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    outcome = "failed" if figures["reasons"] else "passed"
    return GoldenResult(tag, record.stage, outcome, ran.evidence, "; ".join(figures["reasons"]), figures)


def running_target(bundle: Bundle, record: VariantRecord) -> Target:
    """What runs a variant: its target, or the CPU beside the NPU for the part that the NPU left.

    By the profiles that the bundle carries, which may be the recipe's own; else by those of this ModelForge.
    """
    carried = bundle.about.get("profiles", {})

    def profile(tag: str) -> Target:
        if isinstance(carried.get(tag), str):
            return parse_target(carried[tag], Path(f"{tag}.toml"))
        return Registry().get(tag, where=str(bundle.path))

    target = profile(record.target)
    if record.compiler in target.compilers or target.host is None:
        return target
    return replace(profile(target.host), tag=target.tag)


def run_artifact(
    compiler: Compiler, target: Target, artifact: str, files: Mapping[str, Path], inputs: Path, outputs: Path,
    workdir: Path,
) -> Ran:  # fmt: skip
    """Run a variant's artifact on golden samples, one at a time: any variant takes single ones, or pads them."""
    (workdir / "run").mkdir()
    job = RunJob(
        files=files,
        artifact=artifact,
        target=target,
        inputs=inputs,
        batch=1,
        outputs=outputs,
        workdir=workdir / "run",
        timeout=TIMEOUT,
    )
    return compiler.run(job)


def lowered_models(variant: Variant, files: Mapping[str, Path]) -> list[Path]:
    """The variant's lowered model: its graph says which channels of an output mean different things."""
    known = variant.files.get("model.onnx")
    return [files["model.onnx"]] if known is not None and known.role == "lowered-model" else []


def compare_golden(
    reference: Path, value: Path, precision: str, models: Sequence[Path], workdir: Path, what: str
) -> dict[str, Any]:
    """Figures of outputs beside the golden ones; ``reasons`` is empty where they are as near as they must be.

    Outputs are judged by channel group, too, as the gate does: ``models`` are the lowered ones that give them.
    """
    request = {
        "reference": str(reference),
        "value": str(value),
        "precision": precision,
        "models": [str(model) for model in models],
    }
    return worker.call(
        "modelforge.forge.worker:compare_golden", request, workdir=workdir / "judge", timeout=TIMEOUT,
        what=f"comparing the golden samples of {what}",
    )  # fmt: skip
