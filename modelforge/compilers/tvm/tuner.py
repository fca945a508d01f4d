"""Tunes for one target: asks the store for what was measured before, else has it measured. The parent's side.

What is measured depends on the kernels, their sizes and the machine, not on the weights: a model that was trained again
finds its database in the store.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from modelforge.compilers.protocol import CompileJob, Refusal, Tuned
from modelforge.compilers.tvm import archive, database, devices
from modelforge.compilers.tvm.database import Database
from modelforge.compilers.tvm.journal import Journal
from modelforge.errors import BuildError, InputError
from modelforge.options import Options
from modelforge.store import StepRecord, Store, canonical_json
from modelforge.target import CpuArchitecture, Target
from modelforge.toolchains import host, worker

_SEARCH: Final = 1
"""Raised whenever the search itself would find something else."""
_MOST_CRASHES: Final = 10
"""Each costs a new process, and a minute where the candidate hangs."""


def refusals(target: Target, options: Options) -> list[Refusal]:
    """Why this target cannot be tuned so, as far as it is known without asking a device."""
    if not options.get("trials"):
        return []
    if name := options.get("device"):
        try:
            devices.get(str(name))
        except InputError as error:
            return [Refusal("tune-device", f"[target.tune]: {error.what}", error.fix or "")]
        return []
    reason = host.why_not(target.arch) if isinstance(target.arch, CpuArchitecture) else "it is no CPU"
    if reason is None:
        return []
    return [
        Refusal(
            "tune-place",
            f"tuning measures on the target, and code for {target.tag} does not run here: {reason}",
            'name a device: [target.tune] device = "NAME" (`modelforge devices add NAME HOST:PORT KEY`)',
        )
    ]


def place(options: Options) -> str:
    """On what is measured: the device's name, or this machine's CPU. Part of what a database is found again by."""
    return str(options.get("device") or host.cpu_name())


def tune(job: CompileJob, request: Mapping[str, Any], rules: str, store: Store) -> Tuned:
    """Tune one lowered model.

    Args:
        request: what :func:`.worker.compile_model` gets.
        rules: version of the rules, and of TVM.

    Raises:
        InputError: the imported database is none, or was made for another machine.
        BuildError: no device, a dead or lying one, or nothing was measured.
    """
    options = job.options
    imported = _imported(options, request["machine"])
    trials = int(options.get("trials", 0))
    if not trials:
        if imported is None:
            raise InputError("there are neither trials nor a database", where="[target.tune]", fix="give one")
        return _tuned(imported, job.workdir, "taken as it was given, not measured again")
    surveyed = _call("survey", request, job, "looking for what can be tuned")
    key = _key(surveyed["kernels"], request, options, rules, imported)
    # One at a time on one device: a second session waits at its door, and two on one machine measure each other.
    with store.lock(f"tuning-{hashlib.sha256(place(options).encode()).hexdigest()[:16]}"):
        if (kept := store.read(key)) is not None:
            store.touch(key)
            found = database.read(store.blob_path(kept.files[database.FILE].digest))
            return _tuned(found, job.workdir, "measured before")
        begun = time.monotonic()
        found = _measure(job, request, rules, trials, imported)
        tuned = _tuned(found, job.workdir, "")
        files = {database.FILE: store.add(tuned.database)}
        store.write(StepRecord(key, archive.STEP, round(time.monotonic() - begun, 3), {"device": found.device}, files))
    return tuned


def _measure(
    job: CompileJob, request: Mapping[str, Any], rules: str, trials: int, imported: Database | None
) -> Database:
    arch = job.target.arch
    assert isinstance(arch, CpuArchitecture)
    name = place(job.options)
    where: dict[str, Any] = {"name": name}
    if job.options.get("device"):
        found = devices.get(name)
        where |= {"host": found.host, "port": found.port, "key": found.key}
    asked = {
        **request,
        "trials": trials,
        "device": where,
        "isa": arch.isa,
        "choices": imported.choices if imported else {},
        "journal": str(job.workdir / "trials.jsonl"),
    }
    threads = {"TVM_NUM_THREADS": str(min(arch.cores, host.this_host().cores))}
    answer = _until_none_crashes(asked, job, f"tuning for {job.target.tag} on {name}", threads)
    return Database(rules=rules, machine=request["machine"], device=name, trials=trials, **answer)


def _until_none_crashes(asked: Mapping[str, Any], job: CompileJob, what: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Search in a child process; where a candidate ended it, in another one that leaves that candidate out.

    Raises:
        BuildError: what ended it was no candidate, or there were too many such, or the time is over.
    """
    journal = Journal(Path(asked["journal"]))
    end = time.monotonic() + job.timeout
    for crashes in range(_MOST_CRASHES + 1):
        left = replace(job, workdir=job.workdir / f"search-{crashes}", timeout=end - time.monotonic())
        try:
            return _call("tune", asked, left, what, env)
        except BuildError as error:
            candidate = journal.unfinished()
            if candidate is None or time.monotonic() >= end:
                raise
            journal.close_as_crashed(candidate, f"{candidate.label} for {candidate.key}: {error.what}")
            last = error
    raise BuildError(
        f"{what}: {_MOST_CRASHES + 1} candidates crashed, the search was given up; the last: {last.what}", fix=last.fix
    )


def _call(
    function: str, request: Mapping[str, Any], job: CompileJob, what: str, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    folder = job.workdir / function
    own = {**request, "folder": str(folder / "tvm")}
    return worker.call(
        f"modelforge.compilers.tvm.tuning:{function}", own, workdir=folder, timeout=job.timeout, what=what, env=env
    )


def _imported(options: Options, machine: Mapping[str, Any]) -> Database | None:
    path = options.get("database")
    if path is None:
        return None
    found = database.read(Path(str(path)))
    database.check(found, machine, Path(str(path)).name)
    return found


def _key(kernels: Any, request: Mapping[str, Any], options: Options, rules: str, imported: Database | None) -> str:
    """Digest of all that a search depends on but the clock."""
    facts = {
        "search": _SEARCH,
        "rules": rules,
        "kernels": kernels,
        "machine": request["machine"],
        "place": place(options),
        "trials": options["trials"],
        "imported": imported.choices if imported else {},
    }
    return hashlib.sha256(canonical_json({"tuning": facts})).hexdigest()


def _tuned(found: Database, folder: Path, how: str) -> Tuned:
    path = folder / database.FILE
    path.write_bytes(found.to_json())
    sentence = found.sentence() + (f"; {how}" if how else "")
    return Tuned(path, {"sentence": sentence, "kept": found.kept, "choices": len(found.choices)})


def given(options: Options) -> Database | None:
    """The database that a compile step has, from the tuning step before it."""
    path = options.get("tuning")
    return None if path is None else database.read(Path(str(path)))


def files(options: Options) -> dict[str, Path]:
    """What of a tuning goes into the variant: the database, so that another build can import it."""
    path = options.get("tuning")
    return {} if path is None else {database.FILE: Path(str(path))}


def notes(found: Database | None, applied: list[str]) -> tuple[str, ...]:
    """What the variant record says of its tuning."""
    if found is None:
        return ()
    lost = len(found.choices) - len(applied)
    told = f"; {lost} of its choices are unknown to these rules or this model, and left out" if lost else ""
    return (found.sentence() + told,)
