"""The whole way: plan, run, package. What the `build` command calls, and what another program would call."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.bundle.layout import write_bundle
from modelforge.bundle.read import open_bundle
from modelforge.errors import AccuracyError, BuildError, InputError, ModelForgeError, ToolchainMissing
from modelforge.forge.efficiency import Measurement, record_measurement
from modelforge.forge.ladder import VariantResult, missed
from modelforge.forge.package import bundle_content, variant_record
from modelforge.forge.plan import make_plan
from modelforge.forge.run import Built, Reporter, run_plan
from modelforge.store import Store


@dataclass(frozen=True)
class Outcome:
    """What a build gives.

    Attributes:
        document: what ``inspect --json`` prints of the bundle; without a bundle, ``digest`` and ``path`` are None.
        path: the bundle; None where a required target failed, as such a release must not be picked up by anyone.
        seconds: by (target, stage), what its own steps took when they ran.
        error: why the build as a whole did not succeed.
    """

    document: Mapping[str, Any]
    path: Path | None
    digest: str | None
    unchanged: bool
    seconds: Mapping[tuple[str, str], float]
    notes: tuple[str, ...]
    error: ModelForgeError | None


def build(
    recipe: Path,
    *,
    output: Path,
    reporter: Reporter,
    tags: Sequence[str] = (),
    jobs: int = 1,
    force: bool = False,
    allow_deferred: bool = False,
    store: Store | None = None,
) -> Outcome:
    """Build a bundle.

    Raises:
        InputError, ToolchainMissing: at plan time, before anything is written.
        ModelForgeError: where what all targets share fails. A target's own failure is in ``Outcome.error``.
    """
    store = store or Store()
    plan = make_plan(recipe, tags=tags, allow_deferred=allow_deferred)
    destination = output / f"{plan.recipe.name}-{plan.recipe.version}"
    _check_output(output)
    built = run_plan(plan, store, reporter, jobs=jobs)
    seconds = {(result.plan.target.tag, result.plan.stage): result.seconds for result in built.variants}
    notes = tuple(_hint(result) for result in built.variants if _hint(result)) + tuple(_descents(built.variants))
    error = _error(built.variants, allow_deferred, store) or _chain_error(built)
    if error is not None:
        records = [variant_record(result, built).to_json() for result in built.variants]
        document = {
            "name": plan.recipe.name, "version": plan.recipe.version, "digest": None, "path": None, "variants": records,
            "error": _fault(error),
        }  # fmt: skip
        error.reported = True
        return Outcome(document, None, None, False, seconds, notes, error)
    _remember(built, store)
    written = write_bundle(destination, bundle_content(built, store), force=force)
    summary = open_bundle(destination).summary()
    return Outcome(summary, destination, written.digest, written.unchanged, seconds, notes, None)


def _remember(built: Built, store: Store) -> None:
    """Keep what was measured on devices: it corrects the estimates of `plan --matrix` on this machine."""
    for result in built.variants:
        chosen = result.chosen
        if chosen is None or chosen.estimate is None or chosen.plan.evidence != "device":
            continue
        measured, estimated = chosen.verify.facts["latency"].get("by_batch", {}), chosen.estimate.facts["by_batch"]
        for size in sorted(measured.keys() & estimated.keys(), key=int):
            measurement = Measurement(
                target=result.plan.target.tag,
                compiler=result.plan.compiler or "",
                precision=chosen.plan.precision,
                model=f"{built.plan.recipe.name}/{result.plan.stage}",
                batch=int(size),
                estimated=estimated[size] / 1e3,
                measured=measured[size] / 1e3,
            )
            record_measurement(measurement, evidence="device", home=store.home)


def _check_output(output: Path) -> None:
    """Tell before an hour of compiling that the bundle could not be written after it."""
    folder = output
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError("this is a file, not a folder", where=str(folder), fix="give another folder with -o")
    if not os.access(folder, os.W_OK | os.X_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise InputError("the output folder cannot be written", where=str(folder), fix="give another folder with -o")
    if shutil.disk_usage(folder).free < 1 << 16:
        raise InputError("the disk of the output folder is full", where=str(folder), fix="free some space, or use -o")


def _error(variants: Sequence[VariantResult], allow_deferred: bool, store: Store) -> ModelForgeError | None:
    """Why the build is no success. A required target that was skipped, deferred or failed never passes for one."""
    for result in (each for each in variants if each.plan.required):
        tag = result.plan.target.tag
        if result.status == "failed" and result.gate_failed:
            rungs = "; ".join(
                f"{entry['precision']}: {entry['reason']}" for entry in result.ladder if "reason" in entry
            )
            return AccuracyError(
                f"the accuracy gate was not met at any rung; {rungs}{_worst_layers(result, store)}",
                where=f"target {tag}",
                fix="add a higher precision to its ladder, or change [accuracy] knowingly; no bundle was written",
            )
        if result.status == "failed":
            error = result.error or BuildError("it failed", where=f"target {tag}")
            return type(error)(
                error.what, where=f"target {tag}" + (f": {error.where}" if error.where else ""), fix=error.fix
            )
        if result.status == "skipped" or (result.status == "deferred" and not allow_deferred):
            return ToolchainMissing(result.plan.reason, where=f"target {tag}", fix="`modelforge doctor` tells more")
    return None


def _chain_error(built: Built) -> ModelForgeError | None:
    """Stages that each meet their gate do not make a chain that does."""
    for chain in built.chains:
        members = [built.variants[place] for place in chain.plan.members]
        if chain.passed or not all(each.plan.required for each in members):
            continue
        where = f"chain {built.plan.title(chain.plan)}"
        if chain.record is not None:
            rungs = ", ".join(f"{each.plan.stage} {each.chosen.plan.precision}" for each in members if each.chosen)
            return AccuracyError(
                f"the stages one after the other do not meet the gate at any rung; {_left(members)}"
                f"{rungs}: {missed(chain.record.facts)}",
                where=where,
                fix="add a higher precision to a stage's ladder, or cross at fp32 (split.transport)",
            )
        if chain.error is not None:
            return type(chain.error)(chain.error.what, where=where, fix=chain.error.fix)
    return None


def _left(members: Sequence[VariantResult]) -> str:
    """The rungs that were left on the way down, with the reasons."""
    return "".join(
        f"{each.plan.stage} {entry['precision']}: {entry['reason']}; "
        for each in members
        for entry in each.ladder
        if "reason" in entry
    )


def _worst_layers(result: VariantResult, store: Store) -> str:
    """The layers that lose most by INT8, where a rung had it."""
    for tried in result.tried:
        ranking = tried.plan.lower.needs.get("ranking")
        record = store.read(ranking.key) if ranking else None
        if record is not None:
            worst = ", ".join(f"{layer['node']} ({layer['sqnr_db']:.1f} dB)" for layer in record.facts["ranking"][:3])
            return f"; the layers that lose most: {worst}"
    return ""


def _hint(result: VariantResult) -> str:
    """How to raise the evidence, where the artifact itself was not run."""
    lower = result.chosen is not None and result.chosen.verify.facts["evidence"] == "reference"
    return f"{result.plan.target.tag} was not run here; {result.plan.hint}" if lower and result.plan.hint else ""


def _descents(variants: Sequence[VariantResult]) -> Iterator[str]:
    """The rungs that met their own gate, and that a chain did not meet its gate with."""
    for result in variants:
        for rung in result.tried:
            if rung.left is not None:
                yield f"{result.plan.stage}: {rung.plan.precision} was left, {rung.left.reason}"


def _fault(error: ModelForgeError) -> dict[str, Any]:
    return {
        "type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix,
        "exit_code": error.exit_code,
    }  # fmt: skip
